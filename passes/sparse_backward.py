"""Give weighted calls a backward pass that is confined to a row set."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

import rwfx.ops  # noqa: F401  defines the operators named below

# Which operator computes the backward of a call on rows alone, and which masks a dense one. The two tables are
# the list of what can be sparse: to support one more call is to write its operators and add its line.
SPARSE: dict[Callable[..., Any], torch._ops.OpOverload] = {F.linear: torch.ops.rwfx.row_linear.default}
MASKED: dict[Callable[..., Any], torch._ops.OpOverload] = {F.linear: torch.ops.rwfx.masked_linear.default}


def sparse_backward(
    gm: GraphModule,
    rows: Mapping[str, str],
    rules: Mapping[Callable[..., Any], torch._ops.OpOverload] = SPARSE,
    *,
    dx: Literal["rows", "full"] = "rows",
    grad: Literal["dense", "rows"] = "dense",
) -> GraphModule:
    """Give each call on a weight of ``rows`` a backward that computes only its rows.

    The outputs are unchanged, bit for bit. ``rows`` names, per weight, the node that is its row set; a
    weight that is not in it stays as it is. ``dx`` and ``grad`` are those of ``rwfx.ops.row_linear``.
    """
    rewritten = GraphModule(gm, copy.deepcopy(gm.graph))
    graph = rewritten.graph
    nodes = {node.name: node for node in graph.nodes}
    names = {id(p): name for name, p in reversed(list(rewritten.named_parameters(remove_duplicate=False)))}
    calls = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in rules and node.args[1].op == "get_attr":
            calls.append((node, names[id(rewritten.get_parameter(node.args[1].target))]))
    kept: dict[Any, Node] = {}
    for node, weight in calls:
        if weight not in rows:
            continue
        drawn = nodes[rows[weight]]
        shared = grad == "rows" and sum(weight == other for _, other in calls) > 1
        arguments = (*node.args, drawn, dx, grad)
        if shared:
            arguments += (None, *[_keep(rewritten, parameter, drawn, kept) for parameter in node.args[1:3]])
        with graph.inserting_before(node):
            call = graph.create_node("call_function", rules[node.target], arguments, name=node.name)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    graph.lint()
    rewritten.recompile()
    return rewritten


def _keep(gm: GraphModule, parameter: Node | None, rows: Node, kept: dict[Any, Node]) -> Node | None:
    """The rows of a parameter that several calls share, gathered once for all of them."""
    if parameter is None:
        return None
    name = str(parameter.target)
    key = id(gm.get_parameter(name)), rows
    if key not in kept:
        with gm.graph.inserting_after(rows):
            again = gm.graph.get_attr(name)
        with gm.graph.inserting_after(again):
            kept[key] = gm.graph.call_function(torch.ops.rwfx.keep_rows.default, (again, rows))
    return kept[key]
