"""Stochastic gradient descent on rows."""

# torch._foreach_* is what torch.optim itself is made of; torch lists none of it as exported.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable

import torch
from torch import Tensor

from rwfx.optim.rows import (
    Group,
    States,
    add_rows,
    count_updates,
    moments_of,
    per_row,
    read_rows,
    step_dense_and_rows,
    write_rows,
)


class SGD(torch.optim.SGD):
    """``torch.optim.SGD`` that touches only the rows of a row gradient. Arguments, defaults and hooks are the same.

    With a dense gradient it is ``torch.optim.SGD``. With a row gradient, where ``g = dw[rows]``:

        g       = g + weight_decay * w[rows]
        b[rows] = momentum * b[rows] + (1 - dampening) * g        (a row's first time: b[rows] = g)
        g       = b[rows], or g + momentum * b[rows] with nesterov
        w[rows] = w[rows] - lr * g

    Other rows of ``w`` and ``b`` stay as they are, so a row's momentum waits until the row is drawn again.
    ``torch.optim.SGD`` takes a row gradient too, but its momentum moves rows that are not in it.

    State of a parameter that has had a row gradient, with ``momentum > 0``: ``momentum_buffer``, of its shape, and
    ``step``, ``(O,)`` float32, the updates of each row.

    Source: Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and momentum in deep learning",
    ICML 2013, in the form that ``torch.optim.SGD`` documents.

    Raises:
        ValueError: at ``step``, before anything is changed: a sparse gradient that is not a row gradient, or a row
            gradient with ``differentiable=True``.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; ``closure`` reevaluates the model and returns the loss."""
        return step_dense_and_rows(self, torch.optim.SGD.step, update_rows, one_pass, closure)


def one_pass(w: list[Tensor], group: Group, states: States, grad_scale: float) -> None:
    """The equations of ``SGD`` by a kernel, from the ``.grad`` of each ``w``, ``grad_scale`` times too large."""
    (buffers,), steps = moments_of(w, states, "momentum_buffer") if group["momentum"] != 0 else (([],), [])
    numbers = [float(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay")]
    choices = group["nesterov"], group["maximize"]
    torch.ops.rwfx.sgd_rows_.default(w, buffers, steps, [x.grad for x in w], *numbers, *choices, grad_scale)


def update_rows(w: list[Tensor], rows: list[Tensor], g: list[Tensor], group: Group, states: States) -> None:
    """The equations of ``SGD`` for a batch. ``w``: each ``(O, ...)``. ``rows``: each ``(K,)``.

    ``g``: each ``(K, ...)``, not written to.
    """
    if group["weight_decay"] != 0:
        g = list(torch._foreach_add(g, read_rows(w, rows, g[0].dtype), alpha=group["weight_decay"]))
    if group["momentum"] != 0:
        g = with_momentum(w, rows, g, group, states)
    lr = group["lr"]
    if isinstance(lr, Tensor):
        # A product, since alpha would read lr from its device.
        add_rows(w, rows, list(torch._foreach_mul(g, -lr.reshape(()).to(g[0].device))))
    else:
        add_rows(w, rows, g, alpha=-lr)


def with_momentum(w: list[Tensor], rows: list[Tensor], g: list[Tensor], group: Group, states: States) -> list[Tensor]:
    """Update each ``b[rows]``; returns the directions to go, each ``(K, ...)``."""
    momentum, dampening = group["momentum"], group["dampening"]
    (momentum_buffer,), steps = moments_of(w, states, "momentum_buffer")
    t = count_updates(steps, rows)
    b = read_rows(momentum_buffer, rows, g[0].dtype)
    torch._foreach_mul_(b, momentum)
    if dampening == 0:
        torch._foreach_add_(b, g)
    else:
        # b is zero the first time, so that g undampened is all of b.
        torch._foreach_addcmul_(b, g, per_row(1 - dampening * (t > 1).to(g[0].dtype), g))
    write_rows(momentum_buffer, rows, b)
    return list(torch._foreach_add(g, b, alpha=momentum)) if group["nesterov"] else b
