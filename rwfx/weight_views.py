"""Which part of a parameter a weight is: all of it, its transpose, some of its rows, one or all matrices of a stack.

The weight ``(O, I)`` of a linear call need not be a parameter as it is stored: Hugging Face's ``Conv1D`` multiplies
with a transpose, attention with parts of a packed weight, experts with one matrix of many, or with all of them in a
grouped product. Each such *view* is a weight of its own, with a name such as ``in_proj_weight[0:64]`` and rows and a
row set of its own, so that with a density every part has as many rows in every step. It is found by taking the view of
a tensor without data and reading where its numbers lie.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from rwfx.label_rules import bare_name
from rwfx.passes.parameters import parameter_of


class View(NamedTuple):
    """``p[index]``, or ``p`` itself; ``transposed`` of it the transpose; of that the rows ``first`` to ``last``.

    ``stacked``: all matrices of a parameter ``(E, O, I)``, ``transposed`` of ``(E, I, O)``, as ``(O, I, E)``: a row
    lies in every one of them, as that of a convolution in every place of its kernel.
    ``computed``: the weight is an image of that (``rwfx.computed_weights``), which stands for it where walks look.
    """

    index: int | None = None
    transposed: bool = False
    part: tuple[int, int] | None = None
    computed: bool = False
    stacked: bool = False

    def of(self, parameter: Tensor) -> Tensor:
        """The weight, or what it is an image of; it shares the parameter's memory."""
        for function, *arguments in self._steps():
            parameter = function(parameter, *arguments)
        return parameter

    def node(self, graph: Graph, parameter: str) -> Node:
        """The same as new nodes of a graph."""
        at = graph.get_attr(parameter)
        for function, *arguments in self._steps():
            at = graph.call_function(function, (at, *arguments))
        return at

    @property
    def has_rows(self) -> bool:
        """Whether the weight's rows are rows of the parameter, its first dimension."""
        return self.index is None and not (self.transposed or self.computed or self.stacked)

    def name(self, parameter: str) -> str:
        """The weight as one would write it: ``"w"``, ``"w[0:64]"``, of a transpose ``"w"`` and ``"w[:, 0:64]"``."""
        places = [] if self.index is None else [str(self.index)]
        if self.part is not None:
            places += [*[":"] * self.transposed, f"{self.part[0]}:{self.part[1]}"]
        return f"{parameter}[{', '.join(places)}]" if places else parameter

    def _steps(self) -> Iterator[tuple[Any, ...]]:
        if self.index is not None:
            yield torch.select, 0, self.index
        if self.stacked:
            yield torch.permute, (2, 1, 0) if self.transposed else (1, 2, 0)
        elif self.transposed:
            yield (torch.t,)
        if self.part is not None:
            yield torch.narrow, 0, self.part[0], self.part[1] - self.part[0]


def view_of(gm: GraphModule, node: Any, transpose: bool = False) -> tuple[nn.Parameter, View] | None:
    """The parameter that a node, or its transpose, is a matrix of, and which one; None for any other node."""
    if (parameter := parameter_of(gm, node)) is not None and not transpose:
        return (parameter, View()) if parameter.dim() == 2 else None
    if (found := like_view(gm, node)) is None or found[1].dim() != 2 or found[0].dim() not in (2, 3):
        return None
    if not found[1].numel():
        return None
    parameter, weight_OI = found[0], found[1].t() if transpose else found[1]
    (down, across), (rows, features) = parameter.shape[-2:], weight_OI.shape
    index, offset = divmod(int(weight_OI.storage_offset()), down * across)
    stack = None if parameter.dim() == 2 else index
    if (features, weight_OI.stride()) == (across, (across, 1)) and offset % across == 0:
        first, transposed, size = offset // across, False, down
    elif (features, weight_OI.stride()) == (down, (1, across)):
        first, transposed, size = offset, True, across
    else:
        return None
    if first + rows > size:  # of several matrices of a stack
        return None
    return parameter, View(stack, transposed, None if rows == size else (first, first + rows))


def stack_of(gm: GraphModule, node: Any) -> tuple[nn.Parameter, View] | None:
    """The parameter that a node is as the matrices ``(E, I, O)`` of a grouped product, and how; None for any other."""
    if (found := like_view(gm, node)) is None or found[0].dim() != 3:
        return None
    parameter, weight_EIO = found
    for view, whole in ((View(transposed=True, stacked=True), parameter), (View(stacked=True), parameter.mT)):
        if (weight_EIO.shape, weight_EIO.stride()) == (whole.shape, whole.stride()):
            return parameter, view
    return None


def rows_of(gm: GraphModule, node: Any) -> tuple[nn.Parameter, range] | None:
    """The parameter that a node is, or is consecutive rows of, its first dimension, and which; None for any other."""
    if (parameter := parameter_of(gm, node)) is not None:
        return parameter, range(len(parameter))
    if (found := like_view(gm, node)) is None:
        return None
    parameter, rows = found
    if (rows.shape[1:], rows.stride()) != (parameter.shape[1:], parameter.stride()) or not parameter.numel():
        return None
    first, rest = divmod(int(rows.storage_offset()), parameter.stride(0))
    return None if rest else (parameter, range(first, first + len(rows)))


def viewed(gm: GraphModule, node: Any) -> nn.Parameter | None:
    """The parameter that a node is, or is a view of; None for any other."""
    if (parameter := parameter_of(gm, node)) is not None:
        return parameter
    found = like_view(gm, node)
    return None if found is None else found[0]


VIEWS = {
    *("t", "transpose", "permute", "swapaxes", "numpy_T", "mT", "getattr", "view", "alias"),
    *("split", "split_with_sizes", "chunk", "unbind", "select", "slice", "narrow", "getitem"),
}


def like_view(gm: GraphModule, node: Any) -> tuple[nn.Parameter, Tensor] | None:
    """The parameter that a node is a view of, and the view of a tensor like it without data."""
    found = views_of(gm, node)
    return found if found is not None and isinstance(found[1], Tensor) else None


def views_of(gm: GraphModule, node: Any) -> tuple[nn.Parameter, Any] | None:
    """The same, and of a call that gives several views all of them."""
    if not isinstance(node, Node):
        return None
    if (parameter := parameter_of(gm, node)) is not None:
        like = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        return (parameter, like) if parameter.is_contiguous() else None
    sources = node.all_input_nodes
    if len(sources) != 1 or node.op not in ("call_function", "call_method") or bare_name(node.target) not in VIEWS:
        return None
    if node.target is getattr and node.args[1] not in ("T", "mT"):
        return None
    if bare_name(node.target) == "getitem" and _looks_up(node.args[1]):
        return None
    if (source := views_of(gm, sources[0])) is None:
        return None
    args, kwargs = tree_map(lambda a: source[1] if isinstance(a, Node) else a, (node.args, node.kwargs))
    function: Callable[..., Any] = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    views = function(*args, **kwargs)
    whole = tree_leaves(source[1])[0]
    return (source[0], views) if all(_is_view(v, whole) for v in tree_leaves(views)) else None


def _is_view(found: Any, of: Tensor) -> bool:
    """Whether it is numbers of the tensor in its memory, and no copy."""
    if not isinstance(found, Tensor) or found.dtype != of.dtype:
        return False
    return found.untyped_storage()._cdata == of.untyped_storage()._cdata


def _looks_up(index: Any) -> bool:
    """Whether ``p[index]`` is a copy of what a list or a truth value chooses."""
    return any(isinstance(i, list | bool) for i in (index if isinstance(index, tuple) else (index,)))
