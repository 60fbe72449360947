"""Linear calls on a view of a parameter: on its transpose, as Hugging Face's ``Conv1D`` has it, or on some of its rows.

A view is found by taking it of a tensor without data and reading where its numbers lie.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from rwfx.label_rules import bare_name
from rwfx.passes.parameters import parameter_of


class WeightView(NamedTuple):
    """``x @ parameter[first : first + rows].t()``; ``transposed``: of the parameter's transpose in place of it."""

    x: Any
    parameter: nn.Parameter
    first: int
    rows: int
    transposed: bool


def weight_view(gm: GraphModule, node: Node) -> WeightView | None:
    """What a call is linear in, if it is linear in a view of a parameter of two dimensions; None for any other node."""
    operands = CALLS.get(node.target if callable(node.target) else str(node.target))
    if operands is None or node.kwargs:
        return None
    found = operands(*node.args)
    view = None if found is None or not isinstance(found[1], Node) else _view(gm, found[1])
    if found is None or view is None or view[1].dim() != 2:
        return None
    parameter, weight_OI = view[0], view[1] if operands is _linear else view[1].t()
    (rows, features), (row_stride, feature_stride) = weight_OI.shape, weight_OI.stride()
    offset = int(weight_OI.storage_offset())
    if (features, row_stride, feature_stride) == (parameter.shape[1], features, 1) and offset % features == 0:
        return WeightView(found[0], parameter, offset // features, rows, False)
    if (features, row_stride, feature_stride) == (*parameter.shape[:1], 1, parameter.shape[1]):
        return WeightView(found[0], parameter, offset, rows, True)
    return None


def _linear(x: Any, weight: Any, bias: Any = None) -> tuple[Any, Any]:
    return x, weight


def _product(*operands: Any) -> tuple[Any, Any] | None:
    return operands if len(operands) == 2 else None


def _addmm(*operands: Any) -> tuple[Any, Any] | None:
    return operands[1:] if len(operands) == 3 else None


_aten = torch.ops.aten
CALLS: dict[Any, Callable[..., tuple[Any, Any] | None]] = {
    F.linear: _linear,
    _aten.linear.default: _linear,
    operator.matmul: _product,
    torch.matmul: _product,
    torch.mm: _product,
    "matmul": _product,
    "mm": _product,
    _aten.matmul.default: _product,
    _aten.mm.default: _product,
    torch.addmm: _addmm,
    _aten.addmm.default: _addmm,
}
VIEWS = {
    *("t", "transpose", "permute", "swapaxes", "numpy_T", "mT", "view", "alias", "detach"),
    *("split", "split_with_sizes", "chunk", "unbind", "select", "slice", "narrow", "getitem"),
}


def _view(gm: GraphModule, node: Node) -> tuple[nn.Parameter, Tensor] | None:
    """The parameter that a node is a view of, and the view of a tensor like it without data."""
    if (parameter := parameter_of(gm, node)) is not None:
        contiguous = parameter.dim() == 2 and parameter.is_contiguous()
        return (parameter, torch.empty(parameter.shape, device="meta")) if contiguous else None
    sources = node.all_input_nodes
    if len(sources) != 1 or node.op not in ("call_function", "call_method") or bare_name(node.target) not in VIEWS:
        return None
    if (source := _view(gm, sources[0])) is None:
        return None
    args, kwargs = tree_map(lambda a: source[1] if isinstance(a, Node) else a, (node.args, node.kwargs))
    function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    return source[0], function(*args, **kwargs)
