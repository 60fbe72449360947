"""For whoever compiles anyway: ``torch.compile(model, backend=rwfx.backend(num_paths=50))``.

Dynamo hands over the forward pass in one or several graphs, which take the parameters as arguments. Those that have
weights and are run with gradients get a row-sparse backward, each by a row sampler of its own, whose walks start at the
graph's outputs; then the inner backend compiles them. The others go to the inner backend as they are.
"""

import copy
import re
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import InvalidBackend
from torch.fx import Graph, GraphModule, Node

from rwfx.capture import Capture
from rwfx.capture.tape import SHAPE
from rwfx.options import Options, checked_options, common_seed
from rwfx.passes.sample_rows import SAMPLER
from rwfx.policies import Densities, Policy
from rwfx.report import Report
from rwfx.roles import ROLES
from rwfx.sparse_module import SparseModule
from rwfx.transform import transform_captured

NAME = "torch.compile"  # the route, in reports


class Backend:
    """What ``rwfx.backend`` returns.

    Attributes:
        graphs: the transformed graphs, in the order in which they were compiled; of each its ``rows`` and ``report``.
    """

    def __init__(self, inner: str | Callable[..., Any], seed: int, **options: Any) -> None:
        try:
            self._compile = torch._dynamo.lookup_backend(inner)
        except InvalidBackend as error:
            known = ", ".join(torch._dynamo.list_backends())
            raise ValueError(f"inner must be a backend of torch.compile ({known}), got {inner!r}.") from error
        self._inner, self._seed, self._options = inner, seed, options
        self.graphs: list[SparseModule] = []

    @property
    def reports(self) -> list[Report]:
        """What was rewritten in each of ``graphs``, and what stayed dense."""
        return [graph.report for graph in self.graphs]

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile one graph; called by Dynamo."""
        weights = [x for x in example_inputs if isinstance(x, nn.Parameter) and x.requires_grad and x.dim() > 1]
        if not (weights and torch.is_grad_enabled()):
            return self._compile(gm, example_inputs)
        # Graphs that are compiled later draw other rows.
        options = checked_options(**self._options, seed=self._seed + len(self.graphs))
        try:
            sparse = _transformed(gm, example_inputs, options)
        except ValueError as error:
            warnings.warn(f"a graph with weights is compiled as it is: {error}", stacklevel=2)
            return self._compile(gm, example_inputs)
        self.graphs.append(sparse)
        # By torch.compile, which makes arguments of the sampler's tensors, as an inner backend needs them.
        has_open_sizes = any(isinstance(x, torch.SymInt) for x in example_inputs)
        compiled = torch.compile(sparse, backend=self._inner, dynamic=True if has_open_sizes else None)
        # A function around it: of a compiled module itself Dynamo would run what was compiled.
        return lambda *args: compiled(*args)


def backend(
    num_paths: int | None = None,
    *,
    density: Densities | None = None,
    rows: Policy | None = None,
    include: str | Sequence[str] = "all",
    mode: str = "sparse",
    dx: str | None = None,
    grad: str = "dense",
    seed: int | None = None,
    resample_every: int = 1,
    break_even: Any = True,
    inner: str | Callable[..., Any] = "inductor",
) -> Backend:
    """A backend of ``torch.compile`` that gives every graph of a model a row-sparse backward.

    The forward pass may break into several graphs, at whatever Dynamo does not follow. Rows are drawn at every run of a
    graph that was compiled with gradients on: run evaluations under ``torch.no_grad()``. A graph that is compiled anew,
    for other shapes, has a new sampler.

    Args:
        include: ``"all"`` or the roles of weights (``rwfx.roles``), in each graph by itself: with a density, what gives
            a graph's outputs keeps all rows, also before a break, unless ``"head"`` is asked for (``("all", "head")``).
        num_paths, density, rows, mode, dx, grad, seed, resample_every, break_even: as of ``rwfx.transform``, but
            without densities by name: no graph knows the names of all weights.
        inner: the backend that compiles what comes out: ``"inductor"``, ``"aot_eager"``, ``"eager"``, or a function.

    Raises:
        TypeError, ValueError: an argument is not allowed.
    """
    options = {
        "num_paths": num_paths, "density": density, "rows": rows, "include": include, "mode": mode, "dx": dx,
        "grad": grad, "resample_every": resample_every, "break_even": break_even,
    }  # fmt: skip
    checked = checked_options(**options, seed=seed)
    policy = checked.policy
    for place in checked.include:
        if place not in ("all", *ROLES):
            raise ValueError(f'include takes "all" and roles ({", ".join(ROLES)}) here, got {place!r}.')
    if isinstance(policy.density, Mapping):
        raise ValueError("a density by name is for rwfx.transform: a graph of torch.compile has a part of the names.")
    return Backend(inner, common_seed() if seed is None else int(seed), **options)


def _transformed(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> SparseModule:
    """``gm`` with a row-sparse backward, taking the same arguments."""
    host, graph = nn.Module(), copy.deepcopy(gm.graph)
    own = {key: value for key, value in vars(gm).items() if key in ("_modules", "_parameters", "_buffers")}
    host.__dict__.update({key: dict(value) for key, value in own.items()})
    taken: dict[str, Node] = {}
    for node, value in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(value, nn.Parameter):
            name = _name_of(node, taken)
            taken[name] = node
            _hold(host, name, value)
            _read_from_host(graph, node, name)
    for node in graph.nodes:
        _note_shape(node)
    sparse = transform_captured(host, Capture(host, graph, graph, (), NAME), options)
    assert isinstance(sparse, SparseModule)
    # One graph may be run for several modules alike, each with parameters of its own.
    sparse.eval_graph = _taking(graph, taken)
    sparse._modules = {**own["_modules"], SAMPLER: sparse.get_submodule(SAMPLER)}
    sparse.graph = _taking(sparse.graph, taken)
    return sparse


def _name_of(placeholder: Node, others: Container[str]) -> str:
    """The name of a parameter in its model, where Dynamo tells; else that of its argument."""
    source = placeholder.meta.get("grapharg")
    path = ".".join(re.findall(r"_(?:modules|parameters)\['([^']+)'\]", source.source.name if source else ""))
    return path if path and path not in others else placeholder.name


def _hold(host: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, last = name.split(".")
    for part in path:
        host = host._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    host.register_parameter(last, parameter)


def _read_from_host(graph: Graph, placeholder: Node, name: str) -> None:
    """Let the graph read a parameter that it takes as an argument from its host."""
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        read = graph.create_node("get_attr", name)
    read.meta = dict(placeholder.meta)
    placeholder.replace_all_uses_with(read)


def _taking(graph: Graph, taken: Mapping[str, Node]) -> Graph:
    """The inverse: take the parameters of these names as the arguments that they were."""
    graph = copy.deepcopy(graph)
    placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    for node in graph.find_nodes(op="get_attr"):
        if node.target in taken:
            node.replace_all_uses_with(placeholders[taken[node.target].name])
            graph.erase_node(node)
    return graph


def _note_shape(node: Node) -> None:
    """What the labels need to know of a value, with the example's numbers for sizes that are open."""
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor):
        sizes: list[Any] = [size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape]
        if None not in sizes:
            node.meta[SHAPE] = torch.Size(sizes)
