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
def _fake(x, weight, bias, rows, dx="rows", grad="dense", dtype=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype or x.dtype)


def _save(ctx, inputs, output) -> None:
    x, weight, _, rows, ctx.dx, ctx.grad, dtype = inputs
    ctx.save_for_backward(x, weight, rows)
    ctx.dtype = dtype or x.dtype


def _row_backward(ctx, g):
    x, weight, rows = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    num_rows = weight.shape[0]
    g_BO = g.reshape(-1, num_rows)
    g_BK = g_BO.index_select(1, rows)
    dx = dw = db = None
    if needs_x:
        if ctx.dx == "full":
            dx = g_BO @ weight.to(ctx.dtype)
        else:
            dx = g_BK @ weight.index_select(0, rows).to(ctx.dtype)
        dx = dx.reshape(x.shape).to(x.dtype)
    if needs_weight:
        x_BI = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        if ctx.grad == "rows":
            dw = row_wgrad(g_BK, x_BI, rows, num_rows, weight.dtype)
        else:
            dw = weight.new_zeros(weight.shape).index_copy(0, rows, (g_BK.t() @ x_BI).to(weight.dtype))
    if needs_bias:
        if ctx.grad == "rows":
            db = row_wgrad(g_BK, None, rows, num_rows, weight.dtype)
        else:
            db = weight.new_zeros(num_rows).index_copy(0, rows, g_BK.sum(0).to(weight.dtype))
    return dx, dw, db, None, None, None, None


def _masked_backward(ctx, g):
    x, weight, rows = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    num_rows = weight.shape[0]
    g_BO = g.reshape(-1, num_rows)
    # Filled, not multiplied: a masked entry is zero also where the dense one is not finite.
    masked_O = torch.ones(num_rows, dtype=torch.bool, device=g.device).index_fill(0, rows, False)
    dx = dw = db = None
    if needs_x:
        dx = (g_BO if ctx.dx == "full" else g_BO.masked_fill(masked_O, 0)) @ weight.to(ctx.dtype)
        dx = dx.reshape(x.shape).to(x.dtype)
    if needs_weight:
        dw = (g_BO.t() @ x.reshape(-1, x.shape[-1]).to(ctx.dtype)).to(weight.dtype)
        dw = take_rows(dw, rows) if ctx.grad == "rows" else dw.masked_fill(masked_O[:, None], 0)
    if needs_bias:
        db = g_BO.sum(0).to(weight.dtype)
        db = take_rows(db, rows) if ctx.grad == "rows" else db.masked_fill(masked_O, 0)
    return dx, dw, db, None, None, None, None


row_linear.register_autograd(_row_backward, setup_context=_save)
masked_linear.register_autograd(_masked_backward, setup_context=_save)


def _follow_autocast(op: str, device: str, key: str) -> None:
    """Make ``op`` compute in autocast's type, as ``F.linear`` does.

    The type is handed to the operator instead of casting its arguments, so that the weight's gradient is
    cast on its rows alone.
    """

    def kernel(x, weight, bias, rows, dx="rows", grad="dense", dtype=None):
        # Autocast leaves double precision alone.
        lowered = None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.amp.autocast(device, enabled=False):
            return getattr(torch.ops.rwfx, op).default(x, weight, bias, rows, dx, grad, lowered)

    torch.library.impl(f"rwfx::{op}", key)(kernel)


for _op in ("row_linear", "masked_linear"):
    for _device, _key in {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}.items():
        _follow_autocast(_op, _device, _key)
