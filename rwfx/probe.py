"""A probe: where the backward pass of a sparse weight's calls leaves candidates and their gradients.

In, before a step: what to look for. Out, after its backward pass: keys and gradients (``rwfx.ops.probe`` has the
rules). It is no part of a model: it has no parameters, no buffers and no entries in a ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rwfx.ops.probe import DUE, NOT_DUE, probe

if TYPE_CHECKING:
    from rwfx.sparse_weight import SparseWeight


class Probe:
    """What ``weight.probe`` is while a method of topology looks for candidates.

    Attributes:
        rule: what is looked for.
        state, keys, grads: what the operator writes; see ``rwfx.ops.probe.probe``.
    """

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.state = torch.zeros(4, dtype=torch.int64, device="cpu")
        self.keys = torch.empty(0, dtype=torch.int64, device="cpu")
        self.grads = torch.empty(0, device="cpu")

    def __call__(self, y: Tensor, x: Tensor, weight: SparseWeight, options: Sequence[int]) -> Tensor:
        """``y``, whose backward pass fills the probe when it is due."""
        index = weight.ccol_indices, weight.row_indices, weight.crow_indices
        buffers = self.state, self.keys, self.grads
        return probe(y, x, weight.values, *index, options, weight.by, self.rule, *buffers)

    def fit(self, weight: SparseWeight, candidates: int, gradients: int) -> None:
        """Have place for so many of each, on the weight's device. What fits stays, so nothing is compiled anew."""
        like = weight.values
        if self.keys.shape != (candidates,) or self.keys.device != like.device:
            self.keys = torch.zeros(candidates, dtype=torch.int64, device=like.device)
        if self.grads.shape != (gradients,) or self.grads.device != like.device or self.grads.dtype != like.dtype:
            self.grads = torch.zeros(gradients, dtype=like.dtype, device=like.device)

    def look(self, due: bool, key: int = 0, draws: int = 0, given: int = 0) -> None:
        """Look in the next backward pass, or at none until further notice; ``given`` keys are there already."""
        self.state.copy_(torch.tensor([DUE if due else NOT_DUE, key, draws, given], device="cpu"))

    @property
    def looks(self) -> bool:
        """Whether a backward pass has looked, or the next one does."""
        return int(self.state[0]) != NOT_DUE

    def candidates(self) -> tuple[Tensor, Tensor]:
        """The keys that were found, sorted, and their gradients."""
        count = int(self.state[3])
        return self.keys[:count], self.grads[:count]
