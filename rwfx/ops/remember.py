"""``rwfx::remember``: what walks remember of the rows' gradients, and the preference that follows from it.

In: the magnitudes that the last backward pass saw, and the memory. Out: the memory after it, and a preference for every
row. The rows of the observed uses of weights lie one after the other, N of them; U is the number of uses.

This is the implementation for every device; ``rwfx/native/remember.cpp`` is that for a CPU.
"""

import torch
from torch import Tensor

torch.library.define(
    "rwfx::remember",
    "(Tensor[] seen, Tensor taken, Tensor value, Tensor sizes, Tensor use, Tensor row, Tensor last, int num_rows, "
    "bool learned, float rate, float forget, float optimism, float floor, float power) -> (Tensor, Tensor, Tensor)",
)


def remember(
    seen: list[Tensor],
    taken: Tensor,
    value: Tensor,
    sizes: Tensor,
    use: Tensor,
    row: Tensor,
    last: Tensor,
    num_rows: int,
    learned: bool,
    rate: float,
    forget: float,
    optimism: float,
    floor: float,
    power: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the memory.

    With ``m`` the magnitudes in ``seen``, a use is *new* where they differ from those that were taken in last: a
    backward pass has been there since. With ``learned`` and ``R`` the rows that were drawn,

        v[r] = v[r] + rate * (m[r] / mean(m[R]) - v[r])      r in R, of a new use
        v[r] = v[r] + forget * (optimism - v[r])             its other rows
        p[r] = max(v[r], floor) ** power

    and else

        v[r] = v[r] + rate * (m[r] - v[r])                   of a new use
        p[r] = (v[r] / mean(v) + floor) ** power             the mean over its use

    A magnitude that is not finite counts as zero, and the base of a power is bounded so that a sum of them is finite.

    Args:
        seen: ``(O,)`` float32 for each use.    taken, value: ``(N,)`` float32.    sizes: ``(U,)`` int64, the rows of
        each. use: ``(N,)`` int64, which use a row is of.    row: ``(N,)`` int64, its number among the ``num_rows`` of
        ``last``. last: the row sets of the last draw, as ``rwfx::walk`` gives them.

    Returns:
        ``taken``, ``value`` and the preference ``p``, ``(N,)`` float32 each.
    """
    seen_N = torch.cat(list(seen)).nan_to_num(0.0, 0.0, 0.0)
    new_N = (_sums((seen_N != taken).float(), sizes) > 0).float().index_select(0, use)
    if learned:
        drawn_N = _was_drawn(last, num_rows).index_select(0, row)
        mean_U = _sums(seen_N * drawn_N, sizes) / _sums(drawn_N, sizes).clamp(min=1)
        usefulness_N = seen_N / mean_U.clamp(min=TINY).index_select(0, use)
        towards_N = (usefulness_N - optimism) * drawn_N + optimism
        value = value.lerp(towards_N, (drawn_N * (rate - forget) + forget) * new_N)
        base_N = value.clamp(min=floor)
    else:
        value = value.lerp(seen_N, rate * new_N)
        mean_U = (_sums(value, sizes) / sizes).clamp(min=TINY)
        base_N = value / mean_U.index_select(0, use) + floor
    return seen_N, value, base_N.clamp(max=HUGE ** (1 / max(power, 1))) ** power


TINY, HUGE = 1e-30, 1e30

torch.library.impl("rwfx::remember", "default", remember)
# Nothing that it returns has a gradient.
torch.library.impl("rwfx::remember", "Autograd", torch.library.fallthrough_kernel)


@torch.library.register_fake("rwfx::remember")
def _(seen, taken, value, *_):
    return torch.empty_like(taken), torch.empty_like(value), torch.empty_like(value)


def _sums(x_N: Tensor, sizes: Tensor) -> Tensor:
    return torch.segment_reduce(x_N, "sum", lengths=sizes, unsafe=True)


def _was_drawn(last: Tensor, num_rows: int) -> Tensor:
    """1 for the rows in ``last`` and 0 for others."""
    numbers = last[len(last) - num_rows :]
    is_row = torch.arange(num_rows, device=last.device) < last[len(last) - num_rows - 1]
    return last.new_zeros(num_rows + 1, dtype=torch.float32).index_fill_(0, torch.where(is_row, numbers, num_rows), 1.0)
