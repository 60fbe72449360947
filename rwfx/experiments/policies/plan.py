"""What a comparison of policies is to run: its tasks, its contenders' numbers, its rates and its seeds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = {
    "digits": 400,
    "mnist": 1600,
    "fashion-mnist": 1600,
    "shakespeare": 3000,
    "digits-classes": 200,
    "classes": 800,
    "transfer": 800,
}
"""The tasks (see ``tasks``), and the steps of a run where none are asked for."""

POLICY_NAMES = (
    *("RandomWalk", "AdaptiveWalk", "LearnedWalk", "TopK", "Uniform", "Magnitude"),
    *("DenseFirst+AdaptiveWalk", "DenseFirst+TopK"),
)
"""The kinds of sparse contender (see ``contenders.POLICIES``)."""


@dataclass(frozen=True)
class Plan:
    """What to run and where to write it."""

    out: Path = Path("results/policies")
    tasks: tuple[str, ...] = ("mnist",)
    policies: tuple[str, ...] = POLICY_NAMES
    densities: tuple[float, ...] = (0.05, 0.1, 0.25)
    dense_shares: tuple[float, ...] = (0.05, 0.1, 0.25, 0.4, 0.6, 0.8)
    """The shares of the steps after which further dense runs end; small ones cost as many updates as sparse runs."""
    batch_shares: tuple[float, ...] = (0.5, 0.25)
    """The shares of the batch with which further dense runs take all steps."""
    lrs: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    """The learning rates to choose from."""
    seeds: int = 3
    steps: int | None = None
    batch_size: int = 128
    hidden: tuple[int, ...] = (512, 512)
    evaluations: int = 20
    """Evaluations of a final run, at ends of its turns."""
    data_dir: Path | None = None
    device: str = "cpu"
    transform_options: dict[str, Any] = field(default_factory=dict)

    def steps_of(self, task: str) -> int:
        """How many steps a whole run of ``task`` has."""
        return self.steps or STEPS[task]


def check_plan(plan: Plan) -> None:
    """Refuse numbers that make no comparison.

    Raises:
        ValueError: names the number.
    """
    for name, known in {"tasks": tuple(STEPS), "policies": POLICY_NAMES}.items():
        for given in getattr(plan, name):
            if given not in known:
                raise ValueError(f"the {name} are {', '.join(known)}; given {given!r}.")
    counts = {"seeds": plan.seeds, "steps": plan.steps, "batch size": plan.batch_size, "evaluations": plan.evaluations}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1; given {count}.")
    for name in ("tasks", "policies", "densities", "dense_shares", "batch_shares", "lrs"):
        values = getattr(plan, name)
        if len(set(values)) < len(values):
            raise ValueError(f"one of the {name.replace('_', ' ')} is there twice: {', '.join(map(str, values))}.")
    shares = {"dense share": plan.dense_shares, "batch share": plan.batch_shares}
    for name, values in shares.items():
        for value in values:
            if not 0 < value < 1:
                raise ValueError(f"a {name} must be above 0 and below 1; given {value}.")
    for lr in plan.lrs:
        if not 0 < lr < float("inf"):
            raise ValueError(f"a learning rate must be above 0; given {lr}.")
