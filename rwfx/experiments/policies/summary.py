"""Final runs summarised: a line per contender, and how far it is ahead of dense at the same cost.

The *dense frontier* of a seed is the metric that dense runs of the whole batch end with, against what they cost: all
steps, and the fewer steps. Between two of them it is interpolated linearly; beyond them it says nothing. A difference
is taken seed by seed, and is above 0 where the contender is better, of whatever metric.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rwfx.experiments.policies.contenders import DENSE, Contender
from rwfx.experiments.policies.runs import Point, Result
from rwfx.experiments.policies.tasks import Metric
from rwfx.experiments.summary import Mean, mean

COSTS = {"step": "steps", "seconds": "seconds", "flops": "FLOPs", "parameter_updates": "updates"}
"""What can be made equal: the columns of a ``Point``, and their names."""

NEAR = {"accuracy": 0.005, "loss": 0.01}
"""How far below dense is near it: half a point; of a loss, one per cent of dense's."""
FAST = 0.6
"""The share of dense's seconds that is fast."""


@dataclass(frozen=True)
class Line:
    """A contender over all seeds."""

    contender: Contender
    lr: float
    sparse: str
    metric: Mean
    shares: dict[str, Mean]
    """Its whole cost over dense's, by columns of a ``Point``."""
    ahead: dict[str, Mean | None]
    """By how much it is ahead of the frontier at its cost; ``None`` where the frontier does not reach."""
    forgetting: Mean | None
    """The first task's metric before minus after, where there was a first task."""
    stands_out: bool
    """Whether it is near dense, or above, and fast."""


def summarise(results: Sequence[Result], metric: Metric) -> list[Line]:
    """Give a line per contender of one task, in the order in which they were run."""
    seeds = sorted({result.seed for result in results})
    ends = {(result.contender, result.seed): result for result in results}
    entered = list(dict.fromkeys(result.contender for result in results))
    lines = []
    for contender in entered:
        runs = [ends[contender, seed] for seed in seeds]
        dense = [ends[DENSE, seed] for seed in seeds]
        pairs = list(zip(runs, dense, strict=True))
        shares = {cost: mean([_cost(run.end, cost) / _cost(of.end, cost) for run, of in pairs]) for cost in COSTS}
        own = mean([run.end.metric for run in runs])
        slack = NEAR["accuracy"] if metric.sign > 0 else NEAR["loss"] * mean([of.end.metric for of in dense]).value
        near = metric.sign * (own.value - mean([of.end.metric for of in dense]).value) >= -slack
        lines.append(
            Line(
                contender,
                runs[0].lr,
                runs[0].sparse,
                own,
                shares,
                {cost: _ahead(runs, results, cost, metric) for cost in COSTS},
                _forgetting(runs),
                near and shares["seconds"].value <= FAST,
            )
        )
    return lines


def frontier(results: Sequence[Result], seed: int, cost: str) -> list[tuple[float, float]]:
    """The dense runs of a seed, as (cost, metric at the end), the cheapest first."""
    members = [result.end for result in results if result.contender.on_frontier and result.seed == seed]
    return sorted((_cost(end, cost), end.metric) for end in members)


def at_cost(points: Sequence[tuple[float, float]], cost: float) -> float | None:
    """Interpolate between ``points``, sorted pairs of cost and metric; ``None`` outside their range.

    >>> at_cost([(1.0, 0.5), (3.0, 0.9)], 2.0)
    0.7
    """
    costs, metrics = zip(*points, strict=True)
    return float(np.interp(cost, costs, metrics)) if costs[0] <= cost <= costs[-1] else None


def _ahead(runs: Sequence[Result], results: Sequence[Result], cost: str, metric: Metric) -> Mean | None:
    if runs[0].contender.on_frontier:
        return None
    found = []
    for run in runs:
        dense = at_cost(frontier(results, run.seed, cost), _cost(run.end, cost))
        if dense is None:
            return None
        found.append(metric.sign * (run.end.metric - dense))
    return mean(found)


def _forgetting(runs: Sequence[Result]) -> Mean | None:
    lost = [
        run.earlier_before - run.end.earlier_metric
        for run in runs
        if run.earlier_before is not None and run.end.earlier_metric is not None
    ]
    return mean(lost) if lost else None


def _cost(point: Point, cost: str) -> float:
    return float(getattr(point, cost))
