"""What comes before the first step: the time of ``transform``, and of compiling.

In: a ``Plan``. Out: a ``Build`` per repetition, and ``build.csv``. Transforming takes turns with plain
``torch.fx.symbolic_trace`` of the same network. Compiling is the first compiled forward and backward, each in a
process of its own without any cache, dense and sparse in turn; the compiler's own start, its imports and its first
use of the C++ compiler, is behind when the clock starts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from tqdm.auto import tqdm

from rwfx.experiments.fresh import call_fresh
from rwfx.experiments.models import mlp
from rwfx.experiments.speed.contenders import SEED, batch_loss, build, sparsify
from rwfx.experiments.speed.plan import Plan, Size
from rwfx.experiments.speed.turns import Spread, ratios
from rwfx.experiments.tables import markdown, write_csv

WIDTH = 256
"""Of the deep network that is transformed."""
NUM_PATHS = 50
"""With which it is."""


@dataclass(frozen=True)
class Build:
    """One repetition."""

    measurement: str
    """``transform`` or ``compile``."""
    network: str
    contender: str
    repetition: int
    seconds: float


MEANINGS = {
    "transform": "transform(model), beside torch.fx.symbolic_trace(model)",
    "compile": "the first compiled forward and backward of the sparse model, beside the dense one's",
}

LEGEND = (
    "Median [least - greatest] over the repetitions. Compiling: in processes of their own without caches, in turn; the "
    "compiler's own start is not counted."
)


def run(plan: Plan, progress: bool) -> str:
    """Measure, write ``build.csv`` and give the table."""
    found = _transform(plan, progress)
    write_csv(plan.out / "build.csv", Build, found)
    if plan.compiled:
        found += _compile(plan, progress)
        write_csv(plan.out / "build.csv", Build, found)
    left_out = "" if plan.compiled else "\n\nCompiling was left out (`--eager`)."
    return table(found) + left_out


def _transform(plan: Plan, progress: bool) -> list[Build]:
    model = mlp([WIDTH] * (plan.deep_layers + 1), SEED).to(plan.device, plan.dtype)
    calls = {"dense": lambda: fx.symbolic_trace(model), "sparse": lambda: sparsify(plan, model, NUM_PATHS)}
    what = f"{plan.deep_layers} layers, {WIDTH} wide"
    found = []
    with tqdm(total=plan.repeats, desc=f"build: {what}", disable=not progress) as bar:
        for repetition in range(plan.repeats):
            for kind, call in calls.items():
                started = time.perf_counter()
                call()
                found.append(Build("transform", what, kind, repetition, time.perf_counter() - started))
            bar.update()
    return found


def _compile(plan: Plan, progress: bool) -> list[Build]:
    """Compile the first size, with its first number of paths."""
    size = replace(plan.sizes[0], num_paths=plan.sizes[0].num_paths[:1])
    found = []
    with tqdm(total=2 * plan.repeats, desc="build: compiling", unit="process", disable=not progress) as bar:
        for repetition in range(plan.repeats):
            for kind in ("dense", "sparse"):
                seconds = call_fresh(compile_seconds, plan, size, kind, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
                found.append(Build("compile", str(size), kind, repetition, seconds))
                bar.update()
    return found


def compile_seconds(plan: Plan, size: Size, kind: str) -> float:
    """Compile a ``dense`` or ``sparse`` step; to be called in a process of its own."""
    network, _ = build(plan, size, kind, size.num_paths[0])
    loss = batch_loss(plan, size, torch.compile(network, fullgraph=True))
    started_up = torch.compile(_anything, fullgraph=True)
    started_up(torch.ones(8, device=plan.device, requires_grad=True)).backward()
    started = time.perf_counter()
    loss().backward()
    if torch.device(plan.device).type == "cuda":
        torch.cuda.synchronize(plan.device)
    return time.perf_counter() - started


def _anything(x: Tensor) -> Tensor:
    return x.sin().sum()


def table(found: Sequence[Build]) -> str:
    """Give a Markdown table, a line per measurement: seconds, and the ratio pair by pair."""
    cells = []
    for measurement in dict.fromkeys(one.measurement for one in found):
        mine = [one for one in found if one.measurement == measurement]
        dense, sparse = ([one.seconds for one in mine if one.contender == kind] for kind in ("dense", "sparse"))
        spreads = [Spread.of(sparse), Spread.of(dense), Spread.of(ratios(sparse, dense))]
        cells.append([MEANINGS[measurement], mine[0].network, *map(str, spreads)])
    header = ["what", "network", "sparse, s", "dense, s", "sparse / dense"]
    return f"{markdown(header, cells)}\n\n{LEGEND}"
