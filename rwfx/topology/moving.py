"""Move a sparse weight's numbers to other places, and the optimizer's state with them.

Axes: N non-zeros.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwfx.keys import carried, origins
from rwfx.sparse_weight import SparseWeight


@torch.no_grad()
def move(weight: SparseWeight, before: Tensor, after: Tensor, optimizer: Optimizer) -> int:
    """Give ``weight``, whose keys are ``before``, those ``after``, sorted and distinct; give how many are new.

    What stays keeps its value, its gradient and what the optimizer holds of it. What is new has exactly 0 there. Of as
    many places as before no tensor is replaced.
    """
    values, grad, origin = weight.values, weight.values.grad, origins(before, after)
    carry_state(optimizer, values, origin)
    if grad is not None:
        grad = _in_place(grad, carried(grad, origin))
    weight.move_(after, carried(values, origin))
    values.grad = grad
    return int((origin < 0).sum())


@torch.no_grad()
def carry_state(optimizer: Optimizer, parameter: Tensor, origin: Tensor) -> None:
    """Move every tensor of the parameter's shape, by whatever name: ``momentum_buffer``, ``exp_avg``, ..."""
    state = optimizer.state.get(parameter, {})
    for name, part in state.items():
        if isinstance(part, Tensor) and part.shape == parameter.shape:
            state[name] = _in_place(part, carried(part, origin))


def _in_place(old: Tensor, new: Tensor) -> Tensor:
    return old.copy_(new) if old.shape == new.shape else new
