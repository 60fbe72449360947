"""What decides the products that a weighted call of a graph takes: its places, and whether its input has a gradient."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from rwfx.passes.conv_spellings import TRANSPOSED
from rwfx.passes.grouped_spellings import GROUPED
from rwfx.passes.normalize import CONVOLUTIONS
from rwfx.passes.parameters import parameter_of


def places_of(call: Node, shapes: Mapping[str, torch.Size] | None) -> float | None:
    """How many places of an example a call multiplies its weight with: 1, or those of a convolution's output (of a
    transposed one's input), or of a grouped product the share of its matrices; None where that is not known."""
    if call.target is GROUPED:
        return None if shapes is None else _lines_of_each(call, shapes) / shapes[_operand(call, 1)][0]
    if call.target not in CONVOLUTIONS:
        return 1
    at: Any = call.args[0] if call.target in TRANSPOSED else call
    return None if shapes is None else shapes[at.name][-CONVOLUTIONS[call.target] :].numel()


def _lines_of_each(call: Node, shapes: Mapping[str, torch.Size]) -> float:
    """How many lines of a grouped product there are for each of the last linear call before it: experts of a token."""
    seen, queue = set(), [call.args[0]]
    for at in queue:
        if not isinstance(at, Node) or at in seen:
            continue
        seen.add(at)
        if at.target is GROUPED:
            return _lines_of_each(at, shapes) * shapes[_operand(call, 0)][0] / shapes[_operand(at, 0)][0]
        if at.target is F.linear:
            return shapes[_operand(call, 0)][0] / max(1, shapes[at.name][:-1].numel())
        queue += at.all_input_nodes
    return 1


def _operand(call: Node, place: int) -> str:
    operand = call.args[place]
    assert isinstance(operand, Node)
    return operand.name


def needs_gradient(gm: GraphModule, node: Any) -> bool:
    """Whether anything before ``node`` is trained, so that a backward pass goes on through it."""
    seen, queue = set(), [node] if isinstance(node, Node) else []
    while queue:
        at = queue.pop()
        if at.op == "call_module":
            parameters: Iterable[Any] = gm.get_submodule(str(at.target)).parameters()
        else:
            parameter = parameter_of(gm, at)
            parameters = [] if parameter is None else [parameter]
        if any(p.requires_grad for p in parameters):
            return True
        queue += [n for n in at.all_input_nodes if n not in seen]
        seen.update(at.all_input_nodes)
    return False
