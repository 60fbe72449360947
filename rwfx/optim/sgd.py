"""Stochastic gradient descent on rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from rwfx.optim.rows import (
    Group,
    States,
    add_rows,
    count_update,
    per_row,
    read_rows,
    row_state,
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
        return step_dense_and_rows(self, torch.optim.SGD.step, update_rows, closure)


def update_rows(w: Tensor, rows: Tensor, g: Tensor, group: Group, states: States) -> None:
    """The equations of ``SGD``. ``w``: ``(O, ...)``. ``rows``: ``(K,)``. ``g``: ``(K, ...)``, not written to."""
    if group["weight_decay"] != 0:
        g = g.add(read_rows(w, rows, g.dtype), alpha=group["weight_decay"])
    if group["momentum"] != 0:
        g = with_momentum(w, rows, g, group, states)
    lr = group["lr"]
    if isinstance(lr, Tensor):
        # A product, since alpha would read lr from its device.
        add_rows(w, rows, g * -lr.reshape(()).to(g.device))
    else:
        add_rows(w, rows, g, alpha=-lr)


def with_momentum(w: Tensor, rows: Tensor, g: Tensor, group: Group, states: States) -> Tensor:
    """Update ``b[rows]``; returns the direction to go, ``(K, ...)``."""
    momentum, dampening = group["momentum"], group["dampening"]
    state = row_state(w, states, "momentum_buffer")
    t = count_update(state["step"], rows)
    b = read_rows(state["momentum_buffer"], rows, g.dtype).mul_(momentum)
    if dampening == 0:
        b.add_(g)
    else:
        # b is zero the first time, so that g undampened is all of b.
        b.addcmul_(g, 1 - dampening * per_row(t > 1, g))
    write_rows(state["momentum_buffer"], rows, b)
    return g.add(b, alpha=momentum) if group["nesterov"] else b
