"""How far a policy's gradient is from dense's: its bias and its variance, weight by weight.

In: a ``Plan``. Out: a ``Line`` per task, policy and weight, ``variance.csv`` and ``variance.md``. A network is first
trained densely for some steps; then, at one batch and without any update, each policy's gradient ``g_hat`` is drawn
many times beside the dense gradient ``g``:

    bias = |mean(g_hat) - g| / |g|        variance = mean |g_hat - mean(g_hat)|^2 / |g|^2

Of so many draws an unbiased estimate shows ``sqrt(variance / draws)`` as its bias, the *noise*.
"""

import copy
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from rwfx.experiments.machine import as_markdown, check_device, conditions
from rwfx.experiments.policies.contenders import DENSE, transform_options
from rwfx.experiments.policies.plan import Plan, check_plan
from rwfx.experiments.policies.run import FIRST_LR, check_folder, start_of
from rwfx.experiments.policies.runs import Run
from rwfx.experiments.policies.tasks import Task, task_of
from rwfx.experiments.tables import markdown, write_csv
from rwfx.files import replacing
from rwfx.policies import AdaptiveWalk, Magnitude, RandomWalk, Uniform
from rwfx.transform import transform

STEPS, DRAWS, WARM_UP = 200, 200, 20
"""The dense steps before, the draws, and those before them in which a policy that learns gets to know the batch."""


@dataclass(frozen=True)
class Line:
    """What the draws of one policy were like for one weight."""

    task: str
    policy: str
    unbiased: bool
    density: float
    num_paths: int | None
    """Of walks: as many as would visit that share of the widest weight's rows if they fell uniformly."""
    weight: str
    kept: float
    """The mean share of the rows drawn."""
    bias: float
    noise: float
    variance: float


def run(plan: Plan, *, progress: bool = True) -> list[Line]:
    """Measure every task and density of ``plan``, write the files into ``plan.out`` and print the table.

    Raises:
        ValueError, ImportError: something about the plan, the data or the machine will not do.
    """
    check_plan(plan)
    check_device(plan.device)
    check_folder(plan.out)
    lines: list[Line] = []
    tasks = [task_of(plan, name) for name in plan.tasks]
    total = len(tasks) * len(plan.densities) * len(estimators(0.5, 2)) * (WARM_UP + DRAWS)
    with tqdm(total=total, unit="draw", mininterval=0.5, disable=not progress) as bar:
        for task in tasks:
            bar.set_description(f"{task.name}: variance")
            lines += measure_task(plan, task, bar)
            write_csv(plan.out / "variance.csv", Line, lines)
    if not lines:
        raise ValueError("no row-sparse backward would pay in these networks: see --break-even off, or --hidden.")
    about = as_markdown({"run": f"{STEPS} dense steps, then {DRAWS} draws", **conditions(plan.device)})
    text = f"{table(lines)}\n\n{about}"
    with replacing(plan.out / "variance.md", "w") as file:
        file.write(f"# Bias and variance of the gradients\n\n{__doc__}\n{text}\n")
    print(f"\n{text}\n\nwritten: {os.fspath(plan.out)}/")
    return lines


def measure_task(plan: Plan, task: Task, bar: tqdm) -> Iterator[Line]:
    """Train the network of ``task``, and draw each policy's gradients at each density."""
    first = Run(plan, DENSE, start_of(plan, task, 0), task.split.train, STEPS, FIRST_LR, 0)
    first.take_turn(first.steps)
    network = first.network
    batch = task.split.train.inputs[: plan.batch_size], task.split.train.target[: plan.batch_size]
    dense = gradients(copy.deepcopy(network), *batch)
    widest = max(module.out_features for module in network.modules() if isinstance(module, nn.Linear))
    options = transform_options(plan, batch[0])
    for density in sorted(plan.densities):
        for policy in estimators(density, widest):
            sparse = transform(copy.deepcopy(network), rows=policy, seed=0, **options)
            for _ in range(WARM_UP):
                gradients(sparse, *batch)
            spreads = {name: Spread(dense[name]) for name in sparse.report.sparse}
            for _ in range(DRAWS):
                found = gradients(sparse, *batch)
                for name, spread in spreads.items():
                    spread.add(found[name], len(sparse.rows[name]))
            bar.update(WARM_UP + DRAWS)
            what = task.name, type(policy).__name__, policy.unbiased, density, getattr(policy, "num_paths", None)
            for name, spread in spreads.items():
                yield Line(*what, name, *spread.summary())


def estimators(density: float, widest: int) -> list[RandomWalk | Uniform | Magnitude]:
    """The policies that can be unbiased, each biased and unbiased; walks are as many as ``paths_for`` says."""
    found: list[RandomWalk | Uniform | Magnitude] = []
    for unbiased in (False, True):
        walks = {"num_paths": paths_for(density, widest), "unbiased": unbiased}
        found += [
            RandomWalk(**walks),
            AdaptiveWalk(**walks),
            Uniform(density, unbiased),
            Magnitude(density, unbiased=unbiased),
        ]
    return found


def paths_for(density: float, rows: int) -> int:
    """How many walks visit the share ``density`` of ``rows`` rows, were they to fall on them uniformly.

    n walks visit  rows * (1 - (1 - 1 / rows) ** n)
    """
    return max(1, round(math.log1p(-min(density, 1 - 1 / rows)) / math.log1p(-1 / rows)))


def gradients(network: nn.Module, inputs: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The gradients of a step's loss, by name."""
    network.train()
    network.zero_grad()
    F.cross_entropy(network(inputs), target).backward()
    return {name: of.grad.double() for name, of in network.named_parameters() if of.grad is not None}


class Spread:
    """Gathers draws of one weight's gradient beside ``dense_OI``."""

    def __init__(self, dense_OI: Tensor) -> None:
        self.dense_OI, self.sum_OI = dense_OI, torch.zeros_like(dense_OI)
        self.squares, self.kept, self.draws = 0.0, 0, 0

    def add(self, drawn_OI: Tensor, kept: int) -> None:
        """Add a draw, with so many rows kept."""
        self.sum_OI += drawn_OI
        self.squares += float(drawn_OI.square().sum())
        self.kept += kept
        self.draws += 1

    def summary(self) -> tuple[float, float, float, float]:
        """The share of the rows kept, the bias, the noise and the variance."""
        mean_OI, size = self.sum_OI / self.draws, float(self.dense_OI.square().sum())
        variance = (self.squares / self.draws - float(mean_OI.square().sum())) / size
        bias = float((mean_OI - self.dense_OI).norm()) / math.sqrt(size)
        kept = self.kept / self.draws / len(self.dense_OI)
        return kept, bias, math.sqrt(max(0.0, variance) / self.draws), variance


def table(lines: Sequence[Line]) -> str:
    """Give ``lines`` as a Markdown table."""
    header = ["task", "policy", "unbiased", "density", "walks", "weight", "rows kept", "bias", "noise", "variance"]
    cells = [
        [
            line.task,
            line.policy,
            "yes" if line.unbiased else "no",
            f"{line.density:g}",
            str(line.num_paths or ""),
            line.weight,
            f"{line.kept:.1%}",
            *(f"{value:.3g}" for value in (line.bias, line.noise, line.variance)),
        ]
        for line in lines
    ]
    return markdown(header, cells)
