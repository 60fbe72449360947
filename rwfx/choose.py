"""Which weights get a row-sparse backward, and why the others do not.

In: a captured model, its weight graph, what the caller asked for. Out: the report's line for each weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from rwfx.break_even import Candidate, CostModel
from rwfx.call_cost import needs_gradient, places_of
from rwfx.capture import Capture
from rwfx.passes.follow_examples import MARK
from rwfx.passes.grouped_spellings import GROUPED
from rwfx.passes.normalize import CONVOLUTIONS, weight_of
from rwfx.passes.read_columns import ROW_LINEAR
from rwfx.passes.sample_rows import RowNodes
from rwfx.passes.sparse_backward import SPARSE
from rwfx.passes.weights import weights_of
from rwfx.policies import Densities, Magnitude, Policy, TopK
from rwfx.readers import readers_of
from rwfx.report import Line
from rwfx.roles import heads_of, roles_of, vocabularies_of
from rwfx.row_gradients import all_or_none, why_no_row_gradient
from rwfx.sampler import RowSampler
from rwfx.schedules import Schedule
from rwfx.stations import WeightUse
from rwfx.unweighted import why_unweighted
from rwfx.weight_graph import WeightGraph
from rwfx.where import Where, asked_for, asks, matches


def lines_of(
    gm: GraphModule,
    graph: WeightGraph,
    captured: Capture,
    left_out: Mapping[str, str],
    grad: str,
    policy: Policy,
    densities: Mapping[str, float | Schedule] | None,
    of_examples: bool = False,
    shapes: Mapping[str, torch.Size] | None = None,
) -> tuple[Line, ...]:
    """A line per parameter with rows: those of the weighted calls in execution order, then the rest.

    ``left_out``: the weights that are not asked for, each with the reason.
    """
    calls, readers = {node.name: node for node in gm.graph.nodes}, readers_of(gm)
    lines = []
    for weight in graph.names:
        uses = [use for use in graph.uses if use.weight == weight]
        parameter = captured.host.get_parameter(graph.parameter(weight))
        tensor = graph.tensor(weight, {graph.parameter(weight): parameter})
        if weight in left_out:
            reason = left_out[weight]
        elif weight not in graph.reached:
            reason = "no walk reaches it from an output"
        elif not parameter.is_floating_point() or not parameter.numel():
            reason = f"it is {parameter.dtype} of shape {tuple(parameter.shape)}"
        elif densities is not None and weight not in densities:
            reason = "density= does not name it"
            if not isinstance(policy.density, Mapping):
                reason = "it gives the outputs, whose rows are terms of the loss; "
                reason += 'include= ("head") or a density by name makes it sparse'
        elif of_examples and densities is not None and densities[weight] == 1:
            reason = "its density is 1"
        elif isinstance(policy, TopK) and len(uses) > 1:
            reason = f"{len(uses)} calls use it, and TopK would choose other rows in each"
        elif not all(_is_plain(gm, calls[use.node]) for use in uses):
            owner = type(captured.host.get_submodule(graph.parameter(weight).rpartition(".")[0])).__name__
            reason = f"a call that has no row-sparse backward uses it (it belongs to {owner})"
        elif any(use.transposed for use in uses) and isinstance(policy, Magnitude):
            reason = "the rows of a transposed convolution are not its weight's first dimension: they have no norms"
        else:
            reason = why_no_row_gradient(gm, graph, weight, policy, calls, readers) if grad == "rows" else ""
        # A module with weights of its own, or a call on a view of one, is taken to give its input a gradient.
        takers = [calls[use.node] for use in uses]
        input_grads = sum(not _is_plain(gm, call) or needs_gradient(gm, call.args[0]) for call in takers)
        num_rows = uses[0].rows
        features = tensor.numel() // num_rows if num_rows else 0
        found = [places_of(calls[use.node], shapes) for use in uses]
        places = None if None in found else sum(p for p in found if p is not None) / len(found)
        size = parameter.element_size()
        lines.append(Line(weight, num_rows, features, len(uses), input_grads, reason, places=places, itemsize=size))
    used = {graph.parameter(weight) for weight in graph.names}
    for name, parameter in captured.host.named_parameters():
        if parameter.dim() >= 2 and name not in used:
            owner = type(captured.host.get_submodule(name.rpartition(".")[0])).__name__
            reason = f"no plain linear call or convolution uses it (it belongs to {owner})"
            if why := why_unweighted(gm, parameter, readers):
                reason += f": {why}"
            size = parameter.element_size()
            lines.append(Line(name, parameter.shape[0], parameter[0].numel(), 0, 0, reason, itemsize=size))
    return all_or_none(lines, graph) if grad == "rows" else tuple(lines)


def _is_plain(gm: GraphModule, call: Node) -> bool:
    """Whether a call on a weight can be made row-sparse: it reads the whole parameter as it is, by an operator."""
    return weight_of(gm, call) is not None and call.target in SPARSE


def left_out(
    gm: GraphModule,
    graph: WeightGraph,
    captured: Capture,
    include: Sequence[Where],
    exclude: Sequence[Where],
    densities: Densities | None,
) -> dict[str, str]:
    """The weights that are not asked for, each with the reason.

    Of its own accord a vocabulary's scores are not: each is a term of the softmax of every token, and the rows that a
    step leaves out would be left out of the loss's gradient.

    Raises:
        ValueError: a place matches nothing.
    """
    host = captured.host
    weights = {name: (name,) for name, parameter in host.named_parameters() if parameter.dim() >= 2} | graph.names
    roles = roles_of(gm, graph)
    wanted = asked_for("include", include, weights, host, roles)
    unwanted = asked_for("exclude", exclude, weights, host, roles)
    by_name = asked_for("include", [place for place in include if place != "all"], weights, host, roles)
    if isinstance(densities, Mapping):
        by_name |= {weight for weight in weights if any(matches(weights[weight], pattern) for pattern in densities)}
    reasons = {
        weight: f"it gives the scores of a vocabulary, as many rows as {table} has, and a row left out is a term "
        'of the loss left out; include= ("head") or a density by name makes it sparse'
        for weight, table in vocabularies_of(host, graph).items()
        if weight not in by_name
    }
    reasons |= {weight: "include= does not ask for it" for weight in weights.keys() - wanted}
    return reasons | dict.fromkeys(unwanted, "asked for with exclude=")


def densities_of(
    density: Densities | None, graph: WeightGraph, host: nn.Module, include: Sequence[Where] = ()
) -> dict[str, float | Schedule] | None:
    """The density of each weight; None where none is given.

    Not of a weight that a mapping does not name; nor, without a mapping, of one that gives outputs and nothing else,
    unless ``include`` asks for it by more than ``"all"`` or a class: a row of it that is left out is a part of the loss
    that is left out. meProp (Sun et al. 2017) does the same.

    Raises:
        ValueError: a mapping has a name that matches nothing.
    """
    if density is None:
        return None
    if not isinstance(density, Mapping):
        heads = heads_of(graph)
        places = [place for place in include if place != "all" and not isinstance(place, type)]
        return {
            weight: density
            for weight, names in graph.names.items()
            if weight not in heads or any(asks(place, weight, names, host, {"head": heads}) for place in places)
        }
    found, unused = {}, set(density)
    for weight, names in graph.names.items():
        matching = [pattern for pattern in density if matches(names, pattern)]
        unused -= set(matching)
        if matching:
            found[weight] = density[matching[0]]
    if unused:
        known = ", ".join(graph.names)
        raise ValueError(f"density names {min(unused)!r}, which matches no weight or module; the weights are {known}.")
    return found


def with_sources(lines: Sequence[Line], gm: GraphModule, rows: Mapping[str, RowNodes]) -> tuple[Line, ...]:
    """The lines with the weights whose rows are the only columns that are read of an input's gradient.

    ``gm`` is the model with every weight of ``rows`` made row-sparse, ``rows`` the names of what draws their rows.
    """
    weight_at = {nodes.rows: weight for weight, nodes in rows.items()}
    sources: dict[str, list[str]] = {}
    for node in gm.graph.nodes:
        if node.target is ROW_LINEAR:
            columns = str(node.kwargs.get("columns", ""))
            if columns in weight_at and str(node.args[3]) in weight_at:
                sources.setdefault(weight_at[str(node.args[3])], []).append(weight_at[columns])
    return tuple(replace(line, sources=tuple(sources.get(line.weight, ()))) for line in lines)


def with_expected(lines: Sequence[Line], gm: GraphModule, graph: WeightGraph, sampler: RowSampler) -> tuple[Line, ...]:
    """The lines with how many rows of each weight ``sampler`` is expected to keep."""
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    weights = [graph.tensor(name, parameters).detach() for name in sampler.crossed]
    # Weights on the meta device cannot be walked by: the walks that are expected of them step uniformly anyway.
    kept = sampler.expected_rows([torch.ones(()).expand(w.shape) if w.is_meta else w for w in weights])
    return tuple(replace(line, expected=kept.get(line.weight)) for line in lines)


def with_followers(lines: Sequence[Line], gm: GraphModule) -> tuple[Line, ...]:
    """The lines, with the weights marked whose calls follow the examples (``rwfx.passes.follow_examples``)."""
    calls: dict[str, list[bool]] = {}
    for node, weight in weights_of(gm).items():
        calls.setdefault(weight.name, []).append(bool(node.meta.get(MARK)))
    return tuple(replace(line, leaves_examples=all(calls.get(line.weight, [False]))) for line in lines)


def weigh(
    gm: GraphModule,
    sampler: RowSampler,
    lines: Sequence[Line],
    graph: WeightGraph,
    shapes: Mapping[str, torch.Size] | None,
    model: CostModel,
    grad: str,
    dx: str,
    examples: float = 1.0,
) -> tuple[Line, ...]:
    """The lines with the costs that ``model`` predicts; where the row-sparse backward would not pay, with that reason.

    ``sampler`` is what draws the rows of the weights of ``lines`` where all of them are row-sparse, and the lines have
    what is expected of it; ``gm``, ``graph`` and ``shapes`` are of the model before that. ``examples`` is the share of
    the batch that takes part in the backward of the calls that leave examples out. A convolution or a grouped product
    whose shapes are not known is not weighed.
    """
    calls = {node.name: node for node in gm.graph.nodes}
    candidates = []
    for line in lines:
        if line.dense_because or line.places is None:
            continue
        uses = [use for use in graph.uses if use.weight == line.weight]
        batch = max(_batch(use, calls[use.node], shapes) for use in uses) if shapes else model.batch_size
        shape = line.rows, line.features, line.expected or 0.0
        how = line.sources, grad == "dense", dx == "full", examples if line.leaves_examples else 1.0
        groups = uses[0].groups if calls[uses[0].node].target in CONVOLUTIONS else 0
        candidates.append(Candidate(line.weight, *shape, line.calls, line.input_grads, batch, *how, groups))
    crossed = sum(
        use.kernel * len(use.feature_map) // use.groups for use in graph.uses if use.weight in sampler.crossed
    )
    paying = model.paying(candidates, model.sampler(sampler.num_paths, crossed))
    alone = {of.weight: model.costs(of, {}) for of in candidates}
    weighed = []
    for line in lines:
        costs = paying.get(line.weight) or alone.get(line.weight)
        if costs is None or line.weight in paying:
            weighed.append(replace(line, costs=costs))
            continue
        reason = f"it would not pay ({line.expected:.0f} of {line.rows} rows expected, predicted"
        reason += f" {1e6 * costs.sparse:.0f} us against {1e6 * costs.dense:.0f} us dense)"
        if costs.sparse < costs.dense:
            reason = "drawing rows would cost more than all row-sparse backwards save"
        weighed.append(replace(line, costs=costs, dense_because=reason))
    return all_or_none(weighed, graph) if grad == "rows" else tuple(weighed)


def _batch(use: WeightUse, call: Node, shapes: Mapping[str, torch.Size]) -> int:
    """How many places of all examples it multiplies its weight with; of a grouped product, the lines of a group."""
    at: Any = call.args[0] if use.transposed else call
    places = shapes[at.name].numel() // (len(use.feature_map) if use.transposed else use.rows)
    return places // use.kernel if call.target is GROUPED else places
