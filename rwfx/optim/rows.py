"""What the row optimizers share: one step over dense and row gradients, and reading and writing rows.

In: a ``torch.optim`` optimizer whose parameters hold gradients. Out: the parameters and the optimizer's state, updated.
A *row gradient* is a hybrid ``torch.sparse_coo`` tensor with ``sparse_dim=1``. *Row state* is the state of a parameter
that has had one: ``state["step"]`` is then ``(O,)`` float32, each row's own number of updates, where ``torch.optim``
keeps one number for the whole parameter. Where rows *owe* (``unvisited="owed"``), it is the parameter's own number of
steps at each row's last update, 0 where there was none, and ``state["steps"]`` is that number now. A *batch* is
parameters of one group, device and dtype that are updated together: three lists, of the parameters ``w``, of their
``rows`` and of the gradients ``g`` of those rows. A small step is mostly the cost of calls, and a ``torch._foreach``
call does for all of a list what a call does for one tensor.
"""

# torch._foreach_* is what torch.optim itself is made of; torch lists none of it as exported.
# pyright: reportPrivateImportUsage=false

import inspect
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from itertools import repeat
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from rwfx import native

Unvisited = Literal["frozen", "moving", "owed"]
"""What becomes of the rows that are not in a row gradient: see ``rwfx.optim``."""

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
UNVISITED: tuple[Unvisited, ...] = get_args(Unvisited)
ONE_PASS_DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
SPARSE_LAYOUTS = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def offer_unvisited(optimizer: Optimizer, unvisited: Unvisited) -> None:
    """Make ``unvisited`` an option of a new optimizer's groups.

    Raises:
        ValueError: it is none of the choices, or a group's own is not.
    """
    optimizer.defaults["unvisited"] = unvisited
    for group in optimizer.param_groups:
        if group.setdefault("unvisited", unvisited) not in UNVISITED:
            raise ValueError(f"{type(optimizer).__name__} was given {unknown(group['unvisited'])}")


def with_unvisited(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """What ``__setstate__`` is given, with an ``unvisited`` in each group: where it has none, the optimizer's own.

    That is a ``state_dict`` of the namesake's, or one of a time before there was a choice, as a pickle can be too.

    Raises:
        ValueError: a group's ``unvisited`` is none of the choices.
    """
    own = [group["unvisited"] for group in getattr(optimizer, "param_groups", [])]
    for group, unvisited in zip(state["param_groups"], own or repeat("frozen"), strict=False):
        if group.setdefault("unvisited", unvisited) not in UNVISITED:
            raise ValueError(f"the state to load has {unknown(group['unvisited'])}")
    state.get("defaults", {}).setdefault("unvisited", "frozen")
    return state


def unknown(unvisited: object) -> str:
    """What is said of a choice that there is not."""
    return f"unvisited={unvisited!r}. Choose {', '.join(map(repr, UNVISITED[:-1]))} or {UNVISITED[-1]!r}."


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
        ValueError: a group's ``unvisited`` is none of the choices, or another one than the row state was made with; a
            sparse gradient that is not a row gradient; an update by row with ``differentiable=True``. Nothing has been
            changed then.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    by_row, dense, to_fill = parameters_by_row(optimizer)
    with gradients_as(to_fill, [grad_of(w).to_dense() for w in to_fill]):
        # Beside row gradients, the dense ones take part in the same call; alone, they are the namesake's.
        together = dense if by_row and all(has_one_pass(w, group, optimizer.state) for w, group in dense) else []
        if len(together) < len(dense) or not by_row:
            with gradients_as([w for w, _ in by_row], repeat(None)):
                # The namesake's own step may carry the wrapper that calls the user's hooks: they have been called.
                inspect.unwrap(dense_step, stop=lambda step: not hasattr(step, "hooked"))(optimizer)
        if by_row and not overflowed(optimizer):
            with torch.no_grad():
                step_rows(optimizer, by_row, together, update_rows, one_pass)
    return loss


def step_rows(
    optimizer: Optimizer,
    by_row: list[tuple[Tensor, Group]],
    one_pass_too: list[tuple[Tensor, Group]],
    update_rows: RowUpdate,
    one_pass: OnePass,
) -> None:
    """Update ``by_row``, those that ``one_pass`` takes by it, and with them ``one_pass_too``."""
    grad_scale = getattr(optimizer, "grad_scale", None)
    fast: dict[int, tuple[Group, list[Tensor]]] = {}
    left = []
    for w, group in by_row:
        if has_one_pass(w, group, optimizer.state):
            fast.setdefault(id(group), (group, []))[1].append(w)
        else:
            left.append((w, group))
    for w, group in one_pass_too:
        fast.setdefault(id(group), (group, []))[1].append(w)
    for group, w in fast.values():
        one_pass(w, group, optimizer.state, 1.0 if grad_scale is None else float(grad_scale))
        # So that autograd refuses to go back through a weight that is not the one of its forward pass.
        torch.autograd.graph.increment_version(w)
    for group, (w, rows, g) in batches(left):
        update_rows(w, rows, to_descend(w, g, group, grad_scale), group, optimizer.state)


@contextmanager
def gradients_as(w: list[Tensor], grads: Iterable[Tensor | None]) -> Iterator[None]:
    """Let each ``w`` have another gradient, and then its own again."""
    own = [x.grad for x in w]
    try:
        for x, grad in zip(w, grads, strict=False):
            x.grad = grad
        yield
    finally:
        for x, grad in zip(w, own, strict=True):
            x.grad = grad


def parameters_by_row(
    optimizer: Optimizer,
) -> tuple[list[tuple[Tensor, Group]], list[tuple[Tensor, Group]], list[Tensor]]:
    """The parameters to update row by row, each with its group; those that the dense step updates; those to fill.

    By row: those with a row gradient, and those with a dense gradient and row state. To fill: those of the dense step
    whose gradient is a row gradient, because their other rows are ``"moving"``.
    """
    by_row, dense, to_fill = [], [], []
    for number, group in enumerate(optimizer.param_groups):
        unvisited = group["unvisited"]
        if unvisited not in UNVISITED:
            raise ValueError(f"group {number} has {unknown(unvisited)}")
        for position, w in enumerate(group["params"]):
            grad = w.grad
            if grad is None:
                continue
            state = optimizer.state.get(w, {})
            sparse, row_state = grad.layout in SPARSE_LAYOUTS, has_row_state(state)
            fault = fault_of_state(w, state, unvisited) or (fault_by_row(grad, group) if sparse or row_state else None)
            if fault is not None:
                raise ValueError(f"parameter {position} of group {number}, of shape {tuple(w.shape)}, {fault}")
            if row_state or (sparse and unvisited != "moving"):
                by_row.append((w, group))
            else:
                dense.append((w, group))
                if sparse:
                    to_fill.append(w)
    return by_row, dense, to_fill


def fault_by_row(grad: Tensor, group: Group) -> str | None:
    """Why a parameter cannot be updated with this gradient row by row; None where it can."""
    sparse_dim = grad.sparse_dim() if grad.layout == torch.sparse_coo else None
    if grad.layout in SPARSE_LAYOUTS and sparse_dim != 1:
        return (
            f"has a gradient of layout {grad.layout}, sparse_dim={sparse_dim}. A row gradient is torch.sparse_coo with "
            "sparse_dim=1: indices (1, K), values (K, ...). Make the gradient that, or dense with "
            "w.grad = w.grad.to_dense()."
        )
    if group["differentiable"] and group["unvisited"] != "moving":
        return (
            "is to be updated row by row with differentiable=True: rows are written in place, which autograd cannot "
            "follow. Use differentiable=False, or dense gradients only."
        )
    return None


def fault_of_state(w: Tensor, state: dict[str, Any], unvisited: Unvisited) -> str | None:
    """Why the state is of another parameter, for ``load_state_dict`` does not look, or of another choice; or None."""
    shape = w.shape
    for name, of in state.items():
        if isinstance(of, Tensor) and of.dim() and of.shape != (shape[:1] if name == "step" else shape):
            return (
                f"has a state {name!r} of shape {tuple(of.shape)}: it was loaded from an optimizer of other "
                "parameters, or of the same in another order."
            )
    if not has_row_state(state):
        return None
    was = "owed" if "steps" in state else "frozen"
    if was == unvisited:
        return None
    return (
        f"has row state of unvisited={was!r}, and its group now says {unvisited!r}: its rows have been updated at "
        f"different steps, which the two count differently. Set the group's unvisited to {was!r}, or forget the state "
        "with optimizer.state.pop(parameter)."
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
    dtype = w.dtype
    if not (w.is_cpu and dtype in ONE_PASS_DTYPES and w.is_contiguous() and w.dim() > 0):
        return False
    if grad_of(w).dtype != dtype:
        return False
    for name, of in states.get(w, {}).items():
        if name != "step" and isinstance(of, Tensor) and of.dtype != dtype:
            return False
    return not group["differentiable"] and not group.get("capturable") and native.ready()


def batches(by_row: list[tuple[Tensor, Group]]) -> Iterator[tuple[Group, Batch]]:
    """The parameters in batches of one group, device and dtype, without those at which nothing is to be done."""
    open_batches: dict[Any, tuple[Group, Batch]] = {}
    numbers: dict[Any, int] = {}
    for w, group in by_row:
        rows, g = rows_and_values(w)
        if g.shape[0] == 0 and group["unvisited"] != "owed":  # where rows owe, each of them has missed a step
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
    grad = grad_of(w)
    if grad.layout == torch.strided:
        return torch.arange(len(w), device=w.device), grad
    # Row gradients of two backward passes add up to one with repeated rows.
    grad = grad.coalesce()
    # As indices() and values(), without the views that autograd would follow.
    return grad._indices()[0], grad._values()


def grad_of(w: Tensor) -> Tensor:
    """The gradient, of a parameter that is known to have one."""
    assert w.grad is not None
    return w.grad


def moments_of(
    w: list[Tensor], group: Group, states: States, *names: str
) -> tuple[list[list[Tensor]], list[Tensor], list[int]]:
    """The named moments of each ``w``, a list for each name; each ``step``; each ``steps``, 0 where no row owes.

    Counts this step in ``steps``; makes what there is not yet.
    """
    state = [row_state(x, group, states, *names) for x in w]
    return (
        [[of[name] for of in state] for name in names],
        [of["step"] for of in state],
        [of.get("steps", 0) for of in state],
    )


def to_descend(w: list[Tensor], g: list[Tensor], group: Group, grad_scale: Tensor | None) -> list[Tensor]:
    """Gradients unscaled, of the sign to descend, in the dtype to compute in.

    That dtype is float32 for a narrower ``w``: then a step rounds to ``w``'s dtype once, when it writes.
    """
    g = cast(g, torch.promote_types(w[0].dtype, torch.float32))
    if grad_scale is not None:
        g = [x / grad_scale for x in g]
    return list(torch._foreach_neg(g)) if group["maximize"] else g


def row_state(w: Tensor, group: Group, states: States, *moments: str) -> dict[str, Any]:
    """State of ``w`` with the named moments of ``w``'s shape and ``step``, made where it has none.

    ``step`` is ``(O,)``, but for a dense gradient without row state it is one number. After dense steps every row has
    had as many updates as the parameter. Where rows owe, ``steps`` counts this step.
    """
    state = states[w]
    step = state.get("step")
    if step is None:
        # torch.optim.SGD keeps no count. A moment that is there was updated, and "at least once" is all SGD asks.
        step = torch.tensor(float(state.get(moments[0]) is not None), dtype=torch.float32)
    owed = group["unvisited"] == "owed"
    if step.dim() == 0 and grad_of(w).layout != torch.strided:
        if owed:
            # A number of Python: a tensor of the state, but for "step", load_state_dict rounds to the dtype of w.
            state["steps"] = int(step)
        step = torch.zeros(len(w), device=w.device, dtype=torch.float32).add_(step)
    if owed and step.dim():
        state["steps"] += 1
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


def count_updates(step: list[Tensor], rows: list[Tensor], steps: list[int]) -> tuple[Tensor, Tensor]:
    """Count an update of each ``step[rows]``; ``steps`` are 0 or, where rows owe, the parameters' own.

    Returns:
        The updates' numbers and the steps since each row's last one (1: none missed), ``(sum of K,)`` float32.
    """
    before = torch.cat([x.index_select(0, i) for x, i in zip(step, rows, strict=True)])
    counts = [i.shape[0] for i in rows]
    if steps[0]:
        t = torch.cat([torch.full_like(x, now) for x, now in zip(before.split(counts), steps, strict=True)])
    else:
        t = before + 1
    for x, i, t_x in zip(step, rows, t.split(counts), strict=True):
        x.index_copy_(0, i, t_x)
    return t, t - before


def power(base: float | Tensor, exponent: Tensor) -> Tensor:
    """``base**exponent``, in float64: in float32 the error of the base would be multiplied by the exponent."""
    return torch.pow(base, exponent.double())


def pay(moment: list[Tensor], factor: float, age: Tensor) -> None:
    """Decay what was read of a moment, each ``(K, ...)``, by ``factor`` for each step that its row has missed."""
    torch._foreach_mul_(moment, per_row(power(factor, age - 1).to(moment[0].dtype), moment))


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
