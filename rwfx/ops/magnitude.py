"""``rwfx::draw_by_norm``: row sets drawn by the norms of a weight's rows, with exact probabilities.

In: weights, what the last call computed of them, the state of a random stream. Out: a sorted row set per weight.

With ``K`` rows asked for, row ``r`` is in the set with probability ``p[r] = min(1, c * norm[r] ** power)``, ``c`` such
that they add up to K. Systematic sampling has these probabilities exactly: laid end to end in random order, the ``p``
are a line of length K, and of the points ``u, u + 1, ..., u + K - 1`` each picks the row that it falls on.
"""

from itertools import accumulate

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

from rwfx.ops.walk import bits, filled, mix, read_last, uniform

torch.library.define(
    "rwfx::draw_by_norm",
    "(Tensor[] weights, Tensor chances, Tensor order, Tensor state, Tensor last, float power, int refresh, "
    "int[] exactly, Tensor? budget, int resample_every, bool unbiased) -> Tensor[]",
)


def draw_by_norm(
    weights: list[Tensor],
    chances: Tensor,
    order: Tensor,
    state: Tensor,
    last: Tensor,
    power: float,
    refresh: int,
    exactly: list[int],
    budget: Tensor | None,
    resample_every: int,
    unbiased: bool,
) -> list[Tensor]:
    """Draw so many rows of each weight.

    Args:
        weights: ``(O, ...)`` each. chances, order: of all rows, one weight after the other: their probabilities,
        float64, and the random order, int64,
            as this call last returned them.
        state: ``(2,)`` int64, the stream's seed and the number of steps so far.
        last: the row sets of the last draw, as this call gave them.
        power, refresh, resample_every, unbiased: as in ``rwfx.Magnitude`` and ``rwfx.transform``.
        exactly: how many rows of each weight, or empty.    budget: in its place, ``(1 + weights,)``, the first unused.

    Returns:
        A row set per weight, ``(K,)`` int64; if ``unbiased`` for each the inverse probabilities of its rows, ``(K,)``
        float32; the chances, the order, and ``last`` for next time.
    """
    sizes = [len(weight) for weight in weights]
    step = int(state[1])
    if step % resample_every:
        rows = read_last(last, sizes)
        return [*rows, *_scales(rows, chances.split(sizes), unbiased), chances.clone(), order.clone(), last.clone()]
    key = mix(state[0], state[1]).to(last.device)
    counts = exactly if budget is None else budget[1:].tolist()
    # Since the last draw, resample_every steps ago, a multiple of refresh has come by.
    if step % refresh < resample_every or budget is not None:
        norms = [torch.linalg.vector_norm(weight.detach().flatten(1), dim=1).double() for weight in weights]
        chances = torch.cat(
            [inclusion_probabilities((n / n.max()) ** power, k) for n, k in zip(norms, counts, strict=True)]
        )
        places = [torch.arange(n, device=last.device) for n in sizes]
        order = torch.cat([bits(key, k, place_O).argsort() for k, place_O in enumerate(places)])
    else:
        chances, order = chances.clone(), order.clone()
    u = uniform(key, last.new_full((), len(sizes)), torch.arange(len(sizes), device=last.device))
    parts = zip(chances.split(sizes), order.split(sizes), u.unbind(), counts, strict=True)
    rows = [systematic(*part) for part in parts]
    numbered = [part + first for part, first in zip(rows, accumulate(sizes, initial=0), strict=False)]
    bounds = filled(accumulate(counts, initial=0), last)
    next_ = torch.cat([bounds, *numbered, last.new_zeros(sum(sizes) - sum(counts))])
    return [*rows, *_scales(rows, chances.split(sizes), unbiased), chances, order, next_]


torch.library.impl("rwfx::draw_by_norm", "default", draw_by_norm)


@torch.library.register_fake("rwfx::draw_by_norm")
def _(weights, chances, order, state, last, power, refresh, exactly, budget, resample_every, unbiased):
    counts = exactly
    if budget is not None:
        shape_env = torch.library.get_ctx()._shape_env
        counts = [allocate_size(shape_env, 1, len(weight)) for weight in weights]
    rows = [last.new_empty((count,)) for count in counts]
    scales = [last.new_empty((count,), dtype=torch.float32) for count in counts] if unbiased else []
    return [*rows, *scales, torch.empty_like(chances), torch.empty_like(order), torch.empty_like(last)]


def inclusion_probabilities(size_O: Tensor, count: int) -> Tensor:
    """``min(1, c * size)`` with ``c`` such that they add up to ``count``; equal ones where no size is above zero.

    Nothing is read back from the device.
    """
    if count >= len(size_O):
        return torch.ones_like(size_O)
    size_O = torch.where(size_O.isfinite() & (size_O > 0), size_O, 0.0)
    # A row that no size draws still takes part where the others are too few.
    least = size_O.max() * 1e-9
    size_O = size_O.maximum(torch.where(least > 0, least, 1.0))
    sorted_O = size_O.sort(descending=True).values
    # With the m largest at 1, the others share count - m in proportion: the smallest m for which none is above 1.
    rest_O = sorted_O.flip(0).cumsum(0).flip(0)
    fixed_O = torch.arange(len(size_O), device=size_O.device)
    fits = sorted_O * (count - fixed_O) <= rest_O
    fixed = fits.to(torch.int8).argmax(keepdim=True)
    return (size_O * ((count - fixed) / rest_O.index_select(0, fixed))).clamp(max=1)


def systematic(p_O: Tensor, order_O: Tensor, u: Tensor, count: int) -> Tensor:
    """The rows of a systematic sample: see above."""
    ends_O = p_O[order_O].cumsum(0)
    # Rounding can carry the line's end a little past K, or short of it.
    points_K = (torch.arange(count, device=p_O.device) + u) * (ends_O[-1] / count)
    return order_O[torch.searchsorted(ends_O, points_K, right=True).clamp(max=len(p_O) - 1)].sort().values


def _scales(rows: list[Tensor], chances: tuple[Tensor, ...], unbiased: bool) -> list[Tensor]:
    return [(1 / p_O[rows_K]).float() for p_O, rows_K in zip(chances, rows, strict=True)] if unbiased else []
