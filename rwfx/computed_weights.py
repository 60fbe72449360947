"""Weights that are computed from a parameter: by weight norm, spectral norm, standardisation, a mask, a scale.

In: a node of a graph. Out: the parameter that it is an image of, number by number: the one of the weight's shape, while
all else that it is computed from has another shape or is no parameter. The operations that ``KEEPING`` lists leave
every number where it is in the order of the memory; those with fewer numbers than the weight has come to factors or
terms that many of its places share. So row ``i`` of the weight is first of all row ``i`` of the parameter, and where
walks look the parameter stands for the weight.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from rwfx.label_rules import bare_name
from rwfx.passes.parameters import parameter_of

KEEPING = {
    *("add", "sub", "rsub", "mul", "multiply", "div", "divide", "true_divide", "truediv", "neg", "reciprocal"),
    *("pow", "square", "sqrt", "rsqrt", "exp", "log", "abs", "tanh", "sigmoid", "softplus"),
    *("clamp", "clamp_min", "clamp_max", "maximum", "minimum", "where", "gt", "ge", "lt", "le", "masked_fill"),
    *("to", "to_copy", "type_as", "float", "double", "clone", "contiguous"),
    *(
        "view",
        "reshape",
        "reshape_as",
        "view_as",
        "unsafe_view",
        "flatten",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
    ),
    *("normalize", "batch_norm", "native_batch_norm", "layer_norm", "native_layer_norm"),
    *("weight_norm", "weight_norm_interface"),
}
# Those of them that give several results.
SEVERAL = {"native_batch_norm", "native_layer_norm", "weight_norm_interface"}
# What multiplies with weights that have rows of their own.
PRODUCTS = {"linear", "matmul", "mm", "addmm", "bmm", "einsum", "conv1d", "conv2d", "conv3d", "convolution"}


def computed_from(gm: GraphModule, node: Any) -> nn.Parameter | None:
    """The parameter that a node is an image of; None for any other node, and for the parameter itself."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    behind = _behind(node)
    read = [at for at in behind if at.op == "get_attr"]
    if not read:
        return None
    try:
        values: dict[Node, Any] = {at: torch.empty_like(_held(gm, at), device="meta") for at in read}
        shape = _without_data(node, values).shape
    except Exception:  # something else than tensors, or an operation that asks for numbers
        return None
    path, queue = {node}, [node]
    while queue:
        at = queue.pop()
        if at.op == "get_attr":
            continue
        if not _keeps(at):
            return None
        # What has fewer numbers is a factor or a term of many places, however it was computed.
        new = [n for n in at.all_input_nodes if n not in path and _most(values[n]) >= shape.numel()]
        path.update(new)
        queue += new
    found = {p for at in path if (p := parameter_of(gm, at)) is not None and p.shape == shape}
    return found.pop() if len(found) == 1 else None


def _behind(node: Node) -> list[Node]:
    """The node and all that it is computed from; nothing where inputs, modules or products are among that."""
    seen, queue = {node}, [node]
    while queue:
        at = queue.pop()
        if at.op == "get_attr":
            continue
        if at.op not in ("call_function", "call_method") or bare_name(at.target) in PRODUCTS:
            return []
        new = [n for n in at.all_input_nodes if n not in seen]
        seen.update(new)
        queue += new
    return list(seen)


def _keeps(node: Node) -> bool:
    name = bare_name(node.target)
    if name == "getitem":  # one of several results, not some of the numbers of one
        source = node.args[0]
        return isinstance(source, Node) and bare_name(source.target) in SEVERAL
    return name in KEEPING


def _held(gm: GraphModule, node: Node) -> Tensor:
    owner, _, name = str(node.target).rpartition(".")
    return getattr(gm.get_submodule(owner), name)


def _without_data(node: Node, values: dict[Node, Any]) -> Any:
    """The value of a node, without data; those of all before it go into ``values``."""
    if node not in values:
        args, kwargs = tree_map(
            lambda a: _without_data(a, values) if isinstance(a, Node) else a, (node.args, node.kwargs)
        )
        target: Any = node.target
        function: Callable[..., Any] = getattr(Tensor, target) if isinstance(target, str) else target
        values[node] = function(*args, **kwargs)
    return values[node]


def _most(value: Any) -> int:
    """How many numbers the largest tensor in a value has."""
    return max((x.numel() for x in tree_leaves(value) if isinstance(x, Tensor)), default=0)
