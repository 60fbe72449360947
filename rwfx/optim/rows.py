"""What the row optimizers share: one step over dense and row gradients, and reading and writing rows.

In: a ``torch.optim`` optimizer whose parameters hold gradients. Out: the parameters and the optimizer's state, updated.
A *row gradient* is a hybrid ``torch.sparse_coo`` tensor with ``sparse_dim=1``. *Row state* is the state of a parameter
that has had one: ``state["step"]`` is then ``(O,)`` float32, each row's own number of updates, where ``torch.optim``
keeps one number for the whole parameter.
"""

import inspect
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]
States = MutableMapping[Tensor, dict[str, Any]]
# (w, rows, g, group, states): w (O, ...), rows (K,) int64 without repeats, g (K, ...) in the dtype to compute in.
RowUpdate = Callable[[Tensor, Tensor, Tensor, Group, States], None]

SPARSE_LAYOUTS = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def step_dense_and_rows(
    optimizer: Optimizer,
    dense_step: Callable[..., Any],
    update_rows: RowUpdate,
    closure: Callable[[], float] | None = None,
) -> float | None:
    """One step: ``dense_step`` for parameters with a dense gradient, ``update_rows`` for those with a row gradient.

    Args:
        optimizer: whose parameters and state are updated.
        dense_step: ``step`` of the ``torch.optim`` namesake, unbound.
        update_rows: updates the rows of one parameter and their state, in place.
        closure: reevaluates the model and returns the loss.

    Returns:
        What ``closure`` returned.

    Raises:
        ValueError: a sparse gradient that is not a row gradient, or a row gradient with ``differentiable=True``;
            nothing has been changed then.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    by_row, any_dense = parameters_by_row(optimizer)
    if any_dense or not by_row:
        grads = [w.grad for w, _ in by_row]
        for w, _ in by_row:
            w.grad = None
        try:
            # The namesake's own step may carry the wrapper that calls the user's hooks: they have been called.
            inspect.unwrap(dense_step, stop=lambda step: not hasattr(step, "hooked"))(optimizer)
        finally:
            for (w, _), grad in zip(by_row, grads, strict=True):
                w.grad = grad
    with torch.no_grad():
        if by_row and not overflowed(optimizer):
            for w, group in by_row:
                rows, g = rows_and_values(w, group, getattr(optimizer, "grad_scale", None))
                if len(rows):
                    update_rows(w, rows, g, group, optimizer.state)
    return loss


def parameters_by_row(optimizer: Optimizer) -> tuple[list[tuple[Tensor, Group]], bool]:
    """The parameters to update row by row, each with its group; and whether any is left for the dense step.

    By row: those with a row gradient, and those with a dense gradient and row state.
    """
    by_row, any_dense = [], False
    for number, group in enumerate(optimizer.param_groups):
        for position, w in enumerate(group["params"]):
            if w.grad is None:
                continue
            if w.grad.layout in SPARSE_LAYOUTS or has_row_state(optimizer.state.get(w, {})):
                check_by_row(w, group, f"parameter {position} of group {number}")
                by_row.append((w, group))
            else:
                any_dense = True
    return by_row, any_dense


def check_by_row(w: Tensor, group: Group, which: str) -> None:
    """Raise ``ValueError`` where ``w`` cannot be updated row by row."""
    assert w.grad is not None
    layout = w.grad.layout
    sparse_dim = w.grad.sparse_dim() if layout == torch.sparse_coo else None
    if layout in SPARSE_LAYOUTS and sparse_dim != 1:
        raise ValueError(
            f"{which}, of shape {tuple(w.shape)}, has a gradient of layout {layout}, sparse_dim={sparse_dim}. A row "
            "gradient is torch.sparse_coo with sparse_dim=1: indices (1, K), values (K, ...). Make the gradient that, "
            "or dense with w.grad = w.grad.to_dense()."
        )
    if group["differentiable"]:
        raise ValueError(
            f"{which}, of shape {tuple(w.shape)}, is to be updated row by row with differentiable=True: rows are "
            "written in place, which autograd cannot follow. Use differentiable=False, or dense gradients only."
        )


def has_row_state(state: dict[str, Any]) -> bool:
    """Whether each row counts its own updates."""
    return "step" in state and state["step"].dim() == 1


def overflowed(optimizer: Optimizer) -> bool:
    """Whether a ``GradScaler`` that leaves scaling to the optimizer (``fused=True``) found an inf or a nan.

    Reads one number from the device, as the scaler itself does for an optimizer that is not fused.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def rows_and_values(w: Tensor, group: Group, grad_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows ``(K,)`` and gradient ``(K, ...)`` of ``w``, unscaled, of the sign to descend, in the dtype to compute in.

    That dtype is float32 for a narrower ``w``: then a step rounds to ``w``'s dtype once, when it writes.
    """
    assert w.grad is not None
    if w.grad.layout == torch.strided:
        rows, g = torch.arange(len(w), device=w.device), w.grad
    else:
        # Row gradients of two backward passes add up to one with repeated rows.
        grad = w.grad.coalesce()
        rows, g = grad.indices()[0], grad.values()
    g = g.to(torch.promote_types(w.dtype, torch.float32))
    if grad_scale is not None:
        g = g / grad_scale
    return rows, -g if group["maximize"] else g


def row_state(w: Tensor, states: States, *moments: str) -> dict[str, Any]:
    """State of ``w`` with ``step`` of shape ``(O,)`` and the named moments of ``w``'s shape, made where it has none.

    After dense steps every row has had as many updates as the parameter.
    """
    state = states[w]
    if not has_row_state(state):
        # torch.optim.SGD keeps no count. A moment that is there was updated, and "at least once" is all SGD asks.
        step = state.get("step", float(state.get(moments[0]) is not None))
        state["step"] = torch.zeros(len(w), device=w.device, dtype=torch.float32).add_(step)
    elif state["step"].device != w.device:
        # load_state_dict moves the moments to w's device, and leaves step where it was saved.
        state["step"] = state["step"].to(w.device)
    for name in moments:
        if state.get(name) is None:
            state[name] = torch.zeros_like(w, memory_format=torch.preserve_format)
    return state


def count_update(step: Tensor, rows: Tensor) -> Tensor:
    """Add one to ``step[rows]``; returns it, ``(K,)``."""
    t = step.index_select(0, rows).add_(1)
    step.index_copy_(0, rows, t)
    return t


def read_rows(of: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``of[rows]``, a copy ``(K, ...)`` in ``dtype``."""
    return of.index_select(0, rows).to(dtype)


def write_rows(to: Tensor, rows: Tensor, values: Tensor) -> None:
    """``to[rows] = values``, rounded to the dtype of ``to``."""
    values = values.to(to.dtype)
    # On a CPU index_copy_ moves one element after the other, and of the widest dtype, 16 bytes, there are the fewest:
    # half the time in float32. A row, and the place of the first one, must then be a multiple of 16 bytes.
    if to.is_cpu and to.dim() > 1 and to.is_contiguous() and values.is_contiguous():
        size = to.itemsize
        if to.stride(0) * size % 16 == 0 and to.storage_offset() * size % 16 == 0:
            to = to.view(len(to), -1).view(torch.complex128)
            values = values.view(len(values), -1).view(torch.complex128)
    to.index_copy_(0, rows, values)


def add_rows(to: Tensor, rows: Tensor, values: Tensor, alpha: float = 1) -> None:
    """``to[rows] += alpha * values``, computed in the dtype of ``values``."""
    if to.dtype == values.dtype:
        # Half the time of reading, adding and writing.
        to.index_add_(0, rows, values, alpha=alpha)
    else:
        # index_add_ would round the values before it adds them.
        write_rows(to, rows, read_rows(to, rows, values.dtype).add_(values, alpha=alpha))


def per_row(x: Tensor, like: Tensor) -> Tensor:
    """``x`` ``(K,)`` as ``(K, 1, ...)``, to multiply ``like`` ``(K, ...)`` row by row."""
    return x.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
