"""Learning rates: one grid for every contender, judged on validation, with a seed that no final run has.

In: a task, a starting network, contenders. Out: a ``Trial`` per contender and rate, and of these the best rates.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from rwfx.experiments.policies.contenders import Contender
from rwfx.experiments.policies.plan import Plan
from rwfx.experiments.policies.runs import Run
from rwfx.experiments.policies.tasks import Metric, Split, measure

TUNING_SEED = 1_000_003
"""The final seeds are counted from 0."""


@dataclass(frozen=True)
class Trial:
    """A run that was made to judge a learning rate."""

    task: str
    contender: Contender
    lr: float
    validation: float


def trials(
    plan: Plan, task: str, split: Split, metric: Metric, start: nn.Module, entered: Sequence[Contender]
) -> Iterator[tuple[Trial, int]]:
    """Train each contender with each rate, and judge it on the validation part.

    Yields:
        A trial, and the steps that it took.
    """
    for contender in entered:
        for lr in plan.lrs:
            run = Run(plan, contender, start, split.train, plan.steps_of(task), lr, TUNING_SEED)
            run.take_turn(run.steps)
            yield Trial(task, contender, lr, measure(run.network, split.validation, metric)), run.steps


def best_rates(made: Sequence[Trial], metric: Metric) -> dict[Contender, float]:
    """The rate of the best trial of each contender; a run that diverged is never the best, unless all did."""
    by_contender: dict[Contender, list[Trial]] = {}
    for trial in made:
        by_contender.setdefault(trial.contender, []).append(trial)
    return {
        contender: max(of, key=lambda trial: goodness(trial.validation, metric)).lr
        for contender, of in by_contender.items()
    }


def goodness(value: float, metric: Metric) -> float:
    """Turn ``value`` into a number of which more is better; of a run that diverged it is the least."""
    return metric.sign * value if math.isfinite(value) else -math.inf
