"""Move a sparse weight's numbers to other places, and the optimizer's state with them.

Axes: N non-zeros.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwfx.keys import carried
from rwfx.sparse_weight import SparseWeight


@torch.no_grad()
def move(weight: SparseWeight, before: Tensor, after: Tensor, optimizer: Optimizer) -> int:
    """Give ``weight``, whose keys are ``before``, those ``after``, sorted and distinct; give how many are new.

    What stays keeps its value, its gradient and what the optimizer holds of it. What is new has exactly 0 there. Of as
    many places as before no tensor is replaced.
    """
    values, states = weight.values, _states_of(optimizer, weight.values)
    held = [values, *states.values()] if values.grad is None else [values, *states.values(), values.grad]
    moved, new = carried(before, after, held)
    grad = None if values.grad is None else _in_place(values.grad, moved.pop())
    weight.move_(after, moved.pop(0))
    values.grad = grad
    _put(optimizer, values, states, moved)
    return int(new)


@torch.no_grad()
def carry_state(optimizer: Optimizer, parameter: Tensor, before: Tensor, after: Tensor) -> None:
    """Move what the optimizer holds of each number of ``parameter`` from the keys ``before`` to those ``after``."""
    states = _states_of(optimizer, parameter)
    _put(optimizer, parameter, states, carried(before, after, list(states.values()))[0])


def _states_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Every tensor of the parameter's shape, by whatever name: ``momentum_buffer``, ``exp_avg``, ..."""
    state = optimizer.state.get(parameter, {})
    return {name: of for name, of in state.items() if isinstance(of, Tensor) and of.shape == parameter.shape}


def _put(optimizer: Optimizer, parameter: Tensor, old: Mapping[str, Tensor], new: Sequence[Tensor]) -> None:
    for (name, of), to in zip(old.items(), new, strict=True):
        optimizer.state[parameter][name] = _in_place(of, to)


def _in_place(old: Tensor, new: Tensor) -> Tensor:
    return old.copy_(new) if old.shape == new.shape else new
