"""Give calls of sparse weights their dense calls back: the inverse of ``rwfx.passes.sparse_weights``."""

import copy

import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from rwfx.sparse_weight import SparseWeight

CALL_OF = {2: F.linear, 3: F.conv1d, 4: F.conv2d}
"""Of a weight with so many dimensions."""


def dense_weights(gm: GraphModule) -> GraphModule:
    """Spell each call of a ``SparseWeight`` as one of ``torch.nn.functional`` on a parameter of the same name.

    The parameters are not there yet: ``gm`` still has the modules.
    """
    graph = copy.deepcopy(gm.graph)
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        weight = gm.get_submodule(str(node.target))
        if not isinstance(weight, SparseWeight):
            continue
        x, *others = node.args
        with graph.inserting_before(node):
            dense = graph.get_attr(str(node.target))
            if weight.transposed:
                dense = graph.call_function(torch.t, (dense,))
            call = graph.call_function(CALL_OF[len(weight.shape)], (x, dense, *others))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    graph.lint()
    return GraphModule(gm, graph)
