"""Which sizes of its inputs an exported graph leaves open: as many as can be had."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.export import Dim
from torch.fx.experimental import _config as symbolic_shapes
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.modules.module import register_module_forward_pre_hook


class Freedom(NamedTuple):
    """One way to treat the sizes of the inputs."""

    open_dims: Callable[[int], int]  # how many of a tensor's dimensions are open, the first ones
    from_zero: bool  # whether 0 and 1 are sizes like any other, or the graph is for larger ones
    note: str  # what the graph does not do


# What torch.export raises where the forward pass depends on the values of a tensor.
DATA_DEPENDENT = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)

# From the freest.
FREEDOMS = (
    Freedom(lambda dim: dim, True, ""),
    Freedom(lambda dim: dim, False, ""),
    Freedom(lambda dim: min(dim, 1), True, "the graph holds for any batch, of the example's other sizes"),
    Freedom(lambda dim: 0, False, "the graph holds for the shapes of example_inputs alone"),
)

# A size is an expression in the sizes of the inputs. Those of real networks have fewer than ten operations; where each
# layer pads by the size that it is given they double and double again, and an export takes hours.
MOST_OPERATIONS = 20


def after(freedom: Freedom, error: Exception) -> tuple[Freedom, ...]:
    """What is left to try where ``freedom`` failed with ``error``."""
    if isinstance(error, DATA_DEPENDENT):  # on no size of an input
        return ()
    left = FREEDOMS[FREEDOMS.index(freedom) + 1 :]
    return tuple(f for f in left if not isinstance(error, Tangled) or f.open_dims(2) < freedom.open_dims(2))


class Tangled(Exception):
    """A size has become too long an expression."""


def shapes_for(freedom: Freedom, tensors: Sequence[Tensor]) -> Any:
    """``dynamic_shapes`` of ``torch.export``."""
    return (tuple({d: Dim.AUTO for d in range(freedom.open_dims(x.dim()))} for x in tensors),)


@contextmanager
def granting(freedom: Freedom) -> Iterator[None]:
    """Export so; raises ``Tangled`` where sizes become too long."""
    hook = register_module_forward_pre_hook(_refuse_tangles)
    try:
        with symbolic_shapes.patch({"backed_size_oblivious": freedom.from_zero}):  # type: ignore[attr-defined]
            yield
    finally:
        hook.remove()


def _refuse_tangles(module: nn.Module, args: tuple[Any, ...]) -> None:
    for x in args:
        for size in x.shape if isinstance(x, Tensor) else ():
            if isinstance(size, torch.SymInt) and size.node.expr.count_ops() > MOST_OPERATIONS:
                raise Tangled(
                    f"sizes inside of {type(module).__name__} depend on those of the inputs in too many steps"
                )
