"""Linear calls with a weight of which only the non-zeros are stored.

``rwfx::sparse_linear``           ``y = x W^T + b``
``rwfx::sparse_linear_backward``  ``dx = g W`` and ``dv``, the gradient of the non-zeros alone: a sampled product

This is the implementation for every device, by PyTorch's own products of CSR matrices (MKL, cuSPARSE); on a CPU
``rwfx/native/sparse.cpp`` has one that runs both products of the backward pass in one sweep over the non-zeros.

Axes: B the leading dimensions flattened, I columns (input features), O rows (output features), N non-zeros.
"""

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rwfx.nonzeros import Index, keys_of

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define(
    "sparse_linear(Tensor x, Tensor values, Tensor? bias, Tensor ccol_indices, Tensor row_indices, "
    "Tensor crow_indices, Tensor col_indices, Tensor order, str by='nonzeros') -> Tensor"
)
_library.define(
    "sparse_linear_backward(Tensor g, Tensor x, Tensor values, Tensor ccol_indices, Tensor row_indices, "
    "Tensor crow_indices, bool needs_dx, bool needs_dv, str by='nonzeros') -> (Tensor, Tensor)"
)

AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

By = Literal["nonzeros", "dense"]
"""How a product is computed: from the non-zeros, or densely, from a weight that is filled for the call."""

Asked = Literal["auto", "nonzeros", "dense"]
"""How a caller wants it computed: ``"auto"`` is whichever is faster."""


def sparse_linear(x: Tensor, values: Tensor, bias: Tensor | None, index: Index, by: By = "nonzeros") -> Tensor:
    """``y = x @ W.T + bias``, where ``W`` has ``values`` at the places of ``index`` and is zero elsewhere.

    With ``g = dL/dy``, row ``o_n`` and column ``i_n`` of number ``n``::

        y[:, o] = sum over n with o_n = o of  values[n] * x[:, i_n]       + bias[o]
        dx[:, i] = sum over n with i_n = i of values[n] * g[:, o_n]
        dvalues[n] = sum over B of g[:, o_n] * x[:, i_n]                  dbias = g.sum(0)

    ``y`` has the type of ``x``, which autocast chooses; numbers and their gradients keep their own, and on a CPU with
    the kernels of ``rwfx.native`` sums are of float32 at least.

    Args:
        x: ``(*, I)``, any leading shape.    values: ``(N,)``.    bias: ``(O,)`` or None.
        index: the places, of the shapes ``(I + 1,)``, ``(N,)``, ``(O + 1,)``, ``(N,)``, ``(N,)``, int32. That they fit
            together is the caller's promise (``rwfx.nonzeros.index_of``).
        by: ``"nonzeros"``, or ``"dense"``: a dense weight is filled and its products are taken, which is faster where
            it is hardly sparse. The gradients are the same.

    Raises:
        TypeError: ``x`` is not of floating point.
        ValueError: the last dimension of ``x`` is not ``I``, or ``values`` has not a number for each place.
    """
    check_floating(x)
    return torch.ops.rwfx.sparse_linear.default(x, values, bias, *index, by)


def dense_weight(values: Tensor, ccol_indices: Tensor, row_indices: Tensor, rows: int) -> Tensor:
    """The whole matrix, ``(O, I)``."""
    columns = len(ccol_indices) - 1
    flat_IO = values.new_zeros(columns * rows).index_copy(0, keys_of(ccol_indices, row_indices, rows), values)
    return flat_IO.view(columns, rows).t()


def _forward(x, values, bias, ccol_indices, row_indices, crow_indices, col_indices, order, by="nonzeros"):
    rows, columns = len(crow_indices) - 1, len(ccol_indices) - 1
    check_operands(x.shape[-1], columns, rows, values, row_indices, bias)
    if by == "dense":
        W = dense_weight(values.to(x.dtype), ccol_indices, row_indices, rows)
        return F.linear(x, W, None if bias is None else bias.to(x.dtype)).contiguous()
    y_BO = _csr_product(crow_indices, col_indices, values[order], columns, x.reshape(-1, columns))
    if bias is not None:
        y_BO = y_BO + bias.to(y_BO.dtype)
    return y_BO.to(x.dtype).reshape(*x.shape[:-1], rows).contiguous()


def _backward(g, x, values, ccol_indices, row_indices, crow_indices, needs_dx, needs_dv, by="nonzeros"):
    rows, columns = len(crow_indices) - 1, len(ccol_indices) - 1
    g_BO, x_BI = g.reshape(-1, rows), x.reshape(-1, columns)
    dx, dv = g.new_empty(0), values.new_empty(0)
    if needs_dx:
        if by == "dense":
            dx = g_BO @ dense_weight(values.to(g.dtype), ccol_indices, row_indices, rows)
        else:
            dx = _csr_product(ccol_indices, row_indices, values, rows, g_BO).to(g.dtype)
        dx = dx.reshape(x.shape).contiguous()
    if needs_dv:
        dv = _sampled_product(ccol_indices, row_indices, x_BI, g_BO, by).to(values.dtype)
    return dx, dv


def _csr_product(starts: Tensor, places: Tensor, values: Tensor, width: int, x_BI: Tensor) -> Tensor:
    """``x @ M.T`` of a matrix in CSR, which has ``width`` columns, in float32 at least where CSR is had."""
    if not _has_csr(x_BI):
        M = dense_weight(values.to(x_BI.dtype), starts, places, width).t()  # CSR is CSC of the transpose
        return x_BI @ M.t()
    dtype = _csr_dtype(x_BI.dtype)
    M = _csr(starts, places, values.to(dtype), width)
    with _without_autocast(x_BI):
        return torch.sparse.mm(M, x_BI.t().to(dtype)).t()


def _sampled_product(ccol_indices: Tensor, row_indices: Tensor, x_BI: Tensor, g_BO: Tensor, by: str) -> Tensor:
    if by == "dense" or not _has_csr(x_BI):
        return (x_BI.t() @ g_BO).flatten().index_select(0, keys_of(ccol_indices, row_indices, g_BO.shape[1]))
    dtype = _csr_dtype(x_BI.dtype)
    nothing = x_BI.new_zeros(len(row_indices), dtype=dtype)
    pattern = _csr(ccol_indices, row_indices, nothing, g_BO.shape[1])
    with _without_autocast(x_BI):
        return torch.sparse.sampled_addmm(pattern, x_BI.t().to(dtype), g_BO.to(dtype), beta=0.0).values()


def _without_autocast(x: Tensor) -> torch.amp.autocast:
    """For a backward pass that is run in autocast: CSR products are not to be had in its types."""
    return torch.amp.autocast(x.device.type, enabled=False)


def _csr(starts: Tensor, places: Tensor, values: Tensor, width: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # that CSR is new, and that nobody checks the index
        return torch.sparse_csr_tensor(starts, places, values, (len(starts) - 1, width))


def _has_csr(x: Tensor) -> bool:
    """Whether PyTorch multiplies CSR matrices on this device."""
    return x.device.type == "cuda" or (x.device.type == "cpu" and torch.backends.mkl.is_available())


def _csr_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def check_floating(x: Tensor) -> None:
    """Refuse an input of integers or complex numbers, whose type the weight would be converted to."""
    if not x.is_floating_point():
        raise TypeError(f"x must be of floating point, got {x.dtype}: convert it, as with x.float().")


def check_operands(
    features: int, columns: int, rows: int, values: Tensor, row_indices: Tensor, bias: Tensor | None
) -> None:
    """Refuse an input, values or a bias that do not fit the index.

    Raises:
        ValueError: says which.
    """
    if features != columns:
        raise ValueError(f"x has {features} features and the sparse weight has {columns} columns.")
    if values.shape != row_indices.shape:
        raise ValueError(f"values has the shape {list(values.shape)} for {len(row_indices)} places of the index.")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias has the shape {list(bias.shape)} and the sparse weight has {rows} rows.")


for _name, _function in {"sparse_linear": _forward, "sparse_linear_backward": _backward}.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")


def _forward_fake(x, values, bias, ccol_indices, row_indices, crow_indices, col_indices, order, by="nonzeros"):
    return x.new_empty((*x.shape[:-1], crow_indices.shape[0] - 1))


def _backward_fake(g, x, values, ccol_indices, row_indices, crow_indices, needs_dx, needs_dv, by="nonzeros"):
    dx = x.new_empty(x.shape) if needs_dx else g.new_empty(0)
    return dx, values.new_empty(values.shape if needs_dv else (0,))


def _save(ctx, inputs, output):
    x, values, bias, ccol_indices, row_indices, crow_indices, _, _, ctx.by = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, values, ccol_indices, row_indices, crow_indices)


def _gradients(ctx, g):
    x, values, *index = ctx.saved_tensors
    needs_dx, needs_dv, needs_db = ctx.needs_input_grad[:3]
    dx = dv = db = None
    if needs_dx or needs_dv:
        found = torch.ops.rwfx.sparse_linear_backward.default(g, x, values, *index, needs_dx, needs_dv, ctx.by)
        dx, dv = (part if needed else None for part, needed in zip(found, (needs_dx, needs_dv), strict=True))
    if needs_db:
        db = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype)
    return dx, dv, db, None, None, None, None, None, None


def no_second_derivative(ctx, *_):
    """The backward of a backward operator."""
    raise RuntimeError("products with non-zeros have no second derivative: leave create_graph=True out.")


def in_autocast(op, device: str):
    """The operator with its input in the type of autocast on ``device``; double precision it leaves alone."""

    def kernel(x, *others):
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.amp.autocast(device, enabled=False):
            return op(x.to(dtype), *others)

    return kernel


torch.library.register_fake("rwfx::sparse_linear", _forward_fake, lib=_library)
torch.library.register_fake("rwfx::sparse_linear_backward", _backward_fake, lib=_library)
torch.library.register_autograd("rwfx::sparse_linear", _gradients, setup_context=_save, lib=_library)
torch.library.register_autograd("rwfx::sparse_linear_backward", no_second_derivative, lib=_library)
for _device, _key in AUTOCAST.items():
    _library.impl("sparse_linear", in_autocast(torch.ops.rwfx.sparse_linear.default, _device), _key)
