"""The example sampler: a module in the transformed model's graph that makes a step's blank list of kept examples.

In, at every training forward: the number of examples of the batch. Out: ``kept`` ``(E,)`` int64, which the backward
pass fills in (``rwfx.ops.examples``), and the state of the draw. Like the row sampler it has no entries in a
``state_dict``; what a resumed run needs is in ``sampler_state``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import rwfx.ops.examples
import rwfx.ops.streams  # noqa: F401  define the operators
from rwfx.examples import AdaptiveExamples, ExamplePolicy, SampledExamples
from rwfx.sampler import Buffers, KeepsTypes, check_entry

PARTS = 1_000_000  # of which a fraction is counted in whole ones


class ExampleSampler(KeepsTypes):
    """Decides how many examples a step keeps; which ones, ``rwfx::pick_examples`` decides in the backward pass."""

    state: Tensor
    needed: Tensor
    last: Tensor

    def __init__(self, policy: ExamplePolicy, seed: int) -> None:
        super().__init__()
        self.policy = policy
        # Computed here: of a fraction that is computed with in the forward pass a compiler may make a symbol.
        self.number, self.parts = (0, 0) if isinstance(policy, AdaptiveExamples) else counted(policy.fraction)
        self.register_buffer("state", torch.tensor([seed, 0]), persistent=False)
        self.register_buffer("needed", torch.ones(1, dtype=torch.float32), persistent=False)
        self.all_rows = Buffers([])  # of the weights whose calls leave out examples but no rows, by their number
        self.register_buffer("last", torch.zeros(2, dtype=torch.int64), persistent=False)

    def forward(self, num_examples: int) -> tuple[Tensor, Tensor]:
        """A blank list of a step's examples, and the state by which they are drawn."""
        if not torch.is_grad_enabled():
            return torch.empty(0, dtype=torch.int64, device=self.state.device), self.state
        state = self.state
        if isinstance(self.policy, SampledExamples):
            state = torch.ops.rwfx.tick_.default(self.state)
        fractions, count = [], 0
        if isinstance(self.policy, AdaptiveExamples):
            fractions = list(self.policy.fractions)
        else:
            count = kept_of(self.number, self.parts, num_examples)
        blank, counts = torch.ops.rwfx.blank_examples.default(self.needed, num_examples, count, fractions)
        self.last.copy_(counts)
        return blank, state

    def add_rows(self, count: int) -> None:
        """Hold the set of all rows of a weight with so many, as ``all_rows.{count}``."""
        self.all_rows.register_buffer(str(count), torch.arange(count, device=self.state.device), persistent=False)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``rwfx::pick_examples`` that the policy decides."""
        if isinstance(self.policy, SampledExamples):
            return {"floor": self.policy.floor, "unbiased": self.policy.unbiased}
        if isinstance(self.policy, AdaptiveExamples):
            return {"share": self.policy.share, "memory": self.policy.memory}
        return {}

    def sampler_state(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on with the same draws."""
        return {f"examples.{name}": getattr(self, name).detach().cpu().clone() for name in ("state", "needed")}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a state that is not of such a sampler.

        Raises:
            ValueError: names what is wrong.
        """
        for name, own in self.sampler_state().items():
            check_entry(name, state.get(name), own, "from a model that keeps all examples")

    def load_sampler_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``sampler_state`` was taken."""
        self.check_state(state)
        self.state.copy_(state["examples.state"])
        self.needed.copy_(state["examples.needed"])


def counted(fraction: float | int) -> tuple[int, int]:
    """A number of examples and 0, or 0 and how many of ``PARTS`` a fraction is."""
    return (fraction, 0) if isinstance(fraction, int) else (0, max(1, round(fraction * PARTS)))


def kept_of(number: int, parts: int, num_examples: int) -> int:
    """How many of ``num_examples``, also a compiler's symbol, what is ``counted`` keeps: rounded up."""
    if number:
        return torch.sym_min(number, num_examples)  # type: ignore[return-value]
    return (num_examples * parts + PARTS - 1) // PARTS
