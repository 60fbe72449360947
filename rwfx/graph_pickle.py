"""Graphs as plain data, for pickling.

``fx`` pickles a ``GraphModule`` as code and traces that code again when it is loaded, which fails on what
tracing itself has put into a graph (the check that an argument is None); a ``Graph`` pickled as an object
follows the chain of its nodes and overflows the stack at some hundred. A list of its nodes does neither.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate


@dataclass(frozen=True)
class _Value:
    """The value of the node of this name."""

    node: str


@dataclass(frozen=True)
class _Operator:
    """An operator overload, by name: the object itself cannot be pickled."""

    name: str  # "rwfx::row_linear"
    overload: str

    def find(self) -> torch._ops.OpOverload:
        namespace, _, name = self.name.partition("::")
        return getattr(getattr(getattr(torch.ops, namespace), name), self.overload)


def write_graph(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes in order, each ``(op, name, target, args, kwargs)``; the inverse of ``read_graph``."""

    def refer(value: Any) -> Any:
        return _Value(value.name) if isinstance(value, fx.Node) else _written(value)

    return [
        (n.op, n.name, _written(n.target), map_aggregate(n.args, refer), map_aggregate(n.kwargs, refer))
        for n in graph.nodes
    ]


def read_graph(nodes: list[tuple[Any, ...]]) -> fx.Graph:
    """A graph with these nodes."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        return made[value.node] if isinstance(value, _Value) else _read(value)

    for op, name, target, args, kwargs in nodes:
        args, kwargs = map_aggregate(args, resolve), map_aggregate(kwargs, resolve)
        made[name] = graph.create_node(op, _read(target), args, kwargs, name)
    return graph


def _written(value: Any) -> Any:
    if isinstance(value, torch._ops.OpOverload):
        return _Operator(value._schema.name, value._overloadname)
    return value


def _read(value: Any) -> Any:
    return value.find() if isinstance(value, _Operator) else value
