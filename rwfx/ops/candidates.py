"""Candidates: places where a sparse weight has no number and may get one, drawn by guided stochastic exploration.

In: how much each input and each output weighs, ``f`` and ``q``. Out: the places drawn. A draw is a column ``a`` with
probability ``f[a]`` and a row ``b`` with probability ``q[b]``, independently, so it takes time in proportion to inputs,
outputs and draws, and not to the product of the first two (Heddes et al. 2024).

Each number is found in the running sums by bisection: ``log`` of their length in place of the constant of Walker's
alias method, whose tables are made one entry after the other. What is drawn is a function of a key alone
(``rwfx.ops.walk.mix``).

Axes: I columns and O rows of the weight, G groups, M draws.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rwfx.ops.walk import uniform

COLUMN, ROW, SIGN = range(3)
"""The streams under a key."""

AT_ONCE = 1 << 17
"""Draws that a CPU makes at once."""


def draw_places(
    of_inputs: Tensor | None,
    of_rows: Tensor | None,
    rows: int,
    columns: int,
    count: int,
    key: Tensor,
    device: torch.device,
) -> Tensor:
    """``count`` draws with replacement, as keys in the order they are drawn.

    Args:
        of_inputs: ``(G, I)``, not negative: row ``b`` is in group ``b // (O / G)`` and its column is drawn by that
            group's weights. None: uniformly.
        of_rows: ``(O,)``, not negative: what a row weighs beside one group's inputs. None: uniformly.

    Where the weights are all zero, or not all finite, draws are uniform.
    """
    draw = partial(_uniform, rows, columns)
    if of_inputs is not None and of_rows is not None:
        draw = _weighted(of_inputs.double(), of_rows.double()) or draw
    number_M = torch.arange(count, device=device)
    # On a CPU by as many as the caches hold: each number passes through some twenty operations.
    parts = number_M.split(AT_ONCE) if device.type == "cpu" else (number_M,)
    return torch.cat([
        draw(*(uniform(key, part.new_tensor(stream), part) for stream in (COLUMN, ROW)))
        for part in parts
    ])  # fmt: skip


def _uniform(rows: int, columns: int, u_M: Tensor, v_M: Tensor) -> Tensor:
    return (u_M * columns).long() * rows + (v_M * rows).long()


def _weighted(of_inputs: Tensor, of_rows: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """A draw by these weights, None where they cannot be drawn by."""
    rows, columns = len(of_rows), of_inputs.shape[1]
    sum_GI = of_inputs.cumsum(1)
    per_group = rows // len(sum_GI)
    # A place (a, b) is to be drawn with a probability proportional to of_inputs[group of b, a] * of_rows[b].
    sum_O = (of_rows * sum_GI[:, -1].repeat_interleave(per_group)).cumsum(0)
    if not 0 < float(sum_O[-1]) < torch.inf:
        return None
    # One running sum over all groups, each of which goes from its number to the next.
    shares_GI = sum_GI / sum_GI[:, -1:].where(sum_GI[:, -1:] > 0, 1)
    all_ = (shares_GI + torch.arange(len(sum_GI), device=sum_GI.device)[:, None]).flatten()

    def draw(u_M: Tensor, v_M: Tensor) -> Tensor:
        row_M = _found(sum_O, v_M * sum_O[-1])
        if len(sum_GI) == 1:
            return _found(sum_GI[0], u_M * sum_GI[0, -1]) * rows + row_M
        group_M = row_M // per_group
        column_M = (_found(all_, u_M + group_M) - group_M * columns).clamp_(0, columns - 1)
        return column_M * rows + row_M

    return draw


def random_signs(key: Tensor, count: int, device: torch.device) -> Tensor:
    """``count`` numbers, -1 or 1."""
    number = torch.arange(count, device=device)
    return (uniform(key, number.new_tensor(SIGN), number) < 0.5).float() * 2 - 1


def _found(sums: Tensor, at: Tensor) -> Tensor:
    """The first entry whose running sum is above ``at``: never one that weighs nothing."""
    return torch.searchsorted(sums, at, right=True).clamp_(max=len(sums) - 1)
