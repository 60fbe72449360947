"""The backward pass of a convolution on some rows: ``rwfx::row_conv_backward``.

PyTorch's own ``convolution_backward`` is given the channels of the row set. Those of a grouped convolution are dealt to
the groups that hold any, the same number to each: where a group has fewer, its last places are zero.

Axes: B examples, E of them kept, O rows, K rows of the set, I input channels of a group; G groups, H of them hit, M
places in each. Spatial dimensions and those of the kernel are not written.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rwfx.ops.inductor import let_inductor_compare_sparse
from rwfx.ops.linear import places_of
from rwfx.ops.row_gradient import row_gradient

torch.library.define(
    "rwfx::row_conv_backward",
    "(Tensor g, Tensor x, Tensor weight, Tensor rows, Tensor? scale, Tensor? examples, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups, bool full_dx, "
    "str grad, bool[] needs) -> (Tensor, Tensor, Tensor)",
)


class Convolution(NamedTuple):
    """What a convolution is given besides its tensors."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def num_rows(self, weight: Tensor) -> int:
        """How many output channels it has."""
        return weight.shape[1] * self.groups if self.transposed else weight.shape[0]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        """The convolution, with the parameters in ``dtype``."""
        if dtype is not None:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return torch.ops.aten.convolution.default(x, weight, bias, *self)

    def backward(self, g: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
        """``dx``, ``dw`` and ``db``, those of them that are needed, in the type of ``g``."""
        if not any(needs):
            return None, None, None
        x = x.to(g.dtype)
        found = torch.ops.aten.convolution_backward.default(g, x, weight, [g.shape[1]], *self, needs)
        return tuple(d if n else None for d, n in zip(found, needs, strict=True))

    def by_row(self, weight: Tensor) -> Tensor:
        """The weight with its rows before its features, as a view: ``(O, I)``, or ``(G, O / G, I)`` if transposed."""
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2) if self.transposed else weight

    def mask_weight(self, dw: Tensor, masked_O: Tensor) -> Tensor:
        """``dw`` with zeros in the rows that are masked."""
        if not self.transposed:
            return mask_rows(dw, masked_O, 0)
        masked = masked_O.view(self.groups, 1, -1, *[1] * len(self.stride))
        return dw.unflatten(0, (self.groups, -1)).masked_fill(masked, 0).flatten(0, 1)


def mask_rows(t: Tensor, masked: Tensor, dim: int) -> Tensor:
    """``t`` with zeros where its places in dimension ``dim`` are masked."""
    return t.masked_fill(masked.view(-1, *[1] * (t.dim() - dim - 1)), 0)


def keep_channels(t: Tensor, channels: Tensor) -> Tensor:
    """``t[:, channels]`` in the memory format of ``t``."""
    if not _is_channels_last(t):
        return t.index_select(1, channels)
    # In memory the channels come last: to gather them there copies runs and keeps the format.
    return t.movedim(1, -1).index_select(-1, channels).movedim(-1, 1)


@torch.library.impl("rwfx::row_conv_backward", "CompositeExplicitAutograd")
def _(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    scale: Tensor | None,
    examples: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    full_dx: bool,
    grad: str,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dx``, ``dw`` and ``db`` of ``rwfx.ops.row_conv``; None for what is not needed.

    ``grad="values"``: ``dw`` and ``db`` are the values of their row gradients.
    """
    conv = Convolution(stride, padding, dilation, transposed, output_padding, groups)
    num_rows, dx_of = conv.num_rows(weight), x
    if examples is not None:
        g, x = g.index_select(0, examples), x.index_select(0, examples)
    dx = None
    if full_dx and needs[0]:
        dx, _, _ = conv.backward(g, x, weight.to(g.dtype), [True, False, False])
        needs = [False, *needs[1:]]
    whole = rows.shape[0] == num_rows  # the rows are sorted and distinct: all of them, in order
    g_BK = g if whole else keep_channels(g, rows)
    if scale is not None:
        g_BK = g_BK * scale.to(g.dtype).view(-1, *[1] * (g.dim() - 2))
    if whole:
        dx_rows, dw, db = conv.backward(g_BK, x, weight.to(g.dtype), needs)
        dw = None if dw is None else _as_laid_out(dw.to(weight.dtype), weight)
        if grad == "rows" and dw is not None:
            dw = row_gradient(rows.clone(), dw, num_rows)
    else:
        w_KI = _take_rows(conv, weight, rows).to(g.dtype)
        dx_rows, dw_KI, db = _on_rows(conv, g_BK, x, w_KI, rows, num_rows, needs)
        dw = None if dw_KI is None else _weight_gradient(conv, dw_KI, weight, rows, grad)
    dx = dx_rows if dx is None else dx
    if db is not None:
        db = db.to(weight.dtype)
        if grad == "rows":
            db = row_gradient(rows.clone(), db, num_rows)
        elif grad == "dense" and not whole:
            db = db.new_zeros(num_rows).index_copy_(0, rows, db)
    if dx is not None and examples is not None:
        dx = torch.zeros_like(dx_of).index_copy_(0, examples, dx.to(dx_of.dtype))
    return None if dx is None else _as_laid_out(dx.to(dx_of.dtype), dx_of), dw, db


@torch.library.register_fake("rwfx::row_conv_backward")
def _(g, x, weight, rows, scale, examples, *call):
    conv, (grad, needs) = Convolution(*call[:6]), call[7:]
    let_inductor_compare_sparse()
    num_rows = conv.num_rows(weight)

    def of_parameter(like):
        if grad == "dense":
            return like
        values = weight.new_empty((rows.shape[0], *like.shape[1:]))
        return row_gradient(torch.empty_like(rows), values, num_rows) if grad == "rows" else values

    dx = torch.empty_like(x) if needs[0] else None
    dw = of_parameter(torch.empty_like(weight)) if needs[1] else None
    return dx, dw, of_parameter(weight.new_empty(num_rows)) if needs[2] else None


def _take_rows(conv: Convolution, weight: Tensor, rows: Tensor) -> Tensor:
    """``(K, I)``, the rows of the weight."""
    if conv.transposed:
        return conv.by_row(weight)[_group_and_place(conv, weight, rows)]
    return weight.index_select(0, rows).contiguous(memory_format=_format_of(weight))


def _on_rows(
    conv: Convolution, g_BK: Tensor, x: Tensor, w_KI: Tensor, rows: Tensor, num_rows: int, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """``dx``, ``dw[rows]`` and ``db[rows]`` of the gradient of the rows alone."""
    if not len(rows):
        zeros = torch.zeros_like(x), w_KI, w_KI.new_zeros(0)
        return tuple(d if n else None for d, n in zip(zeros, needs, strict=True))
    if conv.groups > 1:
        return _on_groups(conv, g_BK, x, w_KI, rows, num_rows, needs)
    if not conv.transposed:
        return conv.backward(g_BK, x, w_KI, needs)
    dx, dw_IK, db_K = conv.backward(g_BK, x, w_KI.transpose(0, 1), needs)
    return dx, None if dw_IK is None else dw_IK.transpose(0, 1), db_K


def _on_groups(
    conv: Convolution, g_BK: Tensor, x: Tensor, w_KI: Tensor, rows: Tensor, num_rows: int, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """The same, as a convolution of the groups that hold a row."""
    at_K = torch.arange(len(rows), device=rows.device)
    if num_rows == conv.groups:  # depthwise: a group is a row, and nothing has to be read back from a GPU
        hit_H, most = rows, 1
    else:
        group_K = rows // (num_rows // conv.groups)
        hit_H, nth_K, count_H = group_K.unique_consecutive(return_inverse=True, return_counts=True)
        most = int(count_H.max())
        at_K = nth_K * most + at_K - (count_H.cumsum(0) - count_H)[nth_K]
    num_hit = len(hit_H)

    def by_group(w: Tensor, of: int) -> Tensor:
        """From ``(H * M, I)`` to ``(H * I, M)`` or back, as transposed convolutions have it."""
        return w.unflatten(0, (num_hit, of)).transpose(1, 2).flatten(0, 1) if conv.transposed else w

    channels = places_of(hit_H, x.shape[1] // conv.groups)
    all_hit = num_hit == conv.groups
    x_hit = x if all_hit else keep_channels(x, channels)
    g_dealt, w_dealt = _put_channels(g_BK, at_K, num_hit * most), w_KI
    if num_hit * most > len(rows):
        w_dealt = w_KI.new_zeros(num_hit * most, *w_KI.shape[1:]).index_copy_(0, at_K, w_KI)
    dx, dw, db = conv._replace(groups=num_hit).backward(g_dealt, x_hit, by_group(w_dealt, most), needs)
    if dx is not None and not all_hit:
        dx = _put_channels(dx, channels, x.shape[1])
    dw_KI = None if dw is None else by_group(dw, w_KI.shape[1]).index_select(0, at_K)
    return dx, dw_KI, None if db is None else db.index_select(0, at_K)


def _weight_gradient(conv: Convolution, dw_KI: Tensor, weight: Tensor, rows: Tensor, grad: str) -> Tensor:
    """``dw`` as ``grad`` wants it."""
    dw_KI = dw_KI.to(weight.dtype)
    if grad != "dense":
        dw_KI = dw_KI.contiguous()
        return row_gradient(rows.clone(), dw_KI, len(weight)) if grad == "rows" else dw_KI
    dw = torch.zeros_like(weight)
    if conv.transposed:
        conv.by_row(dw)[_group_and_place(conv, weight, rows)] = dw_KI
        return dw
    return dw.index_copy_(0, rows, dw_KI)


def _group_and_place(conv: Convolution, weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the rows are in ``Convolution.by_row`` of a transposed convolution."""
    each = weight.shape[1]
    return rows // each, rows % each


def _put_channels(t: Tensor, channels: Tensor, size: int) -> Tensor:
    """Zeros with ``size`` channels, and ``t`` in ``channels`` of them; ``t`` itself where these are all."""
    if t.shape[1] == size:
        return t
    if not _is_channels_last(t):
        return t.new_zeros(t.shape[0], size, *t.shape[2:]).index_copy_(1, channels, t)
    last = t.movedim(1, -1)
    return last.new_zeros(*last.shape[:-1], size).index_copy_(-1, channels, last).movedim(-1, 1)


def _format_of(t: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.dim(), torch.contiguous_format)
    is_last = t.is_contiguous(memory_format=last) and not t.is_contiguous()
    return last if is_last else torch.contiguous_format


def _is_channels_last(t: Tensor) -> bool:
    return _format_of(t) is not torch.contiguous_format


def _as_laid_out(t: Tensor, like: Tensor) -> Tensor:
    """``t`` in the memory layout of ``like``, as the compiler has been told."""
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)
