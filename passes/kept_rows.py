"""Gather the rows of a parameter once for all calls that share it, so that it gets one row gradient.

Two row gradients of a parameter cannot be added in a compiled graph, nor one to the gradient of a part of it. So where
several calls use a parameter, or parts of it, those get its rows from one operator, at which their gradients meet.
"""

import operator
from collections.abc import Iterable, Mapping

import torch
from torch.fx import GraphModule, Node

import rwfx.ops  # noqa: F401  defines the operators named below
from rwfx.passes.parameters import parameter_of
from rwfx.weight_views import rows_of

# A parameter, by id, of it the rows from here on, and of those the row set.
Rows = tuple[int, int, Node]


def kept_rows(gm: GraphModule, calls: Mapping[Node, Node]) -> dict[Node, list[Node | None]]:
    """Add the operators to ``gm``; give, for each call that needs them, the rows of its weight and of its bias.

    ``calls``: the row set of each call on a weight that has row gradients. What has one call, as a whole, and no bias
    that is a part of a parameter or computed, is left out.
    """
    parts: dict[int, list[Rows]] = {}
    num_calls: dict[int, int] = {}
    for call, drawn in calls.items():
        for k, operand in enumerate(call.args[1:3]):
            if (part := rows_of(gm, operand)) is None:
                continue
            rows = id(part[0]), part[1].start, drawn
            if rows not in parts.setdefault(rows[0], []):
                parts[rows[0]].append(rows)
            num_calls[rows[0]] = num_calls.get(rows[0], 0) + (k == 0)
    kept: dict[Node, list[Node | None]] = {}
    gathered: dict[Rows, Node] = {}
    for call, drawn in calls.items():
        operands = (*call.args[1:3], None)[:2]
        weight, bias = (parameter_of(gm, operand) for operand in operands)
        if weight is not None and num_calls[id(weight)] == 1 and (bias is not None or operands[1] is None):
            continue
        kept[call] = []
        for operand in operands:
            part = rows_of(gm, operand)
            if not isinstance(operand, Node):
                kept[call].append(None)
            elif part is None:  # computed in the forward pass: its gradient goes on from here as any other
                with gm.graph.inserting_before(call):
                    kept[call].append(gm.graph.call_function(torch.index_select, (operand, 0, drawn)))
            else:
                key = id(part[0])
                if (key, part[1].start, drawn) not in gathered:
                    with gm.graph.inserting_before(next(iter(calls))):
                        gathered |= _gather(gm, operand, parts[key])
                kept[call].append(gathered[key, part[1].start, drawn])
    return kept


def _gather(gm: GraphModule, operand: Node, parts: Iterable[Rows]) -> dict[Rows, Node]:
    """New nodes: the rows of all ``parts`` of the parameter that ``operand`` is, or is a part of."""
    while operand.op != "get_attr":
        (operand,) = operand.all_input_nodes
    parameter, parts = gm.graph.get_attr(str(operand.target)), sorted(parts, key=operator.itemgetter(1))
    firsts, rows = [first for _, first, _ in parts], [drawn for _, _, drawn in parts]
    if firsts == [0]:
        return {parts[0]: gm.graph.call_function(torch.ops.rwfx.keep_rows.default, (parameter, *rows))}
    of_all = gm.graph.call_function(torch.ops.rwfx.keep_parts.default, (parameter, rows, firsts))
    return {part: gm.graph.call_function(operator.getitem, (of_all, k)) for k, part in enumerate(parts)}
