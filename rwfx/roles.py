"""The parts that weights play in a model, found in its graph and not by their names.

In: a normalized ``GraphModule`` and its weight graph. Out: for each role the weights that play it.

*head*        gives the outputs and nothing else: a classifier, the scores of a language model.
*attention*   gives queries, keys or values, or takes what an attention gives.
*mlp*         is linear and neither: of a transformer, the weights of its MLP blocks.

A *vocabulary* is a head as large as the model's largest embedding: a row for each word.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from rwfx.label_rules import bare_name, operation_of
from rwfx.passes.normalize import CONVOLUTIONS, weight_of
from rwfx.stations import WeightUse
from rwfx.weight_graph import WeightGraph

ROLES = ("head", "mlp", "attention")

_ATTENTION = {"scaled_dot_product_attention"}
_PRODUCTS = {"matmul", "bmm", "einsum", "baddbmm"}
_BETWEEN = {"dropout", "to", "type_as", "type", "float", "half", "bfloat16", "contiguous", "clone", "detach"}
# What may lie between an attention and the weight that takes its result: no addition, behind which a block ends.
_ONWARD = _BETWEEN | {"transpose", "permute", "reshape", "view", "flatten", "squeeze", "unsqueeze", "getitem", "mul"}


def roles_of(gm: GraphModule, graph: WeightGraph) -> dict[str, frozenset[str]]:
    """The weights of each of ``ROLES``; ``mlp`` has those of linear calls that no other has."""
    calls = {node.name: node for node in gm.graph.nodes}
    used = {use.node: use.weight for use in graph.uses}
    heads = heads_of(graph)
    attention = {used[node.name] for core in _attentions(gm) for node in _around(gm, core) if node.name in used}
    linear = {use.weight for use in graph.uses if calls[use.node].target not in CONVOLUTIONS}
    return {
        "head": frozenset(heads),
        "attention": frozenset(attention - heads),
        "mlp": frozenset(linear - attention - heads),
    }


def heads_of(graph: WeightGraph) -> set[str]:
    """The weights that give outputs of the model and nothing else."""
    uses = {station: s.weight for station, s in enumerate(graph.stations) if isinstance(s, WeightUse)}
    # A junction alone may lead to an output, such as a mean or a loss.
    read = torch.cat([graph.sources(station) for station in uses])
    feeding = set(graph.station_of(graph.leaves(read)).tolist())
    inner = {weight for station, weight in uses.items() if station in feeding or station not in graph.heads}
    return {uses[head] for head in graph.heads} - inner


def vocabularies_of(host: nn.Module, graph: WeightGraph) -> dict[str, str]:
    """The heads that are an embedding's weight, or have as many rows as the largest one has entries; with its name."""
    tables = {
        f"{path}.weight" if path else "weight": module
        for path, module in host.named_modules()
        if isinstance(module, nn.Embedding)
    }
    # Smaller ones count positions, kinds of tokens, days.
    most = max((table.num_embeddings for table in tables.values()), default=0)
    found = {}
    for weight in heads_of(graph):
        own = host.get_parameter(graph.parameter(weight))
        for name, table in tables.items():
            tied = table._parameters.get("weight") is own
            if tied or table.num_embeddings == most == graph.rows(weight) >= FEWEST_WORDS:
                found[weight] = name
    return found


FEWEST_WORDS = 32
"""A head of fewer rows is one of classes, also beside an embedding of as many entries."""


def _attentions(gm: GraphModule) -> Iterable[Node]:
    """The calls at which tokens are mixed by scores: an attention's own, or the softmax of one that is written out."""
    for node in gm.graph.nodes:
        name = _name(gm, node)
        if name in _ATTENTION or (name == "softmax" and _reaches(gm, node, _PRODUCTS)):
            yield node


def _reaches(gm: GraphModule, node: Node, names: set[str]) -> bool:
    return any(_name(gm, user) in names for user in _onward(gm, node, _BETWEEN))


def _around(gm: GraphModule, core: Node) -> set[Node]:
    """The weighted calls that an attention reads, and those that read it."""
    products = [user for user in _onward(gm, core, _BETWEEN) if _name(gm, user) in _PRODUCTS]
    before = _weighted_before(gm, [core, *products])
    results = products or [core]
    after = {node for result in results for node in _onward(gm, result, _ONWARD) if weight_of(gm, node) is not None}
    return before | after


def _weighted_before(gm: GraphModule, start: list[Node]) -> set[Node]:
    """The first weighted calls on every way back from ``start``."""
    found, seen, queue = set(), set(start), list(start)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node in seen:
                continue
            seen.add(node)
            if weight_of(gm, node) is not None:
                found.add(node)
            else:
                queue.append(node)
    return found


def _onward(gm: GraphModule, node: Node, through: set[str]) -> list[Node]:
    """The calls that read ``node``, or what operations of these names make of it."""
    found, queue = [], [node]
    while queue:
        for user in queue.pop().users:
            if user not in found:
                found.append(user)
                if _name(gm, user) in through:
                    queue.append(user)
    return found


def _name(gm: GraphModule, node: Any) -> str:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return "softmax" if isinstance(module, nn.Softmax) else operation_of(module)
    if node.op not in ("call_function", "call_method"):
        return ""
    return bare_name(node.target)
