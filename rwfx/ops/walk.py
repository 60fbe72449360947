"""``rwfx::walk``: the row sets of one step, drawn by random walks over a weight graph.

In: the weights, the graph's tables, the state of a random stream. Out: a sorted row set per weight.

The graph arrives as *stations* in execution order. A station owns a range of global ids; it is either the
use of a weight, one id per row, whose table says which id feeds each input feature (-1: none), or a
*junction*, one id per feature that several ids lead to, whose table lists these *members*. An id only ever
points to ids below it, so one sweep over the stations in reverse order completes every walk, whatever
their number: the loops here run over stations and weights, never over walks or rows.

This is the implementation for every device; ``rwfx/native/walk.cpp`` draws the same on a CPU, faster. No shape here
depends on where walks go, and with ``exactly`` nothing is read back from the device.

Axes: P walks, I input features, R all rows of all weights whose row sets are asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from math import inf

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size


@dataclass(frozen=True)
class Station:
    """What the sweep needs to know of a station beside its table."""

    weight: int  # which of the weights is crossed here; -1 at a junction
    base: int  # global id of its first row
    size: int  # number of its ids
    targets: tuple[int, ...]  # the stations that its table points to
    ends: bool  # whether its table also has -1, the end of a walk


torch.library.define(
    "rwfx::walk",
    "(Tensor[] weights, int[] kept, Tensor[] tables, int[] heads, Tensor[] starts, int[] layout, Tensor state, "
    "Tensor last, int num_paths, float temperature, float epsilon, int min_rows, int[] exactly, int resample_every) "
    "-> Tensor[]",
)


def walk(
    weights: list[Tensor],
    kept: list[int],
    tables: list[Tensor],
    heads: list[int],
    starts: list[Tensor],
    layout: list[int],
    state: Tensor,
    last: Tensor,
    num_paths: int,
    temperature: float,
    epsilon: float,
    min_rows: int,
    exactly: list[int],
    resample_every: int,
) -> list[Tensor]:
    """Draw ``num_paths`` walks; give the sorted distinct rows they visit, weight by weight.

    The draw is a pure function of the weights and of ``state``, so two ranks, or a resumed run, with equal
    state draw equal rows.

    Args:
        weights: ``(O, I)`` each, one per weight on the way of the walks.
        kept: the positions in ``weights`` of those whose row sets are asked for.
        tables: per station, int64: ``(I,)`` ids or, at a junction, ``(2, ids, members)``: the members' ids, and the
            bits of the float64 running sum of their weights of choice.
        heads, starts: per output weight, its station and the int64 ids that a walk starts at.
        layout: the stations, as ``pack_stations`` writes them.
        state: ``(2,)`` int64, the stream's seed and the number of steps so far; on the CPU, or where ``exactly`` is
            given on the weights' device.
        last: the row sets of the last draw, as this call gave them.
        exactly: empty, or for each kept weight how many rows its set has: of those visited the ones that the first
            walks came by, and where too few are visited others as well, uniformly without replacement.
        num_paths, temperature, epsilon, min_rows, resample_every: as in ``rwfx.transform``.

    Returns:
        A row set per kept weight, then what to pass as ``last`` next time: ``(len(kept) + 1 + R,)`` int64, where
        each weight's rows begin and the last one's end, and then the rows, numbered among all rows of the kept
        weights, filled up with zeros.
    """
    sizes = tuple(weights[k].shape[0] for k in kept)
    again = (state[1] % resample_every != 0) if resample_every > 1 else None
    if again is not None and not exactly and again:
        return [*read_last(last, sizes), last.clone()]

    key = mix(state[0], state[1])
    stations = unpack_stations(tuple(layout))
    first_R = first_walks(stations, weights, kept, tables, heads, starts, num_paths, temperature, epsilon, key)
    streams = range(2 * len(stations) + len(heads), 2 * len(stations) + len(heads) + len(kept))
    if not exactly:
        next_ = _visited(first_R, sizes, num_paths, min_rows, key, streams)
        return [*read_last(next_, sizes), next_]
    parts = first_R.split(sizes)
    rows = [_of_priority(*of, num_paths, key) for of in zip(parts, exactly, streams, strict=True)]
    numbered = [part + first for part, first in zip(rows, accumulate(sizes, initial=0), strict=False)]
    bounds = _constant(tuple(accumulate(exactly, initial=0)), last.device)
    next_ = torch.cat([bounds, *numbered, last.new_zeros(sum(sizes) - sum(exactly))])
    if again is not None:
        next_ = torch.where(again, last, next_)
    rows = next_[len(sizes) + 1 :].split([*exactly, sum(sizes) - sum(exactly)])
    return [*[part - first for part, first in zip(rows, accumulate(sizes, initial=0), strict=False)][:-1], next_]


def first_walks(
    stations: Sequence[Station],
    weights: Sequence[Tensor],
    kept: Sequence[int],
    tables: Sequence[Tensor],
    heads: Sequence[int],
    starts: Sequence[Tensor],
    num_paths: int,
    temperature: float,
    epsilon: float,
    key: Tensor,
) -> Tensor:
    """The first walk that comes by each row of the kept weights, ``(R,)`` int64; ``num_paths`` where none does."""
    sizes = [weights[k].shape[0] for k in kept]
    first_row = dict(zip(kept, accumulate(sizes, initial=0), strict=False))
    device = starts[0].device
    walks_P = torch.arange(num_paths, device=device)
    first_R = torch.full((sum(sizes) + 1,), num_paths, device=device)  # a place more, for walks that pass elsewhere
    for s, rows_P in sweep(stations, weights, tables, heads, starts, num_paths, temperature, epsilon, key):
        if (first := first_row.get(stations[s].weight)) is not None:
            places_P = torch.where(rows_P >= 0, rows_P + first, sum(sizes))
            first_R.scatter_reduce_(0, places_P, walks_P, "amin")
    return first_R[:-1]


def _of_priority(first_O: Tensor, count: int, stream: int, num_paths: int, key: Tensor) -> Tensor:
    """The ``count`` rows that walks came by first, then those of the lowest random bits; sorted."""
    rows_O = torch.arange(len(first_O), device=first_O.device)
    chance_O = _shifted(bits(key, stream, rows_O), 2) | (1 << 62)
    priority_O = torch.where(first_O < num_paths, first_O * len(first_O) + rows_O, chance_O)
    return priority_O.topk(count, largest=False, sorted=False).indices.sort().values


def _visited(
    first_R: Tensor, sizes: Sequence[int], num_paths: int, min_rows: int, key: Tensor, streams: range
) -> Tensor:
    """The rows seen, and others up to ``min_rows``, in the form of ``last``. Waits for the device."""
    seen_R = first_R < num_paths
    counts = [int(part.sum()) for part in seen_R.split(list(sizes))]
    for k, size in enumerate(sizes):
        if counts[k] < min(min_rows, size):
            counts[k] = min(min_rows, size)
            rows = _of_priority(first_R.split(list(sizes))[k], counts[k], streams[k], num_paths, key)
            seen_R.split(list(sizes))[k][rows] = True
    numbers = seen_R.nonzero().squeeze(1)
    bounds = torch.tensor(list(accumulate(counts, initial=0)), device=first_R.device)
    return torch.cat([bounds, numbers, numbers.new_zeros(len(seen_R) - len(numbers))])


def read_last(last: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The row sets that ``last`` holds, of weights with ``sizes`` rows each."""
    ends = last[: len(sizes) + 1].tolist()
    parts = last[len(sizes) + 1 :][: ends[-1]].split([b - a for a, b in pairwise(ends)])
    return [part - first for part, first in zip(parts, accumulate(sizes, initial=0), strict=False)]


@lru_cache(maxsize=64)
def _constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)


torch.library.impl("rwfx::walk", "default", walk)


@torch.library.register_fake("rwfx::walk")
def _(
    weights,
    kept,
    tables,
    heads,
    starts,
    layout,
    state,
    last,
    num_paths,
    temperature,
    epsilon,
    min_rows,
    exactly,
    resample_every,
):
    def row_set(size):
        # What new_dynamic_size() does, but for its refusal unless the user has set
        # torch._dynamo.config.capture_dynamic_output_shape_ops: a plain torch.compile(model) would be cut in two here.
        # A symbolic size happens only where an operator test makes every size symbolic.
        bounds = (min(min_rows, size), size) if isinstance(size, int) else ()
        return last.new_empty((allocate_size(torch.library.get_ctx()._shape_env, *bounds),))

    sets = [last.new_empty((k,)) for k in exactly] or [row_set(weights[k].shape[0]) for k in kept]
    return [*sets, torch.empty_like(last)]


def sweep(
    stations: Sequence[Station],
    weights: Sequence[Tensor],
    tables: Sequence[Tensor],
    heads: Sequence[int],
    starts: Sequence[Tensor],
    num_paths: int,
    temperature: float,
    epsilon: float,
    key: Tensor,
) -> Iterator[tuple[int, Tensor]]:
    """Walk all paths from the outputs to the inputs; yield ``(station, rows)`` at every weight use.

    ``rows`` is ``(P,)`` int64: the row at which each walk comes by, -1 where it does not. The walks are dealt out to
    the output weights in turn; each starts uniformly over its weight's ids.
    """
    device = starts[0].device
    walks_P = torch.arange(num_paths, device=device)
    u = uniform(key, torch.arange(2 * len(stations) + len(heads), device=device)[:, None], walks_P)
    # With fewer walks than output weights, the turn of the first walk moves on from step to step.
    head_P = (walks_P - (key % len(heads)).to(device)) % len(heads)
    ids_P = torch.full_like(walks_P, -1)
    for k, ids in enumerate(starts):
        ids_P = torch.where(head_P == k, ids[_uniform_choice(len(ids), u[2 * len(stations) + k])], ids_P)

    for s in reversed(range(len(stations))):
        station, table = stations[s], tables[s]
        here_P = (ids_P >= station.base) & (ids_P < station.base + station.size)
        rows_P = torch.where(here_P, ids_P - station.base, -1)
        places_P = rows_P.clamp(min=0)
        if station.weight >= 0:
            yield s, rows_P
            if not station.targets:
                continue
            weight = weights[station.weight]
            next_P = table[draw_features(weight, places_P, temperature, epsilon, u[2 * s], u[2 * s + 1])]
        else:
            next_P = _draw_member(table, places_P, u[2 * s])
        ids_P = torch.where(here_P, next_P, ids_P)


def draw_features(
    weight: Tensor, rows_P: Tensor, temperature: float, epsilon: float, u_P: Tensor, v_P: Tensor
) -> Tensor:
    """Draw one input feature ``j`` for each row ``i``, with ``p(j | i) ~ |weight[i, j]| ** (1 / temperature)``.

    With probability ``epsilon``, where ``v < epsilon``, it is drawn uniformly instead; so it is from a row that is
    all zero or not finite. ``u`` and ``v`` are uniform float64 numbers from 0 to below 1. Returns ``(P,)`` int64.
    """
    size_PI = weight.detach().index_select(0, rows_P).abs()
    if size_PI.dtype in (torch.float16, torch.bfloat16):
        size_PI = size_PI.float()
    elif not size_PI.is_floating_point():
        size_PI = size_PI.double()
    if temperature != 1.0:
        # Divided by the row's largest first: the power of a large weight would overflow.
        size_PI = (size_PI / size_PI.amax(1, keepdim=True)) ** (1 / temperature)
    sum_PI = size_PI.cumsum(1, dtype=torch.float64)
    total_P1 = sum_PI[:, -1:]
    # With right=True a feature of weight zero, whose sum is its neighbour's, is stepped over.
    features_P = torch.searchsorted(sum_PI, u_P[:, None] * total_P1, right=True).squeeze(1)
    features_P = features_P.clamp(max=weight.shape[1] - 1)  # rounding can carry u * total to the total
    total_P = total_P1.squeeze(1)
    by_weight_P = (total_P > torch.finfo(size_PI.dtype).tiny) & (total_P < inf)
    if epsilon > 0:
        by_weight_P &= v_P >= epsilon
    return torch.where(by_weight_P, features_P, _uniform_choice(weight.shape[1], u_P))


def _draw_member(table: Tensor, places_P: Tensor, u_P: Tensor) -> Tensor:
    members_PM, bits_PM = table[:, places_P]
    sum_PM = bits_PM.contiguous().view(torch.float64)
    choice_P1 = (u_P[:, None] * sum_PM[:, -1:] >= sum_PM[:, :-1]).sum(1, keepdim=True)
    return members_PM.gather(1, choice_P1).squeeze(1)


def _uniform_choice(n: int, u: Tensor) -> Tensor:
    return (u * n).long()  # below n: u is at most 1 - 2**-53


# SplitMix64 (Steele et al. 2014) as a function of its counter: numbers that depend on nothing but the key, the stream
# and the index, so that any device draws them in any order. int64 wraps around, as unsigned numbers do.
_GOLDEN, _FIRST, _SECOND = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(seed: Tensor, step: Tensor) -> Tensor:
    """The 63-bit key of one step of a seed's stream: the keys of neighbours are far apart."""
    return _shifted(_split_mix(seed + (step + 1) * _GOLDEN), 1)


def uniform(key: Tensor, stream: Tensor, index: Tensor) -> Tensor:
    """Numbers ``index`` of streams ``stream`` under ``key``: float64, uniform from 0 to below 1."""
    return _shifted(bits(key, stream, index), 11).double() * 2.0**-53


def bits(key: Tensor, stream: Tensor | int, index: Tensor) -> Tensor:
    """As ``uniform``, 64 random bits."""
    return _split_mix(key.to(index.device) + (stream * (1 << 32) + index + 1) * _GOLDEN)


def _split_mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, n: int) -> Tensor:
    """``z >> n`` of the unsigned number with the bits of ``z``."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def pack_stations(stations: tuple[Station, ...]) -> list[int]:
    """The stations as the flat list of integers that an operator's argument can be."""
    packed = []
    for s in stations:
        packed += [s.weight, s.base, s.size, int(s.ends), len(s.targets), *s.targets]
    return packed


@lru_cache(maxsize=64)
def unpack_stations(layout: tuple[int, ...]) -> tuple[Station, ...]:
    """The inverse of ``pack_stations``."""
    stations, at = [], 0
    while at < len(layout):
        weight, base, size, ends, num_targets = layout[at : at + 5]
        targets = layout[at + 5 : at + 5 + num_targets]
        stations.append(Station(weight, base, size, targets, bool(ends)))
        at += 5 + num_targets
    return tuple(stations)
