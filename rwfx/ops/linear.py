"""Linear calls whose backward pass is confined to a row set.

In: what ``F.linear`` takes, and a row set. Out: what ``F.linear`` gives, bit for bit. Two operators with
the same gradients:

``rwfx::row_linear``     does the two products of the backward pass on the rows alone.
``rwfx::masked_linear``  does them densely and masks what comes out: the method of the original research
                         code, which saves nothing and is kept to compare with.

This is the implementation for every device; on a CPU the backward pass of ``row_linear`` is ``rwfx/native/linear.cpp``.

Axes: B the leading dimensions flattened, I input features, O rows of the weight, K rows of the set, C columns.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwfx.ops.arguments import check_examples, check_rows
from rwfx.ops.inductor import let_inductor_compare_sparse
from rwfx.ops.observe import rows_of_step
from rwfx.ops.registration import register
from rwfx.ops.row_gradient import pack_rows, row_gradient, take_rows

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define(
    "row_linear(Tensor x, Tensor weight, Tensor? bias, Tensor rows, str dx='rows', str grad='dense', "
    "ScalarType? dtype=None, Tensor? kept_weight=None, Tensor? kept_bias=None, Tensor? columns=None, "
    "str activation='', bool direct=False, Tensor? scale=None, Tensor? seen=None, bool seen_all=True, "
    "Tensor? chosen=None, Tensor? examples=None, SymInt num_examples=0, str packed='') -> Tensor"
)
_library.define(
    "masked_linear(Tensor x, Tensor weight, Tensor? bias, Tensor rows, str dx='rows', str grad='dense', "
    "ScalarType? dtype=None, Tensor? kept_weight=None, Tensor? kept_bias=None, Tensor? scale=None, "
    "Tensor? seen=None, bool seen_all=True) -> Tensor"
)


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
    columns: Tensor | None = None,
    activation: str = "",
    direct: bool = False,
    scale: Tensor | None = None,
    seen: Tensor | None = None,
    seen_all: bool = True,
    chosen: Tensor | None = None,
    examples: Tensor | None = None,
    num_examples: int = 0,
    packed: str = "",
) -> Tensor:
    """``y = a @ weight.T + bias``, ``a = activation(x)``; the backward computes only ``rows`` of the weight's gradient.

    With ``g = dL/dy``, ``R = rows``, ``C = columns`` and ``s = scale``, all ones if it is not given::

        h        = g[:, R] * s
        da[:, C] = h @ weight[R][:, C]            (dx="full": da = g @ weight)
        dx       = da * activation'(x)
        dw[R]    = h.T @ a                        zero, or absent, elsewhere
        db[R]    = h.sum(0)                       zero, or absent, elsewhere

    Args:
        x: ``(*, I)``, any leading shape.    weight: ``(O, I)``, stored either way: the transpose ``w.t()`` of a
            parameter ``(I, O)`` gets a dense gradient that is stored as that is.    bias: ``(O,)`` or None.
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
        columns: ``(C,)`` int64, like ``rows`` for the features of ``x``: a promise that nothing reads the gradient of
            the others. That may be left out then, which is to say zero. Not used with ``dx="full"``.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"``, ``"sigmoid"`` of ``torch.nn.functional``, or empty
            for ``a = x``. Its backward too is confined to ``columns``.
        direct: a promise, beside ``columns`` or ``examples``, that the gradient of ``x`` goes to another ``row_linear``
            and to nothing else. It may then be laid out by columns, and hold anything where that does not look.
        scale: ``(K,)``, floating point: a factor for each kept row's output gradient. It has no gradient itself.
        seen: ``(O,)`` float32, which the backward pass overwrites with the magnitudes of the rows of ``g``, as
            ``rwfx.ops.observe_`` does; several calls may share one, and the last to run is seen.
        seen_all: whether ``seen`` gets all rows, or only those of the set.
        chosen: ``(O + 1,)`` int64. The backward pass chooses the row set then, ``R = rwfx.ops.top_rows(g, K)``, and
            writes it here by ``rwfx.ops.record_``. Of ``rows`` only the length counts.
        examples: ``(E,)`` int64, sorted, no repeats: which of ``num_examples`` take part in the backward pass. The
        others
            count as if their ``g`` were zero, and are not looked at. They may be written until that begins
            (``rwfx.ops.pick_examples``). The leading dimensions, flattened, hold the examples one after the other, each
            with as many places.
        packed: what ``direct`` is for ``examples``, of ``g``: a promise that it comes from another ``row_linear`` with
            ``direct`` and the same examples, which may then have left out the others, ``"rows"``, or moreover all
            columns but ``rows``, ``"columns"``.

    What needs no gradient (a frozen weight, the model's input) costs nothing in the backward pass. With ``chosen``, or
    with ``seen`` and ``seen_all``, that reads every column of ``g``; else no others than ``rows``, but with
    ``dx="full"``.

    Raises:
        ValueError: ``rows`` is not int64 or not one-dimensional; no such activation; ``scale``, ``seen``, ``chosen`` or
            ``examples`` has another type or shape; the places of ``x`` cannot be dealt to ``num_examples``; ``chosen``
            beside ``scale``, ``kept_weight`` or ``kept_bias``, which belong to rows that are known before.
    """
    return torch.ops.rwfx.row_linear.default(
        x,
        weight,
        bias,
        rows,
        dx,
        grad,
        dtype,
        kept_weight,
        kept_bias,
        columns,
        activation,
        direct,
        scale,
        seen,
        seen_all,
        chosen,
        examples,
        num_examples,
        packed,
    )


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
    scale: Tensor | None = None,
    seen: Tensor | None = None,
    seen_all: bool = True,
) -> Tensor:
    """``y = x @ weight.T + bias``; the backward is dense and then masked to ``rows``.

    With ``g = dL/dy``, ``m`` the 0/1 mask of the row set and ``s`` ones, but for ``s[rows] = scale``::

        dx = (m * s * g) @ weight       (dx="full": g @ weight)
        dw = m[:, None] * ((s * g).T @ x)
        db = m * (s * g).sum(0)

    Arguments and errors are those of ``row_linear``.
    """
    return torch.ops.rwfx.masked_linear.default(
        x, weight, bias, rows, dx, grad, dtype, kept_weight, kept_bias, scale, seen, seen_all
    )


class Activation(NamedTuple):
    """What may be computed of the input first."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # from the output's gradient, and the input or the output
    of_input: bool


_aten = torch.ops.aten
ACTIVATIONS = {
    "relu": Activation(F.relu, lambda g, a: _aten.threshold_backward(g, a, 0), of_input=False),
    "gelu": Activation(F.gelu, lambda g, x: _aten.gelu_backward(g, x), of_input=True),
    "silu": Activation(F.silu, lambda g, x: _aten.silu_backward(g, x), of_input=True),
    "tanh": Activation(torch.tanh, lambda g, a: _aten.tanh_backward(g, a), of_input=False),
    "sigmoid": Activation(torch.sigmoid, lambda g, a: _aten.sigmoid_backward(g, a), of_input=False),
}


class _Linear(torch.autograd.Function):
    """What both operators have in common: the forward, and how the backward begins and ends."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        rows,
        dx="rows",
        grad="dense",
        dtype=None,
        kept_weight=None,
        kept_bias=None,
        columns=None,
        activation="",
        direct=False,
        scale=None,
        seen=None,
        seen_all=True,
        chosen=None,
        examples=None,
        num_examples=0,
        packed="",
    ):
        check_rows(weight.shape[0], rows, scale, seen, chosen, kept_weight is not None or kept_bias is not None)
        if examples is not None:
            _check_places(x, examples, num_examples)
        ctx.activation = _activation(activation)
        a = ctx.activation.forward(x) if ctx.activation else x
        ctx.shared, ctx.others = kept_weight is not None, 10
        trained = (weight if kept_weight is None else kept_weight).requires_grad
        activated = (x if ctx.activation.of_input else a) if ctx.activation and x.requires_grad else None
        # Only what the backward pass reads.
        weight_read = weight if x.requires_grad else None
        ctx.save_for_backward(a if trained else None, activated, weight_read)
        # Not saved: a choice of examples may choose rows too, and writes them in the backward pass.
        ctx.rows, ctx.columns, ctx.scale = rows, columns, scale
        # Not saved: autograd would refuse a buffer that another call's backward pass has written since.
        ctx.seen, ctx.seen_all, ctx.chosen = seen, seen_all, chosen
        ctx.examples, ctx.num_examples = examples, num_examples
        ctx.dx, ctx.grad, ctx.x_dtype, ctx.dtype = dx, grad, x.dtype, weight.dtype
        ctx.by_columns = weight.stride(0) == 1 and weight.stride(1) != 1
        # Not an operator of ours, so that a compiler sees a product like any other.
        return _product(a, weight, bias, dtype)

    @staticmethod
    def begin(ctx, g, rows):
        """The output's gradient as a matrix, and the row set: ``rows``, unless it is chosen here."""
        if torch.is_grad_enabled():
            raise RuntimeError("rwfx::row_linear has no second derivative: leave create_graph=True out.")
        g_BO = _Linear.kept(ctx, g)
        return g_BO, rows_of_step(g_BO, rows, ctx.seen, ctx.seen_all, ctx.chosen)

    @staticmethod
    def kept(ctx, x):
        """``x`` as a matrix, of the examples that take part."""
        x_BI = x.reshape(-1, x.shape[-1])
        if ctx.examples is None:
            return x_BI
        return x_BI.index_select(0, places_of(ctx.examples, x_BI.shape[0] // ctx.num_examples))

    @staticmethod
    def through_activation(ctx, da_BI, activated_BI):
        da_BI = da_BI.to(ctx.x_dtype)
        return ctx.activation.backward(da_BI, activated_BI) if ctx.activation else da_BI

    @staticmethod
    def gradients(ctx, g, dx, dw, db):
        if dx is not None:
            if ctx.examples is not None:
                num_places = prod(g.shape[:-1])
                places = places_of(ctx.examples, num_places // ctx.num_examples)
                dx = dx.new_zeros(num_places, dx.shape[-1]).index_copy(0, places, dx)
            dx = dx.reshape(*g.shape[:-1], dx.shape[-1])
        none = [None] * ctx.others
        return (dx, *[None] * 6, dw, db, *none) if ctx.shared else (dx, dw, db, *[None] * 6, *none)

    @staticmethod
    def needs(ctx):
        # An argument with its default may not have been passed: kept_bias, for one.
        needs = *ctx.needs_input_grad, False
        return needs[0], *(needs[7:9] if ctx.shared else needs[1:3])


class _RowLinear(_Linear):
    @staticmethod
    def backward(ctx, g):
        a, activated, weight = ctx.saved_tensors  # once: checkpointing gives them no second time
        columns, scale = ctx.columns, ctx.scale
        g_BO, rows = _Linear.begin(ctx, g, ctx.rows)
        needs_x, needs_weight, needs_bias = _Linear.needs(ctx)
        num_rows = g.shape[-1]
        g_BK = g_BO.index_select(1, rows)
        if scale is not None:
            g_BK = g_BK * scale.to(g.dtype)

        def of_parameter(values):
            values = values.to(ctx.dtype)
            if ctx.shared:
                return values
            if ctx.grad == "rows":
                return pack_rows(values, rows, num_rows)
            sizes = num_rows, *values.shape[1:]
            if ctx.by_columns:
                return values.new_zeros(sizes[::-1]).index_copy(-1, rows, values.t()).t()
            return values.new_zeros(sizes).index_copy(0, rows, values)

        dx = dw = db = None
        if needs_x:
            activated_BI = None if activated is None else _Linear.kept(ctx, activated)
            if ctx.dx == "full":
                dx = _Linear.through_activation(ctx, g_BO @ weight.to(g.dtype), activated_BI)
            elif columns is None:
                dx = _Linear.through_activation(ctx, g_BK @ weight.index_select(0, rows).to(g.dtype), activated_BI)
            else:
                activated_BC = None if activated_BI is None else activated_BI.index_select(1, columns)
                w_KC = weight.index_select(0, rows).index_select(1, columns).to(g.dtype)
                dx_BC = _Linear.through_activation(ctx, g_BK @ w_KC, activated_BC)
                dx = dx_BC.new_zeros(g_BK.shape[0], weight.shape[1]).index_copy(1, columns, dx_BC)
        if needs_weight:
            dw = of_parameter(g_BK.t() @ _Linear.kept(ctx, a).to(g.dtype))
        if needs_bias:
            db = of_parameter(g_BK.sum(0))
        return _Linear.gradients(ctx, g, dx, dw, db)


class _MaskedLinear(_Linear):
    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        rows,
        dx="rows",
        grad="dense",
        dtype=None,
        kept_weight=None,
        kept_bias=None,
        scale=None,
        seen=None,
        seen_all=True,
    ):
        shared = x, weight, bias, rows, dx, grad, dtype, kept_weight, kept_bias
        y = _Linear.forward(ctx, *shared, scale=scale, seen=seen, seen_all=seen_all)
        ctx.others = 3
        return y

    @staticmethod
    def backward(ctx, g):
        x, _, weight = ctx.saved_tensors
        scale = ctx.scale
        g_BO, rows = _Linear.begin(ctx, g, ctx.rows)
        needs_x, needs_weight, needs_bias = _Linear.needs(ctx)
        num_rows = g.shape[-1]
        # Filled, not multiplied: a masked entry is zero also where the dense one is not finite.
        masked_O = torch.ones(num_rows, dtype=torch.bool, device=g.device).index_fill(0, rows, False)
        h_BO = g_BO
        if scale is not None:
            h_BO = g_BO * torch.ones_like(masked_O, dtype=g.dtype).index_copy(0, rows, scale.to(g.dtype))

        def of_parameter(dense):
            dense = dense.to(ctx.dtype)
            if ctx.shared:
                return dense.index_select(0, rows)
            if ctx.grad == "rows":
                return take_rows(dense, rows)
            return dense.masked_fill(masked_O.view(-1, *[1] * (dense.dim() - 1)), 0)

        dx = dw = db = None
        if needs_x:
            g_x = g_BO if ctx.dx == "full" else h_BO.masked_fill(masked_O, 0)
            dx = (g_x @ weight.to(g.dtype)).to(ctx.x_dtype)
        if needs_weight:
            dw = of_parameter(h_BO.t() @ x.reshape(-1, x.shape[-1]).to(g.dtype))
        if needs_bias:
            db = of_parameter(h_BO.sum(0))
        return _Linear.gradients(ctx, g, dx, dw, db)


def _check_places(x: Tensor, examples: Tensor, num_examples: int) -> None:
    check_examples(examples)
    places = prod(x.shape[:-1])  # not numel(), of which a compiler has to know the value
    torch._check_value(
        num_examples > 0 and places % num_examples == 0,
        lambda: f"the {places} places of x (its leading dimensions) cannot be dealt to {num_examples} examples.",
    )


def places_of(examples: Tensor, each: int) -> Tensor:
    """The places of ``examples`` among the flattened leading dimensions, where every example has ``each``."""
    if each == 1:
        return examples
    return (examples[:, None] * each + torch.arange(each, device=examples.device)).flatten()


def _activation(name: str) -> Activation | None:
    if name and name not in ACTIVATIONS:
        raise ValueError(f"activation must be {', '.join(ACTIVATIONS)} or empty, got {name}.")
    return ACTIVATIONS.get(name)


def _product(a: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return F.linear(a, weight, bias)
    return F.linear(a.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


# The backward of row_linear as one operator, for a CPU: rwfx/native/linear.cpp has its only implementation.
_library.define(
    "row_linear_backward(Tensor g, Tensor? a, Tensor? activated, Tensor? weight, Tensor rows, Tensor? columns, "
    "Tensor? scale, bool needs_bias, ScalarType x_dtype, ScalarType dtype, bool full_dx, str grad, str activation, "
    "bool direct, Tensor? examples, SymInt num_examples, str packed, Tensor? g_kept, bool by_columns) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("rwfx::row_linear_backward")
def _(
    g,
    a,
    activated,
    weight,
    rows,
    columns,
    scale,
    needs_bias,
    x_dtype,
    dtype,
    full_dx,
    grad,
    activation,
    direct,
    examples,
    num_examples,
    packed,
    g_kept,
    by_columns,
):
    let_inductor_compare_sparse()

    def of_parameter(*features):
        if grad == "dense":
            sizes = g.shape[-1], *features
            return g.new_empty(sizes[::-1], dtype=dtype).t() if by_columns else g.new_empty(sizes, dtype=dtype)
        values = g.new_empty((rows.shape[0], *features), dtype=dtype)
        return row_gradient(torch.empty_like(rows), values, g.shape[-1]) if grad == "rows" else values

    dx = None
    if weight is not None:
        dx = g.new_empty((*g.shape[:-1], weight.shape[1]), dtype=x_dtype)
        if direct and columns is not None and not full_dx and examples is None:
            dx = g.new_empty((weight.shape[1], *g.shape[:-1]), dtype=x_dtype).movedim(0, -1)
    return dx, None if a is None else of_parameter(a.shape[-1]), of_parameter() if needs_bias else None


register(_library, "row_linear", _RowLinear)
register(_library, "masked_linear", _MaskedLinear)
