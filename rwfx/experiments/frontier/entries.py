"""Entries: the runs that there are to do, each told apart from every other, and the lines of the files about them.

A line of ``frontier.csv`` is a finished run, one of ``tuning.csv`` a trial. Both begin with the fields of an ``Entry``
and the *plan* that it was run under, in words: what else decides its numbers.
"""

from dataclasses import dataclass

from rwfx.experiments.frontier.plan import Plan
from rwfx.experiments.policies.tasks import Task

TUNING_SEED = 1_000_003
"""The seed of every trial; those of the final runs are counted from 0."""


@dataclass(frozen=True)
class Entry:
    """A run that is to be done."""

    task: str
    contender: str
    batch: int
    lr: float
    share: float
    """Of the budget."""
    seed: int


@dataclass(frozen=True)
class Trial(Entry):
    """A run that judged a batch size and a rate."""

    plan: str
    validation: float


@dataclass(frozen=True)
class Result(Entry):
    """A final run at its end, judged on test data."""

    plan: str
    process: int
    """Which of the processes that wrote the file, from 1: seconds of two of them do not compare."""
    row_sparse: str
    """How many of its weights had a backward pass on some rows alone, such as ``2 of 3``."""
    example_sparse: str
    """How many had one on the kept examples alone."""
    steps: int
    examples: float
    """The share of the examples that took part in the backward pass."""
    flops: int
    seconds: float
    """Forward, backward, update and ``zero_grad``."""
    metric: float


def plan_of(plan: Plan, task: Task) -> str:
    """Say what decides the numbers of a run besides its entry."""
    options = "".join(f", {name} {value}" for name, value in sorted(plan.transform_options.items()))
    return f"{plan.steps_of(task.name)} steps, {task.about}, {plan.device}{options}"
