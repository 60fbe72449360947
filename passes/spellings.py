"""The spellings of a linear call on a weight: modules, functions and ATen operators, and what each of them means.

A spelling takes a node and gives the ``Call`` it is, or None where it is another. ``rwfx.passes.normalize`` writes it.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from rwfx.passes.parameters import is_plain
from rwfx.weight_views import like_view


class Call(NamedTuple):
    """``target(x, weight, bias, *options)``, behind ``F.pad(x, *pad)`` where there is one."""

    target: Callable[..., Any]
    x: Any
    weight: Any  # a node, or the name of a parameter
    bias: Any = None  # of a grouped product, which has none, where its groups end
    options: tuple[Any, ...] = ()
    pad: tuple[Any, ...] | None = None
    transpose: bool = False  # ``weight.t()`` in place of ``weight``


Spelling = Callable[[GraphModule, Node], Call | None]


def operands_of(node: Node, **defaults: Any) -> dict[str, Any] | None:
    """The arguments of a call by name, in the order of ``defaults``; None if it has others."""
    if len(node.args) > len(defaults) or not node.kwargs.keys() <= defaults.keys():
        return None
    return defaults | dict(zip(defaults, node.args, strict=False)) | node.kwargs


def _module(gm: GraphModule, node: Node) -> Call | None:
    module, given = gm.get_submodule(str(node.target)), operands_of(node, input=None)
    if given is None or not is_plain(module, nn.Linear):
        return None
    bias = f"{node.target}.bias" if module._parameters["bias"] is not None else None
    return Call(F.linear, given["input"], f"{node.target}.weight", bias)


def _linear(gm: GraphModule, node: Node) -> Call | None:
    given = operands_of(node, input=None, weight=None, bias=None)
    return Call(F.linear, *given.values()) if given else None


def _product(gm: GraphModule, node: Node) -> Call | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    x, weight = node.args
    return _product_with(x, weight) if isinstance(x, Node) else None


def _addmm(gm: GraphModule, node: Node) -> Call | None:
    if len(node.args) != 3 or node.kwargs:
        return None
    bias, x, weight = node.args
    vector = like_view(gm, bias)
    return _product_with(x, weight, bias) if vector is not None and vector[1].dim() == 1 else None


def _product_with(x: Any, weight: Any, bias: Any = None) -> Call:
    """``x @ weight + bias``: ``F.linear`` of the transpose, which is the same call of the same kernel."""
    inner = untransposed(weight)
    return Call(F.linear, x, weight if inner is None else inner, bias, transpose=inner is None)


_aten = torch.ops.aten
LINEAR_MODULES: dict[type[nn.Module], Spelling] = {nn.Linear: _module}
LINEAR_CALLS: dict[Any, Spelling] = {
    F.linear: _linear,
    _aten.linear.default: _linear,
    torch.matmul: _product,
    torch.mm: _product,
    operator.matmul: _product,
    "matmul": _product,
    "mm": _product,
    _aten.matmul.default: _product,
    _aten.mm.default: _product,
    torch.addmm: _addmm,
    _aten.addmm.default: _addmm,
}

TRANSPOSES = {
    *(torch.t, torch.transpose, torch.swapaxes, "t", "transpose", "swapaxes"),
    *(_aten.t.default, _aten.transpose.int, _aten.swapaxes.default, _aten.numpy_T.default, _aten.mT.default),
}
PERMUTATIONS = {torch.permute, "permute", _aten.permute.default}


def untransposed(node: Any) -> Node | None:
    """``w`` of ``w.t()``, ``w.T``, ``w.mT``, ``w.transpose(0, 1)``, ``w.permute(1, 0)``."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    dims = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]
    axes = [d % 2 for d in dims if isinstance(d, int)]
    if (node.target in TRANSPOSES and sorted(axes) in ([], [0, 1])) or (node.target in PERMUTATIONS and axes == [1, 0]):
        return node.args[0]
    if node.target is getattr and node.args[1] in ("T", "mT"):
        return node.args[0]
    return None
