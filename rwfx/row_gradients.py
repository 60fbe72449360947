"""Which weights can have row gradients: those that are rows of a parameter that has no other gradient beside."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import nn
from torch.fx import GraphModule, Node

from rwfx.policies import Policy, TopK
from rwfx.readers import Readers
from rwfx.report import Line
from rwfx.weight_graph import WeightGraph
from rwfx.weight_views import View, rows_of, viewed


def why_no_row_gradient(
    gm: GraphModule, graph: WeightGraph, weight: str, policy: Policy, calls: Mapping[str, Node], readers: Readers
) -> str:
    """The reason for which a weight can have no row gradient; empty if it can.

    ``calls``: the nodes of ``gm`` by name.    ``readers``: of its parameters.
    """
    family = _family(graph, weight)
    uses = [use for use in graph.uses if use.weight in family]
    if any(use.transposed for use in uses if use.weight == weight):
        return "the rows of a transposed convolution are not its weight's first dimension: it has no row gradient"
    views = {name: graph.weights[name].view if name in graph.weights else View() for name in family}
    if not views[weight].has_rows:
        return 'its rows are no rows of its parameter: it has no row gradient, and is row-sparse with grad="dense"'
    if len(family) > 1 and not _apart([views[name] for name in family]):
        return "other weights are views of the same rows, and two row gradients cannot be added in a compiled graph"
    if weight in graph.weights and isinstance(policy, TopK):
        return "it is a part of a parameter, and TopK chooses rows too late to gather those of all parts"
    if not _biases_apart(gm, [(use.weight, calls[use.node]) for use in uses]):
        return "others add rows of its bias too, and two row gradients cannot be added in a compiled graph"
    if other := _other_gradient(gm, [calls[use.node] for use in uses], readers):
        return f"{other}, and a row gradient cannot be added to another gradient in a compiled graph"
    return ""


def all_or_none(lines: Sequence[Line], graph: WeightGraph) -> tuple[Line, ...]:
    """The lines, where the weights that are parts of one parameter are row-sparse together or not at all: of row
    gradients and dense ones there is no sum."""
    dense = {line.weight for line in lines if line.dense_because}
    found = []
    for line in lines:
        others = dense.intersection(_family(graph, line.weight)) if line.weight in graph.weights else set()
        reason = f"{min(others)}, of the same parameter, is dense" if others else ""
        found.append(replace(line, dense_because=line.dense_because or reason))
    return tuple(found)


def _family(graph: WeightGraph, weight: str) -> list[str]:
    """The weights that are the parameter of a weight or views of it."""
    return [name for name in graph.names if graph.parameter(name) == graph.parameter(weight)]


def _apart(views: Sequence[View]) -> bool:
    """Whether they are parts of rows that do not overlap."""
    if not all(view.has_rows and view.part for view in views):
        return False
    parts = sorted(view.part for view in views if view.part)
    return all(before[1] <= after[0] for before, after in pairwise(parts))


def _biases_apart(gm: GraphModule, calls: Sequence[tuple[str, Node]]) -> bool:
    """Whether the biases of these calls on the weights named can have one row gradient a parameter, or have none.

    They can where they are rows of the parameter that do not overlap, each added with the rows of one weight.
    """
    parts: dict[nn.Parameter, set[tuple[str, range | None]]] = {}
    for weight, call in calls:
        bias = (*call.args[1:3], None)[1]
        if (parameter := viewed(gm, bias)) is not None:
            of = rows_of(gm, bias)
            parts.setdefault(parameter, set()).add((weight, of and of[1]))
    for found in parts.values():
        known = [rows for _, rows in found if rows is not None]
        distinct = {row for rows in known for row in rows}
        if known and (len(known) < len(found) or len(distinct) < sum(map(len, known))):
            return False
    return True


def _other_gradient(gm: GraphModule, calls: Sequence[Node], readers: Readers) -> str:
    """Where the weight or bias of these calls gets a gradient that is not confined to their row sets, if it does."""
    for operand in (operand for call in calls for operand in call.args[1:3]):
        parameter = viewed(gm, operand)
        for node in () if parameter is None else readers[parameter]:
            if node not in calls or viewed(gm, node.args[0]) is parameter:
                return f"{node.name} uses its weight or bias too"
    return ""
