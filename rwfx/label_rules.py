"""What each operation does to labels: one line per operation (``rwfx.labels`` has the words).

A rule is ``rule(run, function, args, kwargs) -> value``; ``run`` offers ``meet`` (ids where tensors of one shape are
added), ``reduce`` (ids where many places are pooled into one) and ``anything`` (no rule known). An operation is looked
up by its bare name, whether it is spelled as a function, a method, a module or an ATen operator.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rwfx import label_products as products
from rwfx.label_attention import attention_module
from rwfx.label_values import (
    Everywhere,
    Extremes,
    Labels,
    UnknownShape,
    core,
    has_rows,
    lean,
    nowhere,
    operands_of,
    with_shapes,
)


def _elementwise(run, function, args, kwargs):
    return run.meet_operands(operands_of(args, kwargs))


def _first(run, function, args, kwargs):
    x = operands_of(args, kwargs)[0]
    return Labels(x.ids) if isinstance(x, Labels) else x


def _same(run, function, args, kwargs):
    x = operands_of(args, kwargs)[0]
    return Labels(x.ids, x, lambda ids: ids) if isinstance(x, Labels) else x


def _with_statistics(run, function, args, kwargs):
    return _first(run, function, args, kwargs), Everywhere(-1), Everywhere(-1)


def _scaled(run, function, args, kwargs):
    # A smaller operand is added to, or taken times, many places alike: a gate, of which a walk may follow the rows.
    # But where it was computed from what it scales, with no weight between, it is a statistic, and no path.
    operands = operands_of(args, kwargs)
    if shaped := with_shapes(operands):
        shape = torch.broadcast_shapes(*[x.ids.shape for x in shaped])
        full = [x for x in shaped if x.ids.shape == shape and has_rows(x)]
        if full:
            gates = [x for x in shaped if x.ids.shape != shape and has_rows(x)]
            operands = full + [x for x in gates if not _is_statistic(run, x.ids.expand(shape), full[0].ids)]
    return run.meet_operands(operands)


def _is_statistic(run, gate: Tensor, full: Tensor) -> bool:
    gate, full = core(gate), core(full)
    shape = torch.broadcast_shapes(gate.shape, full.shape)
    pairs = torch.stack([gate.expand(shape).reshape(-1), full.expand(shape).reshape(-1)], 1)
    pairs = pairs[(pairs >= 0).all(1)]
    return len(pairs) > 0 and run.share_rows(*pairs[0].tolist())


def _where(run, function, args, kwargs):
    branches = operands_of(args[1:], kwargs)
    return run.meet_operands(branches) if branches else Everywhere(-1)


def _structural(run, function, args, kwargs):
    operands = with_shapes(operands_of(args, kwargs))
    if not operands and all(isinstance(x, Everywhere) for x in operands_of(args, kwargs)):
        return Everywhere(run.any_of(operands_of(args, kwargs)))
    if not operands:
        raise UnknownShape(f"{run.node.name} needs the shape of an input")

    def by(*ids: Tensor) -> Any:
        given = iter(ids)
        arguments, named = tree_map(lambda x: next(given) if isinstance(x, Labels) else x, (args, kwargs))
        return _executed(function, arguments, named)

    sources = [x.ids for x in operands]
    result = by(*sources)
    (first, *others), memory = operands, {ids.untyped_storage().data_ptr() for ids in sources}

    def labels(ids: Any, path: tuple[int, ...] = ()) -> Any:
        if isinstance(ids, (tuple, list)):
            return type(ids)(labels(part, (*path, k)) for k, part in enumerate(ids))
        if not isinstance(ids, Tensor):
            return ids
        if others or ids.untyped_storage().data_ptr() not in memory:
            return Labels(lean(ids))
        return Labels(ids, first, lambda whole: _at(by(whole), path))

    return labels(result)


def _at(tree: Any, path: tuple[int, ...]) -> Any:
    for k in path:
        tree = tree[k]
    return tree


def _executed(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except RuntimeError:
        if bare_name(function) not in ("view", "unsafe_view"):
            raise
        # The labels of a contiguous tensor need not be contiguous.
        shape = args[1:] if len(args) > 1 else tuple(kwargs.values())
        return args[0].reshape(*shape)


def _view(run, function, args, kwargs):
    if len(args) > 1 and isinstance(args[1], torch.dtype):
        return _same(run, function, args, kwargs)
    return _structural(run, function, args, kwargs)


def _cat(run, function, args, kwargs):
    parts = list(args[0] if args else kwargs["tensors"])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    known = [part.ids.shape for part in parts if isinstance(part, Labels)]
    if not known:
        return _structural(run, torch.cat, (parts, dim), {})
    nodes = run.node.args[0] if run.node.args else run.node.kwargs["tensors"]
    parts = [
        nowhere(part.shape) if isinstance(part, Tensor)
        else part if isinstance(part, Labels)
        else run.widen(part, node.name, known[0], dim)
        for part, node in zip(parts, nodes, strict=True)
    ]  # fmt: skip
    # An old ``torch.cat`` leaves out tensors of one dimension without numbers.
    parts = [part for part in parts if part.ids.numel() or part.ids.dim() == len(known[0])]
    return Labels(_joined([part.ids for part in parts], dim))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """``torch.cat``, with the dimensions that no part differs along stored once."""
    dim %= parts[0].dim()
    alike = [d for d in range(parts[0].dim()) if d != dim and all(core(p).shape[d] == 1 for p in parts)]
    shape = [n if d in alike else -1 for d, n in enumerate(parts[0].shape)]
    for d in alike:
        parts = [p.narrow(d, 0, 1) for p in parts]
    return torch.cat(parts, dim).expand(shape)


def _stack(run, function, args, kwargs):
    parts = args[0] if args else kwargs["tensors"]
    known = [part.ids.shape for part in parts if isinstance(part, Labels)]
    if known:
        parts = [
            part if isinstance(part, Labels) else nowhere(known[0], part.id if isinstance(part, Everywhere) else -1)
            for part in parts
        ]
    return _structural(run, function, (parts, *args[1:]), {k: v for k, v in kwargs.items() if k != "tensors"})


def _pad(run, function, args, kwargs):
    x = operands_of(args, kwargs)[0]
    if isinstance(x, Everywhere):
        return x
    sizes = args[1] if len(args) > 1 else kwargs["pad"]
    mode = args[2] if len(args) > 2 and isinstance(args[2], str) else kwargs.get("mode", "constant")
    if mode != "constant":  # it repeats numbers of the neighbourhood
        dims = [x.ids.dim() - 1 - k for k in range(len(sizes) // 2)]
        if all(core(x.ids).shape[d] == 1 for d in dims):
            return _respaced(
                run, x.ids, dims, [x.ids.shape[d] + sum(sizes[2 * k : 2 * k + 2]) for k, d in enumerate(dims)]
            )
        return Labels(lean(torch.nn.functional.pad(x.ids.double(), sizes, mode).long()))
    # Ids are shifted by one, so that what is filled with zero means "no row".
    return Labels(lean(torch.nn.functional.pad(x.ids + 1, sizes) - 1))


def _pad_module(run, module, args, kwargs):
    kinds = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}
    mode = next((kinds[word] for word in kinds if type(module).__name__.startswith(word)), "constant")
    return _pad(run, torch.nn.functional.pad, (*args, list(module.padding), mode), {})


def _unfold(run, function, args, kwargs):
    if bare_name(function) == "unfold" and function is not torch.nn.functional.unfold:
        return _structural(run, function, args, kwargs)
    x, *sizes = args  # im2col, which is not made for whole numbers
    return x if isinstance(x, Everywhere) else Labels(lean(function(x.ids.double() + 1, *sizes, **kwargs).long() - 1))


def _pool(run, function, args, kwargs):
    """Pooling and resampling: places of space are read together, channels are not."""
    x = operands_of(args, kwargs)[0]
    if isinstance(x, Everywhere):
        return x
    out = run.shape_of(function, args, kwargs)
    spatial = next((int(c) for c in run.operation if c.isdigit()), x.ids.dim() - 2)
    dims = [x.ids.dim() - 1 - k for k in range(spatial)]
    pooled = _respaced(run, x.ids, dims, [out[d] for d in dims])
    return Extremes(pooled, nowhere(out)) if "indices" in run.operation else pooled


def _respaced(run, ids: Tensor, dims: list[int], sizes: list[int]) -> Labels:
    """The ids, pooled over ``dims``, of a tensor with other sizes there."""
    shape = list(ids.shape)
    for d, size in zip(dims, sizes, strict=True):
        shape[d] = size
    return Labels(run.reduce(ids, dims).expand(shape))


def _getitem(run, function, args, kwargs):
    if isinstance(args[0], Labels) or operands_of(args[1]):
        return _index(run, function, args, kwargs)
    return args[0] if isinstance(args[0], Everywhere) else args[0][args[1]]


def _index(run, function, args, kwargs):
    """Indexing; where the index is computed from data, any place along the dimension may be meant."""
    x, index = args[0], args[1:]
    unknown = operands_of(index, kwargs)
    if not unknown or isinstance(x, Everywhere):
        return _structural(run, function, args, kwargs)
    if isinstance(x, Tensor):
        return Everywhere(-1)
    if any(isinstance(i, Everywhere) for i in unknown):
        raise UnknownShape(f"{run.node.name} needs the shape of an index")
    entries = index[0] if isinstance(index[0], (tuple, list)) else index
    named = bare_name(function) in ("gather", "index_select", "take_along_dim")
    dims = [d for d, i in enumerate(entries) if isinstance(i, Labels)] if not named else [
        next(i for i in index if isinstance(i, int)) % x.ids.dim()
    ]  # fmt: skip
    spread = run.reduce(x.ids, dims).expand(x.ids.shape)
    anywhere = tree_map(lambda i: torch.zeros(i.ids.shape, dtype=torch.int64) if isinstance(i, Labels) else i, index)
    return Labels(lean(function(spread, *anywhere)))


def _reduce(run, function, args, kwargs):
    x = operands_of(args, kwargs)[0]
    if isinstance(x, Everywhere):
        return x
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    every = range(x.ids.dim())
    dims = every if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    gone = sorted(d % max(x.ids.dim(), 1) for d in dims)
    shape = [1 if d in gone else x.ids.shape[d] for d in every if keepdim is True or d not in gone]
    return Labels(run.reduce(x.ids, gone).reshape(shape))


def _extreme(run, function, args, kwargs):
    if len(operands_of(args, kwargs)) > 1:
        return _elementwise(run, function, args, kwargs)
    reduced = _reduce(run, function, args, kwargs)
    return reduced if len(args) == 1 and not kwargs else Extremes(reduced, Everywhere(-1))


def _variance(run, function, args, kwargs):
    # The third argument is a correction, the fourth says whether to keep the dimension.
    return _reduce(run, function, (*args[:2], *args[3:4]), kwargs)


def _variance_and_mean(run, function, args, kwargs):
    variance = _variance(run, function, args, kwargs)
    return variance, variance


def _norm(run, function, args, kwargs):
    # A norm has its order before its dimensions.
    return _reduce(run, function, (args[0], *args[2:]), kwargs)


def _along(run, function, args, kwargs):
    """Each place may hold any of its line: a running sum, an order."""
    x = operands_of(args, kwargs)[0]
    if isinstance(x, Everywhere):
        return x
    dim = next((a for a in args[1:] if isinstance(a, int)), kwargs.get("dim", -1)) % x.ids.dim()
    return Labels(run.reduce(x.ids, [dim]).expand(x.ids.shape))


def _sorted(run, function, args, kwargs):
    along = _along(run, function, args, kwargs)
    return Extremes(along, nowhere(along.ids.shape) if isinstance(along, Labels) else along)


def _topk(run, function, args, kwargs):
    x, k = args[0], args[1]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
    if isinstance(x, Everywhere):
        return Extremes(x, Everywhere(-1))
    dim %= x.ids.dim()
    values = _respaced(run, x.ids, [dim], [k])
    return Extremes(values, nowhere(values.ids.shape))


def _copied(run, function, args, kwargs):
    into, source = args[:2]
    if isinstance(into, Everywhere):
        return source
    ids = (
        source.ids if isinstance(source, Labels) else torch.tensor(source.id if isinstance(source, Everywhere) else -1)
    )
    return Labels(ids.expand(into.ids.shape))


def _written(run, function, args, kwargs):
    """``x[index] = value``, and ``index_put``."""
    x, index, value = args[:3]
    if not isinstance(x, Labels) or operands_of(index):
        return run.anything("an index computed from data", operands_of(args))
    ids = x.ids.clone(memory_format=torch.contiguous_format)
    index = tuple(index) if isinstance(index, list) else index
    index = tuple(slice(None) if i is None else i for i in index) if run.operation == "index_put" else index
    ids[index] = value.ids if isinstance(value, Labels) else value.id if isinstance(value, Everywhere) else -1
    return Labels(lean(ids))


def _none(run, function, args, kwargs):
    """Numbers that come from no row: what is new, what has a token's number, what tells places apart."""
    x = operands_of(args, kwargs)[0]
    return nowhere(x.ids.shape) if isinstance(x, Labels) else Everywhere(-1)


def _end(run, function, args, kwargs):
    return Everywhere(-1)


def _new(run, function, args, kwargs):
    if not isinstance(args[0], Labels):
        return Everywhere(-1)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("dtype", "device", "pin_memory")}
    return nowhere(function(args[0].ids.to("meta"), *args[1:], **kwargs).shape)


def _size(run, function, args, kwargs):
    shape = _shape(run, args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if dim is None:
        return shape
    if isinstance(args[0], Everywhere) and not 0 <= dim < len(run.lead):
        raise UnknownShape(f"{run.node.name} needs the shape of an input")
    return shape[dim]


def _numel(run, function, args, kwargs):
    if isinstance(args[0], Everywhere):
        raise UnknownShape(f"{run.node.name} needs the shape of an input")
    return args[0].ids.numel()


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


def _loss(run, function, args, kwargs):
    """Of what is compared with the targets, whether or not every entry has a loss of its own."""
    x = operands_of(args[:1], kwargs)[0]
    return _reduce(run, torch.sum, (x,), {})


def _nothing(run, function, args, kwargs):
    return None


_TABLE: dict[Callable[..., Any], str] = {
    _elementwise: """add maximum minimum fmax fmin pow atan2 hypot lerp addcmul addcdiv
        eq ne lt le gt ge logical_and logical_or logical_xor and or xor isclose remainder fmod floordiv
        floor_divide mod xlogy logaddexp clamp clip bitwise_and bitwise_or bitwise_xor""",
    _scaled: "mul multiply div divide truediv true_divide sub rsub subtract",
    _where: "where",
    _first: """relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh
        hardshrink softshrink tanhshrink threshold softplus softsign logsigmoid log_sigmoid sigmoid tanh softmax
        log_softmax safe_softmax softmin normalize dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
        feature_alpha_dropout stochastic_depth batch_norm layer_norm group_norm instance_norm rms_norm
        local_response_norm fused_rms_norm
        abs neg negative pos positive invert logical_not bitwise_not sign sgn sqrt rsqrt square exp exp2 expm1 log log2
        log10 log1p sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erfinv floor ceil round trunc frac
        reciprocal nan_to_num isnan isinf isfinite masked_fill fill_diagonal to to_copy type type_as float double half
        bfloat16 int long bool cuda cpu clone contiguous tril triu clamp_min clamp_max deg2rad rad2deg sinc i0 lgamma
        digamma logit""",
    _same: "detach alias lift_fresh lift_fresh_copy requires_grad identity",
    _with_statistics: "native_batch_norm native_layer_norm native_group_norm native_dropout",
    _structural: """reshape flatten unflatten ravel permute transpose t swapaxes swapdims swapaxes_ movedim
        moveaxis adjoint numpy_T matrix_H mT mH squeeze unsqueeze expand expand_as view_as reshape_as broadcast_to
        repeat tile repeat_interleave split split_with_sizes tensor_split unsafe_split unsafe_chunk chunk unbind select
        slice narrow flip fliplr flipud roll rot90 diagonal pixel_shuffle pixel_unshuffle channel_shuffle hsplit vsplit
        take broadcast_tensors atleast_1d atleast_2d atleast_3d slice_scatter select_scatter""",
    _view: "view unsafe_view",
    _unfold: "unfold im2col",
    _cat: "cat concat concatenate",
    _stack: "stack hstack vstack dstack column_stack",
    _pad: "pad constant_pad_nd",
    _pad_module: "pad_module",
    _pool: """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d
        avg_pool3d lp_pool1d lp_pool2d lp_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate upsample upsample_nearest1d
        upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
        upsample_trilinear3d""",
    _getitem: "getitem",
    _index: "index gather index_select take_along_dim",
    _reduce: "mean sum nansum nanmean amax amin prod logsumexp any all",
    _variance: "var std",
    _variance_and_mean: "var_mean std_mean",
    _loss: """cross_entropy cross_entropy_loss nll_loss nll_loss_nd nll_loss2d gaussian_nll_loss poisson_nll_loss
        mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss multilabel_soft_margin_loss binary_cross_entropy
        binary_cross_entropy_with_logits kl_div ctc_loss""",
    _extreme: "max min median",
    _norm: "linalg_vector_norm norm",
    _along: "cumsum cumprod logcumsumexp cummax cummin",
    _sorted: "sort",
    _topk: "topk",
    _copied: "copy",
    _written: "setitem index_put",
    _none: """zeros_like ones_like full_like empty_like rand_like randn_like randint_like bernoulli
        argsort zero fill""",
    _end: "embedding one_hot argmax argmin nonzero bincount",
    _new: "new_zeros new_ones new_full new_empty new_tensor",
    _size: "size sym_size",
    _numel: "numel sym_numel",
    _rank: "dim ndimension",
    _getattr: "getattr",
    _nothing: "assert assert_is_none assert_tensor_metadata assert_scalar assert_async",
    products.matmul: "matmul mm bmm",
    products.add_matmul: "baddbmm addmm",
    products.attention: "scaled_dot_product_attention",
    products.einsum: "einsum",
    products.glu: "glu",
    attention_module: "multihead_attention",
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
    nn.GLU: "glu",
    nn.Embedding: "embedding",
    nn.EmbeddingBag: "embedding",
    nn.MultiheadAttention: "multihead_attention",
}
_FILES = {
    "activation": "relu",
    "dropout": "dropout",
    "batchnorm": "batch_norm",
    "instancenorm": "instance_norm",
    "normalization": "layer_norm",
    "upsampling": "interpolate",
    "padding": "pad_module",
}


def bare_name(operation: Any) -> str:
    """The name under which an operation has a rule: a function, or a function's or method's name, as fx holds it."""
    if isinstance(operation, torch._ops.OpOverload):
        operation = operation._schema.name.rpartition("::")[2]
    name = operation if isinstance(operation, str) else getattr(operation, "__name__", str(operation))
    name = name.strip("_")
    return name if name in RULES else name.removeprefix("i")


def operation_of(module: nn.Module) -> str:
    """The operation that a module performs, or its class name where there is no rule for it."""
    kind = type(module)
    if kind in _MODULES:
        return _MODULES[kind]
    package, _, file = kind.__module__.rpartition(".")
    if package != "torch.nn.modules":
        return kind.__name__
    if file == "pooling":
        return _pooling(kind.__name__)
    return _FILES.get(file, kind.__name__)


def _pooling(name: str) -> str:
    """``AdaptiveAvgPool2d`` as ``adaptive_avg_pool2d``."""
    return "".join("_" + c.lower() if c.isupper() else c for c in name).strip("_")
