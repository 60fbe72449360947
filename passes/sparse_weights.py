"""Give weighted calls the non-zeros of their weights in place of the dense ones."""

import copy
from collections.abc import Mapping

import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from rwfx.passes.normalize import weighted
from rwfx.readers import Readers
from rwfx.weight_views import View

# The calls that have an operator on non-zeros: those of ``rwfx.sparse_weight.SparseWeight``.
TARGETS = {F.linear, F.conv1d, F.conv2d}


def sparse_weights(gm: GraphModule, host_of: Mapping[str, str]) -> GraphModule:
    """Call ``host_of[parameter]``, a ``SparseWeight``, with what each call on a parameter is given beside it.

    ``gm`` is normalized, and every use of the parameters is such a call (``why_not_sparse``). Outputs are those of the
    model with what the ``SparseWeight`` does not store set to zero.
    """
    graph = copy.deepcopy(gm.graph)
    for node in list(graph.nodes):
        name = _name_of(gm, node)
        if name not in host_of:
            continue
        x, weight, *others = node.args
        with graph.inserting_before(node):
            call = graph.call_module(host_of[name], (x, *others))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        _erase_unused(graph, weight)
    graph.lint()
    return GraphModule(gm, graph)


def why_not_sparse(gm: GraphModule, own: nn.Parameter, readers: Readers) -> str | None:
    """Why a parameter of the model of a normalized graph cannot be stored as its non-zeros; None: it can.

    ``readers``: ``rwfx.readers.readers_of(gm)``. A graph has not those parameters that it does not read.
    """
    reads = {node: weighted(gm, node) for node in readers.get(own, ())}
    calls = {node: found[1] for node, found in reads.items() if found is not None and found[0] is own}
    if not calls:
        return "no linear call or convolution that the graph shows uses it"
    other = next((node for node in calls if node.target not in TARGETS), None)
    if other is not None:
        return f"{other.target.__name__} ({other.name}) has no operator on non-zeros"
    if any(view not in (View(), View(transposed=True)) for view in calls.values()):
        return "calls use parts of it"
    if len(set(calls.values())) > 1:
        return "it is used both as it is and transposed"
    left = [node.name for node in reads if node not in calls]
    return f"{left[0]} reads it too" if left else None


def is_transposed(gm: GraphModule, own: nn.Parameter, readers: Readers) -> bool:
    """Whether the calls on a parameter of a normalized graph read its transpose."""
    found = [weighted(gm, node) for node in readers.get(own, ())]
    return any(of is not None and of[0] is own and of[1].transposed for of in found)


def _name_of(gm: GraphModule, node: Node) -> str | None:
    """The name by which a weighted call reads its parameter."""
    if node.op != "call_function" or node.target not in TARGETS or weighted(gm, node) is None:
        return None
    at = node.args[1]
    while isinstance(at, Node) and at.op != "get_attr":
        at = at.args[0]
    return str(at.target) if isinstance(at, Node) else None


def _erase_unused(graph: Graph, node: Node) -> None:
    while not node.users:
        above = node.all_input_nodes
        graph.erase_node(node)
        if not above:
            return
        node = above[0]
