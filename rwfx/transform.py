"""The front door: a model in, the same model with a row-sparse backward pass out.

capture -> normalize -> weight graph -> sample_rows -> sparse_backward -> read_columns -> verify
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from math import inf
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import distributed, nn
from torch.fx import GraphModule, Node

from rwfx import native
from rwfx.capture import Capture, capture, shared_copy, split_inputs
from rwfx.passes.normalize import normalize, parameter_of
from rwfx.passes.read_columns import read_columns
from rwfx.passes.sample_rows import SAMPLER, sample_rows
from rwfx.passes.sparse_backward import MASKED, SPARSE, sparse_backward
from rwfx.passes.verify import same_outputs, verify
from rwfx.report import Line
from rwfx.sparse_module import SparseModule, check_names
from rwfx.walk import RowSampler, WalkOptions, rows_kept
from rwfx.weight_graph import WeightGraph, graph_of


def transform(
    model: nn.Module,
    num_paths: int | None = None,
    *,
    density: float | None = None,
    temperature: float = 1.0,
    epsilon: float = 0.0,
    min_rows: int = 1,
    dense: str | Sequence[str] = (),
    mode: Literal["sparse", "masked"] = "sparse",
    dx: Literal["rows", "full"] | None = None,
    grad: Literal["dense", "rows"] = "dense",
    seed: int | None = None,
    resample_every: int = 1,
    example_inputs: Any = None,
) -> SparseModule:
    """Give ``model`` a backward pass that computes, every step, only the rows that random walks visit.

    The result is a ``torch.fx.GraphModule`` with the model's call signature. It shares the model's parameters and
    buffers, has the same ``state_dict`` keys, and its forward pass is the model's own, bit for bit. At every
    training forward it draws a row set ``R`` for each linear weight, and with ``g = dL/dy`` its backward is

        dx = g[..., R] @ W[R]      dW[R] = g[..., R].T @ x      db[R] = g[..., R].sum(0)      zero elsewhere.

    In eval mode it is the dense model; without gradients nothing is drawn. ``model`` itself is left as it was.

    Args:
        model: an ``nn.Module`` that ``torch.fx`` can trace symbolically.
        num_paths: walks a step, at least 1; 50 by default. They start at the rows of the output weights.
        density: above 0 and at most 1. Every row set then has the same number of rows at every step, this share of its
            weight's, rounded up: the rows that the first walks come by, and where ``num_paths`` walks (by default
            twice as many as the largest row set) visit fewer, others as well, uniformly without replacement. No shape
            changes from step to step and nothing is read back from a GPU, as CUDA graphs need
            (``torch.compile(mode="reduce-overhead")``).
        temperature: above 0. A step at row ``i`` draws feature ``j`` with ``p ~ |W[i, j]| ** (1 / temperature)``.
        epsilon: from 0 to 1, the probability of a uniform step instead.
        min_rows: a row set with fewer rows is filled up to so many, uniformly without replacement.
        dense: names of weights or modules that stay dense; ``*`` and ``?`` match any letters (``"head.*"``).
        mode: ``"sparse"``, or ``"masked"``: dense products, masked afterwards, to compare with.
        dx: ``"rows"`` sums the input's gradient over the row set, ``"full"`` over every row; then the gradients
            are those of plain backpropagation, masked. By default ``"rows"``, and ``"full"`` with
            ``mode="masked"``, which together are the method of the original research code.
        grad: ``"dense"``: gradients with zeros outside the rows, for any optimizer. ``"rows"``: hybrid
            ``torch.sparse_coo`` gradients that hold the rows alone, for ``rwfx.optim``.
        seed: of the walks' private random stream, which no other draw disturbs and which disturbs no other; equal
            seeds draw equal rows on every rank. By default one number of ``torch.manual_seed``'s stream, that of
            rank 0 where ``torch.distributed`` is initialized: then every rank has to call ``transform``.
        resample_every: draw new row sets every so many training forwards.
        example_inputs: a tuple, a dict of keyword arguments, or a single value for ``model.forward``. Needed where
            the model reshapes by the shape of its inputs, or to say which optional arguments are used; the
            result is then also checked against the model on them.

    Raises:
        TypeError, ValueError: an argument is not allowed, the model cannot be traced, has no linear weight, or no
            weight is left to make sparse. Nothing has been changed then.
    """
    options = WalkOptions(
        50 if num_paths is None else num_paths, density, temperature, epsilon, min_rows, resample_every
    )
    _check_options(options)
    _check_choices(mode, dx, grad, seed)
    dx = dx or ("full" if mode == "masked" else "rows")
    patterns = _patterns(dense)
    if isinstance(model, SparseModule):
        raise ValueError("model is already transformed. Transform the model it was made from.")

    captured = capture(model, example_inputs)
    check_names(captured.host)
    gm = normalize(GraphModule(captured.host, captured.train))
    graph = graph_of(gm, captured, example_inputs)
    lines = _lines(gm, graph, captured, patterns, grad)
    kept = [line.weight for line in lines if not line.dense_because]
    if not kept:
        reasons = "; ".join(f"{line.weight}: {line.dense_because}" for line in lines)
        raise ValueError(f"no weight is left to make sparse ({reasons}).")

    if num_paths is None and density is not None:
        most = max(rows_kept(line.rows, options) for line in lines if not line.dense_because)
        options = replace(options, num_paths=2 * most)

    seed = _common_seed() if seed is None else int(seed)
    device = captured.host.get_parameter(kept[0]).device
    if device.type == "cpu":
        native.ready()
    gm, rows = sample_rows(gm, RowSampler(graph, kept, options, seed).to(device))
    gm = sparse_backward(gm, rows, SPARSE if mode == "sparse" else MASKED, dx=dx, grad=grad)
    gm = verify(read_columns(gm), model, rows)

    settings = {**vars(options), "mode": mode, "dx": dx, "grad": grad, "seed": seed}
    sparse_model = SparseModule.over(
        captured.host,
        gm.graph,
        captured.eval,
        lines=lines,
        settings=settings,
        notes=(*graph.notes, *captured.notes),
    )
    sparse_model._modules[SAMPLER] = gm.get_submodule(SAMPLER)
    _check_replay(model, sparse_model, example_inputs)
    return sparse_model


def _common_seed() -> int:
    seeds = [int(torch.randint(2**62, ()))]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(seeds)
    return seeds[0]


def _lines(
    gm: GraphModule, graph: WeightGraph, captured: Capture, patterns: Sequence[str], grad: str
) -> tuple[Line, ...]:
    """A line per parameter with rows: those of the linear calls in execution order, then the rest."""
    calls = {node.name: node for node in gm.graph.nodes}
    lines, every_name = [], []
    for weight, names in graph.names.items():
        uses = [use for use in graph.uses if use.weight == weight]
        parameter = captured.host.get_parameter(weight)
        every_name += [n for name in names for n in _paths(name)]
        if any(_matches(name, patterns) for name in names):
            reason = "asked for with dense="
        elif weight not in graph.reached:
            reason = "no walk reaches it from an output"
        elif not parameter.is_floating_point() or not parameter.numel():
            reason = f"it is {parameter.dtype} of shape {tuple(parameter.shape)}"
        elif grad == "rows" and (other := _other_gradient(gm, [calls[use.node] for use in uses])):
            reason = f"{other}, and a row gradient cannot be added to another gradient in a compiled graph"
        else:
            reason = ""
        input_grads = sum(_needs_gradient(gm, calls[use.node].args[0]) for use in uses)
        num_rows, features = parameter.shape
        lines.append(Line(weight, num_rows, features, len(uses), input_grads, reason))
    for name, parameter in captured.host.named_parameters():
        if parameter.dim() >= 2 and not any(name in names for names in graph.names.values()):
            owner = type(captured.host.get_submodule(name.rpartition(".")[0])).__name__
            every_name += _paths(name)
            reason = f"no plain linear call uses it (it belongs to {owner})"
            lines.append(Line(name, parameter.shape[0], parameter[0].numel(), 0, 0, reason))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every_name):
            known = ", ".join(line.weight for line in lines)
            raise ValueError(f"dense names {pattern!r}, which matches no weight or module; the weights are {known}.")
    return tuple(lines)


def _other_gradient(gm: GraphModule, calls: Sequence[Node]) -> str:
    """Where the weight or the bias of these calls gets a gradient that is not confined to their row set, if it does."""
    parameters = {id(p) for call in calls for p in map(partial(parameter_of, gm), call.args[1:3]) if p is not None}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            shared = any(id(p) in parameters for p in gm.get_submodule(str(node.target)).parameters())
        else:
            shared = any(id(parameter_of(gm, n)) in parameters for n in node.all_input_nodes)
        if shared and node not in calls:
            return f"{node.name} uses its weight or bias too"
    return ""


def _paths(weight: str) -> list[str]:
    """A weight's name and those of all modules that it lies in."""
    parts = weight.split(".")
    return [".".join(parts[:k]) for k in range(len(parts), 0, -1)]


def _matches(weight: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(n, p) for n in _paths(weight) for p in patterns)


def _needs_gradient(gm: GraphModule, node: Any) -> bool:
    """Whether anything before ``node`` is trained, so that a backward pass goes on through it."""
    seen, queue = set(), [node] if isinstance(node, Node) else []
    while queue:
        at = queue.pop()
        if at.op == "call_module":
            parameters: Iterable[Any] = gm.get_submodule(str(at.target)).parameters()
        else:
            parameter = parameter_of(gm, at)
            parameters = [] if parameter is None else [parameter]
        if any(p.requires_grad for p in parameters):
            return True
        queue += [n for n in at.all_input_nodes if n not in seen]
        seen.update(at.all_input_nodes)
    return False


def _check_replay(model: nn.Module, sparse_model: SparseModule, example_inputs: Any) -> None:
    if example_inputs is None:
        return
    args, kwargs = split_inputs(example_inputs)
    theirs, mode = shared_copy(model), sparse_model.training
    flags = {path: module.training for path, module in sparse_model.named_modules()}
    same = same_outputs(theirs, sparse_model, args, kwargs)
    for module in (theirs, sparse_model):
        module.train(not mode)
    same = same_outputs(theirs, sparse_model, args, kwargs) and same
    for path, module in sparse_model.named_modules():
        module.training = flags[path]
    if not same:
        raise ValueError(
            f"the captured graph of {type(model).__name__} gives other outputs than the model on example_inputs, so "
            "its forward pass does something that tracing froze (a branch or a number computed in Python)."
        )


def _patterns(dense: Any) -> tuple[str, ...]:
    patterns = (dense,) if isinstance(dense, str) else tuple(dense) if isinstance(dense, Iterable) else (dense,)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"dense must hold names of weights or modules (str), got {pattern!r}.")
    return patterns


def _check_options(options: WalkOptions) -> None:
    _check_number("num_paths", options.num_paths, Integral, 1)
    if options.density is not None:
        _check_number("density", options.density, Real, 0, 1, above=True)
    _check_number("temperature", options.temperature, Real, 0, above=True)
    _check_number("epsilon", options.epsilon, Real, 0, 1)
    _check_number("min_rows", options.min_rows, Integral, 0)
    _check_number("resample_every", options.resample_every, Integral, 1)


def _check_number(name: str, value: Any, kind: type, low: float, high: float = inf, above: bool = False) -> None:
    wanted = "a whole number" if kind is Integral else "a number"
    bounds = f"above {low}" if above else f"at least {low}" if high == inf else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted} {bounds}, got {value!r} ({type(value).__name__}).")
    if not low <= value <= high or (above and value == low) or value == inf:
        raise ValueError(f"{name} must be {wanted} {bounds}, got {value!r}.")


def _check_choices(mode: Any, dx: Any, grad: Any, seed: Any) -> None:
    choices: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
        "mode": (mode, ("sparse", "masked")),
        "dx": (dx, ("rows", "full", None)),
        "grad": (grad, ("dense", "rows")),
    }
    for name, (value, allowed) in choices.items():
        if not any(value is choice or value == choice for choice in allowed):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    if seed is not None:
        _check_number("seed", seed, Integral, 0, 2**63 - 1)
