"""Linear calls whose backward pass is confined to a row set.

In: what ``F.linear`` takes, and a row set. Out: what ``F.linear`` gives, bit for bit. Two operators with
the same gradients:

``rwfx::row_linear``     does the two products of the backward pass on the rows alone.
``rwfx::masked_linear``  does them densely and masks what comes out: the method of the original research
                         code, which saves nothing and is kept to compare with.

Axes: B the leading dimensions flattened, I input features, O rows of the weight, K rows of the set.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rwfx.ops.row_gradient import row_wgrad, take_rows


@torch.library.custom_op("rwfx::row_linear", mutates_args=())
def row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    dx: str = "rows",
    grad: str = "dense",
    dtype: torch.dtype | None = None,
    kept_weight: Tensor | None = None,
    kept_bias: Tensor | None = None,
) -> Tensor:
    """``y = x @ weight.T + bias``; the backward computes only ``rows`` of the parameters' gradients.

    With ``g = dL/dy`` and ``R = rows``::

        dx    = g[:, R] @ weight[R]        (dx="full": g @ weight)
        dw[R] = g[:, R].T @ x              zero, or absent, elsewhere
        db[R] = g[:, R].sum(0)             zero, or absent, elsewhere

    Args:
        x: ``(*, I)``, any leading shape.    weight: ``(O, I)``.    bias: ``(O,)`` or None.
        rows: ``(K,)`` int64, sorted, no repeats, ``0 <= rows < O``; ``K = 0`` is allowed. Order, repeats
            and range are the caller's promise: to look would cost a synchronisation every step.
        dx: ``"rows"`` or ``"full"``: the rows that the gradient of ``x`` is summed over.
        grad: ``"dense"`` gives ``dw`` and ``db`` with zeros outside the rows; ``"rows"`` gives them as
            row gradients (``rwfx.ops.row_gradient``), which hold the rows alone.
        dtype: the type to compute in; autocast fills it in. A gradient has the type of its parameter.
        kept_weight, kept_bias: ``rwfx.ops.keep_rows`` of both, where several calls share a weight. They
            receive the gradients then, and ``weight`` and ``bias`` none: those of all calls are summed on
            the rows before they are made row gradients, since two of these cannot be added in a
            compiled graph.

    What needs no gradient (a frozen weight, the model's input) costs nothing in the backward pass.

    Raises:
        ValueError: ``rows`` is not int64 or not one-dimensional.
    """
    return _linear(x, weight, bias, rows, dtype)


@torch.library.custom_op("rwfx::masked_linear", mutates_args=())
def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    dx: str = "rows",
    grad: str = "dense",
    dtype: torch.dtype | None = None,
    kept_weight: Tensor | None = None,
    kept_bias: Tensor | None = None,
) -> Tensor:
    """``y = x @ weight.T + bias``; the backward is dense and then masked to ``rows``.

    With ``g = dL/dy`` and ``m`` the 0/1 mask of the row set::

        dx = (m * g) @ weight       (dx="full": g @ weight)
        dw = m[:, None] * (g.T @ x)
        db = m * g.sum(0)

    Arguments and errors are those of ``row_linear``.
    """
    return _linear(x, weight, bias, rows, dtype)


def _linear(x, weight, bias, rows, dtype):
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(
            f"rows must be a one-dimensional int64 tensor of row numbers, got {rows.dtype} of shape "
            f"{tuple(rows.shape)}."
        )
    if dtype is None:
        return F.linear(x, weight, bias)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


@row_linear.register_fake
@masked_linear.register_fake
def _fake(x, weight, bias, rows, dx="rows", grad="dense", dtype=None, kept_weight=None, kept_bias=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype or x.dtype)


def _save(ctx, inputs, output) -> None:
    x, weight, _, rows, ctx.dx, ctx.grad, dtype, kept_weight, _ = inputs
    ctx.save_for_backward(x, weight, rows)
    ctx.dtype = dtype or x.dtype
    ctx.kept = kept_weight is not None


def _row_backward(ctx, g):
    x, weight, rows = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = _needs(ctx)
    num_rows = weight.shape[0]
    g_BO = g.reshape(-1, num_rows)
    g_BK = g_BO.index_select(1, rows)
    dx = dw = db = None
    if needs_x:
        if ctx.dx == "full":
            dx = g_BO @ weight.to(ctx.dtype)
        else:
            dx = g_BK @ weight.index_select(0, rows).to(ctx.dtype)
    if needs_weight:
        x_BI = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        if ctx.grad == "rows" and not ctx.kept:
            dw = row_wgrad(g_BK, x_BI, rows, num_rows, weight.dtype)
        else:
            dw = (g_BK.t() @ x_BI).to(weight.dtype)
            dw = dw if ctx.kept else weight.new_zeros(weight.shape).index_copy(0, rows, dw)
    if needs_bias:
        if ctx.grad == "rows" and not ctx.kept:
            db = row_wgrad(g_BK, None, rows, num_rows, weight.dtype)
        else:
            db = g_BK.sum(0).to(weight.dtype)
            db = db if ctx.kept else weight.new_zeros(num_rows).index_copy(0, rows, db)
    return _gradients(ctx, x, dx, dw, db)


def _masked_backward(ctx, g):
    x, weight, rows = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = _needs(ctx)
    num_rows = weight.shape[0]
    g_BO = g.reshape(-1, num_rows)
    # Filled, not multiplied: a masked entry is zero also where the dense one is not finite.
    masked_O = torch.ones(num_rows, dtype=torch.bool, device=g.device).index_fill(0, rows, False)

    def mask(dense):
        if ctx.kept:
            return dense.index_select(0, rows)
        if ctx.grad == "rows":
            return take_rows(dense, rows)
        return dense.masked_fill(masked_O.view(-1, *[1] * (dense.dim() - 1)), 0)

    dx = dw = db = None
    if needs_x:
        dx = (g_BO if ctx.dx == "full" else g_BO.masked_fill(masked_O, 0)) @ weight.to(ctx.dtype)
    if needs_weight:
        dw = mask((g_BO.t() @ x.reshape(-1, x.shape[-1]).to(ctx.dtype)).to(weight.dtype))
    if needs_bias:
        db = mask(g_BO.sum(0).to(weight.dtype))
    return _gradients(ctx, x, dx, dw, db)


def _needs(ctx) -> tuple[bool, bool, bool]:
    needs = (*ctx.needs_input_grad, False, False)  # arguments left at their default have no entry
    needs_weight, needs_bias = needs[7:9] if ctx.kept else needs[1:3]
    return needs[0], needs_weight, needs_bias


def _gradients(ctx, x, dx, dw, db):
    if dx is not None:
        dx = dx.reshape(x.shape).to(x.dtype)
    parameters = (None, None, None, None, None, None, dw, db) if ctx.kept else (dw, db, *[None] * 6)
    return dx, *parameters


row_linear.register_autograd(_row_backward, setup_context=_save)
masked_linear.register_autograd(_masked_backward, setup_context=_save)


def _follow_autocast(op: str, device: str, key: str) -> None:
    """Make ``op`` compute in autocast's type, as ``F.linear`` does.

    The type is handed to the operator instead of casting its arguments, so that the weight's gradient is
    cast on its rows alone.
    """

    def kernel(x, weight, bias, rows, dx="rows", grad="dense", dtype=None, kept_weight=None, kept_bias=None):
        # Autocast leaves double precision alone.
        lowered = None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.amp.autocast(device, enabled=False):
            call = getattr(torch.ops.rwfx, op).default
            return call(x, weight, bias, rows, dx, grad, lowered, kept_weight, kept_bias)

    torch.library.impl(f"rwfx::{op}", key)(kernel)


for _op in ("row_linear", "masked_linear"):
    for _device, _key in {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}.items():
        _follow_autocast(_op, _device, _key)
