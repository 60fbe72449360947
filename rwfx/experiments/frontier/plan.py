"""What a comparison is to run: its tasks and contenders, their budgets, batches, rates and seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = {
    "digits": 200,
    "mnist": 800,
    "fashion-mnist": 1200,
    "noisy-mnist": 800,
    "shakespeare": 3000,
    "cifar10": 2000,
    "sst2": 1500,
}
"""The tasks (see ``tasks``), and the dense steps of the whole budget where none are asked for."""

REFERENCE_BATCH = 128
"""The whole budget is that of so many dense steps with this batch, in operations of products of matrices."""

SPARSE_NAMES = (
    *("rows-0.25", "rows-0.1"),
    *("examples-0.3", "examples-0.5", "adaptive-0.9", "uniform-0.3"),
    *("both-0.5", "both-0.3", "both-mixed-0.5"),
    *("two-pass-0.3", "two-pass-0.5"),
)
"""The contenders beside dense (see ``contenders.CONTENDERS``)."""


@dataclass(frozen=True)
class Plan:
    """What to run and where to write it."""

    out: Path = Path("results/frontier")
    tasks: tuple[str, ...] = ("mnist",)
    contenders: tuple[str, ...] = SPARSE_NAMES
    """Those beside dense, which is always there."""
    shares: tuple[float, ...] = (0.25, 0.4, 0.6, 0.8, 1.0)
    """The shares of the budget for which dense is trained."""
    sparse_shares: tuple[float, ...] = (0.25, 0.4, 0.6)
    """Those for which the others are."""
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128)
    """Of dense, which is a contender with each of them."""
    sparse_batch_sizes: tuple[int, ...] = (32, 64, 128)
    """Those of which each other contender has the best."""
    lrs: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3, 2e-3)
    """The learning rates to choose from."""
    seeds: int = 5
    steps: int | None = None
    hidden: tuple[int, ...] = (1024, 1024)
    data_dir: Path | None = None
    device: str = "cpu"
    transform_options: dict[str, Any] = field(default_factory=dict)

    def steps_of(self, task: str) -> int:
        """How many dense steps the whole budget of ``task`` pays."""
        return self.steps or STEPS[task]

    def shares_of(self, contender: str) -> tuple[float, ...]:
        """The shares of the budget for which a contender is trained, the smallest first."""
        return tuple(sorted(self.shares if contender == "dense" else self.sparse_shares))

    def batch_sizes_of(self, contender: str) -> tuple[int, ...]:
        """The batch sizes that a contender tries, the smallest first."""
        return tuple(sorted(self.batch_sizes if contender == "dense" else self.sparse_batch_sizes))


def check_plan(plan: Plan) -> None:
    """Refuse what makes no comparison.

    Raises:
        ValueError: names it.
    """
    for name, known in {"tasks": tuple(STEPS), "contenders": SPARSE_NAMES}.items():
        for given in getattr(plan, name):
            if given not in known:
                raise ValueError(f"the {name} are {', '.join(known)}; given {given!r}.")
    for name, count in {"seeds": plan.seeds, "steps": plan.steps}.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1; given {count}.")
    for name in ("tasks", "contenders", "shares", "sparse_shares", "batch_sizes", "sparse_batch_sizes", "lrs"):
        _check_list(name.replace("_", " "), getattr(plan, name))
    for share in (*plan.shares, *plan.sparse_shares):
        if not 0 < share <= 1:
            raise ValueError(f"a share of the budget must be above 0 and at most 1; given {share}.")
    if 1 not in plan.shares:
        raise ValueError(
            f"dense must be trained for the whole budget, which the others are compared with: add 1 to the shares "
            f"{', '.join(map(str, plan.shares))}."
        )
    for batch in (*plan.batch_sizes, *plan.sparse_batch_sizes):
        if batch < 1:
            raise ValueError(f"a batch size must be at least 1; given {batch}.")
    for lr in plan.lrs:
        if not 0 < lr < math.inf:
            raise ValueError(f"a learning rate must be above 0; given {lr}.")


def _check_list(name: str, values: Sequence[Any]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"one of the {name} is there twice: {', '.join(map(str, values))}.")
    if not values and name != "contenders":
        raise ValueError(f"there must be at least one of the {name}.")
