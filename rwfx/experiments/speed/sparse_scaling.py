"""How an always-sparse step, and an update of its topology, grow with the width, at a fixed number of non-zeros a row.

In: a ``Plan``. Out: ``always_sparse_scaling.csv``, a figure and a table per batch size. At every width turns are taken
by the *step* of a sparse perceptron, and by steps after each of which GSE updates the topology. What such a step takes
above the plain one, pair by pair, is an *update*: finding the candidates and their gradients in the backward pass, and
moving the non-zeros. Then RigL's updates are measured likewise, by themselves: it makes a dense gradient of one weight
at a time, as far as it may be as large, and a step that follows finds nothing of its own in the caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import torch
from tqdm.auto import tqdm

import rwfx
from rwfx.experiments.speed.contenders import batch_loss, train_step
from rwfx.experiments.speed.plan import Plan, Size
from rwfx.experiments.speed.sparse_figures import draw_scaling
from rwfx.experiments.speed.sparse_steps import sparse_mlp
from rwfx.experiments.speed.turns import Call, Spread, ratios, take_turns
from rwfx.experiments.tables import markdown, write_csv

UPDATES = {"gse": "GSE's update", "rigl": "RigL's update"}
"""The methods, and what the table calls what they do."""


@dataclass(frozen=True)
class ScalingTurn:
    """The time of one turn, per step."""

    width: int
    layers: int
    batch_size: int
    nonzeros: int
    """Of all weights."""
    method: str
    """Of the updates beside which it was measured."""
    contender: str
    """``step``, or the method that updates the topology after it."""
    round: int
    milliseconds: float


LEGEND = (
    "*growth*: over that of half the width. Medians [least - greatest] over the rounds, ratios and differences of "
    "pairs taken in one round. An update is what a step with one takes above a step without."
)


def run(plan: Plan, progress: bool) -> str:
    """Measure, write the files and give the tables."""
    of = plan.always_sparse
    turns: list[ScalingTurn] = []
    for batch_size in of.scaling_batch_sizes:
        turns += measure(plan, batch_size, progress)
        write_csv(plan.out / "always_sparse_scaling.csv", ScalingTurn, turns)
    found = {
        batch_size: series([turn for turn in turns if turn.batch_size == batch_size])
        for batch_size in of.scaling_batch_sizes
    }
    spreads = {
        f"batch {batch_size}": {
            name: {width: Spread.of(times) for width, times in by_width.items()} for name, by_width in of_batch.items()
        }
        for batch_size, of_batch in found.items()
    }
    draw_scaling(spreads, f"{of.row_nonzeros} non-zeros a row", plan.out / "always_sparse_scaling.png")
    tables = [f"Batch {batch_size}:\n\n{table(plan, of_batch)}" for batch_size, of_batch in found.items()]
    return "\n\n".join([*tables, LEGEND])


def measure(plan: Plan, batch_size: int, progress: bool) -> list[ScalingTurn]:
    """Give every contender of every width its turns, method by method."""
    return [turn for method in UPDATES for turn in _measure(plan, batch_size, method, progress)]


def _measure(plan: Plan, batch_size: int, method: str, progress: bool) -> list[ScalingTurn]:
    of = plan.always_sparse
    most = inf if method != "rigl" else of.dense_bytes / plan.dtype.itemsize
    widths = [width for width in of.scaling_widths if width**2 <= most]
    about = f"scaling@{batch_size}, {method}"
    entered: list[tuple[int, int, str, Call]] = []
    with tqdm(desc=f"{about}: building", unit="turn", mininterval=0.5, disable=not progress) as bar:
        for width in widths:
            entered += [(width, *_contender(plan, width, batch_size, moved)) for moved in ("static", method)]
        bar.reset(total=len(entered) * (plan.rounds + 1))
        bar.set_description(about)
        turns = []
        for number, place, spent in take_turns([call for *_, call in entered], plan.rounds, plan.device, bar):
            width, nonzeros, contender, _ = entered[place]
            turns.append(ScalingTurn(width, of.layers, batch_size, nonzeros, method, contender, number, spent))
    return turns


def series(turns: Sequence[ScalingTurn]) -> dict[str, dict[int, list[float]]]:
    """Give the milliseconds of a step, as beside the first method, and of each update, by width, in each round."""
    times: dict[str, dict[str, dict[int, list[float]]]] = {}
    for turn in turns:
        of_method = times.setdefault(turn.method, {})
        of_method.setdefault(turn.contender, {}).setdefault(turn.width, []).append(turn.milliseconds)
    found = {"step": next(iter(times.values()))["step"]}
    for method, of_method in times.items():
        found[method] = {
            width: [whole - step for whole, step in zip(spent, of_method["step"][width], strict=True)]
            for width, spent in of_method[method].items()
        }
    return found


def table(plan: Plan, found: dict[str, dict[int, list[float]]]) -> str:
    """Give a line per width."""
    of = plan.always_sparse
    header = ["width", "density", "non-zeros a weight"]
    for name in found:
        header += [f"{UPDATES.get(name, 'step')}, ms", "growth"]
    half = dict((wide, narrow) for narrow, wide in pairwise(sorted(found["step"])))
    cells = []
    for width in sorted(found["step"]):
        row = [str(width), f"{of.row_nonzeros / width:.3%}", f"{of.row_nonzeros * width:,}"]
        for times in found.values():
            if width not in times:
                row += ["", ""]
                continue
            growth = "" if width not in half else str(Spread.of(ratios(times[width], times[half[width]])))
            row += [str(Spread.of(times[width])), growth]
        cells.append(row)
    return markdown(header, cells)


def _contender(plan: Plan, width: int, batch_size: int, method: str) -> tuple[int, str, Call]:
    """The non-zeros of a network, its name in the table, and its step."""
    of = plan.always_sparse
    widths = (width,) * (of.layers + 1)
    network = sparse_mlp(plan, widths, of.row_nonzeros / width)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    step = train_step(batch_loss(plan, Size(widths, batch_size, ()), network), optimizer)
    if method == "static":
        return network.nnz, "step", step
    topology = rwfx.Topology(network, optimizer, method, interval=1, schedule="constant")

    def updated() -> None:
        step()
        topology.step()

    return network.nnz, method, updated
