"""What a visit of the zoo is to check and where to write it."""

from dataclasses import dataclass
from pathlib import Path

from rwfx.experiments.zoo.catalogue import SUITES, Entry, entries


@dataclass(frozen=True)
class Plan:
    """What to check and where to write it."""

    out: Path = Path("results/zoo")
    suites: tuple[str, ...] = tuple(SUITES)
    models: tuple[str, ...] = ("*",)
    """Patterns of the names of models."""
    limit: float = 1800
    """The seconds that the check of one model may take."""
    again: bool = False
    """Whether models are checked again that are written down with a problem."""


def entries_of(plan: Plan) -> tuple[Entry, ...]:
    """The models to check, suite by suite.

    Raises:
        ValueError: a suite is not known, no model fits, or the limit is no time.
    """
    for suite in plan.suites:
        if suite not in SUITES:
            raise ValueError(f"the suites are {', '.join(SUITES)}; given {suite!r}.")
    if not plan.limit > 0:
        raise ValueError(f"the limit of a check must be more than 0 seconds; given {plan.limit:g}.")
    found = entries(plan.suites, plan.models)
    if not found:
        raise ValueError(f"no model of {', '.join(plan.suites)} has a name like {', '.join(plan.models)}.")
    return found
