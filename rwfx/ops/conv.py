"""Convolutions whose backward pass is confined to a row set, and to some examples.

In: what ``torch.convolution`` takes, and a row set. Out: what it gives, bit for bit. Two operators with the same
gradients, as for linear calls (``rwfx.ops.linear``):

``rwfx::row_conv``     computes the backward pass on the rows alone (``rwfx.ops.conv_rows``).
``rwfx::masked_conv``  computes it densely and masks what comes out, to compare with.

Axes: B examples, I input channels, O rows (output channels), K rows of the set; spatial dimensions are not written.
"""

import torch
from torch import Tensor

from rwfx.ops.arguments import check_examples, check_rows
from rwfx.ops.conv_rows import Convolution, keep_channels, mask_rows
from rwfx.ops.observe import observe_, record_, top_rows
from rwfx.ops.registration import register
from rwfx.ops.row_gradient import take_rows

_library = torch.library.Library("rwfx", "FRAGMENT")
_CALL = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor rows, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups=1, bool transposed=False, SymInt[]? output_padding=None, str dx='rows', str grad='dense', "
    "ScalarType? dtype=None, Tensor? kept_weight=None, Tensor? kept_bias=None, Tensor? scale=None, Tensor? seen=None, "
    "bool seen_all=True"
)
_library.define(f"row_conv{_CALL}, Tensor? chosen=None, Tensor? examples=None, SymInt num_examples=0) -> Tensor")
_library.define(f"masked_conv{_CALL}) -> Tensor")


def row_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    transposed: bool = False,
    output_padding: list[int] | None = None,
    dx: str = "rows",
    grad: str = "dense",
    dtype: torch.dtype | None = None,
    kept_weight: Tensor | None = None,
    kept_bias: Tensor | None = None,
    scale: Tensor | None = None,
    seen: Tensor | None = None,
    seen_all: bool = True,
    chosen: Tensor | None = None,
    examples: Tensor | None = None,
    num_examples: int = 0,
) -> Tensor:
    """``torch.convolution(x, weight, bias, ...)``; the backward computes only ``rows`` of the weight's gradient.

    A row is an output channel. With ``g = dL/dy``, ``R = rows`` and ``s = scale``, all ones if it is not given::

        h     = g[:, R] * s
        dx    = conv_input_grad(h, weight[R])     (dx="full": of g and weight)
        dw[R] = conv_weight_grad(h, x)            zero, or absent, elsewhere
        db[R] = h.sum(batch, space)               zero, or absent, elsewhere

    In a grouped convolution a row reads the input channels of its group alone, so ``dx`` is zero in those of the groups
    that hold no row of the set.

    Args:
        x: ``(B, I, *space)``, one to three spatial dimensions; or ``(I, *space)``.
        weight: ``(O, I / groups, *kernel)``; of a transposed convolution ``(I, O / groups, *kernel)``.    bias:
            ``(O,)``.
        rows: ``(K,)`` int64, sorted, no repeats, ``0 <= rows < O``; ``K = 0`` is allowed. It is not looked at.
        stride, padding, dilation, output_padding: a number for each spatial dimension.
        dx, grad, dtype, kept_weight, kept_bias, scale, seen, seen_all, chosen: as of ``rwfx.ops.row_linear``. The
            magnitude of a row is the sum of ``|g|`` over batch and space. A transposed convolution has no row
            gradients: its rows are not the first dimension of its weight.
        examples: ``(E,)`` int64, sorted, no repeats: which of the ``num_examples = B`` take part in the backward pass,
            as of ``row_linear``.

    Raises:
        ValueError: as ``row_linear`` does; ``x`` has not ``num_examples`` examples; ``grad="rows"`` or ``kept_weight``
            of a transposed convolution.
    """
    return torch.ops.rwfx.row_conv.default(
        x,
        weight,
        bias,
        rows,
        stride,
        padding,
        dilation,
        groups,
        transposed,
        output_padding,
        dx,
        grad,
        dtype,
        kept_weight,
        kept_bias,
        scale,
        seen,
        seen_all,
        chosen,
        examples,
        num_examples,
    )


def masked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    transposed: bool = False,
    output_padding: list[int] | None = None,
    dx: str = "rows",
    grad: str = "dense",
    dtype: torch.dtype | None = None,
    kept_weight: Tensor | None = None,
    kept_bias: Tensor | None = None,
    scale: Tensor | None = None,
    seen: Tensor | None = None,
    seen_all: bool = True,
) -> Tensor:
    """``torch.convolution(x, weight, bias, ...)``; the backward is dense and then masked to ``rows``.

    Arguments and errors are those of ``row_conv``.
    """
    return torch.ops.rwfx.masked_conv.default(
        x,
        weight,
        bias,
        rows,
        stride,
        padding,
        dilation,
        groups,
        transposed,
        output_padding,
        dx,
        grad,
        dtype,
        kept_weight,
        kept_bias,
        scale,
        seen,
        seen_all,
    )


class _Conv(torch.autograd.Function):
    """What both operators have in common: the forward, and how the backward begins and ends."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        rows,
        stride,
        padding,
        dilation,
        groups=1,
        transposed=False,
        output_padding=None,
        dx="rows",
        grad="dense",
        dtype=None,
        kept_weight=None,
        kept_bias=None,
        scale=None,
        seen=None,
        seen_all=True,
        chosen=None,
        examples=None,
        num_examples=0,
    ):
        space = [0] * len(stride) if output_padding is None else output_padding
        conv = Convolution(stride, padding, dilation, transposed, space, groups)
        shared = kept_weight is not None or kept_bias is not None
        check_rows(conv.num_rows(weight), rows, scale, seen, chosen, shared)
        if transposed and (grad == "rows" or shared):
            raise ValueError(
                "a transposed convolution has no row gradients: its rows are not the first dimension of its weight. "
                'Use grad="dense".'
            )
        if examples is not None:
            check_examples(examples)
            num_held = x.shape[0] if x.dim() == weight.dim() else 0
            torch._check_value(
                num_held == num_examples,
                lambda: f"x holds {num_held} examples and not {num_examples}: {tuple(x.shape)}.",
            )
        ctx.unbatched = x.dim() == weight.dim() - 1
        ctx.x_dtype = x.dtype
        x = x.unsqueeze(0) if ctx.unbatched else x
        x = x if dtype is None else x.to(dtype)
        # Both for whatever is wanted: PyTorch's backward chooses its kernel by them.
        ctx.save_for_backward(x, weight)
        # Not saved: they may be written in the backward pass (rwfx.ops.linear).
        ctx.rows, ctx.scale, ctx.examples = rows, scale, examples
        ctx.seen, ctx.seen_all, ctx.chosen = seen, seen_all, chosen
        ctx.conv, ctx.dx, ctx.grad = conv, dx, grad
        ctx.shared, ctx.others = kept_weight is not None, 6
        y = conv.forward(x, weight, bias, dtype)
        return y.squeeze(0) if ctx.unbatched else y

    @staticmethod
    def begin(ctx, g):
        """The output's gradient of a batch, and the row set: ``ctx.rows``, unless it is chosen here."""
        if torch.is_grad_enabled():
            raise RuntimeError("rwfx::row_conv has no second derivative: leave create_graph=True out.")
        g = g.unsqueeze(0) if ctx.unbatched else g
        rows = ctx.rows
        if ctx.seen is None and ctx.chosen is None:
            return g, rows
        g_kept = g if ctx.examples is None else g.index_select(0, ctx.examples)
        if ctx.chosen is not None or ctx.seen_all:
            size_1O = _magnitudes(g_kept)[None]
            if ctx.chosen is not None:
                rows = top_rows(size_1O, rows.shape[0])
                record_(ctx.chosen, rows)
        else:
            size_K = _magnitudes(keep_channels(g_kept, rows))
            size_1O = size_K.new_zeros(1, g.shape[1]).index_copy(1, rows, size_K[None])
        if ctx.seen is not None:
            observe_(ctx.seen, size_1O, None if ctx.seen_all else rows)
        return g, rows

    @staticmethod
    def needs(ctx):
        # An argument with its default may not have been passed: kept_bias, for one.
        needs = *ctx.needs_input_grad, False, False
        return [needs[0], *(needs[13:15] if ctx.shared else needs[1:3])]

    @staticmethod
    def gradients(ctx, dx, dw, db):
        if dx is not None:
            dx = dx.to(ctx.x_dtype)
            dx = dx.squeeze(0) if ctx.unbatched else dx
        of_weight = (None, None, dw, db) if ctx.shared else (dw, db, None, None)
        return dx, *of_weight[:2], *[None] * 10, *of_weight[2:], *[None] * ctx.others


class _RowConv(_Conv):
    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors  # once: checkpointing gives them no second time
        g, rows = _Conv.begin(ctx, g)
        grad = "values" if ctx.shared else ctx.grad
        return _Conv.gradients(
            ctx,
            *torch.ops.rwfx.row_conv_backward.default(
                g, x, weight, rows, ctx.scale, ctx.examples, *ctx.conv, ctx.dx == "full", grad, _Conv.needs(ctx)
            ),
        )


class _MaskedConv(_Conv):
    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        rows,
        stride,
        padding,
        dilation,
        groups=1,
        transposed=False,
        output_padding=None,
        dx="rows",
        grad="dense",
        dtype=None,
        kept_weight=None,
        kept_bias=None,
        scale=None,
        seen=None,
        seen_all=True,
    ):
        call = stride, padding, dilation, groups, transposed, output_padding, dx, grad, dtype, kept_weight, kept_bias
        y = _Conv.forward(ctx, x, weight, bias, rows, *call, scale, seen, seen_all)
        ctx.others = 3
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        g, rows = _Conv.begin(ctx, g)
        needs_x, *needs_parameters = _Conv.needs(ctx)
        # Filled, not multiplied: a masked entry is zero also where the dense one is not finite.
        masked_O = torch.ones(g.shape[1], dtype=torch.bool, device=g.device).index_fill(0, rows, False)
        h = g
        if ctx.scale is not None:
            scale_O = torch.ones_like(masked_O, dtype=g.dtype).index_copy(0, rows, ctx.scale.to(g.dtype))
            h = g * scale_O.view(-1, *[1] * (g.dim() - 2))

        def of_parameter(dense, mask):
            if dense is None:
                return None
            dense = dense.to(weight.dtype)
            if ctx.shared:
                return dense.index_select(0, rows)
            return take_rows(dense, rows) if ctx.grad == "rows" else mask(dense)

        dx = None
        if needs_x:
            g_x = g if ctx.dx == "full" else mask_rows(h, masked_O, 1)
            dx, _, _ = ctx.conv.backward(g_x, x, weight.to(g.dtype), [True, False, False])
        _, dw, db = ctx.conv.backward(h, x, weight.to(g.dtype), [False, *needs_parameters])
        dw = of_parameter(dw, lambda dense: ctx.conv.mask_weight(dense, masked_O))
        return _Conv.gradients(ctx, dx, dw, of_parameter(db, lambda dense: mask_rows(dense, masked_O, 0)))


def _magnitudes(g: Tensor) -> Tensor:
    """``(O,)`` float32: the sum of ``|g|`` over batch and space."""
    dtype = torch.promote_types(g.dtype, torch.float32)  # a norm may not be taken in a narrower type
    return torch.linalg.vector_norm(g, 1, dim=[0, *range(2, g.dim())], dtype=dtype).float()


register(_library, "row_conv", _RowConv)
register(_library, "masked_conv", _MaskedConv)
