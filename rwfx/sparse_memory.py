"""The bytes that training an always-sparse model holds, by category, beside those of the dense model.

In: a sparsified model and its optimizer. Out: a ``SparseMemory``. Counted are all parameters of the model, biases and
norms too; not what a step holds for a while, such as activations.
"""

from dataclasses import dataclass, fields
from math import prod

from torch import Tensor, nn
from torch.optim import Optimizer

from rwfx.sparse_weight import SparseWeight
from rwfx.sparsified import SparsifiedModule


@dataclass(frozen=True)
class Bytes:
    """Bytes by category."""

    values: int
    """Of the parameters."""
    gradients: int
    """Of those that are trained, after a backward pass."""
    optimizer_state: int
    """What the optimizer holds now: nothing before its first step."""
    index: int
    """Where the non-zeros are."""

    @property
    def total(self) -> int:
        """All categories."""
        return sum(getattr(self, category.name) for category in fields(self))


@dataclass(frozen=True)
class SparseMemory:
    """The bytes of the sparsified model, and of the dense one trained by the same optimizer."""

    sparse: Bytes
    dense: Bytes

    @property
    def share(self) -> float:
        """All of the one over all of the other."""
        return self.sparse.total / self.dense.total

    def __str__(self) -> str:
        rows = [f"{'bytes':<16} {'sparse':>15} {'dense':>15}"]
        for name in (*(category.name for category in fields(Bytes)), "total"):
            own, of = (getattr(bytes_, name) for bytes_ in (self.sparse, self.dense))
            rows.append(f"{name.replace('_', ' '):<16} {own:>15,} {of:>15,}" + (f"  {own / of:.1%}" if of else ""))
        return "\n".join(rows)


def memory_of(model: SparsifiedModule, optimizer: Optimizer | None = None) -> SparseMemory:
    """Count the bytes of ``model``, and of the state of ``optimizer`` for its parameters.

    Raises:
        TypeError: ``model`` did not come from ``rwfx.sparsify``.
    """
    if not isinstance(model, SparsifiedModule):
        raise TypeError(f"model must come from rwfx.sparsify, got {type(model).__name__}.")
    weights = [module for module in model.modules() if isinstance(module, SparseWeight)]
    sizes = {id(weight.values): prod(weight.shape) for weight in weights}
    sparse, dense = [0, 0, 0], [0, 0, 0]
    for parameter in model.parameters():
        size = sizes.get(id(parameter), parameter.numel())
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        for total, numbers in ((sparse, parameter.numel()), (dense, size)):
            total[0] += numbers * parameter.itemsize
            total[1] += numbers * parameter.itemsize * parameter.requires_grad
            total[2] += sum(_state_bytes(held, parameter, numbers) for held in state.values())
    index = sum(buffer.nbytes for weight in weights for buffer in weight.buffers())
    return SparseMemory(*(Bytes(*of, index=at) for of, at in ((sparse, index), (dense, 0))))


def _state_bytes(held: object, parameter: nn.Parameter, numbers: int) -> int:
    """The bytes of a tensor that an optimizer holds, if the parameter had so many numbers."""
    if not isinstance(held, Tensor):
        return 0
    return numbers * held.itemsize if held.shape == parameter.shape else held.nbytes
