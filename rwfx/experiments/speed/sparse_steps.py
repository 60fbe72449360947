"""Training steps of an always-sparse perceptron, beside the dense step, and the bytes that both hold.

In: a ``Plan``. Out: ``always_sparse_steps.csv``, ``always_sparse_bytes.csv`` and tables. Turns are taken by the dense
step with ``torch.optim.Adam(fused=True)``; that of ``rwfx.sparsify(model, density)`` with the same optimizer; and
*masked*, the same with ``by="dense"``, which fills a dense weight and computes as any simulation of sparse training
does, but for the update, which is that of the non-zeros. Each is eager and compiled. The sparse models are built
on the meta device: none ever has a dense weight.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

import rwfx
from rwfx.experiments.models import mlp
from rwfx.experiments.speed.contenders import SEED, batch_loss, train_step
from rwfx.experiments.speed.plan import Plan, Size
from rwfx.experiments.speed.sparse_figures import draw_steps
from rwfx.experiments.speed.turns import Call, Spread, ratios, take_turns
from rwfx.experiments.tables import markdown, write_csv
from rwfx.sparse_memory import memory_of
from rwfx.sparsified import SparsifiedModule

KINDS = {"sparse": "nonzeros", "masked": "dense"}
"""The sparse contenders, and how their products are computed."""

CATEGORIES = ("values", "gradients", "optimizer_state", "index")
"""Of ``rwfx.sparse_memory.Bytes``; the topology stays as it is here."""


@dataclass(frozen=True)
class SparseTurn:
    """The time of one turn, per step."""

    size: str
    batch_size: int
    density: float
    """Of a dense step 1."""
    contender: str
    compiled: bool
    round: int
    milliseconds: float


@dataclass(frozen=True)
class BytesRow:
    """What a category holds after a step."""

    density: float
    category: str
    sparse: int
    dense: int


LEGEND = (
    "*times dense*, *times masked*: the better dense or masked step over the better sparse one, each the better of "
    "eager and compiled by median. Ratios are medians [least - greatest] of pairs taken in one round. "
    "Bytes are those held after a step, as shares of the dense model's; *index* as a share of its weights."
)


def run(plan: Plan, progress: bool) -> str:
    """Measure, write the files and give the tables."""
    turns, held = measure(plan, progress)
    write_csv(plan.out / "always_sparse_steps.csv", SparseTurn, turns)
    write_csv(plan.out / "always_sparse_bytes.csv", BytesRow, held)
    dense = best(turns, "dense", 1.0)
    speeds = {
        density: {kind: Spread.of(ratios(dense, best(turns, kind, density))) for kind in KINDS}
        for density in plan.always_sparse.densities
    }
    draw_steps(speeds, held, size_of(plan), plan.out / "always_sparse_steps.png")
    return table(plan, turns, held)


def size_of(plan: Plan) -> Size:
    """The perceptron."""
    of = plan.always_sparse
    return Size((of.width,) * (of.layers + 1), of.batch_size, ())


def measure(plan: Plan, progress: bool) -> tuple[list[SparseTurn], list[BytesRow]]:
    """Give every contender its turns, and count what each density holds."""
    torch.compiler.reset()
    size = size_of(plan)
    entered: list[tuple[tuple[str, float, bool], Call]] = []
    held = []
    with tqdm(desc=f"{size.name}: building", unit="turn", mininterval=0.5, disable=not progress) as bar:
        dense = mlp(size.widths, SEED).to(plan.device, plan.dtype)
        entered += _steps(plan, ("dense", 1.0), dense, torch.optim.Adam(dense.parameters(), fused=True))
        for density in plan.always_sparse.densities:
            for kind, by in KINDS.items():
                network = sparse_mlp(plan, size.widths, density, by)
                optimizer = torch.optim.Adam(network.parameters(), fused=True)
                steps = _steps(plan, (kind, density), network, optimizer)
                if kind == "sparse":
                    steps[0][1]()
                    held += _bytes(density, network, optimizer)
                entered += steps
        bar.reset(total=len(entered) * (plan.rounds + 1))
        bar.set_description(f"{size.name}@{size.batch_size}: steps")
        about = size.name, size.batch_size
        turns = []
        for number, place, spent in take_turns([call for _, call in entered], plan.rounds, plan.device, bar):
            kind, density, compiled = entered[place][0]
            turns.append(SparseTurn(*about, density, kind, compiled, number, spent))
    return turns, held


def sparse_mlp(plan: Plan, widths: Sequence[int], density: float, by: str = "auto") -> SparsifiedModule:
    """A sparse perceptron: no dense weight of it is made where the device is the CPU."""
    device = torch.device(plan.device)
    with torch.device("meta" if device.type == "cpu" else device):
        model = mlp(widths, SEED).to(plan.dtype)
    return rwfx.sparsify(model, density, init="uniform", growth="static", by=by, seed=SEED)  # type: ignore[arg-type]


def best(turns: Sequence[SparseTurn], kind: str, density: float) -> list[float]:
    """The milliseconds of a contender in each round, eager or compiled, whichever has the better median."""
    times: dict[bool, list[float]] = {}
    for turn in turns:
        if (turn.contender, turn.density) == (kind, density):
            times.setdefault(turn.compiled, []).append(turn.milliseconds)
    return min(times.values(), key=statistics.median)


def table(plan: Plan, turns: Sequence[SparseTurn], held: Sequence[BytesRow]) -> str:
    """Give a line per density."""
    header = ["MLP", "batch", "density", "dense ms", "masked ms", "sparse ms", "times dense", "times masked"]
    header += [f"{name.replace('_', ' ')}, %" for name in CATEGORIES] + ["all bytes, %"]
    weights = max(row.dense for row in held if row.category == "values")
    cells = []
    for density in plan.always_sparse.densities:
        own = {row.category: row for row in held if row.density == density}
        shares = [100 * own[name].sparse / (own[name].dense or weights) for name in CATEGORIES]
        total = 100 * sum(row.sparse for row in own.values()) / sum(row.dense for row in own.values())
        size = size_of(plan)
        times = [best(turns, *of) for of in (("dense", 1.0), ("masked", density), ("sparse", density))]
        cells.append(
            [
                *(size.name, str(size.batch_size), f"{density:g}"),
                *(f"{statistics.median(spent):.2f}" for spent in times),
                *(str(Spread.of(ratios(other, times[-1]))) for other in times[:-1]),
                *(f"{share:.1f}" for share in (*shares, total)),
            ]
        )
    return f"{markdown(header, cells)}\n\n{LEGEND}"


def _steps(
    plan: Plan, about: tuple[str, float], network: nn.Module, optimizer: Optimizer
) -> list[tuple[tuple[str, float, bool], Call]]:
    """The eager and the compiled step of one network."""
    found = []
    for compiled in (False, True) if plan.compiled else (False,):
        stepped = torch.compile(network, fullgraph=True) if compiled else network
        call = train_step(batch_loss(plan, size_of(plan), stepped), optimizer)
        found.append(((*about, compiled), call))
    return found


def _bytes(density: float, network: SparsifiedModule, optimizer: Optimizer) -> list[BytesRow]:
    memory = memory_of(network, optimizer)
    return [BytesRow(density, name, getattr(memory.sparse, name), getattr(memory.dense, name)) for name in CATEGORIES]
