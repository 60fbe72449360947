"""Adam on rows."""

# torch._foreach_* is what torch.optim itself is made of; torch lists none of it as exported.
# pyright: reportPrivateImportUsage=false

import math
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
    power,
    read_rows,
    step_dense_and_rows,
    with_unvisited,
    write_rows,
)


class Adam(torch.optim.Adam):
    """``torch.optim.Adam`` that touches only the rows of a row gradient.

    Arguments, defaults and hooks are the same, and ``unvisited`` is one more.

    With a dense gradient it is ``torch.optim.Adam``. With a row gradient, where ``g = dw[rows]``:

        t[rows] = t[rows] + 1
        g       = g + weight_decay * w[rows]
        m[rows] = beta1 * m[rows] + (1 - beta1) * g
        v[rows] = beta2 * v[rows] + (1 - beta2) * g**2
        m_hat   = m[rows] / (1 - beta1**t[rows])
        v_hat   = v[rows] / (1 - beta2**t[rows])
        w[rows] = w[rows] - lr * m_hat / (sqrt(v_hat) + eps)

    With ``amsgrad``, ``v_hat`` is made of the largest ``v[rows]`` so far; with ``decoupled_weight_decay``, the second
    line is ``w[rows] = (1 - lr * weight_decay) * w[rows]``. Other rows of ``w``, ``m``, ``v`` and ``t`` stay as they
    are (``unvisited="frozen"``): a row first drawn at step 900 is at its step 1. ``torch.optim.SparseAdam`` differs in
    that one ``t`` counts for all rows, so that the bias correction of a late row is missing, and in that it refuses
    dense gradients and has no weight decay and no amsgrad.

    With ``unvisited="moving"`` the other rows have a gradient of zero, and it is
    ``torch.optim.Adam`` on the gradient filled with zeros, at the cost of a dense update. With ``"owed"`` they are not
    touched either, and a row pays what its moments would have lost since its last update, at step ``t[rows]``, or 0:

        T       = T + 1
        age     = T - t[rows]
        t[rows] = T
        m[rows] = beta1**age * m[rows] + (1 - beta1) * g
        v[rows] = beta2**age * v[rows] + (1 - beta2) * g**2

    in the places of their namesakes, and the rest as above; with ``decoupled_weight_decay``, ``w[rows] =
    (1 - lr * weight_decay)**age * w[rows]``, with the ``lr`` of this step. What momentum would have moved in the
    meantime is not made up for. Nothing else is owed: the largest ``v[rows]`` so far stays, and a ``weight_decay`` that
    is added to the gradient counts only in the steps that draw the row.

    Args:
        unvisited: what becomes of the rows that are not in a row gradient, ``"frozen"``, ``"moving"`` or ``"owed"``; an
            entry of each group. A ``state_dict`` without it leaves it as it is.

    State of a parameter that has had a row gradient: ``exp_avg`` (m), ``exp_avg_sq`` (v) and, with ``amsgrad``,
    ``max_exp_avg_sq``, of its shape, and ``step`` (t), ``(O,)`` float32; with ``"owed"`` also ``steps`` (T), an int.
    With ``"moving"`` it is that of ``torch.optim.Adam``. After dense gradients and with ``"moving"`` a group's
    ``unvisited`` may be changed; after row gradients with ``"frozen"`` or ``"owed"`` that is refused.

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1; amsgrad: Reddi, Kale &
    Kumar, "On the Convergence of Adam and Beyond", ICLR 2018.

    Raises:
        ValueError: ``unvisited`` is none of the choices. At ``step``, before anything is changed: a group's is none of
            them, or not the one that its row state was made with; a sparse gradient that is not a row gradient; a row
            gradient with ``differentiable=True``, unless the other rows are ``"moving"``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        unvisited: Unvisited = "frozen",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        offer_unvisited(self, unvisited)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(with_unvisited(self, state))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; ``closure`` reevaluates the model and returns the loss."""
        return step_dense_and_rows(self, torch.optim.Adam.step, update_rows, one_pass, closure)


def one_pass(w: list[Tensor], group: Group, states: States, grad_scale: float) -> None:
    """The equations of ``Adam`` by a kernel, from the ``.grad`` of each ``w``, ``grad_scale`` times too large."""
    names = moment_names(group)
    moments, step, steps = moments_of(w, group, states, *names)
    numbers = [float(x) for x in (group["lr"], *group["betas"], group["eps"], group["weight_decay"])]
    choices = group["decoupled_weight_decay"], group["maximize"]
    lists = *moments, *[[]] * (3 - len(names)), step, steps, [x.grad for x in w]
    torch.ops.rwfx.adam_rows_.default(w, *lists, *numbers, *choices, grad_scale)


def update_rows(w: list[Tensor], rows: list[Tensor], g: list[Tensor], group: Group, states: States) -> None:
    """The equations of ``Adam`` for a batch. ``w``: each ``(O, ...)``. ``rows``: each ``(K,)``.

    ``g``: each ``(K, ...)``, not written to.
    """
    # A beta on a device is read back once here, where torch.optim.Adam's own loop reads it too.
    beta1, beta2 = (float(beta) for beta in group["betas"])
    lr, eps, weight_decay = group["lr"], group["eps"], group["weight_decay"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(()).to(w[0].device)
    owed = group["unvisited"] == "owed"
    moments, step, steps = moments_of(w, group, states, *moment_names(group))
    if w[0].is_complex():
        # The real and the imaginary part are two weights, as in torch.optim.Adam.
        w, g, *moments = ([torch.view_as_real(x) for x in xs] for xs in (w, g, *moments))
    exp_avg, exp_avg_sq, *max_exp_avg_sq = moments
    dtype = g[0].dtype
    t, age = count_updates(step, rows, steps)

    w_rows = read_rows(w, rows, dtype) if weight_decay != 0 else None
    if w_rows is not None and not group["decoupled_weight_decay"]:
        g = list(torch._foreach_add(g, w_rows, alpha=weight_decay))
    m = read_rows(exp_avg, rows, dtype)
    if owed:
        pay(m, beta1, age)
    torch._foreach_lerp_(m, g, 1 - beta1)
    write_rows(exp_avg, rows, m)
    v = read_rows(exp_avg_sq, rows, dtype)
    if owed:
        pay(v, beta2, age)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, value=1 - beta2)
    write_rows(exp_avg_sq, rows, v)
    for of in max_exp_avg_sq:
        torch._foreach_maximum_(v, read_rows(of, rows, dtype))
        write_rows(of, rows, v)

    # lr * m_hat / (sqrt(v_hat) + eps) = lr_hat * m / (sqrt(v) + eps_hat), the order Kingma & Ba advise at the end of
    # their section 2: what is corrected is (K,) numbers, not (K, ...).
    t = t.to(dtype)
    correction1, correction2 = bias_correction(beta1, t), bias_correction(beta2, t).sqrt_()
    lr_hat, eps_hat = per_row(correction2 * lr / correction1, g), per_row(correction2 * eps, g)
    # sqrt as 1 / rsqrt: on a CPU sqrt takes four times as long for a zero, and where inputs are often zero, so is v.
    torch._foreach_rsqrt_(v)
    torch._foreach_reciprocal_(v)
    torch._foreach_add_(v, eps_hat)
    dw = m
    torch._foreach_div_(dw, v)
    torch._foreach_mul_(dw, lr_hat)
    if w_rows is not None and group["decoupled_weight_decay"]:
        if owed:
            keep = 1 - (lr.double() if isinstance(lr, Tensor) else lr) * weight_decay
            torch._foreach_mul_(w_rows, per_row((1 - power(keep, age)).to(dtype), w_rows))
        else:
            torch._foreach_mul_(w_rows, lr * weight_decay)
        torch._foreach_add_(dw, w_rows)
    add_rows(w, rows, dw, alpha=-1)


def moment_names(group: Group) -> tuple[str, ...]:
    """What of a parameter's state is of its shape."""
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")


def bias_correction(beta: float, t: Tensor) -> Tensor:
    """``1 - beta**t``, by ``expm1``: for a ``beta`` close to one the difference loses four digits in float32."""
    return torch.expm1(t * (math.log(beta) if beta else -math.inf)).neg_()
