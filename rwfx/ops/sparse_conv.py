"""Convolutions in two dimensions with a weight of which only the non-zeros are stored.

``rwfx::sparse_conv``           ``F.conv2d``
``rwfx::sparse_conv_backward``  its input's gradient, and that of the non-zeros alone

This is the implementation for every device: a dense weight is filled for the call. On a CPU ``rwfx/native/sparse.cpp``
computes with the non-zeros, without unfolding the input.

Axes: O output channels, I columns (input channels of a group times kernel places), N non-zeros.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from rwfx.nonzeros import Index, keys_of
from rwfx.ops.sparse_linear import (
    AUTOCAST,
    By,
    check_floating,
    check_operands,
    dense_weight,
    in_autocast,
    no_second_derivative,
)

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define(
    "sparse_conv(Tensor x, Tensor values, Tensor? bias, Tensor ccol_indices, Tensor row_indices, Tensor crow_indices, "
    "Tensor col_indices, Tensor order, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    "str by='nonzeros') -> Tensor"
)
_library.define(
    "sparse_conv_backward(Tensor g, Tensor x, Tensor values, Tensor ccol_indices, Tensor row_indices, "
    "Tensor crow_indices, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool needs_dx, "
    "bool needs_dv, str by='nonzeros') -> (Tensor, Tensor)"
)


def sparse_conv(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Index,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    by: By = "nonzeros",
) -> Tensor:
    """``F.conv2d(x, W, bias, stride, padding, dilation, groups)`` with ``values`` at the places of ``index`` in ``W``.

    With ``g = dL/dy``, number ``n`` at the output channel ``o_n`` and column ``i_n = (c, u, v)``, and ``x`` padded::

        y[:, o, p, q]  = sum over n with o_n = o of values[n] * x[:, c_n, p s + u d, q s + v d]       + bias[o]
        dvalues[n]     = sum over examples, p, q of g[:, o_n, p, q] * x[:, c_n, p s + u d, q s + v d]

    Args:
        x: ``(B, C, H, W)`` or ``(C, H, W)``.    values: ``(N,)``.    bias: ``(O,)`` or None.
        index: the places in the weight as ``(O, C / groups * kernel[0] * kernel[1])``, as in ``sparse_linear``.
        kernel, stride, padding, dilation: two numbers each.    by: as in ``sparse_linear``.

    Raises:
        TypeError: ``x`` is not of floating point.
        ValueError: ``x`` has another number of channels, or ``values`` has not a number for each place.
    """
    check_floating(x)
    options = list(kernel), list(stride), list(padding), list(dilation), groups, by
    if x.dim() == 3:
        return torch.ops.rwfx.sparse_conv.default(x.unsqueeze(0), values, bias, *index, *options).squeeze(0)
    return torch.ops.rwfx.sparse_conv.default(x, values, bias, *index, *options)


def _forward(
    x, values, bias, ccol_indices, row_indices, crow_indices, col_indices, order,
    kernel, stride, padding, dilation, groups, by="nonzeros",
):  # fmt: skip
    rows = len(crow_indices) - 1
    check_conv(x, rows, kernel, stride, padding, dilation, groups)
    check_operands(x.shape[1] // groups * prod(kernel), len(ccol_indices) - 1, rows, values, row_indices, bias)
    W = _dense(values.to(x.dtype), ccol_indices, row_indices, rows, kernel)
    bias = None if bias is None else bias.to(x.dtype)
    return torch.ops.aten.convolution(x, W, bias, stride, padding, dilation, False, [0, 0], groups).contiguous()


def _backward(
    g, x, values, ccol_indices, row_indices, crow_indices,
    kernel, stride, padding, dilation, groups, needs_dx, needs_dv, by="nonzeros",
):  # fmt: skip
    rows = len(crow_indices) - 1
    W = _dense(values.to(x.dtype), ccol_indices, row_indices, rows, kernel)
    dx, dW, _ = torch.ops.aten.convolution_backward(
        g, x, W, None, stride, padding, dilation, False, [0, 0], groups, [needs_dx, needs_dv, False]
    )
    dx = dx.contiguous() if needs_dx else g.new_empty(0)
    if not needs_dv:
        return dx, values.new_empty(0)
    dv = dW.flatten(1).t().reshape(-1).index_select(0, keys_of(ccol_indices, row_indices, rows))
    return dx, dv.to(values.dtype)


def check_conv(
    x: Tensor,
    rows: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Refuse what ``F.conv2d`` does.

    Raises:
        ValueError: says what does not fit.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), got the shape {list(x.shape)}.")
    if groups < 1 or x.shape[1] % groups or rows % groups:
        raise ValueError(f"{x.shape[1]} channels and {rows} rows cannot be dealt to groups={groups}.")
    if not all(len(sizes) == 2 for sizes in (kernel, stride, padding, dilation)):
        raise ValueError("kernel, stride, padding and dilation must be two numbers each.")
    if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(
            "kernel, stride and dilation must be above 0 and padding not below, got "
            f"{list(kernel)}, {list(stride)}, {list(dilation)} and {list(padding)}."
        )
    for n, k, p, d in zip(x.shape[2:], kernel, padding, dilation, strict=True):
        if n + 2 * p < (reach := d * (k - 1) + 1):
            raise ValueError(f"the kernel reaches over {reach} places and the padded input has {n + 2 * p}.")


def _dense(values: Tensor, ccol_indices: Tensor, row_indices: Tensor, rows: int, kernel: Sequence[int]) -> Tensor:
    return dense_weight(values, ccol_indices, row_indices, rows).reshape(rows, -1, *kernel)


for _name, _function in {"sparse_conv": _forward, "sparse_conv_backward": _backward}.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")


def _forward_fake(
    x, values, bias, ccol_indices, row_indices, crow_indices, col_indices, order,
    kernel, stride, padding, dilation, groups, by="nonzeros",
):  # fmt: skip
    check_conv(x, crow_indices.shape[0] - 1, kernel, stride, padding, dilation, groups)
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return x.new_empty((x.shape[0], crow_indices.shape[0] - 1, *out))


def _backward_fake(
    g, x, values, ccol_indices, row_indices, crow_indices,
    kernel, stride, padding, dilation, groups, needs_dx, needs_dv, by="nonzeros",
):  # fmt: skip
    dx = x.new_empty(x.shape) if needs_dx else g.new_empty(0)
    return dx, values.new_empty(values.shape if needs_dv else (0,))


def _save(ctx, inputs, output):
    x, values, bias, ccol_indices, row_indices, crow_indices, _, _, *ctx.options, ctx.by = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, values, ccol_indices, row_indices, crow_indices)


def _gradients(ctx, g):
    needs_dx, needs_dv, needs_db = ctx.needs_input_grad[:3]
    dx = dv = db = None
    if needs_dx or needs_dv:
        found = torch.ops.rwfx.sparse_conv_backward.default(
            g, *ctx.saved_tensors, *ctx.options, needs_dx, needs_dv, ctx.by
        )
        dx, dv = (part if needed else None for part, needed in zip(found, (needs_dx, needs_dv), strict=True))
    if needs_db:
        db = g.sum((0, 2, 3)).to(ctx.bias_dtype)
    return dx, dv, db, *[None] * 11


torch.library.register_fake("rwfx::sparse_conv", _forward_fake, lib=_library)
torch.library.register_fake("rwfx::sparse_conv_backward", _backward_fake, lib=_library)
torch.library.register_autograd("rwfx::sparse_conv", _gradients, setup_context=_save, lib=_library)
torch.library.register_autograd("rwfx::sparse_conv_backward", no_second_derivative, lib=_library)
for _device, _key in AUTOCAST.items():
    _library.impl("sparse_conv", in_autocast(torch.ops.rwfx.sparse_conv.default, _device), _key)
