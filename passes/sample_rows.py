"""Put the row sampler into the graph, so that every training forward has its own row sets."""

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule

from rwfx.draws import TopKSampler
from rwfx.passes.weights import weights_of
from rwfx.sampler import RowSampler
from rwfx.walk import WalkSampler

SAMPLER = "row_sampler"  # the name of the submodule


@dataclass(frozen=True)
class RowNodes:
    """What a sampler has in the graph for one weight."""

    rows: str  # the node that is the row set
    scale: str = ""  # the node of its rows' inverse probabilities
    chosen: str = ""  # the buffer that a call writes its rows to, where it chooses them in the backward pass
    seen: Mapping[str, str] = field(default_factory=dict)  # for each call the buffer that it writes what it sees to
    seen_all: bool = True  # whether it is to see all rows, or its own


def sample_rows(gm: GraphModule, sampler: RowSampler) -> tuple[GraphModule, dict[str, RowNodes]]:
    """Call ``sampler`` on its weights before anything else in the forward pass.

    The outputs are unchanged; without a weight to draw for, so is the graph. Also returns, for each weight, what the
    calls on it need.
    """
    sampled = GraphModule(gm, copy.deepcopy(gm.graph))
    sampled.add_module(SAMPLER, sampler)
    if not sampler.kept:
        return sampled, {}
    graph = sampled.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    rows = {}
    with graph.inserting_before(first):
        views = {of.name: of for of in weights_of(sampled).values()}
        weights = tuple(
            views[name].view.node(graph, views[name].parameter) if name in views else graph.get_attr(name)
            for name in sampler.crossed
        )
        drawn = graph.call_module(SAMPLER, weights)

        def item(k: int, name: str) -> str:
            return graph.create_node("call_function", operator.getitem, (drawn, k), name=name).name

        names = [weight.replace(".", "_") for weight in sampler.kept]
        sets = [item(k, f"rows_{name}") for k, name in enumerate(names)]
        scales = [item(k, f"scale_{name}") for k, name in enumerate(names, len(names))] if sampler.unbiased else []
    seen, seen_all = observed(sampler)
    for k, weight in enumerate(sampler.kept):
        chosen = f"{SAMPLER}.chosen.{k}" if isinstance(sampler, TopKSampler) else ""
        rows[weight] = RowNodes(sets[k], scales[k] if scales else "", chosen, seen, seen_all)
    graph.lint()
    sampled.recompile()
    return sampled, rows


def observed(sampler: RowSampler) -> tuple[dict[str, str], bool]:
    """The buffers that the calls are to write, by the node of a call, and whether with all rows."""
    if not isinstance(sampler, WalkSampler) or sampler.preference is None:
        return {}, True
    buffers = {call: f"{SAMPLER}.preference.seen.{k}" for k, call in enumerate(sampler.preference.calls)}
    return buffers, sampler.preference.sees_all
