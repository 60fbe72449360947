"""What decides the products that a weighted call of a graph takes: its places, and whether its input has a gradient."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from rwfx.passes.conv_spellings import TRANSPOSED
from rwfx.passes.normalize import CONVOLUTIONS
from rwfx.passes.parameters import parameter_of


def places_of(call: Node, shapes: Mapping[str, torch.Size] | None) -> int | None:
    """How many places of an example a call multiplies its weight with: 1, or those of a convolution's output (of a
    transposed one's input); None where that is not known."""
    if call.target not in CONVOLUTIONS:
        return 1
    at: Any = call.args[0] if call.target in TRANSPOSED else call
    return None if shapes is None else shapes[at.name][-CONVOLUTIONS[call.target] :].numel()


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
