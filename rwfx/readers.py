"""Which calls of a graph read a parameter, as it is or as a view of it.

In: a graph module. Out: for each parameter that is read, its *readers* in the order of the graph. What makes a view
(``rwfx.weight_views``) is no reader: those that read the view are.
"""

from collections.abc import Sequence

from torch import nn
from torch.fx import GraphModule, Node

from rwfx.weight_views import viewed, views_of

Readers = dict[nn.Parameter, Sequence[Node]]


def readers_of(gm: GraphModule) -> Readers:
    """The readers of every parameter; a module reads its own parameters beside its operands."""
    found: dict[nn.Parameter, list[Node]] = {}
    for node in gm.graph.nodes:
        if views_of(gm, node) is not None:
            continue
        operands = [viewed(gm, n) for n in node.all_input_nodes]
        own = owned(gm, node)
        for parameter in dict.fromkeys([*own, *(p for p in operands if p is not None)]):
            found.setdefault(parameter, []).append(node)
    return {parameter: tuple(nodes) for parameter, nodes in found.items()}


def owned(gm: GraphModule, node: Node) -> Sequence[nn.Parameter]:
    """The parameters of the module that a node calls; none of another node."""
    return tuple(gm.get_submodule(str(node.target)).parameters()) if node.op == "call_module" else ()
