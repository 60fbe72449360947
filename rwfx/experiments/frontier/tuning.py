"""Tuning: batch size and learning rate together, on validation, with a seed that no final run has.

In: a contender. Out: the entries of its trials, and, once they are judged, its *choices*: the batch sizes and rates of
its final runs. Dense is a contender with each batch size, and has a choice for each; another has the best of all.
"""

from collections.abc import Iterable, Sequence

from rwfx.experiments.frontier.entries import TUNING_SEED, Entry, Trial
from rwfx.experiments.frontier.plan import Plan
from rwfx.experiments.policies.tasks import Metric
from rwfx.experiments.policies.tuning import goodness


def trial_entries(plan: Plan, task: str, contender: str) -> list[Entry]:
    """Every batch size with every rate, for the largest share of the budget that the contender has final runs of."""
    share = plan.shares_of(contender)[-1]
    return [
        Entry(task, contender, batch, lr, share, TUNING_SEED)
        for batch in plan.batch_sizes_of(contender)
        for lr in sorted(plan.lrs)
    ]


def choices(trials: Iterable[Trial], metric: Metric) -> list[Trial]:
    """Give the best of a contender's trials, of dense the best with each batch size."""
    groups: dict[int, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.batch if trial.contender == "dense" else 0, []).append(trial)
    return [max(of, key=lambda trial: goodness(trial.validation, metric)) for of in groups.values()]


def final_entries(plan: Plan, chosen: Sequence[Trial], seed: int) -> list[Entry]:
    """Give the final runs of a seed: each choice for each share of the budget."""
    return [
        Entry(trial.task, trial.contender, trial.batch, trial.lr, share, seed)
        for trial in chosen
        for share in plan.shares_of(trial.contender)
    ]


def at_the_edge(plan: Plan, trial: Trial) -> str:
    """Name what of a choice is the least or the most that was tried, where there was more than one to try."""
    tried = {"batch": plan.batch_sizes_of(trial.contender), "rate": tuple(sorted(plan.lrs))}
    if trial.contender == "dense":
        del tried["batch"]  # each of them is a contender
    at = {"batch": trial.batch, "rate": trial.lr}
    return " and ".join(name for name, of in tried.items() if len(of) > 1 and at[name] in (of[0], of[-1]))
