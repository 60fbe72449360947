"""What the row optimizers share: one step over dense and row gradients, and reading and writing rows.

In: a ``torch.optim`` optimizer whose parameters hold gradients. Out: the parameters and the optimizer's state, updated.
A *row gradient* is a hybrid ``torch.sparse_coo`` tensor with ``sparse_dim=1``. *Row state* is the state of a parameter
that has had one: ``state["step"]`` is then ``(O,)`` float32, each row's own number of updates, where ``torch.optim``
keeps one number for the whole parameter. A *batch* is parameters of one group, device and dtype that are updated
together: three lists, of the parameters ``w``, of their ``rows`` and of the gradients ``g`` of those rows. A small step
is mostly the cost of calls, and a ``torch._foreach`` call does for all of a list what a call does for one tensor.
"""

# torch._foreach_* is what torch.optim itself is made of; torch lists none of it as exported.
# pyright: reportPrivateImportUsage=false

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwfx import native

Group = dict[str, Any]
States = MutableMapping[Tensor, dict[str, Any]]
# (w, rows, g, group, states), the first three lists over the parameters of a batch: w (O, ...), rows (K,) int64 without
# repeats, g (K, ...) in the dtype to compute in.
RowUpdate = Callable[[list[Tensor], list[Tensor], list[Tensor], Group, States], None]
# (w, group, states, grad_scale): the same for parameters that rwfx.native can update, of one group, from their .grad.
OnePass = Callable[[list[Tensor], Group, States, float], None]
Batch = tuple[list[Tensor], list[Tensor], list[Tensor]]

# A batch takes no more parameters once its gradients have this many numbers. Many small parameters then share the cost
# of a call, and what is made for large ones stays in the cache, and is never as large as the model.
BATCH = 2**16
ONE_PASS_DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
SPARSE_LAYOUTS = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def step_dense_and_rows(
    optimizer: Optimizer,
    dense_step: Callable[..., Any],
    update_rows: RowUpdate,
    one_pass: OnePass,
    closure: Callable[[], float] | None = None,
) -> float | None:
    """One step: ``dense_step`` for parameters with a dense gradient, ``update_rows`` for those with a row gradient.

    Args:
        optimizer: whose parameters and state are updated.
        dense_step: ``step`` of the ``torch.optim`` namesake, unbound.
        update_rows: updates the rows of a batch of parameters and their state, in place.
        one_pass: does so by a kernel of ``rwfx.native``, for the parameters that it takes.
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
    by_row, dense = parameters_by_row(optimizer)
    # Beside row gradients, the dense ones take part in the same call; alone, they are the namesake's.
    if by_row and (not dense or all(has_one_pass(w, group, optimizer.state) for w, group in dense)):
        by_row += dense
    else:
        with_gradients_hidden(by_row, optimizer, dense_step)
    with torch.no_grad():
        if by_row and not overflowed(optimizer):
            grad_scale = getattr(optimizer, "grad_scale", None)
            fast: dict[int, tuple[Group, list[Tensor]]] = {}
            left = []
            for w, group in by_row:
                if has_one_pass(w, group, optimizer.state):
                    fast.setdefault(id(group), (group, []))[1].append(w)
                else:
                    left.append((w, group))
            for group, w in fast.values():
                one_pass(w, group, optimizer.state, 1.0 if grad_scale is None else float(grad_scale))
                # So that autograd refuses to go back through a weight that is not the one of its forward pass.
                torch.autograd.graph.increment_version(w)
            for group, (w, rows, g) in batches(left):
                update_rows(w, rows, to_descend(w, g, group, grad_scale), group, optimizer.state)
    return loss


def with_gradients_hidden(
    hidden: list[tuple[Tensor, Group]], optimizer: Optimizer, dense_step: Callable[..., Any]
) -> None:
    """Take ``dense_step`` for all parameters but the hidden ones."""
    grads = [w.grad for w, _ in hidden]
    for w, _ in hidden:
        w.grad = None
    try:
        # The namesake's own step may carry the wrapper that calls the user's hooks: they have been called.
        inspect.unwrap(dense_step, stop=lambda step: not hasattr(step, "hooked"))(optimizer)
    finally:
        for (w, _), grad in zip(hidden, grads, strict=True):
            w.grad = grad


def parameters_by_row(optimizer: Optimizer) -> tuple[list[tuple[Tensor, Group]], list[tuple[Tensor, Group]]]:
    """The parameters to update row by row, each with its group; and those that the dense step updates.

    By row: those with a row gradient, and those with a dense gradient and row state.
    """
    by_row, dense = [], []
    for number, group in enumerate(optimizer.param_groups):
        for position, w in enumerate(group["params"]):
            if w.grad is None:
                continue
            state = optimizer.state.get(w, {})
            check_state(w, state, f"parameter {position} of group {number}")
            if w.grad.layout in SPARSE_LAYOUTS or has_row_state(state):
                check_by_row(w, group, f"parameter {position} of group {number}")
                by_row.append((w, group))
            else:
                dense.append((w, group))
    return by_row, dense


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


def check_state(w: Tensor, state: dict[str, Any], which: str) -> None:
    """Raise ``ValueError`` where the state is that of another parameter: ``load_state_dict`` does not look."""
    for name, of in state.items():
        if isinstance(of, Tensor) and of.dim() and of.shape != (w.shape[:1] if name == "step" else w.shape):
            raise ValueError(
                f"{which}, of shape {tuple(w.shape)}, has a state {name!r} of shape {tuple(of.shape)}: it was loaded "
                "from an optimizer of other parameters, or of the same in another order."
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


def has_one_pass(w: Tensor, group: Group, states: States) -> bool:
    """Whether the kernels of ``rwfx.native`` take ``w``: on a CPU, contiguous, of one real dtype with its own."""
    grad = w.grad
    assert grad is not None
    fits = w.is_cpu and w.dtype in ONE_PASS_DTYPES and w.is_contiguous() and w.dim() > 0
    own = [grad, *[x for name, x in states.get(w, {}).items() if name != "step" and isinstance(x, Tensor)]]
    fits = fits and all(x.dtype == w.dtype for x in own)
    return fits and not group["differentiable"] and not group.get("capturable") and native.ready()


def batches(by_row: list[tuple[Tensor, Group]]) -> Iterator[tuple[Group, Batch]]:
    """The parameters in batches of one group, device and dtype, without those of which no row is drawn."""
    open_batches: dict[Any, tuple[Group, Batch]] = {}
    numbers: dict[Any, int] = {}
    for w, group in by_row:
        rows, g = rows_and_values(w)
        if g.shape[0] == 0:
            continue
        key = (id(group), w.device, w.dtype, g.dtype)
        _, batch = open_batches.setdefault(key, (group, ([], [], [])))
        for of_batch, x in zip(batch, (w, rows, g), strict=True):
            of_batch.append(x)
        numbers[key] = numbers.get(key, 0) + g.numel()
        if numbers[key] >= BATCH:
            del numbers[key]
            yield open_batches.pop(key)
    yield from open_batches.values()


def rows_and_values(w: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``(K,)`` and gradient ``(K, ...)`` of ``w``."""
    grad = w.grad
    assert grad is not None
    if grad.layout == torch.strided:
        return torch.arange(len(w), device=w.device), grad
    # Row gradients of two backward passes add up to one with repeated rows.
    grad = grad.coalesce()
    # As indices() and values(), without the views that autograd would follow.
    return grad._indices()[0], grad._values()


def moments_of(w: list[Tensor], states: States, *names: str) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The named moments of each ``w``, a list for each name, and each ``step``; made where there are none."""
    state = [row_state(x, states, *names) for x in w]
    return [[of[name] for of in state] for name in names], [of["step"] for of in state]


def to_descend(w: list[Tensor], g: list[Tensor], group: Group, grad_scale: Tensor | None) -> list[Tensor]:
    """Gradients unscaled, of the sign to descend, in the dtype to compute in.

    That dtype is float32 for a narrower ``w``: then a step rounds to ``w``'s dtype once, when it writes.
    """
    g = cast(g, torch.promote_types(w[0].dtype, torch.float32))
    if grad_scale is not None:
        g = [x / grad_scale for x in g]
    return list(torch._foreach_neg(g)) if group["maximize"] else g


def row_state(w: Tensor, states: States, *moments: str) -> dict[str, Any]:
    """State of ``w`` with the named moments of ``w``'s shape and ``step``, made where it has none.

    ``step`` is ``(O,)``, but for a dense gradient without row state it is one number. After dense steps every row has
    had as many updates as the parameter.
    """
    state = states[w]
    step = state.get("step")
    if step is None:
        # torch.optim.SGD keeps no count. A moment that is there was updated, and "at least once" is all SGD asks.
        step = torch.tensor(float(state.get(moments[0]) is not None), dtype=torch.float32)
    if step.dim() == 0 and w.grad is not None and w.grad.layout != torch.strided:
        step = torch.zeros(len(w), device=w.device, dtype=torch.float32).add_(step)
    # load_state_dict moves the moments to w's device, and leaves step where it was saved. torch.optim counts in the
    # default dtype, the kernels in float32.
    state["step"] = step.to(w.device if step.dim() else step.device, torch.float32)
    for name in moments:
        of = state.get(name)
        if of is None:
            state[name] = torch.zeros_like(w, memory_format=torch.preserve_format)
        elif w.is_contiguous() and not of.is_contiguous():
            state[name] = of.contiguous()
    return state


def count_updates(step: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Add one to each ``step[rows]``; returns them one after the other, ``(sum of K,)``."""
    t = torch.cat([x.index_select(0, i) for x, i in zip(step, rows, strict=True)]).add_(1)
    for x, i, t_x in zip(step, rows, t.split([i.shape[0] for i in rows]), strict=True):
        x.index_copy_(0, i, t_x)
    return t


def read_rows(of: list[Tensor], rows: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each ``of[rows]``, a copy ``(K, ...)`` in ``dtype``."""
    return cast([x.index_select(0, i) for x, i in zip(of, rows, strict=True)], dtype)


def write_rows(to: list[Tensor], rows: list[Tensor], values: list[Tensor]) -> None:
    """Each ``to[rows] = values``, rounded to the dtype of ``to``."""
    for x, i, new in zip(to, rows, cast(values, to[0].dtype), strict=True):
        # On a CPU index_copy_ moves one element after the other, and of the widest dtype, 16 bytes, there are the
        # fewest: half the time in float32. A row, and the place of the first one, must then be a multiple of 16 bytes.
        if x.is_cpu and x.dim() > 1 and x.is_contiguous() and new.is_contiguous():
            size = x.itemsize
            if x.stride(0) * size % 16 == 0 and x.storage_offset() * size % 16 == 0:
                x, new = (y.flatten(1).view(torch.complex128) for y in (x, new))
        x.index_copy_(0, i, new)


def add_rows(to: list[Tensor], rows: list[Tensor], values: list[Tensor], alpha: float = 1) -> None:
    """Each ``to[rows] += alpha * values``, computed in the dtype of ``values``."""
    if to[0].dtype == values[0].dtype:
        # Half the time of reading, adding and writing.
        for x, i, new in zip(to, rows, values, strict=True):
            x.index_add_(0, i, new, alpha=alpha)
    else:
        # index_add_ would round the values before it adds them.
        sums = read_rows(to, rows, values[0].dtype)
        torch._foreach_add_(sums, values, alpha=alpha)
        write_rows(to, rows, sums)


def per_row(x: Tensor, like: list[Tensor]) -> list[Tensor]:
    """``x`` ``(sum of K,)`` as one ``(K, 1, ...)`` for each ``like`` ``(K, ...)``, to multiply it row by row."""
    # Most parameters are matrices, and a column is then split off as it is.
    columns = x.unsqueeze(1).split([y.shape[0] for y in like])
    return [c if y.dim() == 2 else c.view(-1, *[1] * (y.dim() - 1)) for c, y in zip(columns, like, strict=True)]


def cast(values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The values, all of one dtype, in ``dtype``; themselves where they have it."""
    return values if values[0].dtype == dtype else [x.to(dtype) for x in values]
