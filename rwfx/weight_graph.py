"""The weight graph: which row of which weight feeds which input feature of which other.

In: a model. Out: a ``WeightGraph``: its weights in execution order, the feature map of each use, the
junctions where rows are added, and the heads, where walks start. It holds names and integers, no parameters.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import networkx as nx
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx import GraphModule

from rwfx.capture import Capture, capture, untouched
from rwfx.capture.structure import leaves_of, rebuilt
from rwfx.capture.tape import SHAPE
from rwfx.labels import follow_rows
from rwfx.passes.normalize import normalize
from rwfx.passes.weights import Weight, weights_of
from rwfx.stations import Junction, WeightUse, leaves
from rwfx.weight_views import View


@dataclass(frozen=True)
class WeightGraph:
    """The rows of a model's weights and what feeds them."""

    stations: tuple[WeightUse | Junction, ...]  # execution order; every id points to lower ids only
    heads: dict[int, Tensor]  # station of an output weight -> the int64 ids that reach an output
    names: dict[str, tuple[str, ...]]  # weight -> all its names, in execution order of the first use
    notes: tuple[str, ...] = ()  # operations that could only be followed roughly
    weights: dict[str, Weight] = field(default_factory=dict)  # those of ``names`` that are views of parameters

    def __len__(self) -> int:
        """The number of ids."""
        return self.stations[-1].base + self.stations[-1].size if self.stations else 0

    @property
    def uses(self) -> tuple[WeightUse, ...]:
        """The calls on weights, in execution order; a weight called twice has two."""
        return tuple(s for s in self.stations if isinstance(s, WeightUse))

    @cached_property
    def bases(self) -> Tensor:
        """The first id of each station."""
        return torch.tensor([s.base for s in self.stations])

    def station_of(self, ids: Tensor) -> Tensor:
        """The number of the station that each id belongs to; -1 for -1."""
        return torch.bucketize(ids, self.bases, right=True) - 1

    def parameter(self, weight: str) -> str:
        """The name of the parameter that a weight is, or is a view of."""
        return self.weights[weight].parameter if weight in self.weights else weight

    def tensor(self, weight: str, parameters: Mapping[str, Tensor]) -> Tensor:
        """A weight as a tensor, given the parameters by name."""
        parameter = parameters[self.parameter(weight)]
        return self.weights[weight].view.of(parameter) if weight in self.weights else parameter

    def rows(self, weight: str) -> int:
        """How many rows a weight has."""
        return next(use.rows for use in self.uses if use.weight == weight)

    def sources(self, station: int) -> Tensor:
        """The distinct ids that a station's table points to, with -1 where a walk may end there."""
        s = self.stations[station]
        return (s.feature_map if isinstance(s, WeightUse) else s.members).unique()

    @cached_property
    def reached(self) -> frozenset[str]:
        """The weights that some walk from a head can come to."""
        at = set(self.heads)
        for station in reversed(range(len(self.stations))):
            if station in at:
                at.update(self.station_of(self.sources(station)).tolist())
        return frozenset(s.weight for i, s in enumerate(self.stations) if i in at and isinstance(s, WeightUse))

    def leaves(self, ids: Tensor) -> Tensor:
        """The ids of weight rows that ``ids`` lead to across junctions; distinct, sorted."""
        return leaves(self.stations, ids)

    def to_networkx(self, level: Literal["layer", "row"] = "layer") -> nx.DiGraph:
        """The graph for ``networkx``; an edge runs the way the data does, from producer to consumer.

        ``level="layer"``: a node per linear call, by the name of its ``WeightUse``, with ``weight``, ``rows``
        and ``head`` (whether walks start there); an edge where rows of one feed features of the other, with
        the number of ``features`` fed.

        ``level="row"``: a node ``(call, row)`` per row, with ``weight``; an edge per pair of rows that a step
        of a walk can cross, with ``features``, the input features by which it does. It has as many edges
        as the weights have entries: for small models.

        Raises:
            ValueError: ``level`` is neither.
        """
        if level == "layer":
            return self._layers()
        if level == "row":
            return self._rows()
        raise ValueError(f"level must be 'layer' or 'row', got {level!r}.")

    def _layers(self) -> nx.DiGraph:
        graph = nx.DiGraph()
        uses = self.uses
        # Which calls are behind each id, one column per call; the last line is for -1: none.
        behind = torch.zeros(len(self) + 1, len(uses), dtype=torch.bool)
        for station, s in enumerate(self.stations):
            if isinstance(s, WeightUse):
                features = behind[s.feature_map].sum(0)
                behind[s.base : s.base + s.size, graph.number_of_nodes()] = True
                graph.add_node(s.name, weight=s.weight, rows=s.rows, head=station in self.heads)
                for k in features.nonzero().squeeze(1).tolist():
                    graph.add_edge(uses[k].name, s.name, features=int(features[k]))
            else:
                behind[s.base : s.base + s.size] = behind[s.members].any(1)
        return graph

    def _rows(self) -> nx.DiGraph:
        graph = nx.DiGraph()
        owner = {use.base + i: (use.name, i) for use in self.uses for i in range(use.rows)}
        for use in self.uses:
            graph.add_nodes_from([((use.name, i), {"weight": use.weight}) for i in range(use.rows)])
            fed: dict[tuple[str, int], list[int]] = {}
            for feature, source in enumerate(use.feature_map):
                for leaf in self.leaves(source[None]).tolist():
                    fed.setdefault(owner[leaf], []).append(feature)
            for producer, features in fed.items():
                edges = [(producer, (use.name, i)) for i in range(use.rows)]
                graph.add_edges_from(edges, features=tuple(features))
        return graph


def weight_graph(model: nn.Module, example_inputs: Any = None) -> WeightGraph:
    """The weight graph of ``model``.

    Args:
        model: an ``nn.Module`` that ``torch.fx`` can trace symbolically or, with ``example_inputs``, any. It is left as
            it was.
        example_inputs: a tuple, a dict of keyword arguments, or a single value for ``model.forward``;
            needed only where the model reshapes or branches in a way that depends on the shape of its inputs.

    Raises:
        ValueError: the model cannot be traced, has no weight with rows, or needs example inputs.
    """
    captured = capture(model, example_inputs)
    gm = normalize(GraphModule(captured.host, captured.train))
    shapes = shapes_of(gm, captured)
    with torch.device("cpu"):
        return graph_of(gm, captured, shapes)


def graph_of(gm: GraphModule, captured: Capture, shapes: Mapping[str, torch.Size] | None = None) -> WeightGraph:
    """The weight graph of a captured model whose train graph has been normalized to ``gm``.

    ``shapes``, from ``shapes_of``, are needed where the model reshapes by the shape of its inputs.
    """
    names: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in captured.host.named_parameters(remove_duplicate=False):
        aliases.setdefault(names.setdefault(id(parameter), name), []).append(name)
    trail = follow_rows(gm, names, shapes)

    graph = WeightGraph(trail.stations, {}, {}, trail.notes)
    if not graph.uses:
        raise ValueError(
            "the model has no weight with rows: no nn.Linear, F.linear, x @ weight.t() or convolution on a parameter."
        )
    ids = graph.leaves(trail.output_ids)
    if not len(ids):
        raise ValueError("no row of a weight reaches an output of the model, so no walk can start.")
    station = graph.station_of(ids)
    heads = {int(s): ids[station == s] for s in station.unique()}
    views = {of.name: of for of in weights_of(gm).values() if of.view != View()}
    weights: dict[str, tuple[str, ...]] = {}
    for weight in dict.fromkeys(use.weight for use in graph.uses):
        whole = views[weight].parameter if weight in views else weight
        part = weight.removeprefix(whole)
        weights[weight] = tuple(alias + part for alias in aliases[whole])
    return WeightGraph(trail.stations, heads, weights, trail.notes, views)


def shapes_of(gm: GraphModule, captured: Capture) -> dict[str, torch.Size] | None:
    """The shape of every node's value on the example inputs, computed without data where that goes; None without any.

    Of a run that was written down they are known.
    """
    shapes = {node.name: node.meta[SHAPE] for node in gm.graph.nodes if SHAPE in node.meta}
    if shapes or captured.inputs is None:
        return shapes or None

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            read = [self.env[node] for node in n.all_input_nodes]
            # What no input is in has data, and may be read as a number.
            known = n.op == "call_function" and not any(isinstance(value, FakeTensor) for value in read)
            with unset_fake_temporarily() if known else nullcontext():
                value = super().run_node(n)
            if isinstance(value, Tensor):
                shapes[n.name] = value.shape
            return value

    placeholders = [node for node in captured.train.nodes if node.op == "placeholder"]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = captured.inputs.in_order(placeholders)
    fake = rebuilt(given, [mode.from_tensor(x) if isinstance(x, Tensor) else x for _, x in leaves_of(given)])
    try:
        with untouched(captured.host), mode:
            Shapes(gm).run(*fake)
    except RuntimeError:
        # A module that is called as a whole decides by numbers, as a parametrization may; or an operator computes in a
        # type that it refuses where there are no data.
        if any(p.is_meta for p in captured.host.parameters()):
            raise
        with untouched(captured.host):
            Shapes(gm).run(*given)
    return shapes
