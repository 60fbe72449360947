"""Give weighted calls a backward pass that is confined to a row set."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

import rwfx.ops  # noqa: F401  defines the operators named below
from rwfx.passes.conv_spellings import TRANSPOSED
from rwfx.passes.grouped_spellings import GROUPED
from rwfx.passes.kept_rows import kept_rows
from rwfx.passes.normalize import CONVOLUTIONS
from rwfx.passes.sample_rows import RowNodes
from rwfx.passes.weights import weights_of

# Which operator computes the backward of a call on rows alone, and which masks a dense one. The two tables are
# the list of what can be sparse: to support one more call is to write its operators and add its line.
Rules = Mapping[Any, torch._ops.OpOverload]
SPARSE: Rules = {
    F.linear: torch.ops.rwfx.row_linear.default,
    GROUPED: torch.ops.rwfx.row_grouped_mm.default,
    **dict.fromkeys(CONVOLUTIONS, torch.ops.rwfx.row_conv.default),
}
MASKED: Rules = {
    F.linear: torch.ops.rwfx.masked_linear.default,
    GROUPED: torch.ops.rwfx.masked_grouped_mm.default,
    **dict.fromkeys(CONVOLUTIONS, torch.ops.rwfx.masked_conv.default),
}


def sparse_backward(
    gm: GraphModule,
    rows: Mapping[str, RowNodes],
    rules: Rules = SPARSE,
    *,
    dx: Literal["rows", "full"] = "rows",
    grad: Literal["dense", "rows"] = "dense",
) -> GraphModule:
    """Give each call on a weight of ``rows`` a backward that computes only its rows.

    The outputs are unchanged, bit for bit. ``rows`` names, per weight, the node that is its row set and what else its
    calls need; a weight that is not in it stays as it is. ``dx`` and ``grad`` are those of ``rwfx.ops.row_linear``.
    """
    rewritten = GraphModule(gm, copy.deepcopy(gm.graph))
    graph = rewritten.graph
    nodes = {node.name: node for node in graph.nodes}
    calls = {node: of.name for node, of in weights_of(rewritten).items() if node.target in rules and of.name in rows}
    drawn_for = {node: nodes[rows[weight].rows] for node, weight in calls.items()}
    kept = kept_rows(rewritten, drawn_for) if grad == "rows" else {}
    for node, weight in calls.items():
        of = rows[weight]
        arguments = (*on_rows(node, drawn_for[node]), dx, grad)
        if node in kept:
            arguments += (None, *kept[node])
        with graph.inserting_before(node):
            more: dict[str, Any] = {"scale": nodes[of.scale]} if of.scale else {}
            if of.chosen:
                more["chosen"] = graph.get_attr(of.chosen)
            if node.name in of.seen:
                more |= {"seen": graph.get_attr(of.seen[node.name]), "seen_all": of.seen_all}
            call = graph.create_node("call_function", rules[node.target], arguments, more, name=node.name)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    graph.lint()
    rewritten.recompile()
    return rewritten


def on_rows(call: Node, rows: Node) -> tuple[Any, ...]:
    """What the operators of the tables take, up to ``dx``: a normalized call's operands, a row set, the options."""
    return operands_on_rows(call.target, call.args, rows)


def operands_on_rows(target: Any, operands: Sequence[Any], rows: Any) -> tuple[Any, ...]:
    """The same of the call ``target(*operands)``; of a grouped product its offsets are in the place of a bias."""
    options: list[Any]
    x, weight, bias, *options = (*operands, *[None] * (3 - len(operands)))
    if target in TRANSPOSED:
        stride, padding, output_padding, groups, dilation = options
        options = [stride, padding, dilation, groups, True, output_padding]
    elif target in CONVOLUTIONS:
        options += [False, None]
    return x, weight, bias, rows, *options
