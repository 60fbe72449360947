"""Steps that leave out examples as well as rows, beside the dense step.

In: a ``Plan``. Out: ``examples.csv`` and a table. Turns are taken by the dense step, its forward alone, and the steps
of ``transform(model, rows=TopK(rows), examples=examples, grad="rows")`` with ``rwfx.optim.Adam``, each eager and
compiled.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

import rwfx.optim
from rwfx.experiments.models import mlp
from rwfx.experiments.speed.contenders import SEED, batch, batch_loss, build, train_step
from rwfx.experiments.speed.plan import Plan, Thin
from rwfx.experiments.speed.turns import Call, Spread, ratios, take_turns
from rwfx.experiments.tables import markdown, write_csv
from rwfx.policies import TopK
from rwfx.transform import transform


@dataclass(frozen=True)
class ThinTurn:
    """The time of one turn, per step."""

    size: str
    batch_size: int
    examples: float
    rows: float
    contender: str
    compiled: bool
    round: int
    milliseconds: float


LEGEND = (
    "*times dense*: the better dense step over the better thin one, each the better of eager and compiled by median. "
    "*ideal* = forward + (dense step - forward) x examples x rows. Ratios are medians [least - greatest] of pairs "
    "taken in one round."
)


def run(plan: Plan, progress: bool) -> str:
    """Measure, write ``examples.csv`` and give the table."""
    turns: list[ThinTurn] = []
    for thin in plan.thin:
        turns += _measure(plan, thin, progress)
        write_csv(plan.out / "examples.csv", ThinTurn, turns)
    header = ["widths", "batch", "examples", "rows", "dense ms", "thin ms", "times dense", "limit", "times the ideal"]
    return f"{markdown(header, [_cells(thin, turns) for thin in plan.thin])}\n\n{LEGEND}"


def _measure(plan: Plan, thin: Thin, progress: bool) -> list[ThinTurn]:
    torch.compiler.reset()
    entered = [
        (kind, compiled, make(plan, thin, compiled))
        for kind, make in {"forward": _forward, "dense": _dense, "thin": _thin}.items()
        for compiled in ((False, True) if plan.compiled else (False,))
    ]
    about = thin.size.name, thin.batch_size, thin.examples, thin.rows
    found = []
    with tqdm(total=len(entered) * (plan.rounds + 1), desc=f"{about[0]}@{about[1]}", disable=not progress) as bar:
        for number, place, spent in take_turns([call for *_, call in entered], plan.rounds, plan.device, bar):
            kind, compiled, _ = entered[place]
            found.append(ThinTurn(*about, kind, compiled, number, spent))
    return found


def _forward(plan: Plan, thin: Thin, compiled: bool) -> Call:
    network, _ = build(plan, thin.size, "dense", None)
    inputs, _ = batch(plan, thin.size)
    called = torch.compile(network, fullgraph=True) if compiled else network
    return lambda: called(inputs)


def _dense(plan: Plan, thin: Thin, compiled: bool) -> Call:
    return _step(plan, thin, compiled, *build(plan, thin.size, "dense", None))


def _thin(plan: Plan, thin: Thin, compiled: bool) -> Call:
    model = mlp(thin.widths, SEED).to(plan.device, plan.dtype)
    options = {"grad": "rows", "seed": SEED, **plan.transform_options}
    network = transform(model, rows=TopK(thin.rows), examples=thin.examples, **options)
    return _step(plan, thin, compiled, network, rwfx.optim.Adam(network.parameters()))


def _step(plan: Plan, thin: Thin, compiled: bool, network: nn.Module, optimizer: Optimizer) -> Call:
    stepped: Callable = torch.compile(network, fullgraph=True) if compiled else network
    return train_step(batch_loss(plan, thin.size, stepped), optimizer)


def _cells(thin: Thin, turns: list[ThinTurn]) -> list[str]:
    own = [turn for turn in turns if (turn.size, turn.batch_size) == (thin.size.name, thin.batch_size)]

    def best(kind: str) -> list[float]:
        times = {c: [t.milliseconds for t in own if (t.contender, t.compiled) == (kind, c)] for c in (False, True)}
        return min(filter(None, times.values()), key=statistics.median)

    forward, dense, sparse = best("forward"), best("dense"), best("thin")
    share = thin.examples * thin.rows
    ideal = [f + (d - f) * share for d, f in zip(dense, forward, strict=True)]
    return [
        thin.size.name,
        str(thin.batch_size),
        f"{thin.examples:g}",
        f"{thin.rows:g}",
        f"{statistics.median(dense):.2f}",
        f"{statistics.median(sparse):.2f}",
        str(Spread.of(ratios(dense, sparse))),
        f"{statistics.median(ratios(dense, forward)):.2f}",
        str(Spread.of(ratios(sparse, ideal))),
    ]
