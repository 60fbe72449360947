"""Adam on rows."""

# torch._foreach_* is what torch.optim itself is made of; torch lists none of it as exported.
# pyright: reportPrivateImportUsage=false

import math
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


class Adam(torch.optim.Adam):
    """``torch.optim.Adam`` that touches only the rows of a row gradient. Arguments, defaults and hooks are the same.

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
    are: a row first drawn at step 900 is at its step 1. ``torch.optim.SparseAdam`` differs in that one ``t`` counts
    for all rows, so that the bias correction of a late row is missing, and in that it refuses dense gradients and
    has no weight decay and no amsgrad.

    State of a parameter that has had a row gradient: ``exp_avg`` (m), ``exp_avg_sq`` (v) and, with ``amsgrad``,
    ``max_exp_avg_sq``, of its shape, and ``step`` (t), ``(O,)`` float32.

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1; amsgrad: Reddi, Kale &
    Kumar, "On the Convergence of Adam and Beyond", ICLR 2018.

    Raises:
        ValueError: at ``step``, before anything is changed: a sparse gradient that is not a row gradient, or a row
            gradient with ``differentiable=True``.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; ``closure`` reevaluates the model and returns the loss."""
        return step_dense_and_rows(self, torch.optim.Adam.step, update_rows, one_pass, closure)


def one_pass(w: list[Tensor], group: Group, states: States, grad_scale: float) -> None:
    """The equations of ``Adam`` by a kernel, from the ``.grad`` of each ``w``, ``grad_scale`` times too large."""
    names = moment_names(group)
    moments, steps = moments_of(w, states, *names)
    numbers = [float(x) for x in (group["lr"], *group["betas"], group["eps"], group["weight_decay"])]
    choices = group["decoupled_weight_decay"], group["maximize"]
    lists = *moments, *[[]] * (3 - len(names)), steps, [x.grad for x in w]
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
    moments, steps = moments_of(w, states, *moment_names(group))
    if w[0].is_complex():
        # The real and the imaginary part are two weights, as in torch.optim.Adam.
        w, g, *moments = ([torch.view_as_real(x) for x in xs] for xs in (w, g, *moments))
    exp_avg, exp_avg_sq, *max_exp_avg_sq = moments
    dtype = g[0].dtype

    w_rows = read_rows(w, rows, dtype) if weight_decay != 0 else None
    if w_rows is not None and not group["decoupled_weight_decay"]:
        g = list(torch._foreach_add(g, w_rows, alpha=weight_decay))
    m = read_rows(exp_avg, rows, dtype)
    torch._foreach_lerp_(m, g, 1 - beta1)
    write_rows(exp_avg, rows, m)
    v = read_rows(exp_avg_sq, rows, dtype)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, value=1 - beta2)
    write_rows(exp_avg_sq, rows, v)
    for of in max_exp_avg_sq:
        torch._foreach_maximum_(v, read_rows(of, rows, dtype))
        write_rows(of, rows, v)

    # lr * m_hat / (sqrt(v_hat) + eps) = lr_hat * m / (sqrt(v) + eps_hat), the order Kingma & Ba advise at the end of
    # their section 2: what is corrected is (K,) numbers, not (K, ...).
    t = count_updates(steps, rows).to(dtype)
    correction1, correction2 = bias_correction(beta1, t), bias_correction(beta2, t).sqrt_()
    lr_hat, eps_hat = per_row(correction2 * lr / correction1, g), per_row(correction2 * eps, g)
    # sqrt as 1 / rsqrt: on a CPU sqrt takes four times as long for a zero, and where inputs are often zero, so is v.
    torch._foreach_rsqrt_(v)
    torch._foreach_reciprocal_(v)
    torch._foreach_add_(v, eps_hat)
    step = m
    torch._foreach_div_(step, v)
    torch._foreach_mul_(step, lr_hat)
    if w_rows is not None and group["decoupled_weight_decay"]:
        torch._foreach_mul_(w_rows, lr * weight_decay)
        torch._foreach_add_(step, w_rows)
    add_rows(w, rows, step, alpha=-1)


def moment_names(group: Group) -> tuple[str, ...]:
    """What of a parameter's state is of its shape."""
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")


def bias_correction(beta: float, t: Tensor) -> Tensor:
    """``1 - beta**t``, by ``expm1``: for a ``beta`` close to one the difference loses four digits in float32."""
    return torch.expm1(t * (math.log(beta) if beta else -math.inf)).neg_()
