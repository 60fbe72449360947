"""The gradients that row sets should give, by plain autograd on the model as it is.

In: a model, and the row set of each row-sparse weight. While ``MaskedCalls`` is entered, the gradient of the output of
every call on such a weight is zeroed outside the weight's row set; all else is dense autograd. It knows nothing of
graphs: a call is met when torch makes it.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from rwfx.weight_views import View


class _MaskedGradient(torch.autograd.Function):
    """A copy, whose gradient is masked. A hook would be lost where the output is then changed in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.saved_tensors[0], None


class MaskedCalls(TorchFunctionMode):
    """Masks the calls on the weights of ``rows``, parameters or parts of them; ``met`` collects their names.

    ``rounded``: whether a call gave float32 numbers that need a gradient.
    """

    def __init__(self, model: nn.Module, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        held = {name: parameters[name] for name in (weight.partition("[")[0] for weight in rows)}
        self.parameters = {p.untyped_storage().data_ptr(): (name, p) for name, p in held.items()}
        self.origins = WeakIdKeyDictionary()  # of what is computed without calls on weights, the parameters behind it
        self.rows = rows
        self.met: set[str] = set()
        self.rounded = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, and hook its output where it is a call on one of the weights."""
        out = func(*args, **(kwargs or {}))
        if func not in CALLS:
            self._note_origins(args, kwargs, out)
        if not isinstance(out, Tensor):
            return out
        self.rounded |= out.requires_grad and out.dtype == torch.float32
        if func in CALLS:
            operand, dim = CALLS[func](*args, **(kwargs or {}))
            weight = self._weight_of(operand)
            if weight in self.rows:
                self.met.add(weight)
                if out.requires_grad:  # not before a weight that is frozen
                    mask = torch.isin(torch.arange(out.shape[dim]), self.rows[weight])
                    out = _MaskedGradient.apply(out, mask.view(-1, *[1] * (-1 - dim)).to(out))
        return out

    def _note_origins(self, *given: Any) -> None:
        """Let the results of a call, the last of ``given``, have the origins of its operands."""
        *operands, out = given
        found = set()
        for x in tree_leaves(operands):
            if isinstance(x, Tensor):
                place = x.untyped_storage().data_ptr()
                found |= {place} if place in self.parameters else self._origins_of(x)
        for x in tree_leaves(out) if found else ():
            if isinstance(x, Tensor):
                self.origins[x] = found

    def _origins_of(self, x: Tensor) -> set[int]:
        return self.origins.get(x) or set()

    def _weight_of(self, operand: Any) -> str:
        """The name of the weight that a call multiplies with: of a parameter, of a part of one by where it lies, or of
        one of the weight's shape that it is computed from."""
        place = operand.untyped_storage().data_ptr() if isinstance(operand, Tensor) else 0
        if place not in self.parameters:
            origins = [self.parameters[at] for at in self._origins_of(operand)] if place else []
            return next((name for name, p in origins if p.shape == operand.shape), "")
        name, parameter = self.parameters[place]
        if operand.dim() != 2 or parameter.dim() not in (2, 3):
            return name
        down, across = parameter.shape[-2:]
        index, offset = divmod(int(operand.storage_offset()), down * across)
        transposed = operand.stride() == (1, across) and operand.shape[1] == down
        first, size = (offset, across) if transposed else (offset // across, down)
        whole = View(None if parameter.dim() == 2 else index, transposed)
        part = whole._replace(part=(first, first + len(operand))).name(name)
        # One that is used both ways has a name with all of its rows for the second.
        return whole.name(name) if len(operand) == size and part not in self.rows else part


@contextmanager
def masked_calls(model: nn.Module, rows: Mapping[str, Tensor]) -> Iterator[MaskedCalls]:
    """Enter ``MaskedCalls``, such that it sees the calls inside of ``torch.nn.functional``'s own functions too."""
    with ExitStack() as stack:
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            stack.enter_context(mock.patch.object(F, name, return_value=False))
        yield stack.enter_context(MaskedCalls(model, rows))


def _weighted(dim: int) -> Callable[..., tuple[Any, int]]:
    def operands(input: Any, weight: Any, *rest: Any, **options: Any) -> tuple[Any, int]:
        return weight, dim

    return operands


def _product(a: Any, b: Any, **options: Any) -> tuple[Any, int]:
    return b.t() if isinstance(b, Tensor) and b.dim() == 2 else None, -1


def _addmm(bias: Any, a: Any, b: Any, **options: Any) -> tuple[Any, int]:
    return _product(a, b)


TRANSPOSED = {F.conv_transpose1d: -2, F.conv_transpose2d: -3, F.conv_transpose3d: -4}
CALLS: dict[Any, Callable[..., tuple[Any, int]]] = {
    F.linear: _weighted(-1),
    torch._grouped_mm: _weighted(-1),  # type: ignore[attr-defined]  what F.grouped_mm calls
    F.conv1d: _weighted(-2),
    F.conv2d: _weighted(-3),
    F.conv3d: _weighted(-4),
    **{function: _weighted(dim) for function, dim in TRANSPOSED.items()},
    **dict.fromkeys((torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, operator.matmul), _product),
    **dict.fromkeys((torch.Tensor.__matmul__,), _product),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), _addmm),
}
"""The functions that may be called on a weight: the weight, its rows first, and the output's dimension of features."""
