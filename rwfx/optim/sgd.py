"""Stochastic gradient descent on rows."""

# torch._foreach_* is what torch.optim itself is made of; torch lists none of it as exported.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from rwfx.optim.rows import (
    Group,
    States,
    Unvisited,
    add_rows,
    count_updates,
    moments_of,
    offer_unvisited,
    pay,
    per_row,
    read_rows,
    step_dense_and_rows,
    with_unvisited,
    write_rows,
)


class SGD(torch.optim.SGD):
    """``torch.optim.SGD`` that touches only the rows of a row gradient.

    Arguments, defaults and hooks are the same, and ``unvisited`` is one more.

    With a dense gradient it is ``torch.optim.SGD``. With a row gradient, where ``g = dw[rows]``:

        g       = g + weight_decay * w[rows]
        b[rows] = momentum * b[rows] + (1 - dampening) * g        (a row's first time: b[rows] = g)
        g       = b[rows], or g + momentum * b[rows] with nesterov
        w[rows] = w[rows] - lr * g

    Other rows of ``w`` and ``b`` stay as they are (``unvisited="frozen"``), so a row's momentum waits until the row is
    drawn again. ``torch.optim.SGD`` takes a row gradient too, but its momentum moves rows that are not in it.

    With ``unvisited="moving"`` the other rows have a gradient of zero, and it is
    ``torch.optim.SGD`` on the gradient filled with zeros, at the cost of a dense update. With ``"owed"`` they are not
    touched either, and a row pays what its momentum would have lost since its last update, at step ``t[rows]``, or 0:

        T       = T + 1
        age     = T - t[rows]
        t[rows] = T
        b[rows] = momentum**age * b[rows] + (1 - dampening) * g

    in the place of its namesake, and the rest as above. What momentum would have moved in the meantime is not made up
    for, and ``weight_decay``, which is added to the gradient, counts only in the steps that draw the row.

    Args:
        unvisited: what becomes of the rows that are not in a row gradient, ``"frozen"``, ``"moving"`` or ``"owed"``; an
            entry of each group. A ``state_dict`` without it leaves it as it is.

    State of a parameter that has had a row gradient, with ``momentum > 0``: ``momentum_buffer``, of its shape, and
    ``step`` (t), ``(O,)`` float32, the updates of each row; with ``"owed"`` its last one's step, and ``steps`` (T), an
    int. With ``"moving"`` it is that of ``torch.optim.SGD``. After dense gradients and with ``"moving"`` a group's
    ``unvisited`` may be changed; after row gradients with ``"frozen"`` or ``"owed"`` that is refused.

    Source: Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and momentum in deep learning",
    ICML 2013, in the form that ``torch.optim.SGD`` documents.

    Raises:
        ValueError: ``unvisited`` is none of the choices. At ``step``, before anything is changed: a group's is none of
            them, or not the one that its row state was made with; a sparse gradient that is not a row gradient; a row
            gradient with ``differentiable=True``, unless the other rows are ``"moving"``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        unvisited: Unvisited = "frozen",
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        offer_unvisited(self, unvisited)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(with_unvisited(self, state))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; ``closure`` reevaluates the model and returns the loss."""
        return step_dense_and_rows(self, torch.optim.SGD.step, update_rows, one_pass, closure)


def one_pass(w: list[Tensor], group: Group, states: States, grad_scale: float) -> None:
    """The equations of ``SGD`` by a kernel, from the ``.grad`` of each ``w``, ``grad_scale`` times too large."""
    buffers, step, steps = [], [], []
    if group["momentum"] != 0:
        (buffers,), step, steps = moments_of(w, group, states, "momentum_buffer")
    numbers = [float(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay")]
    choices = group["nesterov"], group["maximize"]
    torch.ops.rwfx.sgd_rows_.default(w, buffers, step, steps, [x.grad for x in w], *numbers, *choices, grad_scale)


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
    (momentum_buffer,), step, steps = moments_of(w, group, states, "momentum_buffer")
    t, age = count_updates(step, rows, steps)
    b = read_rows(momentum_buffer, rows, g[0].dtype)
    if group["unvisited"] == "owed":
        pay(b, momentum, age)
    torch._foreach_mul_(b, momentum)
    if dampening == 0:
        torch._foreach_add_(b, g)
    else:
        # b is zero the first time, so that g undampened is all of b.
        torch._foreach_addcmul_(b, g, per_row(1 - dampening * (t > age).to(g[0].dtype), g))
    write_rows(momentum_buffer, rows, b)
    return list(torch._foreach_add(g, b, alpha=momentum)) if group["nesterov"] else b
