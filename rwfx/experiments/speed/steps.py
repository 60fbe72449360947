"""Step times: every contender of a size in turn, the table of their ratios, and ``steps.csv``.

In: a ``Plan``. Out: a ``Turn`` per contender and round, and of these a ``Line`` per size and number of paths. A
ratio is taken within a round, pair by pair, and the median of the rounds is told with the least and the greatest.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from rwfx.experiments.speed.contenders import contenders
from rwfx.experiments.speed.plan import Plan, Size
from rwfx.experiments.speed.turns import Spread, ratios, take_turns
from rwfx.experiments.tables import markdown, write_csv


@dataclass(frozen=True)
class Turn:
    """The time of one turn, per step."""

    size: str
    batch_size: int
    num_paths: int | None
    contender: str
    compiled: bool
    round: int
    milliseconds: float
    kept: float | None
    """After a sparse turn: the share of the backward's products that its last draw kept."""


@dataclass(frozen=True)
class Line:
    """A size with one number of paths. *Best* is the sparse step, eager or compiled, that is faster by median."""

    size: str
    batch_size: int
    num_paths: int
    dense_ms: float
    dense_compiled: bool
    limit: float
    times_dense: dict[tuple[str, bool], Spread]
    """By kind of contender, and whether it is compiled."""
    best: tuple[str, bool]
    times_ideal: Spread
    sampler_ms: float
    sampler_share: float
    optimizer_ms: float
    optimizer_share: float
    kept: float

    @property
    def share_of_limit(self) -> float:
        """How much of the speed that a free backward and update would give is there."""
        return self.times_dense[self.best].median / self.limit


COLUMNS = {
    "dense ms": "the better of the eager and the compiled dense step, by median, with `torch.optim.Adam(fused=True)`",
    "limit": "dense step over its forward alone, the better of eager and compiled: as many times as fast would be a "
    "step with a free backward and update",
    "times dense": "dense step over this step: above 1 is faster than dense",
    "share of the limit": "times dense of the better sparse step, over the limit",
    "times the ideal": "the better sparse step over the ideal one: 1 is ideal, above 1 is slower; ideal = forward + "
    "(dense step - forward) x kept",
    "sampler ms": "drawing the row sets, by itself, and as a share of the better sparse step",
    "optimizer ms": "the row optimizer's step, by itself and on fixed gradients, and as a share of the same",
    "kept": "share of the dense backward's products that is kept, K of O rows of each (not counted: that of an input's "
    "gradient only the columns read are computed); mean of the turns' last draws",
}
"""What the table shows after size, batch and paths."""


def run(plan: Plan, progress: bool) -> str:
    """Measure every size, write ``steps.csv`` after each, and give the table."""
    turns: list[Turn] = []
    for size in plan.sizes:
        turns += measure(plan, size, progress)
        write_csv(plan.out / "steps.csv", Turn, turns)
    return table(summarise(turns))


def measure(plan: Plan, size: Size, progress: bool) -> list[Turn]:
    """Give every contender of ``size`` its turns."""
    torch.compiler.reset()  # or the eighth size would meet the limit of recompilations
    turns = []
    with tqdm(desc=f"{size.name}: building", unit="turn", mininterval=0.5, disable=not progress) as bar:
        entered = contenders(plan, size)
        bar.reset(total=len(entered) * (plan.rounds + 1))
        bar.set_description(f"{size.name}@{size.batch_size}")
        for number, place, spent in take_turns([one.call for one in entered], plan.rounds, plan.device, bar):
            one = entered[place]
            what = size.name, size.batch_size, one.num_paths, one.kind, one.compiled
            turns.append(Turn(*what, number, spent, one.kept()))
    return turns


def summarise(turns: Sequence[Turn]) -> list[Line]:
    """Give a line per size and number of paths, in the order in which they were measured."""
    cases = dict.fromkeys((turn.size, turn.batch_size, turn.num_paths) for turn in turns if turn.num_paths is not None)
    return [_line(turns, *case) for case in cases]


def _line(turns: Sequence[Turn], size: str, batch_size: int, num_paths: int) -> Line:
    times: dict[tuple[str, bool], list[float]] = {}
    kept = []
    for turn in turns:
        if (turn.size, turn.batch_size) == (size, batch_size) and turn.num_paths in (None, num_paths):
            times.setdefault((turn.contender, turn.compiled), []).append(turn.milliseconds)
            kept += [] if turn.kept is None else [turn.kept]

    def fastest(kind: str) -> tuple[str, bool]:
        return min((key for key in times if key[0] == kind), key=lambda key: statistics.median(times[key]))

    dense, forward, sampler, optimizer = (times[fastest(k)] for k in ("dense", "forward", "sampler", "optimizer"))
    best = fastest("sparse")
    share = statistics.fmean(kept)
    ideal = [f + (d - f) * share for d, f in zip(dense, forward, strict=True)]
    return Line(
        size,
        batch_size,
        num_paths,
        dense_ms=statistics.median(dense),
        dense_compiled=fastest("dense")[1],
        limit=statistics.median(ratios(dense, forward)),
        times_dense={key: Spread.of(ratios(dense, times[key])) for key in times if key[0] in ("masked", "sparse")},
        best=best,
        times_ideal=Spread.of(ratios(times[best], ideal)),
        sampler_ms=statistics.median(sampler),
        sampler_share=statistics.median(ratios(sampler, times[best])),
        optimizer_ms=statistics.median(optimizer),
        optimizer_share=statistics.median(ratios(optimizer, times[best])),
        kept=share,
    )


def table(lines: Sequence[Line]) -> str:
    """Give ``lines`` as a Markdown table, with a sentence on each column below."""
    kinds = list(lines[0].times_dense)
    speeds = [f"times dense: {kind}, {_how(compiled)}" for kind, compiled in kinds]
    names = [name for column in COLUMNS for name in (speeds if column == "times dense" else [column])]
    cells = [
        [
            line.size,
            str(line.batch_size),
            str(line.num_paths),
            f"{line.dense_ms:.2f} ({_how(line.dense_compiled)})",
            f"{line.limit:.2f}",
            *(str(line.times_dense[kind]) for kind in kinds),
            f"{line.share_of_limit:.2f}",
            str(line.times_ideal),
            f"{line.sampler_ms:.2f} ({line.sampler_share:.0%})",
            f"{line.optimizer_ms:.2f} ({line.optimizer_share:.0%})",
            f"{line.kept:.1%}",
        ]
        for line in lines
    ]
    legend = "\n".join(f"- *{name}*: {meaning}." for name, meaning in COLUMNS.items())
    intro = "Ratios are taken within a round: median [least - greatest]."
    return f"{markdown(['MLP', 'batch', 'paths', *names], cells)}\n\n{intro}\n\n{legend}"


def _how(compiled: bool) -> str:
    return "compiled" if compiled else "eager"
