"""One spelling for one meaning: every linear call on a parameter becomes ``F.linear``, a convolution of ``F`` or a
grouped product."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from rwfx.computed_weights import computed_from
from rwfx.passes import conv_spellings
from rwfx.passes.conv_spellings import CONV_CALLS, CONV_MODULES, TRANSPOSED
from rwfx.passes.grouped_spellings import GROUPED, GROUPED_CALLS
from rwfx.passes.parameters import parameter_of
from rwfx.passes.spellings import LINEAR_CALLS, LINEAR_MODULES, Call, untransposed
from rwfx.weight_views import View, like_view, stack_of, view_of

# The normalized calls that are convolutions, with their number of spatial dimensions.
CONVOLUTIONS: dict[Any, int] = conv_spellings.CONVOLUTIONS | TRANSPOSED
WEIGHTED: dict[Any, int] = {F.linear: 0, GROUPED: 0} | CONVOLUTIONS

CALLS = LINEAR_CALLS | CONV_CALLS | GROUPED_CALLS
MODULES = LINEAR_MODULES | CONV_MODULES


def normalize(gm: GraphModule) -> GraphModule:
    """Spell ``nn.Linear``, ``x @ w.t()``, ``nn.Conv2d``, ``aten.conv2d``, ... as calls of ``torch.nn.functional``.

    A linear call is ``F.linear(x, weight, bias)``, where the weight may be a view of a parameter
    (``rwfx.weight_views``): of ``x @ w`` it is ``w.t()``; or be computed from one (``rwfx.computed_weights``), as that
    of a convolution may. A convolution is ``F.conv2d(x, weight, bias, stride, padding, dilation, groups)`` or
    ``F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)``, with lists of numbers.
    A grouped product is ``rwfx::grouped_mm(x, weight, offsets, by)``, with all matrices of a parameter. Each spelling
    ends in the same kernel, so the outputs stay the same bit for bit. What does more than its class (hooks, a forward
    of its own, a parametrization that is called as a whole) and what has a symbolic option is left as it is.
    """
    graph = copy.deepcopy(gm.graph)
    for node in list(graph.nodes):
        call = _meaning(gm, node)
        if call is None:
            continue
        with graph.inserting_before(node):
            weight, bias = (graph.get_attr(p) if isinstance(p, str) else p for p in (call.weight, call.bias))
            if call.transpose:
                weight = graph.call_function(torch.t, (weight,))
            x = call.x if call.pad is None else graph.call_function(F.pad, (call.x, *call.pad))
            written = graph.call_function(call.target, (x, weight, bias, *call.options))
        written.meta = dict(node.meta)
        node.replace_all_uses_with(written)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        # The transposes and parameters that the old spellings read.
        if not node.users and (node.op == "get_attr" or untransposed(node) is not None):
            graph.erase_node(node)
    graph.lint()
    return GraphModule(gm, graph)


def weight_of(gm: GraphModule, node: Node) -> nn.Parameter | None:
    """The parameter that a normalized call is linear in, or in a view of; None for any other node."""
    found = weighted(gm, node)
    return None if found is None else found[0]


def weighted(gm: GraphModule, node: Node) -> tuple[nn.Parameter, View] | None:
    """That parameter, and which view of it the weight is.

    The weight's rows are its first dimension: ``(O, I)``, ``(O, I / groups, *kernel)`` of a convolution, or
    ``(O, I, E)`` of a grouped product. A transposed convolution's are not: ``(I, O / groups, *kernel)``.
    """
    if node.op != "call_function" or node.target not in WEIGHTED or len(node.args) < 2:
        return None
    if node.kwargs or any(isinstance(o, Node) for o in tree_leaves(node.args[3:])):
        return None  # one with a symbolic option, or whose bias is broadcast, has been left as it was
    return _weight(gm, node.target, node.args[1], (*node.args, None)[2])


def num_rows(gm: GraphModule, node: Node) -> int:
    """How many rows the weight of a normalized call has."""
    found = weighted(gm, node)
    assert found is not None
    weight = found[1].of(found[0])
    return weight.shape[1] * node.args[6] if node.target in TRANSPOSED else weight.shape[0]  # type: ignore[operator]


def _meaning(gm: GraphModule, node: Node) -> Call | None:
    """The normalized call that a node is, if it is one on a parameter."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        spelling = next((MODULES[kind] for kind in type(module).__mro__ if kind in MODULES), None)
    else:
        known = CALLS.get(node.target) or CALLS.get(str(node.target))
        spelling = known if node.op in ("call_function", "call_method") else None
    call = spelling(gm, node) if spelling else None
    if call is None:
        return None
    if isinstance(call.weight, str):
        return call if gm.get_parameter(call.weight).dim() == 2 + WEIGHTED[call.target] else None
    return call if _weight(gm, call.target, call.weight, call.bias, call.transpose) is not None else None


def _weight(
    gm: GraphModule, target: Any, node: Any, bias: Any, transpose: bool = False
) -> tuple[nn.Parameter, View] | None:
    """The weight that a node, or its transpose, is to a call of ``target`` that adds ``bias``."""
    if target is F.linear:
        found, vector = view_of(gm, node, transpose), like_view(gm, bias)
        if found is None and not transpose and (image_of := computed_from(gm, node)) is not None:
            found = (image_of, View(computed=True)) if image_of.dim() == 2 else None
        if found is None or vector is None:
            return found
        # A bias of another shape is broadcast: its entries are not those of the rows.
        return found if vector[1].shape == found[1].of(found[0]).shape[:1] else None
    if target is GROUPED:
        return stack_of(gm, node)
    parameter, view = parameter_of(gm, node), View()
    if parameter is None:
        parameter, view = computed_from(gm, node), View(computed=True)
    return (parameter, view) if parameter is not None and parameter.dim() == 2 + WEIGHTED[target] else None
