"""``rwfx::grouped_mm``: products with a matrix of its own for every group of lines, as those of experts.

In: lines that are sorted by group, where each group ends, a stack of matrices. Out: each line times its group's matrix.
It is what a normalized graph has in place of ``F.grouped_mm`` and of the operator that transformers calls where that is
not to be had. Unlike those it can be traced in every type, and does not look at how a gradient is laid out.

Axes: S lines (tokens, one for each expert that they go to), E groups (experts), I input features, O output features.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define("grouped_mm(Tensor x, Tensor weight, Tensor offsets, str by) -> Tensor")
_library.define("grouped_outer(Tensor a, Tensor b, Tensor offsets, str by) -> Tensor")


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, by: str = "mm") -> Tensor:
    """``y[s] = x[s] @ weight[e]`` for each line ``s`` of group ``e``, ``offsets[e - 1] <= s < offsets[e]``.

    Args:
        x: ``(S, I)``.
        weight: ``(E, I, O)``, stored either way: it may be the transpose of a parameter ``(E, O, I)``.
        offsets: ``(E,)`` int32 or int64, never falling: where each group ends. What lies behind the last one is in no
            group: the product there is nobody's, and its gradient is zero.
        by: which product gives the numbers, here and in the backward pass: ``"mm"``, group by group, or
            ``"grouped_mm"``, that of ``F``, which wants features in multiples of 16 bytes.
    """
    return torch.ops.rwfx.grouped_mm.default(x, weight, offsets, by)


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor, by: str = "mm") -> Tensor:
    """``(E, K, I)``: for each group the sum over its lines of ``a[s].T @ b[s]``.

    Args:
        a: ``(S, K)``.    b: ``(S, I)``.    offsets, by: as of ``grouped_mm``.
    """
    return torch.ops.rwfx.grouped_outer.default(a, b, offsets, by)


def weight_gradient(x: Tensor, g: Tensor, offsets: Tensor, by_rows: bool, by: str = "mm") -> Tensor:
    """``(E, I, O)``, of ``grouped_mm`` with the output gradient ``g``; ``by_rows``: stored as ``(E, O, I)``."""
    return grouped_outer(g, x, offsets, by).transpose(1, 2) if by_rows else grouped_outer(x, g, offsets, by)


def by_rows(weight: Tensor) -> bool:
    """Whether a weight ``(E, I, O)`` is the transpose of a parameter ``(E, O, I)``: its gradient is stored alike."""
    return weight.stride(2) != 1


def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, by: str) -> Tensor:
    if by == "grouped_mm":
        return F.grouped_mm(x, weight, offs=offsets).contiguous()  # on a GPU its lines may be padded
    y = x.new_zeros(x.shape[0], weight.shape[2])
    for group, lines in _groups(offsets):
        torch.mm(x[lines], weight[group], out=y[lines])
    return y


def _grouped_outer(a: Tensor, b: Tensor, offsets: Tensor, by: str) -> Tensor:
    if by == "grouped_mm":
        return F.grouped_mm(a.t(), b, offs=offsets).contiguous()
    found = a.new_zeros(offsets.shape[0], a.shape[1], b.shape[1])
    for group, lines in _groups(offsets):
        torch.mm(a[lines].t(), b[lines], out=found[group])
    return found


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Each group that has lines, and which. It waits for a GPU, once."""
    start = 0
    for group, end in enumerate(offsets.tolist()):
        if end > start:
            yield group, slice(start, end)
            start = end


_library.impl("grouped_mm", _grouped_mm, "CompositeExplicitAutograd")
_library.impl("grouped_outer", _grouped_outer, "CompositeExplicitAutograd")


@torch.library.register_fake("rwfx::grouped_mm", lib=_library)
def _(x, weight, offsets, by):
    return x.new_empty((x.shape[0], weight.shape[2]))


@torch.library.register_fake("rwfx::grouped_outer", lib=_library)
def _(a, b, offsets, by):
    return a.new_empty((offsets.shape[0], a.shape[1], b.shape[1]))


def _setup(ctx, inputs, output) -> None:
    x, weight, offsets, ctx.by = inputs
    ctx.save_for_backward(x, weight, offsets)


def _backward(ctx, g):
    x, weight, offsets = ctx.saved_tensors
    g = g.contiguous()
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = grouped_mm(g, weight.transpose(1, 2), offsets, ctx.by)
        in_no_group = torch.arange(len(x), device=x.device) >= offsets[-1]
        dx = dx.masked_fill(in_no_group[:, None], 0)
    if ctx.needs_input_grad[1]:
        dw = weight_gradient(x, g, offsets, by_rows(weight), ctx.by)
    return dx, dw, None, None


torch.library.register_autograd("rwfx::grouped_mm", _backward, setup_context=_setup, lib=_library)
