"""Move a sparse weight's numbers to other places, and the optimizer's state with them.

Axes: N non-zeros.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwfx.nonzeros import contains
from rwfx.sparse_weight import SparseWeight


@torch.no_grad()
def move(weight: SparseWeight, keys: Tensor, optimizer: Optimizer) -> int:
    """Give ``weight`` the places ``keys``, sorted and distinct; give how many are new.

    What stays keeps its value, its gradient and what the optimizer holds of it. What is new has exactly 0 there. Of as
    many places as before no tensor is replaced.
    """
    before, values, grad = weight.keys(), weight.values, weight.values.grad
    carry_state(optimizer, values, before, keys)
    moved, moved_grad = (None if part is None else carried(part, before, keys) for part in (values, grad))
    weight.move_(keys, moved)
    if grad is not None and values.grad is grad:
        grad.copy_(moved_grad)
    else:
        values.grad = moved_grad
    return len(keys) - int(contains(before, keys)[0].sum())


@torch.no_grad()
def carry_state(optimizer: Optimizer, parameter: Tensor, before: Tensor, after: Tensor) -> None:
    """Move every tensor of the parameter's shape, by whatever name: ``momentum_buffer``, ``exp_avg``, ..."""
    state = optimizer.state.get(parameter, {})
    for name, part in state.items():
        if isinstance(part, Tensor) and part.shape == parameter.shape:
            moved = carried(part, before, after)
            state[name] = part.copy_(moved) if moved.shape == part.shape else moved


def carried(numbers: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """What is at the keys ``before``, at the keys ``after``; 0 where it was nowhere."""
    stays, place = contains(before, after)
    return torch.where(stays, numbers[place], 0)
