"""Contenders: the ways to train that are compared.

``dense``    all steps of the whole batch, with ``torch.optim.Adam(fused=True)``; *fewer steps*, where the run and its
             schedule end after a share of the steps; or a *smaller batch*, with all steps.
a policy     all steps of the whole batch, the rows chosen by it at a density, with ``rwfx.optim.Adam``. A weight
             whose row-sparse backward would not pay stays dense, as it does for a user.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rwfx.experiments.policies.plan import POLICY_NAMES, Plan
from rwfx.policies import AdaptiveWalk, LearnedWalk, Magnitude, Policy, RandomWalk, TopK, Uniform
from rwfx.schedules import DenseFirst
from rwfx.train import RandomWalkTrainer

POLICIES: dict[str, Callable[[float, int], Policy]] = {
    "RandomWalk": lambda density, steps: RandomWalk(density=density),
    "AdaptiveWalk": lambda density, steps: AdaptiveWalk(density=density),
    "LearnedWalk": lambda density, steps: LearnedWalk(density=density),
    "TopK": lambda density, steps: TopK(density),
    "Uniform": lambda density, steps: Uniform(density),
    "Magnitude": lambda density, steps: Magnitude(density),
    "DenseFirst+AdaptiveWalk": lambda density, steps: AdaptiveWalk(density=_dense_first(density, steps)),
    "DenseFirst+TopK": lambda density, steps: TopK(_dense_first(density, steps)),
}
"""The policy of each kind of sparse contender, at a density, for a run of so many steps."""
assert tuple(POLICIES) == POLICY_NAMES

FIRST = 0.1
"""The share of its steps that a ``DenseFirst`` contender takes densely."""


@dataclass(frozen=True)
class Contender:
    """A way to train."""

    kind: str
    """``"dense"``, or a key of ``POLICIES``."""
    density: float | None = None
    steps_share: float = 1.0
    batch_share: float = 1.0

    @property
    def name(self) -> str:
        """What it is called in tables."""
        if self.density is not None:
            return f"{self.kind} {self.density:g}"
        if self.steps_share < 1:
            return f"dense, {self.steps_share:g} of the steps"
        return "dense" if self.batch_share == 1 else f"dense, {self.batch_share:g} of the batch"

    @property
    def on_frontier(self) -> bool:
        """Whether it is dense with the whole batch, so that others are compared with it at their cost."""
        return self.kind == "dense" and self.batch_share == 1

    def steps(self, whole: int) -> int:
        """How many steps it takes where a whole run has ``whole``."""
        return max(1, round(self.steps_share * whole))

    def batch(self, whole: int) -> int:
        """How many examples a step of it sees where a whole batch has ``whole``."""
        return max(1, round(self.batch_share * whole))


DENSE = Contender("dense")


def contenders(plan: Plan) -> list[Contender]:
    """Every contender of ``plan``, dense first."""
    return [
        DENSE,
        *[Contender("dense", steps_share=share) for share in sorted(plan.dense_shares, reverse=True)],
        *[Contender("dense", batch_share=share) for share in sorted(plan.batch_shares, reverse=True)],
        *[Contender(kind, density) for kind in plan.policies for density in sorted(plan.densities)],
    ]


def trainer_of(
    plan: Plan, contender: Contender, network: nn.Module, inputs: Tensor, steps: int, epochs: int, seed: int
) -> RandomWalkTrainer:
    """The trainer that trains ``network`` in place, on batches such as ``inputs``."""
    options: dict[str, Any] = {"epochs": epochs, "seed": seed, "progress": False}
    if contender.density is None:
        return RandomWalkTrainer(network, "full", **options)
    options |= {"rows": POLICIES[contender.kind](contender.density, steps), **transform_options(plan, inputs)}
    return RandomWalkTrainer(network, "rw_sparse", **options)


def transform_options(plan: Plan, inputs: Tensor) -> dict[str, Any]:
    """The arguments of ``rwfx.transform`` besides the policy."""
    return {"example_inputs": (inputs,), **plan.transform_options}


def _dense_first(density: float, steps: int) -> DenseFirst:
    return DenseFirst(max(1, round(FIRST * steps)), density)
