"""The front door of always-sparse training: a model in, the same model with its weights stored as non-zeros out.

capture -> normalize -> which weights, how many non-zeros each, where -> sparse_weights
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from math import prod
from numbers import Real
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.fx import GraphModule

from rwfx import native
from rwfx.arguments import check_choice, check_number
from rwfx.call_cost import needs_gradient, places_of
from rwfx.capture import Capture, capture, tape
from rwfx.extremes import largest_magnitudes
from rwfx.nonzeros import check_size, draw_keys
from rwfx.ops.sparse_linear import Asked
from rwfx.options import common_seed
from rwfx.passes.dense_weights import dense_weights
from rwfx.passes.normalize import normalize, weighted
from rwfx.passes.sparse_weights import is_transposed, sparse_weights, why_not_sparse
from rwfx.readers import Readers, readers_of
from rwfx.roles import ROLES, roles_of
from rwfx.sparse_weight import SparseWeight
from rwfx.sparsified import SparsifiedModule
from rwfx.sparsity import Init, count_nonzeros
from rwfx.sparsity_report import SparsityLine
from rwfx.transformed import Transformed
from rwfx.two_graphs import TwoGraphs, check_names
from rwfx.weight_graph import graph_of, shapes_of
from rwfx.where import Where, asked_for, given_places

Growth = Literal["gse", "rigl", "set", "snfs", "topkast", "gradual", "static"]
Values = Literal["drawn", "largest"]


def sparsify(
    model: nn.Module,
    density: float = 0.02,
    *,
    init: Init = "er",
    growth: Growth = "gse",
    values: Values = "drawn",
    dense: Where | Iterable[Where] = (),
    by: Asked = "auto",
    seed: int | None = None,
    example_inputs: Any = None,
) -> SparsifiedModule:
    """A ``GraphModule`` that computes what ``model`` does, with weights of which only the non-zeros are stored.

    Each chosen weight ``fc1.weight`` becomes a ``rwfx.SparseWeight``: a parameter ``fc1.weight.values`` of as many
    numbers as it has non-zeros, and where they are. There is no dense weight, mask or gradient, not while it is made
    either: a model on the meta device (``with torch.device("meta")``) never has one. Everything else is a copy;
    ``model`` is left as it was.

    Drawn values are uniform with the standard deviation ``1 / sqrt(k)`` of a row with ``k`` non-zeros, and so are the
    biases of these weights (Heddes et al. 2024).

    Args:
        model: an ``nn.Module`` that ``torch.fx`` can trace symbolically or, with ``example_inputs``, that
            ``torch.export`` can. What is on the meta device comes to the CPU.
        density: the share of non-zeros of all chosen weights together, above 0 and at most 1.
        init: how many of them each weight gets: ``"er"``, ``"erk"``, ``"uniform"``; see ``rwfx.sparsity``.
        growth: the method by which ``rwfx.Topology`` moves them, if it is not told another.
        values: ``"drawn"``: at random places, any set of so many equally likely, with new values. ``"largest"``: the
            model's own weights with the largest magnitude, with its biases.
        dense: the weights that stay dense: names of weights or modules with ``*`` and ``?``, roles (``"head"``,
            ``"mlp"``, ``"attention"``), classes of modules, functions of a weight's name and its module, or several.
        by: how products are computed: from the non-zeros, or densely, from a weight that is filled for the call;
            ``"auto"`` takes what is faster at the weight's density, by what was measured (``rwfx.sparse_cost``).
        seed: of the draws; by default a number of ``torch.manual_seed``'s stream, the same on every rank.
        example_inputs: as in ``rwfx.transform``.

    Raises:
        TypeError, ValueError: an argument is not allowed, the model cannot be captured as a graph, or no weight is left
            to make sparse. Nothing has been changed then.
    """
    check_number("density", density, Real, 0, 1, above=True)
    for name, given, allowed in (
        ("init", init, get_args(Init)),
        ("growth", growth, get_args(Growth)),
        ("values", values, get_args(Values)),
        ("by", by, get_args(Asked)),
    ):
        check_choice(name, given, allowed)
    places = given_places("dense", dense)
    _check_new(model)
    captured = capture(model, example_inputs)
    if captured.route == tape.NAME:
        raise ValueError(
            f"no graph holds the forward pass of {type(model).__name__} ({captured.notes[-1]}), and always-sparse "
            "weights need one to be put into."
        )
    check_names(captured.host, SparsifiedModule)
    return _sparsified(captured, float(density), init, growth, values, places, by, seed)


def densify(model: SparsifiedModule) -> TwoGraphs:
    """The same model with ordinary weights, zeros included: a ``GraphModule`` with the ``state_dict`` of the original.

    It shares no tensor with ``model``, gives its outputs up to the order of sums, and can be loaded into the class the
    model came from: ``original.load_state_dict(rwfx.densify(model).state_dict())``.

    Raises:
        TypeError: ``model`` did not come from ``rwfx.sparsify``.
    """
    if not isinstance(model, SparsifiedModule):
        raise TypeError(f"model must come from rwfx.sparsify, got {type(model).__name__}.")
    host = copy.deepcopy(model)
    assert host.eval_graph is not None
    dense = {weight: _dense_parameter(weight) for weight in host.sparse_weights.values()}
    graphs = [dense_weights(GraphModule(host, graph)).graph for graph in (host.graph, host.eval_graph)]
    for owner_path, owner in [*host.named_modules()]:
        for name, module in [*owner._modules.items()]:
            if isinstance(module, SparseWeight):
                _put(host, f"{owner_path}.{name}" if owner_path else name, dense[module])
    return TwoGraphs.over(host, *graphs)


def _dense_parameter(weight: SparseWeight) -> nn.Parameter:
    full = weight.to_dense().detach()
    full = full.t() if weight.transposed else full
    return nn.Parameter(full.contiguous(), requires_grad=weight.values.requires_grad)


def _sparsified(
    captured: Capture,
    density: float,
    init: Init,
    growth: Growth,
    values: Values,
    dense: Sequence[Where],
    by: Asked,
    seed: int | None,
) -> SparsifiedModule:
    gms = [normalize(GraphModule(captured.host, graph)) for graph in (captured.train, captured.eval)]
    lines = _lines(gms, captured, dense)
    chosen = {line.weight: line for line in lines if not line.dense_because}
    if not chosen:
        reasons = "; ".join(f"{line.weight}: {line.dense_because}" for line in lines)
        raise ValueError(f"no weight is left to store as non-zeros ({reasons}).")
    counts = count_nonzeros({name: line.shape for name, line in chosen.items()}, density, init)
    for name, line in chosen.items():
        check_size(line.shape[0], prod(line.shape[1:]), counts[name], name)
    if values == "largest" and (empty := [n for n in chosen if captured.host.get_parameter(n).is_meta]):
        raise ValueError(f'values="largest" needs numbers to choose from, and {empty[0]!r} is on the meta device.')

    seed = common_seed() if seed is None else seed
    generator = Generator().manual_seed(seed)
    parameters = {name: captured.host.get_parameter(name) for name in chosen}
    host = _copied_without(captured.host, parameters.values())
    if any(p.device.type in ("cpu", "meta") for p in parameters.values()):
        native.ready()
    for name, line in chosen.items():
        weight = _sparse_weight(parameters[name], line, counts[name], values, by, generator)
        for place in _places_of(captured.host, parameters[name]):
            _put(host, place, weight)
        if values == "drawn":
            _draw_bias(host, name, weight, generator)
    _materialize(host)
    host_of = {alias: name for name in chosen for alias in _names_of(captured.host, parameters[name])}
    train, evaluation = (sparse_weights(gm, host_of).graph for gm in gms)
    lines = tuple(replace(line, nnz=counts.get(line.weight)) for line in lines)
    settings = {
        "density": density,
        "init": init,
        "growth": growth,
        "values": values,
        "seed": seed,
        "route": captured.route,
    }
    return SparsifiedModule.over(host, train, evaluation, lines=lines, settings=settings, notes=captured.notes)


def _lines(gms: Sequence[GraphModule], captured: Capture, dense: Sequence[Where]) -> tuple[SparsityLine, ...]:
    """A line for every parameter with two dimensions or more."""
    host = captured.host
    shapes = {name: p.shape for name, p in host.named_parameters() if p.dim() >= 2}
    names = {name: _names_of(host, host.get_parameter(name)) for name in shapes}
    unwanted = asked_for("dense", dense, names, host, _roles(gms[0], captured, dense))
    sizes = shapes_of(gms[0], captured)
    readers = [readers_of(gm) for gm in gms]
    lines = []
    for name, shape in shapes.items():
        own = host.get_parameter(name)
        reason = 'asked for with "dense="' if name in unwanted else None
        reason = reason or next(filter(None, map(why_not_sparse, gms, repeat(own), readers)), None)
        transposed = not reason and is_transposed(gms[0], own, readers[0])
        stored = tuple(reversed(shape)) if transposed else tuple(shape)
        lines.append(
            SparsityLine(name, stored, reason or "", transposed=transposed, **_calls_on(gms[0], own, readers[0], sizes))
        )
    return tuple(lines)


def _calls_on(
    gm: GraphModule, own: nn.Parameter, readers: Readers, sizes: Mapping[str, torch.Size] | None
) -> dict[str, Any]:
    """What a line says of the calls on a parameter."""
    calls = [n for n in readers.get(own, ()) if (found := weighted(gm, n)) is not None and found[0] is own]
    places = [
        # Tokens are places of an example, where it is known that there are any.
        sizes[call.name][1:-1].numel() if call.target is F.linear and sizes is not None else places_of(call, sizes)
        for call in calls
    ]
    return {
        "calls": len(calls),
        "input_grads": sum(needs_gradient(gm, call.args[0]) for call in calls),
        "places": None if None in places else sum(filter(None, places)) / max(1, len(calls)),
    }


def _roles(gm: GraphModule, captured: Capture, dense: Sequence[Where]) -> Mapping[str, frozenset[str]]:
    if not any(isinstance(place, str) and place in ROLES for place in dense):
        return {}
    shapes = shapes_of(gm, captured)
    with torch.device("cpu"):
        return roles_of(gm, graph_of(gm, captured, shapes))


def _sparse_weight(
    parameter: nn.Parameter, line: SparsityLine, count: int, values: Values, by: Asked, generator: Generator
) -> SparseWeight:
    rows, columns = line.shape[0], prod(line.shape[1:])
    if values == "largest":
        full = parameter.detach().t() if line.transposed else parameter.detach()
        by_columns = full.flatten(1).t().reshape(-1)
        keys = largest_magnitudes(by_columns, count)
        numbers = by_columns[keys]
    else:
        keys = draw_keys(rows, columns, count, generator)
        numbers = (torch.rand(count, generator=generator, device="cpu") * 2 - 1) * _bounds(keys, rows)[keys % rows]
    weight = SparseWeight(line.shape, keys.cpu(), numbers.cpu().to(parameter.dtype), line.transposed, by)
    device = "cpu" if parameter.is_meta else parameter.device
    weight.values.requires_grad_(parameter.requires_grad)
    return weight.to(device)


def _bounds(keys: Tensor, rows: int) -> Tensor:
    """``sqrt(3 / k)`` of a row with ``k`` non-zeros: uniform numbers within have the variance ``1 / k``."""
    fan_in = torch.bincount(keys % rows, minlength=rows).clamp(min=1)
    return (3 / fan_in).sqrt()


def _draw_bias(host: nn.Module, name: str, weight: SparseWeight, generator: Generator) -> None:
    """The bias that lies beside the weight, within the bounds of its rows."""
    owner = host.get_submodule(name.rpartition(".")[0])
    bias: Any = owner._parameters.get("bias")
    if bias is None or bias.shape != (weight.rows,) or not name.endswith("weight"):
        return
    bounds = _bounds(weight.keys().cpu(), weight.rows)
    drawn = (torch.rand(weight.rows, generator=generator, device="cpu") * 2 - 1) * bounds
    drawn_bias = nn.Parameter(drawn.to(weight.values), requires_grad=bias.requires_grad)
    for alias in _names_of(host, bias):  # which may be tied
        path, _, last = alias.rpartition(".")
        host.get_submodule(path)._parameters[last] = drawn_bias


def _copied_without(host: nn.Module, parameters: Iterable[nn.Parameter]) -> nn.Module:
    """A copy of everything but ``parameters``, which are still in their places."""
    return copy.deepcopy(host, {id(parameter): parameter for parameter in parameters})


def _materialize(host: nn.Module) -> None:
    """Give what is left on the meta device numbers, as its module draws them; what is tied stays so."""
    names = {name: _names_of(host, p) for name, p in host.named_parameters() if p.is_meta}
    for path, module in host.named_modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        empty = [name for name, tensor in own if tensor is not None and tensor.is_meta]
        if not empty:
            continue
        if not callable(reset := getattr(module, "reset_parameters", None)):
            raise ValueError(
                f"{'.'.join(filter(None, [path, empty[0]]))!r} is on the meta device, and {type(module).__name__} has "
                "no reset_parameters() to give it numbers. Build this module on a device."
            )
        module.to_empty(device="cpu", recurse=False)
        reset()
    for name, aliases in names.items():
        for alias in aliases:
            path, _, last = alias.rpartition(".")
            host.get_submodule(path)._parameters[last] = host.get_parameter(name)


def _names_of(host: nn.Module, parameter: nn.Parameter) -> tuple[str, ...]:
    return tuple(name for name, p in host.named_parameters(remove_duplicate=False) if p is parameter)


def _places_of(host: nn.Module, parameter: nn.Parameter) -> tuple[str, ...]:
    """One name for each module that holds it: a module may have several."""
    return tuple(
        f"{path}.{name}" if path else name
        for path, module in host.named_modules()
        for name, p in module._parameters.items()
        if p is parameter
    )


def _put(host: nn.Module, path: str, part: nn.Module | nn.Parameter) -> None:
    """Put a module in the place of a parameter; or a parameter, before the others, in that of a module."""
    owner_path, _, name = path.rpartition(".")
    owner = host.get_submodule(owner_path)
    if isinstance(part, nn.Module):
        owner._parameters.pop(name)
        owner._modules[name] = part
    else:
        owner._modules.pop(name)
        owner._parameters = {name: part} | owner._parameters


def _check_new(model: Any) -> None:
    """Refuse what is transformed or sparsified already, as a whole or in a part."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, (Transformed, SparseWeight)):
            what = f"module {path!r} of the model" if path else "model"
            raise ValueError(f"{what} is already made sparse. Give the model it was made from, or rwfx.densify it.")
