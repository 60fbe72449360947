"""What it takes to choose the rows: of a step, and of nothing but the choice.

In: a ``Plan``, of which the widths, the batch and the densities count. Out: a ``Line`` per policy and density,
``overhead.csv`` and ``overhead.md``. The network is a perceptron for MNIST with ReLUs, the batch random numbers. Steps
of dense training and of every policy take turns, and so does *choosing* by itself: the sampler's draw and, for each
weight, what its backward notes of the output's gradient or chooses by it.
"""

import copy
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import rwfx.optim
from rwfx.draws import TopKSampler
from rwfx.experiments.machine import as_markdown, check_device, conditions
from rwfx.experiments.models import mlp
from rwfx.experiments.policies.contenders import POLICIES
from rwfx.experiments.policies.plan import Plan, check_plan
from rwfx.experiments.policies.run import check_folder
from rwfx.experiments.speed.turns import Spread, ratios, take_turns
from rwfx.experiments.tables import markdown, write_csv
from rwfx.files import replacing
from rwfx.ops import observe_, record_, top_rows
from rwfx.passes.sample_rows import SAMPLER
from rwfx.sampler import RowSampler
from rwfx.transform import transform
from rwfx.transformed import Transformed
from rwfx.walk import WalkSampler

ROUNDS = 12
FEATURES, CLASSES = 784, 10


@dataclass(frozen=True)
class Line:
    """One policy at one density; times in milliseconds, medians of the rounds."""

    policy: str
    density: float
    step: float
    times_dense: Spread
    """The dense step over this one, pair by pair."""
    choosing: float
    share: Spread
    """Choosing over the step, pair by pair."""


def run(plan: Plan, *, progress: bool = True) -> list[Line]:
    """Measure, write the files into ``plan.out`` and print the table.

    Raises:
        ValueError: something about the plan or the machine will not do.
    """
    check_plan(plan)
    check_device(plan.device)
    check_folder(plan.out)
    torch.manual_seed(0)
    batch = torch.randn(plan.batch_size, FEATURES), torch.randint(CLASSES, (plan.batch_size,))
    model = mlp((FEATURES, *plan.hidden, CLASSES), seed=0)
    cases = [(kind, density) for kind in plan.policies for density in plan.densities if "+" not in kind]
    calls = [_dense_step(copy.deepcopy(model), *batch)]
    for kind, density in cases:
        policy = POLICIES[kind](density, 1)
        sparse = transform(copy.deepcopy(model), rows=policy, grad="rows", seed=0, **plan.transform_options)
        calls += [_step(sparse, rwfx.optim.Adam(sparse.parameters()), *batch), choosing(sparse, plan.batch_size)]
    times: list[list[float]] = [[] for _ in calls]
    with tqdm(total=len(calls) * (ROUNDS + 1), desc="overhead", unit="turn", disable=not progress) as bar:
        for _, place, spent in take_turns(calls, ROUNDS, plan.device, bar):
            times[place].append(spent)
    lines = []
    for k, case in enumerate(cases):
        step, chosen = times[1 + 2 * k], times[2 + 2 * k]
        median = statistics.median(step), statistics.median(chosen)
        spreads = Spread.of(ratios(times[0], step)), Spread.of(ratios(chosen, step))
        lines.append(Line(*case, median[0], spreads[0], median[1], spreads[1]))
    write_csv(plan.out / "overhead.csv", Line, lines)
    widths = "-".join(map(str, (FEATURES, *plan.hidden, CLASSES)))
    about = as_markdown({"run": f"{widths}, batch {plan.batch_size}, {ROUNDS} rounds", **conditions(plan.device)})
    text = f"{table(lines)}\n\n{about}"
    with replacing(plan.out / "overhead.md", "w") as file:
        file.write(f"# What choosing takes\n\n{__doc__}\n{text}\n")
    print(f"\n{text}\n\nwritten: {os.fspath(plan.out)}/")
    return lines


def choosing(sparse: Transformed, batch_size: int) -> Callable[[], None]:
    """Give what ``sparse`` does in a step to choose rows, on random gradients."""
    sampler = sparse.get_submodule(SAMPLER)
    assert isinstance(sampler, RowSampler)
    weights = [sparse.get_parameter(name) for name in sampler.crossed]
    noted: list[tuple[Tensor, Tensor, bool]] = []
    chosen: list[tuple[Tensor, Tensor, int]] = []
    if isinstance(sampler, WalkSampler) and sampler.preference is not None:
        seen = sampler.preference.seen.tensors()
        noted = [(of, torch.randn(batch_size, len(of)), sampler.preference.sees_all) for of in seen]
    if isinstance(sampler, TopKSampler):
        buffers = zip(sampler.chosen.tensors(), sampler.exactly, strict=True)
        chosen = [(of, torch.randn(batch_size, len(of) - 1), count) for of, count in buffers]

    def call() -> None:
        rows = sampler(*weights)
        with torch.no_grad():
            for k, (of, g, everything) in enumerate(noted):
                observe_(of, g, None if everything else rows[k])
            for of, g, count in chosen:
                record_(of, top_rows(g, count))

    return call


def _dense_step(model: nn.Module, inputs: Tensor, target: Tensor) -> Callable[[], None]:
    return _step(model, torch.optim.Adam(model.parameters(), fused=True), inputs, target)


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, target: Tensor) -> Callable[[], None]:
    def call() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), target).backward()
        optimizer.step()

    return call


def table(lines: Sequence[Line]) -> str:
    """Give ``lines`` as a Markdown table."""
    header = ["policy", "density", "step, ms", "times dense", "choosing, ms", "choosing / step, %"]
    cells = [
        [
            line.policy,
            f"{line.density:g}",
            f"{line.step:.2f}",
            str(line.times_dense),
            f"{line.choosing:.3f}",
            str(Spread(*(100 * value for value in vars(line.share).values()))),
        ]
        for line in lines
    ]
    return markdown(header, cells)
