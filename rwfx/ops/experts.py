"""Grouped products, as those of experts, whose backward pass is confined to a row set.

In: what ``rwfx.ops.grouped_mm`` takes, and a row set. Out: what it gives, bit for bit. A row is an output feature, in
the matrices of all groups: so the sizes of the products depend on no routing. Two operators with the same gradients, as
for linear calls (``rwfx.ops.linear``):

``rwfx::row_grouped_mm``     multiplies with the rows alone in the backward pass.
``rwfx::masked_grouped_mm``  multiplies densely and masks what comes out, to compare with.

Axes: S lines, E groups, I input features, O rows, K rows of the set.
"""

import torch
from torch import Tensor

from rwfx.ops.arguments import check_rows
from rwfx.ops.grouped_mm import by_rows, grouped_mm, weight_gradient
from rwfx.ops.observe import rows_of_step
from rwfx.ops.registration import register

_library = torch.library.Library("rwfx", "FRAGMENT")
_CALL = (
    "(Tensor x, Tensor weight, Tensor offsets, Tensor rows, str by, str dx='rows', str grad='dense', "
    "Tensor? scale=None, Tensor? seen=None, bool seen_all=True"
)
_library.define(f"row_grouped_mm{_CALL}, Tensor? chosen=None) -> Tensor")
_library.define(f"masked_grouped_mm{_CALL}) -> Tensor")


def row_grouped_mm(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    rows: Tensor,
    by: str,
    dx: str = "rows",
    grad: str = "dense",
    scale: Tensor | None = None,
    seen: Tensor | None = None,
    seen_all: bool = True,
    chosen: Tensor | None = None,
) -> Tensor:
    """``y[s] = x[s] @ weight[e]`` for each line ``s`` of group ``e``; the backward computes only ``rows``.

    With ``g = dL/dy``, ``R = rows`` and ``f = scale``, all ones if it is not given, for the lines ``s`` of a group::

        h              = g[s][:, R] * f
        dx[s]          = h @ weight[e][:, R].T           (dx="full": g[s] @ weight[e].T)
        dw[e][:, R]    = x[s].T @ h                      zero elsewhere, and where a group has no lines

    Args:
        x, weight, offsets, by: as of ``rwfx.ops.grouped_mm``: ``(S, I)`` and ``(E, I, O)``.
        rows: ``(K,)`` int64, sorted, no repeats, ``0 <= rows < O``; ``K = 0`` is allowed. It is not looked at.
        dx, scale, seen, seen_all, chosen: as of ``rwfx.ops.row_linear``.
        grad: ``"dense"``. A row lies in all matrices of the stack, so that it has no row gradient.

    Raises:
        ValueError: ``rows``, ``scale``, ``seen`` or ``chosen`` as of ``row_linear``; ``grad`` is not ``"dense"``.
    """
    return torch.ops.rwfx.row_grouped_mm.default(x, weight, offsets, rows, by, dx, grad, scale, seen, seen_all, chosen)


def masked_grouped_mm(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    rows: Tensor,
    by: str,
    dx: str = "rows",
    grad: str = "dense",
    scale: Tensor | None = None,
    seen: Tensor | None = None,
    seen_all: bool = True,
) -> Tensor:
    """``y[s] = x[s] @ weight[e]``; the backward is dense and then masked to ``rows``.

    Arguments and errors are those of ``row_grouped_mm``.
    """
    return torch.ops.rwfx.masked_grouped_mm.default(x, weight, offsets, rows, by, dx, grad, scale, seen, seen_all)


class _Grouped(torch.autograd.Function):
    """What both operators have in common: the forward, and how the backward begins and ends."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        offsets,
        rows,
        by,
        dx="rows",
        grad="dense",
        scale=None,
        seen=None,
        seen_all=True,
        chosen=None,
    ):
        check_rows(weight.shape[2], rows, scale, seen, chosen, False)
        if grad != "dense":
            raise ValueError(
                f"grad must be 'dense', got {grad!r}: a row of a stack of matrices is not its first dimension."
            )
        # Only what the backward pass reads.
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None, offsets)
        # Not saved: they may be written in the backward pass (rwfx.ops.linear).
        ctx.rows, ctx.scale = rows, scale
        ctx.seen, ctx.seen_all, ctx.chosen = seen, seen_all, chosen
        ctx.dx, ctx.by_rows, ctx.others = dx, by_rows(weight), 6
        return grouped_mm(x, weight, offsets, by)

    @staticmethod
    def begin(ctx, g):
        """The row set: ``ctx.rows``, unless it is chosen here."""
        if torch.is_grad_enabled():
            raise RuntimeError("rwfx::row_grouped_mm has no second derivative: leave create_graph=True out.")
        return rows_of_step(g, ctx.rows, ctx.seen, ctx.seen_all, ctx.chosen)

    @staticmethod
    def gradients(ctx, dx, dw):
        return dx, dw, *[None] * 3, *[None] * ctx.others


class _RowGrouped(_Grouped):
    @staticmethod
    def backward(ctx, g):
        x, weight, offsets = ctx.saved_tensors  # once: checkpointing gives them no second time
        rows = _Grouped.begin(ctx, g)
        h = g.index_select(-1, rows)
        if ctx.scale is not None:
            h = h * ctx.scale.to(g.dtype)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            full = ctx.dx == "full"
            dx = grouped_mm(g if full else h, (weight if full else _kept(weight, rows)).transpose(1, 2), offsets)
        if ctx.needs_input_grad[1]:
            dw_EIK = weight_gradient(x, h, offsets, ctx.by_rows)
            num_groups, num_features, num_rows = *dw_EIK.shape[:2], g.shape[-1]
            if ctx.by_rows:
                dw = dw_EIK.new_zeros(num_groups, num_rows, num_features).transpose(1, 2)
            else:
                dw = dw_EIK.new_zeros(num_groups, num_features, num_rows)
            dw.index_copy_(2, rows, dw_EIK)
        return _Grouped.gradients(ctx, dx, dw)


class _MaskedGrouped(_Grouped):
    @staticmethod
    def forward(ctx, x, weight, offsets, rows, by, dx="rows", grad="dense", scale=None, seen=None, seen_all=True):
        y = _Grouped.forward(ctx, x, weight, offsets, rows, by, dx, grad, scale, seen, seen_all)
        ctx.others = 5
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, offsets = ctx.saved_tensors
        rows = _Grouped.begin(ctx, g)
        # Filled, not multiplied: a masked entry is zero also where the dense one is not finite.
        masked_O = torch.ones(g.shape[-1], dtype=torch.bool, device=g.device).index_fill(0, rows, False)
        h = g
        if ctx.scale is not None:
            h = g * torch.ones_like(masked_O, dtype=g.dtype).index_copy(0, rows, ctx.scale.to(g.dtype))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            g_x = g if ctx.dx == "full" else h.masked_fill(masked_O, 0)
            dx = grouped_mm(g_x, weight.transpose(1, 2), offsets)
        if ctx.needs_input_grad[1]:
            # In place, which leaves it stored as the parameter is.
            dw = weight_gradient(x, h, offsets, ctx.by_rows).masked_fill_(masked_O, 0)
        return _Grouped.gradients(ctx, dx, dw)


def _kept(weight: Tensor, rows: Tensor) -> Tensor:
    """``weight[:, :, rows]``, gathered as the weight is stored: across that it would take several times as long."""
    if by_rows(weight):
        return weight.transpose(1, 2).index_select(1, rows).transpose(1, 2)
    return weight.index_select(2, rows)


register(_library, "row_grouped_mm", _RowGrouped)
register(_library, "masked_grouped_mm", _MaskedGrouped)
