"""AdamW on rows."""

from collections.abc import Callable

import torch

from rwfx.optim.adam import one_pass, update_rows
from rwfx.optim.rows import step_dense_and_rows


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` that touches only the rows of a row gradient. Arguments, defaults and hooks are the same.

    With a dense gradient it is ``torch.optim.AdamW``. With a row gradient, where ``g = dw[rows]``:

        t[rows] = t[rows] + 1
        w[rows] = (1 - lr * weight_decay) * w[rows]
        m[rows] = beta1 * m[rows] + (1 - beta1) * g
        v[rows] = beta2 * v[rows] + (1 - beta2) * g**2
        m_hat   = m[rows] / (1 - beta1**t[rows])
        v_hat   = v[rows] / (1 - beta2**t[rows])
        w[rows] = w[rows] - lr * m_hat / (sqrt(v_hat) + eps)

    Other rows of ``w``, ``m``, ``v`` and ``t`` stay as they are: a row decays only when it is drawn. State,
    ``amsgrad`` and the difference from ``torch.optim.SparseAdam`` are as in ``rwfx.optim.Adam``.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2, with the decay times
    ``lr`` as in ``torch.optim.AdamW``.

    Raises:
        ValueError: at ``step``, before anything is changed: a sparse gradient that is not a row gradient, or a row
            gradient with ``differentiable=True``.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; ``closure`` reevaluates the model and returns the loss."""
        return step_dense_and_rows(self, torch.optim.AdamW.step, update_rows, one_pass, closure)
