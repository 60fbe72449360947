"""Candidates: places where a sparse weight has no number and may get one, drawn by guided stochastic exploration.

In: how much each input and each output weighs, ``f`` and ``q``. Out: the places drawn. A draw is a column ``a`` with
probability ``f[a]`` and a row ``b`` with probability ``q[b]``, independently, so it takes time in proportion to inputs,
outputs and draws, and not to the product of the first two (Heddes et al. 2024).

Each number is found in running sums: on a CPU in constant time on average (``rwfx/native/candidates.cpp`` keeps where a
search begins, in place of Walker's alias method, whose tables are made one entry after the other), and by bisection
elsewhere.
What is drawn is a function of a key alone (``rwfx.ops.walk.mix``).

Axes: I columns and O rows of the weight, G groups, M draws.
"""

import torch
from torch import Tensor

from rwfx.ops.walk import uniform

COLUMN, ROW, SIGN = range(3)
"""The streams under a key."""

AT_ONCE = 1 << 17
"""Draws that a CPU makes at once without kernels."""

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define(
    "draw_places(Tensor key, Tensor? sums_of_inputs, Tensor? sums_of_rows, SymInt rows, SymInt columns, SymInt count) "
    "-> Tensor"
)


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
            group's weights.
        of_rows: ``(O,)``, not negative: what a row weighs beside one group's inputs.

    Draws are uniform where both are None, and where weights are all zero or not all finite.
    """
    sums = None, None
    if of_inputs is not None and of_rows is not None:
        sums = _sums(of_inputs.double(), of_rows.double()) or sums
    return torch.ops.rwfx.draw_places.default(key.to(device), *sums, rows, columns, count)


def _sums(of_inputs: Tensor, of_rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """The running shares of a group's inputs, from the group's number to the next, and of the rows, from 0 to 1.

    None where weights cannot be drawn by.
    """
    sum_GI = of_inputs.cumsum(1)
    total_G = sum_GI[:, -1]
    # A place (a, b) is to be drawn with a probability proportional to of_inputs[group of b, a] * of_rows[b].
    sum_O = (of_rows * total_G.repeat_interleave(len(of_rows) // len(total_G))).cumsum(0)
    if not 0 < float(sum_O[-1]) < torch.inf:
        return None
    shares_GI = sum_GI / total_G.where(total_G > 0, 1)[:, None]
    return shares_GI + torch.arange(len(total_G), device=total_G.device)[:, None], sum_O / sum_O[-1]


def _draw_places(
    key: Tensor, sums_GI: Tensor | None, sum_O: Tensor | None, rows: int, columns: int, count: int
) -> Tensor:
    number_M = torch.arange(count, device=key.device)
    # On a CPU by as many as the caches hold: each number passes through some twenty operations.
    parts = number_M.split(AT_ONCE) if key.device.type == "cpu" else (number_M,)
    drawn = []
    for part in parts:
        u_M, v_M = (uniform(key, part.new_tensor(stream), part) for stream in (COLUMN, ROW))
        if sums_GI is None or sum_O is None:
            drawn.append((u_M * columns).long() * rows + (v_M * rows).long())
            continue
        row_M = _found(sum_O, v_M)
        group_M = row_M // (rows // len(sums_GI))
        column_M = _found(sums_GI.flatten(), u_M + group_M) - group_M * columns
        drawn.append(column_M.clamp_(0, columns - 1) * rows + row_M)
    return torch.cat(drawn)


def random_signs(key: Tensor, count: int, device: torch.device) -> Tensor:
    """``count`` numbers, -1 or 1."""
    number = torch.arange(count, device=device)
    return (uniform(key, number.new_tensor(SIGN), number) < 0.5).float() * 2 - 1


def _found(sums: Tensor, at: Tensor) -> Tensor:
    """The first entry whose running sum is above ``at``: never one that weighs nothing."""
    return torch.searchsorted(sums, at, right=True).clamp_(max=len(sums) - 1)


_library.impl("draw_places", _draw_places, "CompositeExplicitAutograd")


@torch.library.register_fake("rwfx::draw_places", lib=_library)
def _(key: Tensor, sums_GI: Tensor | None, sum_O: Tensor | None, rows: int, columns: int, count: int) -> Tensor:
    return key.new_empty(count)
