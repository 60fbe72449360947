"""What each operation does to labels: one line per operation (``rwfx.labels`` has the words).

A rule is ``rule(run, function, args, kwargs) -> value``; ``run`` offers ``meet`` (ids where tensors of one
shape are added), ``gather`` (ids where many places are pooled into one) and ``anything`` (no rule known).
An operation is looked up by its bare name, whether it is spelled as a function, a method or a module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map


@dataclass(frozen=True)
class Labels:
    """The ids of a tensor's elements, as an int64 tensor of its shape; -1: no row."""

    ids: Tensor


@dataclass(frozen=True)
class Everywhere:
    """A tensor of unknown shape whose every element has the same id."""

    id: int


class Extremes(NamedTuple):
    """What ``max`` and ``min`` along a dimension return."""

    values: Any
    indices: Any


class UnknownShape(Exception):
    """The labels cannot be followed without a shape that only example inputs tell."""


def operands_of(*trees: Any) -> list[Labels | Everywhere]:
    """The labelled tensors in nested arguments, in order."""
    return [leaf for leaf in tree_flatten(trees)[0] if isinstance(leaf, (Labels, Everywhere))]


def _elementwise(run, function, args, kwargs):
    return _meet(run, operands_of(args, kwargs))


def _first(run, function, args, kwargs):
    return operands_of(args, kwargs)[0]


def _product(run, function, args, kwargs):
    # A factor that is broadcast is a gate (one number for many features); the features are the other's.
    operands = operands_of(args, kwargs)
    shape = _broadcast_shape(operands)
    full = [x for x in operands if isinstance(x, Labels) and x.ids.shape == shape and bool((x.ids >= 0).any())]
    return _meet(run, full or operands)


def _where(run, function, args, kwargs):
    branches = operands_of(args[1:], kwargs)
    return _meet(run, branches) if branches else Everywhere(-1)


def _meet(run, operands):
    if all(isinstance(x, Everywhere) for x in operands):
        return Everywhere(run.any_of(operands))
    shape = _broadcast_shape(operands)
    ids = [
        x.ids.expand(shape) if isinstance(x, Labels) else torch.full(shape, x.id)
        for x in operands
        if isinstance(x, Labels) or x.id >= 0
    ]
    return Labels(run.meet(ids))


def _broadcast_shape(operands) -> torch.Size:
    return torch.broadcast_shapes(*[x.ids.shape for x in operands if isinstance(x, Labels)])


def _structural(run, function, args, kwargs):
    operands = operands_of(args, kwargs)
    if all(isinstance(x, Everywhere) for x in operands):
        return Everywhere(run.any_of(operands))
    if any(isinstance(x, Everywhere) for x in operands):
        raise UnknownShape(f"{run.node.name} needs the shape of an input")
    # Ids are shifted by one, so that what an operation fills with zero means "no row".
    args, kwargs = tree_map(lambda x: x.ids + 1 if isinstance(x, Labels) else x, (args, kwargs))
    try:
        result = function(*args, **kwargs)
    except RuntimeError:
        if run.node.target != "view":
            raise
        result = args[0].reshape(*args[1:])  # the labels of a contiguous tensor need not be contiguous
    return tree_map(lambda ids: Labels(ids - 1) if isinstance(ids, Tensor) else ids, result)


def _cat(run, function, args, kwargs):
    parts = list(args[0] if args else kwargs["tensors"])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    known = [part.ids.shape for part in parts if isinstance(part, Labels)]
    if known:
        nodes = run.node.args[0] if run.node.args else run.node.kwargs["tensors"]
        parts = [
            part if isinstance(part, Labels) else run.widen(part, node.name, known[0], dim)
            for part, node in zip(parts, nodes, strict=True)
        ]
    return _structural(run, torch.cat, (parts, dim), {})


def _stack(run, function, args, kwargs):
    parts = args[0] if args else kwargs["tensors"]
    known = [part.ids.shape for part in parts if isinstance(part, Labels)]
    if known:
        parts = [part if isinstance(part, Labels) else Labels(torch.full(known[0], part.id)) for part in parts]
    return _structural(run, function, (parts, *args[1:]), {k: v for k, v in kwargs.items() if k != "tensors"})


def _pad(run, function, args, kwargs):
    kwargs = {key: value for key, value in kwargs.items() if key != "value"}
    return _structural(run, function, args[:3], kwargs)


def _getitem(run, function, args, kwargs):
    if isinstance(args[0], (Labels, Everywhere)):
        return _structural(run, function, args, kwargs)
    return args[0][args[1]]


def _reduce(run, function, args, kwargs):
    x = operands_of(args, kwargs)[0]
    if isinstance(x, Everywhere):
        return x
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    every = range(x.ids.dim())
    dims = every if dim is None else [dim] if isinstance(dim, int) else dim
    gone = sorted(d % max(x.ids.dim(), 1) for d in dims)
    kept = [d for d in every if d not in gone]
    shape = [1 if d in gone else x.ids.shape[d] for d in every if keepdim or d in kept]
    places = x.ids.permute(*kept, *gone).flatten(len(kept))
    return Labels(run.gather(places.reshape(-1, places.shape[-1])).reshape(shape))


def _extreme(run, function, args, kwargs):
    if len(operands_of(args, kwargs)) > 1:
        return _elementwise(run, function, args, kwargs)
    reduced = _reduce(run, function, args, kwargs)
    return reduced if len(args) == 1 and not kwargs else Extremes(reduced, Everywhere(-1))


def _like(run, function, args, kwargs):
    x = operands_of(args, kwargs)[0]
    return Labels(torch.full_like(x.ids, -1)) if isinstance(x, Labels) else Everywhere(-1)


def _new(run, function, args, kwargs):
    if not isinstance(args[0], Labels):
        return Everywhere(-1)
    return Labels(torch.full_like(function(args[0].ids, *args[1:], **kwargs), -1, dtype=torch.int64))


def _size(run, function, args, kwargs):
    shape = _shape(run, args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if dim is None:
        return shape
    if isinstance(args[0], Everywhere) and not 0 <= dim < len(run.lead):
        raise UnknownShape(f"{run.node.name} needs the shape of an input")
    return shape[dim]


def _getattr(run, function, args, kwargs):
    x, name = args
    if not isinstance(x, (Labels, Everywhere)):
        return getattr(x, name)
    if name in ("T", "mT", "H", "mH"):
        return _structural(run, function, args, kwargs)
    known = {"shape": _shape(run, x), "dtype": torch.float32, "device": torch.device("cpu")}
    known["ndim"] = len(known["shape"])
    return known.get(name, x)


def _rank(run, function, args, kwargs):
    return len(_shape(run, args[0]))


def _shape(run, x) -> tuple[Any, ...]:
    # Of an input only the leading dimensions are guessed; its last one is not known (None).
    return tuple(x.ids.shape) if isinstance(x, Labels) else (*run.lead, None)


def _nothing(run, function, args, kwargs):
    return None


_TABLE: dict[Callable[..., Any], str] = {
    _elementwise: """add sub rsub subtract maximum minimum fmax fmin pow atan2 hypot lerp addcmul addcdiv
        eq ne lt le gt ge logical_and logical_or logical_xor and or xor isclose remainder fmod floordiv
        floor_divide mod xlogy logaddexp clamp clip""",
    _product: "mul multiply div divide truediv",
    _where: "where",
    _first: """relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh
        hardshrink softshrink tanhshrink threshold softplus softsign logsigmoid sigmoid tanh softmax log_softmax
        softmin normalize dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
        feature_alpha_dropout batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm
        abs neg negative pos positive invert logical_not sign sgn sqrt rsqrt square exp exp2 expm1 log log2 log10
        log1p sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erfinv floor ceil round trunc frac
        reciprocal nan_to_num isnan isinf isfinite masked_fill fill_diagonal to type type_as float double half
        bfloat16 int long bool cuda cpu detach clone contiguous requires_grad alias tril triu identity
        clamp_min clamp_max deg2rad rad2deg sinc i0 lgamma digamma logit""",
    _structural: """view reshape flatten unflatten ravel permute transpose t swapaxes swapdims swapaxes_ movedim
        moveaxis adjoint squeeze unsqueeze expand expand_as view_as reshape_as broadcast_to repeat tile
        repeat_interleave split split_with_sizes tensor_split chunk unbind select narrow index_select flip fliplr
        flipud roll rot90 diagonal unfold pixel_shuffle pixel_unshuffle channel_shuffle hsplit vsplit take
        gather broadcast_tensors atleast_1d atleast_2d atleast_3d""",
    _cat: "cat concat concatenate",
    _stack: "stack hstack vstack dstack column_stack",
    _pad: "pad",
    _getitem: "getitem",
    _reduce: "mean sum nansum nanmean amax amin prod logsumexp",
    _extreme: "max min",
    _like: "zeros_like ones_like full_like empty_like rand_like randn_like randint_like bernoulli",
    _new: "new_zeros new_ones new_full new_empty new_tensor",
    _size: "size",
    _rank: "dim ndimension",
    _getattr: "getattr",
    _nothing: "assert assert_is_none",
}
RULES = {name: rule for rule, names in _TABLE.items() for name in names.split()}

# A module is looked up by the name of its operation: its class, or the file of torch.nn that it lies in.
_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.Flatten: "flatten",
    nn.Unflatten: "unflatten",
    nn.PixelShuffle: "pixel_shuffle",
    nn.PixelUnshuffle: "pixel_unshuffle",
    nn.ChannelShuffle: "channel_shuffle",
}
_FILES = {
    "activation": "relu",
    "dropout": "dropout",
    "batchnorm": "batch_norm",
    "instancenorm": "instance_norm",
    "normalization": "layer_norm",
    "padding": "pad",
}


def bare_name(operation: Any) -> str:
    """The name under which an operation has a rule: a function, or a function's or method's name, as fx holds it."""
    name = (operation if isinstance(operation, str) else getattr(operation, "__name__", str(operation))).strip("_")
    return name if name in RULES else name.removeprefix("i")


def operation_of(module: nn.Module) -> str:
    """The operation that a module performs, or its class name where there is no rule for it."""
    kind = type(module)
    if kind in _MODULES:
        return _MODULES[kind]
    package, _, file = kind.__module__.rpartition(".")
    weighted = isinstance(module, nn.MultiheadAttention)
    return _FILES.get(file, kind.__name__) if package == "torch.nn.modules" and not weighted else kind.__name__
