"""The bytes that training an always-sparse model holds, by category, beside those of the dense model.

In: a sparsified model, its optimizer and its topology. Out: a ``SparseMemory``. Counted are all parameters of the
model, biases and norms too; not what a step holds for a while, such as activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import prod

from torch import Tensor, nn
from torch.optim import Optimizer

from rwfx.sparse_weight import SparseWeight
from rwfx.sparsified import SparsifiedModule
from rwfx.topology import Topology


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
    topology: int
    """What finds the next places: candidates and their gradients; of SNFS a mean gradient of every place; of Top-KAST
    all weights, and what is trained of them outside of the non-zeros."""

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


def memory_of(
    model: SparsifiedModule, optimizer: Optimizer | None = None, topology: Topology | None = None
) -> SparseMemory:
    """Count the bytes of ``model``, of the state of ``optimizer`` for its parameters, and of what ``topology`` keeps.

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
    kept = _topology_bytes(model, weights, topology)
    own, of_dense = (Bytes(values, gradients, state, 0, 0) for values, gradients, state in (sparse, dense))
    return SparseMemory(replace(own, index=index, topology=kept), of_dense)


def _topology_bytes(model: nn.Module, weights: Sequence[SparseWeight], topology: Topology | None) -> int:
    found: list[object] = []
    for probe in (weight.probe for weight in weights if weight.probe is not None):
        found += [probe.state, probe.keys, probe.grads]
    if topology is not None:
        explored = topology.state_dict()["exploration"].values()
        found += [of["theta"] for of in explored]
        # Their values are parameters that the optimizer has and the model has not.
        own = {id(parameter) for parameter in model.parameters()}
        trained = [of for group in topology.optimizer.param_groups for of in group["params"]] if explored else []
        for parameter in (of for of in trained if id(of) not in own):
            found += [parameter, parameter.grad, *topology.optimizer.state.get(parameter, {}).values()]
    return sum(held.nbytes for held in found if isinstance(held, Tensor))


def _state_bytes(held: object, parameter: nn.Parameter, numbers: int) -> int:
    """The bytes of a tensor that an optimizer holds, if the parameter had so many numbers."""
    if not isinstance(held, Tensor):
        return 0
    return numbers * held.itemsize if held.shape == parameter.shape else held.nbytes
