"""AdamW on rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from rwfx.optim.adam import one_pass, update_rows
from rwfx.optim.rows import Unvisited, offer_unvisited, step_dense_and_rows, with_unvisited


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` that touches only the rows of a row gradient.

    Arguments, defaults and hooks are the same, and ``unvisited`` is one more.

    With a dense gradient it is ``torch.optim.AdamW``. With a row gradient, where ``g = dw[rows]``:

        t[rows] = t[rows] + 1
        w[rows] = (1 - lr * weight_decay) * w[rows]
        m[rows] = beta1 * m[rows] + (1 - beta1) * g
        v[rows] = beta2 * v[rows] + (1 - beta2) * g**2
        m_hat   = m[rows] / (1 - beta1**t[rows])
        v_hat   = v[rows] / (1 - beta2**t[rows])
        w[rows] = w[rows] - lr * m_hat / (sqrt(v_hat) + eps)

    Other rows of ``w``, ``m``, ``v`` and ``t`` stay as they are (``unvisited="frozen"``): a row decays only when
    it is drawn.

    With ``unvisited="moving"`` the other rows have a gradient of zero, and it is
    ``torch.optim.AdamW`` on the gradient filled with zeros, at the cost of a dense update. With ``"owed"`` they are not
    touched either, and a row pays what it would have lost since its last update, at step ``t[rows]``, or 0:

        T       = T + 1
        age     = T - t[rows]
        t[rows] = T
        w[rows] = (1 - lr * weight_decay)**age * w[rows]
        m[rows] = beta1**age * m[rows] + (1 - beta1) * g
        v[rows] = beta2**age * v[rows] + (1 - beta2) * g**2

    in the places of their namesakes, with the ``lr`` of this step, and the rest as above. ``unvisited``, state,
    ``amsgrad`` and the difference from ``torch.optim.SparseAdam`` are as in ``rwfx.optim.Adam``.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2, with the decay times
    ``lr`` as in ``torch.optim.AdamW``.

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
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        unvisited: Unvisited = "frozen",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        offer_unvisited(self, unvisited)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(with_unvisited(self, state))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; ``closure`` reevaluates the model and returns the loss."""
        return step_dense_and_rows(self, torch.optim.AdamW.step, update_rows, one_pass, closure)
