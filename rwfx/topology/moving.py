"""Move a sparse weight's numbers to other places, and the optimizer's state with them.

Axes: N non-zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwfx.nonzeros import find_keys
from rwfx.sparse_weight import SparseWeight


@torch.no_grad()
def move(weight: SparseWeight, keys: Tensor, optimizer: Optimizer) -> int:
    """Give ``weight`` the places ``keys``, sorted and distinct; give how many are new.

    What stays keeps its value, its gradient and what the optimizer holds of it. What is new has exactly 0 there. Of as
    many places as before no tensor is replaced.
    """
    way = Way.between(weight.keys(), keys)
    values, grad = weight.values, weight.values.grad
    way.carry_state(optimizer, values)
    grad = None if grad is None else _in_place(grad, way.carried(grad))
    weight.move_(keys, way.carried(values))
    values.grad = grad
    return len(keys) - int(way.stays.sum())


class Way(NamedTuple):
    """From one set of keys to another."""

    stays: Tensor  # (N,) bool: which of the keys after were among those before
    place: Tensor  # (N,): where they were

    @classmethod
    def between(cls, before: Tensor, after: Tensor) -> "Way":
        """Both sorted and distinct."""
        return cls(*find_keys(before, after))

    def carried(self, numbers: Tensor) -> Tensor:
        """What is at the keys before, at the keys after; 0 where it was nowhere."""
        return torch.where(self.stays, numbers[self.place], 0)

    def carry_state(self, optimizer: Optimizer, parameter: Tensor) -> None:
        """Move every tensor of the parameter's shape, by whatever name: ``momentum_buffer``, ``exp_avg``, ..."""
        state = optimizer.state.get(parameter, {})
        for name, part in state.items():
            if isinstance(part, Tensor) and part.shape == parameter.shape:
                state[name] = _in_place(part, self.carried(part))


def _in_place(old: Tensor, new: Tensor) -> Tensor:
    return old.copy_(new) if old.shape == new.shape else new
