"""Put the row sampler into the graph, so that every training forward draws its own row sets."""

import copy
import operator

from torch.fx import GraphModule

from rwfx.walk import RowSampler

SAMPLER = "row_sampler"  # the name of the submodule


def sample_rows(gm: GraphModule, sampler: RowSampler) -> tuple[GraphModule, dict[str, str]]:
    """Call ``sampler`` on its weights before anything else in the forward pass.

    The outputs are unchanged; without a weight to draw for, so is the graph. Also returns, for each weight, the name of
    the node that is its row set.
    """
    sampled = GraphModule(gm, copy.deepcopy(gm.graph))
    sampled.add_module(SAMPLER, sampler)
    if not sampler.kept:
        return sampled, {}
    graph = sampled.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    rows = {}
    with graph.inserting_before(first):
        weights = tuple(graph.get_attr(name) for name in sampler.crossed)
        drawn = graph.call_module(SAMPLER, weights)
        for k, weight in enumerate(sampler.kept):
            name = "rows_" + weight.replace(".", "_")
            rows[weight] = graph.create_node("call_function", operator.getitem, (drawn, k), name=name).name
    graph.lint()
    sampled.recompile()
    return sampled, rows
