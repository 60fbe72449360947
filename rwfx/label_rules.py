"""What each operation does to labels: one line per operation (``rwfx.labels`` has the words).

A rule is ``rule(run, function, args, kwargs) -> value``; ``run`` offers ``meet`` (ids where tensors of one shape are
added), ``reduce`` (ids where many places are pooled into one) and ``anything`` (no rule known). An operation is looked
up by its bare name, whether it is spelled as a function, a method, a module or an ATen operator.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rwfx import label_pools as pools
from rwfx import label_products as products
from rwfx import label_structure as structure
from rwfx.label_attention import attention_module
from rwfx.label_values import (
    Everywhere,
    Labels,
    UnknownShape,
    core,
    has_rows,
    nowhere,
    operands_of,
    with_shapes,
)


def _elementwise(run, function, args, kwargs):
    return run.meet_operands(operands_of(args, kwargs))


def _first(run, function, args, kwargs):
    x = operands_of(args, kwargs)[0]
    return Labels(x.ids) if isinstance(x, Labels) else x


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
        return structure.structural(run, function, args, kwargs)
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
    structure.same: "detach alias lift_fresh lift_fresh_copy requires_grad identity",
    _with_statistics: "native_batch_norm native_layer_norm native_group_norm native_dropout",
    structure.structural: """reshape flatten unflatten ravel permute transpose t swapaxes swapdims swapaxes_ movedim
        moveaxis adjoint numpy_T matrix_H mT mH squeeze unsqueeze expand expand_as view_as reshape_as broadcast_to
        repeat tile repeat_interleave split split_with_sizes tensor_split unsafe_split unsafe_chunk chunk unbind select
        slice narrow flip fliplr flipud roll rot90 diagonal pixel_shuffle pixel_unshuffle channel_shuffle hsplit vsplit
        take broadcast_tensors atleast_1d atleast_2d atleast_3d slice_scatter select_scatter""",
    structure.view: "view unsafe_view",
    structure.unfold: "unfold im2col",
    structure.cat: "cat concat concatenate",
    structure.stack: "stack hstack vstack dstack column_stack",
    structure.pad: "pad constant_pad_nd",
    structure.pad_module: "pad_module",
    pools.pool: """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d
        avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate upsample upsample_nearest1d
        upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
        upsample_trilinear3d""",
    structure.getitem: "getitem",
    structure.index: "index gather index_select take_along_dim",
    pools.regions: "roi_align roi_pool",
    pools.reduce: "mean sum nansum nanmean amax amin prod logsumexp any all",
    pools.variance: "var std",
    pools.variance_and_mean: "var_mean std_mean",
    pools.loss: """cross_entropy cross_entropy_loss nll_loss nll_loss_nd nll_loss2d gaussian_nll_loss poisson_nll_loss
        mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss multilabel_soft_margin_loss binary_cross_entropy
        binary_cross_entropy_with_logits kl_div ctc_loss""",
    pools.extreme: "max min median",
    pools.norm: "linalg_vector_norm norm",
    pools.along: "cumsum cumprod logcumsumexp cummax cummin",
    pools.in_order: "sort",
    pools.topk: "topk",
    structure.copied: "copy",
    structure.written: "setitem index_put",
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
    in_place = name.removeprefix("i")
    return in_place if name not in RULES and in_place in RULES else name


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
