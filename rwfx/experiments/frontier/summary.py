"""Final runs summarised: what a contender reaches for its budgets, and the least for which it reaches dense's best.

*Dense's best* is the mean over the seeds of the metric that dense ends with after the whole budget, with the batch size
for which that is best. The seconds of a run are given as a share of those of that dense run with the same seed, which
was trained in turns with it; after a stop, where another process has trained that, of the mean of those that its own
process trained: another process may have had another machine, or this one at another pace.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from rwfx.experiments.frontier.entries import Result
from rwfx.experiments.policies.tasks import Metric
from rwfx.experiments.summary import Mean, mean


@dataclass(frozen=True)
class Point:
    """A contender at a share of the budget, over all seeds."""

    share: float
    metric: Mean
    seconds: Mean
    """As a share of those of dense's best."""
    flops: Mean
    """As a share of those of dense's best."""
    steps: float
    examples: float
    """The share of the examples that took part in the backward pass."""


@dataclass(frozen=True)
class Line:
    """A contender, of dense with one batch size."""

    contender: str
    batch: int
    lr: float
    row_sparse: str
    example_sparse: str
    points: tuple[Point, ...]
    """The smallest share of the budget first."""

    @property
    def name(self) -> str:
        """What it is called in tables: of dense, with the batch."""
        return f"dense, batch {self.batch}" if self.contender == "dense" else self.contender

    @property
    def end(self) -> Point:
        """That of the largest share."""
        return self.points[-1]


@dataclass(frozen=True)
class Reached:
    """The least cost at which a goal is reached, a share of that of dense's best."""

    cost: float
    first: bool
    """Whether at the very first point, so that less may do: nothing is said of what was not run."""


@dataclass(frozen=True)
class Summary:
    """A task's lines, in the order in which they were run, and dense's best."""

    lines: tuple[Line, ...]
    best: Line
    """The line of dense that ends best."""
    strangers: int
    """Runs of processes that trained no run of dense's best: their seconds are over those of the other processes'."""

    @property
    def goal(self) -> Mean:
        """Dense's best."""
        return self.best.end.metric


def summarise(results: Sequence[Result], metric: Metric) -> Summary:
    """Summarise the final runs of one task; every contender has each of its shares with the same seeds."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.contender, result.batch), []).append(result)
    whole = {key: [of for of in runs if of.share == 1] for key, runs in groups.items() if key[0] == "dense"}
    best = max(whole, key=lambda key: metric.sign * fmean(of.metric for of in whole[key]))
    lines = {key: _line(runs, whole[best]) for key, runs in groups.items()}
    known = {of.process for of in whole[best]}
    return Summary(tuple(lines.values()), lines[best], sum(of.process not in known for of in results))


def reached(points: Sequence[tuple[float, float]], goal: float, sign: int) -> Reached | None:
    """Give the least cost at which the metric is as good as ``goal``; ``None`` where it never is.

    Args:
        points: pairs of cost and metric, between which the metric is taken to be linear.
        goal: the metric to reach.
        sign: 1 where more is better, -1 where less is.

    >>> reached([(1.0, 0.5), (3.0, 1.0)], 0.75, 1)
    Reached(cost=2.0, first=False)
    """
    ordered = sorted((cost, sign * value) for cost, value in points)
    goal = sign * goal
    if ordered[0][1] >= goal:
        return Reached(ordered[0][0], True)
    for (cost, value), (next_cost, next_value) in pairwise(ordered):
        if next_value >= goal:
            return Reached(cost + (next_cost - cost) * (goal - value) / (next_value - value), False)
    return None


def reached_by(line: Line, cost: str, goal: float, metric: Metric) -> Reached | None:
    """Give the least ``cost``, ``"seconds"`` or ``"flops"``, at which a contender's mean is as good as ``goal``."""
    return reached([(getattr(of, cost).value, of.metric.value) for of in line.points], goal, metric.sign)


def _line(runs: Sequence[Result], best: Sequence[Result]) -> Line:
    flops = fmean(of.flops for of in best)
    points = []
    for share in sorted({of.share for of in runs}):
        members = [of for of in runs if of.share == share]
        points.append(
            Point(
                share,
                mean([of.metric for of in members]),
                mean([of.seconds / _seconds_beside(of, best) for of in members]),
                mean([of.flops / flops for of in members]),
                fmean(of.steps for of in members),
                fmean(of.examples for of in members),
            )
        )
    first = runs[0]
    return Line(first.contender, first.batch, first.lr, first.row_sparse, first.example_sparse, tuple(points))


def _seconds_beside(run: Result, best: Sequence[Result]) -> float:
    """Give the seconds of dense's best that those of ``run`` are compared with."""
    own = [of for of in best if of.process == run.process]
    turns = [of for of in own if of.seed == run.seed]
    return fmean(of.seconds for of in turns or own or best)
