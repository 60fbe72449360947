"""``rwfx::walk``: the row sets of one step, drawn by random walks over a weight graph.

In: the weights, the graph's tables, the state of a random stream. Out: a sorted row set per weight.

The graph arrives as *stations* in execution order. A station owns a range of global ids; it is either the
use of a weight, one id per row, whose table says which id feeds each input feature (-1: none), or a
*junction*, one id per feature that several ids lead to, whose table lists these *members*. An id only ever
points to ids below it, so one sweep over the stations in reverse order completes every walk, whatever
their number: the loops here run over stations and weights, never over walks or rows.

This is the implementation for every device; ``rwfx/native/walk.cpp`` draws the same on a CPU, faster. No shape here
depends on where walks go, and with ``exactly`` or ``budget`` nothing is read back from the device.

Axes: P walks, I input features, S starts of a head, O rows of a weight, R all rows of all weights whose row sets are
asked for.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
    groups: int = 1  # of a convolution: row i reads the features of group i // (size / groups) alone
    transposed: bool = False  # whether the weight is (features, rows / groups, *kernel)


torch.library.define(
    "rwfx::walk",
    "(Tensor[] weights, int[] kept, Tensor[] tables, int[] heads, Tensor[] starts, int[] layout, Tensor state, "
    "Tensor last, int num_paths, float temperature, float epsilon, int min_rows, int[] exactly, int resample_every, "
    "Tensor[]? factors=None, Tensor[]? start_weights=None, Tensor? budget=None, bool unbiased=False) -> Tensor[]",
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
    factors: Sequence[Tensor] | None = None,
    start_weights: Sequence[Tensor] | None = None,
    budget: Tensor | None = None,
    unbiased: bool = False,
) -> list[Tensor]:
    """Draw ``num_paths`` walks; give the sorted distinct rows they visit, weight by weight.

    The draw is a pure function of the weights, of what they are multiplied by and of ``state``, so two ranks, or a
    resumed run, with equal state draw equal rows. At row ``i`` of a weight's use ``s`` feature ``j`` is drawn with

        p(j | i) ~ |W[i, j]| ** (1 / temperature) * factors[s][j]    (with probability epsilon uniformly instead)

    and uniformly where these numbers are all zero or not all finite. Of a convolution ``|W[i, j]|`` is summed over the
    kernel, and ``j`` is drawn among the features of the row's group.

    Args:
        weights: ``(O, I)`` each, or ``(O, I / groups, *kernel)``, or as its station says transposed; one per weight on
            the way of the walks.
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
        factors: None, or per station ``(I,)`` floating, not negative; ignored at a junction and where a walk ends
            with its row.
        start_weights: None, or per head, as long as its ``starts``, floating, not negative: a start is drawn with a
            probability proportional to it; uniformly where they are all zero or not all finite.
        budget: None, or ``(1 + len(kept),)`` int64 on the CPU: what takes the place of ``num_paths``, then of
            ``exactly``. It can change from step to step in a compiled model. With no walks rows are drawn uniformly.
        unbiased: also return, per row kept, the inverse of its probability of being in the set *given where the walks
            stood at the use above it*. With ``n`` walks dealt to a head, ``q`` its starts' probabilities, and with
            ``n`` walks at the rows ``i_1 .. i_n`` of the use above any other:

                P(r) = 1 - (1 - q[r]) ** n        P(r) = 1 - prod_k (1 - sum_{j leads to r} p(j | i_k))

            and to both, with ``min_rows = 1``, the probability of the row that is drawn where no walk arrives. A
            gradient whose kept rows are multiplied by it, use after use, is unbiased where a row has no other way to
            the loss than by weights that walks can cross: a weight or a factor of zero bars a way.

    Returns:
        A row set per kept weight; with ``unbiased`` its ``scale`` per kept weight, ``(K,)`` float32; then what to pass
        as ``last`` next time: ``(len(kept) + 1 + R,)`` int64, where each weight's rows begin and the last one's end,
        and then the rows, numbered among all rows of the kept weights, filled up with zeros.

    Raises:
        ValueError: ``factors``, ``start_weights`` or ``budget`` do not fit the graph; or ``unbiased`` where the
            stations are no tree of weight uses (``is_tree``), where a set's size or age is not left to this step's
            walks, or where a head can be left without a row.
    """
    stations = unpack_stations(tuple(layout))
    sizes = _rows_of(stations, kept)
    factors, start_weights = factors or (), start_weights or ()
    _check_shapes(stations, weights, starts, factors, start_weights)
    if budget is not None:
        num_paths, *exactly = _read_budget(budget, sizes)
    if unbiased:
        _check_unbiased(stations, heads, num_paths, min_rows, exactly, resample_every)
    again = (state[1] % resample_every != 0) if resample_every > 1 else None
    if again is not None and (budget is not None or not exactly) and again:
        return [*read_last(last, sizes), last.clone()]

    key = mix(state[0], state[1])
    graph = stations, weights, tables, heads, starts
    rule = num_paths, temperature, epsilon, key, factors, start_weights
    visits = list(sweep(*graph, *rule))
    first_R = first_walks(visits, stations, kept, num_paths)
    streams = range(2 * len(stations) + len(heads), 2 * len(stations) + len(heads) + len(kept))
    if not exactly:
        rows, next_ = _visited(first_R, sizes, num_paths, min_rows, key, streams)
        if not unbiased:
            return [*rows, next_]
        chances = row_chances(visits, *graph, *rule, kept, min_rows)
        scales = [(1 / chance_O[of]).float() for chance_O, of in zip(chances, rows, strict=True)]
        return [*rows, *scales, next_]
    parts = first_R.split(sizes)
    rows = [_of_priority(*of, num_paths, key) for of in zip(parts, exactly, streams, strict=True)]
    numbered = [part + first for part, first in zip(rows, accumulate(sizes, initial=0), strict=False)]
    bounds = filled(accumulate(exactly, initial=0), last)
    next_ = torch.cat([bounds, *numbered, last.new_zeros(sum(sizes) - sum(exactly))])
    if again is not None:
        next_ = torch.where(again, last, next_)
    rows = next_[len(sizes) + 1 :].split([*exactly, sum(sizes) - sum(exactly)])
    return [*[part - first for part, first in zip(rows, accumulate(sizes, initial=0), strict=False)][:-1], next_]


def _rows_of(stations: Sequence[Station], kept: Sequence[int]) -> tuple[int, ...]:
    """How many rows each kept weight has."""
    sizes = {station.weight: station.size for station in stations}
    return tuple(sizes[k] for k in kept)


def _features_of(weight: Tensor, station: Station) -> int:
    return weight.shape[0] if station.transposed else weight.shape[1] * station.groups


def _check_shapes(
    stations: Sequence[Station],
    weights: Sequence[Tensor],
    starts: Sequence[Tensor],
    factors: Sequence[Tensor],
    start_weights: Sequence[Tensor],
) -> None:
    if factors and len(factors) != len(stations):
        raise ValueError(f"there are {len(factors)} factors for {len(stations)} stations: give one for each, or none.")
    for s, (factor, station) in enumerate(zip(factors, stations, strict=False)):
        if station.weight >= 0 and station.targets:
            features = _features_of(weights[station.weight], station)
            if factor.shape != (features,):
                raise ValueError(
                    f"factors[{s}] has the shape {tuple(factor.shape)}, the weight there has {features} features: "
                    "give one number for each."
                )
    if start_weights and len(start_weights) != len(starts):
        raise ValueError(
            f"there are {len(start_weights)} start_weights for {len(starts)} heads: give one for each, or none."
        )
    for k, (given, ids) in enumerate(zip(start_weights, starts, strict=False)):
        if given.shape != ids.shape:
            raise ValueError(
                f"start_weights[{k}] has the shape {tuple(given.shape)}, its head has {len(ids)} starts: give one "
                "number for each."
            )


def _read_budget(budget: Tensor, sizes: Sequence[int]) -> list[int]:
    if budget.dtype != torch.int64 or budget.shape != (1 + len(sizes),) or budget.device.type != "cpu":
        raise ValueError(
            f"the budget is {budget.dtype} {tuple(budget.shape)} on {budget.device}: it must be int64 "
            f"({1 + len(sizes)},) on the CPU, the number of walks and a number of rows for each kept weight."
        )
    num_paths, *counts = numbers = budget.tolist()
    if num_paths < 0 or not all(1 <= count <= size for count, size in zip(counts, sizes, strict=True)):
        raise ValueError(
            f"the budget is {numbers}: it needs 0 walks or more, then 1 or more rows of each kept weight's {[*sizes]}."
        )
    return numbers


def _check_unbiased(
    stations: Sequence[Station],
    heads: Sequence[int],
    num_paths: int,
    min_rows: int,
    exactly: Sequence[int],
    resample_every: int,
) -> None:
    if not is_tree(stations, heads):
        raise ValueError(
            "unbiased needs walks over a tree of weight uses; here rows are added at a junction, several uses lead to "
            "one, a head is led to, or a weight is used twice."
        )
    if exactly:
        raise ValueError(f"unbiased leaves the sizes of row sets to the walks; given are {[*exactly]} rows.")
    if resample_every > 1:
        raise ValueError(f"unbiased needs rows that are drawn at every step; resample_every is {resample_every}.")
    if min_rows > 1:
        raise ValueError(f"unbiased needs min_rows of 0 or 1, not {min_rows}.")
    if min_rows < 1 and num_paths < len(heads):
        raise ValueError(
            f"unbiased needs a row of every head: {num_paths} walks leave some of the {len(heads)} heads without one. "
            "Draw more walks, or set min_rows=1."
        )


def is_tree(stations: Sequence[Station], heads: Sequence[int]) -> bool:
    """Whether the stations are a tree of weight uses.

    It has no junction, each use is led to by at most one use, or is a head and led to by none, and no weight is used
    twice.
    """
    led_to = Counter([*heads, *(target for station in stations for target in station.targets)])
    used = Counter(station.weight for station in stations)
    return -1 not in used and max([*led_to.values(), *used.values()], default=0) <= 1


def first_walks(
    visits: Sequence[tuple[int, Tensor]],
    stations: Sequence[Station],
    kept: Sequence[int],
    num_paths: int,
) -> Tensor:
    """The first walk that comes by each row of the kept weights, ``(R,)`` int64; ``num_paths`` where none does.

    ``visits`` are those of ``sweep``.
    """
    sizes = _rows_of(stations, kept)
    first_row = dict(zip(kept, accumulate(sizes, initial=0), strict=False))
    device = visits[0][1].device
    walks_P = torch.arange(num_paths, device=device)
    first_R = torch.full((sum(sizes) + 1,), num_paths, device=device)  # a place more, for walks that pass elsewhere
    for s, rows_P in visits:
        if (first := first_row.get(stations[s].weight)) is not None:
            places_P = torch.where(rows_P >= 0, rows_P + first, sum(sizes))
            first_R.scatter_reduce_(0, places_P, walks_P, "amin")
    return first_R[:-1]


def row_chances(
    visits: Sequence[tuple[int, Tensor]],
    stations: Sequence[Station],
    weights: Sequence[Tensor],
    tables: Sequence[Tensor],
    heads: Sequence[int],
    starts: Sequence[Tensor],
    num_paths: int,
    temperature: float,
    epsilon: float,
    key: Tensor,
    factors: Sequence[Tensor],
    start_weights: Sequence[Tensor],
    kept: Sequence[int],
    min_rows: int,
) -> list[Tensor]:
    """Each kept weight's rows' probabilities of being in its set, given where the walks stood above: ``(O,)`` float64.

    The stations are a tree; ``visits`` are those of ``sweep``.
    """
    device = starts[0].device
    # Per station (P, O): the probability of each walk to come to each row.
    arrivals = [torch.zeros(num_paths, s.size, dtype=torch.float64, device=device) for s in stations]
    head_P = _deal(num_paths, len(heads), key, device)
    for k, (head, ids) in enumerate(zip(heads, starts, strict=True)):
        chance_S = _start_chances(ids, start_weights[k] if start_weights else None)
        step_PS = (head_P == k)[:, None] * chance_S
        arrivals[head].index_add_(1, ids - stations[head].base, step_PS)
    for s, rows_P in visits:
        weight, table, factor = weights[stations[s].weight], tables[s], factors[s] if factors else None
        if stations[s].targets:
            places_P = rows_P.clamp(min=0)
            step_PI = _step_chances(weight, places_P, temperature, epsilon, factor, stations[s])
            step_PI *= (rows_P >= 0)[:, None]
            first_P = _first_features(places_P, step_PI.shape[1], stations[s])
            features_PI = first_P[:, None] + torch.arange(step_PI.shape[1], device=device)
        for target in stations[s].targets:
            base, size = stations[target].base, stations[target].size
            places_I = torch.where((table >= base) & (table < base + size), table - base, size)
            places_PI = places_I[features_PI]
            arrivals[target] = step_PI.new_zeros(num_paths, size + 1).scatter_add_(1, places_PI, step_PI)[:, :-1]

    station_of = {station.weight: s for s, station in enumerate(stations)}
    chances = []
    for k in kept:
        size = stations[station_of[k]].size
        step_PO = arrivals[station_of[k]]
        # 1 - prod (1 - p), without its cancellation; rounding can carry a sum of probabilities above 1.
        visited_O = -torch.expm1(torch.log1p(-step_PO.clamp(max=1)).sum(0))
        nobody = (1 - step_PO.sum(1)).clamp(min=0).prod()
        chances.append(visited_O + nobody * min_rows / size)
    return chances


def _of_priority(first_O: Tensor, count: int, stream: int, num_paths: int, key: Tensor) -> Tensor:
    """The ``count`` rows that walks came by first, then those of the lowest random bits; sorted."""
    rows_O = torch.arange(len(first_O), device=first_O.device)
    chance_O = _shifted(bits(key, stream, rows_O), 2) | (1 << 62)
    priority_O = torch.where(first_O < num_paths, first_O * len(first_O) + rows_O, chance_O)
    return priority_O.topk(count, largest=False, sorted=False).indices.sort().values


def _visited(
    first_R: Tensor, sizes: Sequence[int], num_paths: int, min_rows: int, key: Tensor, streams: range
) -> tuple[list[Tensor], Tensor]:
    """The rows seen, and others up to ``min_rows``; and the same in the form of ``last``. Reads once from the
    device."""
    seen_R = first_R < num_paths
    parts = seen_R.split(list(sizes))
    counts = torch.stack([part.sum() for part in parts]).tolist()
    for k, size in enumerate(sizes):
        if counts[k] < min(min_rows, size):
            counts[k] = min(min_rows, size)
            parts[k][_of_priority(first_R.split(list(sizes))[k], counts[k], streams[k], num_paths, key)] = True
    # Not nonzero, which would ask the device once more how many there are.
    numbers = seen_R.logical_not().sort(stable=True).indices[: sum(counts)]
    bounds = filled(accumulate(counts, initial=0), numbers)
    last = torch.cat([bounds, numbers, numbers.new_zeros(len(seen_R) - len(numbers))])
    firsts = accumulate(sizes, initial=0)
    return [part - first for part, first in zip(numbers.split(counts), firsts, strict=False)], last


def filled(numbers: Iterable[int], like: Tensor) -> Tensor:
    """The numbers as ``like`` has them, where it is.

    Filled in, not copied from the CPU, which would be waited for and which no CUDA graph can hold.
    """
    return torch.cat([like.new_full((1,), number) for number in numbers])


def read_last(last: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The row sets that ``last`` holds, of weights with ``sizes`` rows each."""
    ends = last[: len(sizes) + 1].tolist()
    parts = last[len(sizes) + 1 :][: ends[-1]].split([b - a for a, b in pairwise(ends)])
    return [part - first for part, first in zip(parts, accumulate(sizes, initial=0), strict=False)]


torch.library.impl("rwfx::walk", "default", walk)
# Nothing that it returns has a gradient.
torch.library.impl("rwfx::walk", "Autograd", torch.library.fallthrough_kernel)


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
    factors=None,
    start_weights=None,
    budget=None,
    unbiased=False,
):
    at_least = min_rows if budget is None else 1

    def row_set(size):
        # What new_dynamic_size() does, but for its refusal unless the user has set
        # torch._dynamo.config.capture_dynamic_output_shape_ops: a plain torch.compile(model) would be cut in two here.
        return last.new_empty((allocate_size(torch.library.get_ctx()._shape_env, min(at_least, size), size),))

    fixed = exactly if budget is None else []
    sets = [last.new_empty((k,)) for k in fixed] or [
        row_set(size) for size in _rows_of(unpack_stations(tuple(layout)), kept)
    ]
    scales = [rows.new_empty(rows.shape, dtype=torch.float32) for rows in sets] if unbiased else []
    return [*sets, *scales, torch.empty_like(last)]


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
    factors: Sequence[Tensor] = (),
    start_weights: Sequence[Tensor] = (),
) -> Iterator[tuple[int, Tensor]]:
    """Walk all paths from the outputs to the inputs; yield ``(station, rows)`` at every weight use.

    ``rows`` is ``(P,)`` int64: the row at which each walk comes by, -1 where it does not. The walks are dealt out to
    the output weights in turn; each starts at one of its weight's ids, drawn uniformly or by ``start_weights``.
    """
    device = starts[0].device
    walks_P = torch.arange(num_paths, device=device)
    u = uniform(key, torch.arange(2 * len(stations) + len(heads), device=device)[:, None], walks_P)
    head_P = _deal(num_paths, len(heads), key, device)
    ids_P = torch.full_like(walks_P, -1)
    for k, ids in enumerate(starts):
        start_P = _draw_start(ids, start_weights[k] if start_weights else None, u[2 * len(stations) + k])
        ids_P = torch.where(head_P == k, start_P, ids_P)

    for s in reversed(range(len(stations))):
        station, table = stations[s], tables[s]
        here_P = (ids_P >= station.base) & (ids_P < station.base + station.size)
        rows_P = torch.where(here_P, ids_P - station.base, -1)
        places_P = rows_P.clamp(min=0)
        if station.weight >= 0:
            yield s, rows_P
            if not station.targets:
                continue
            weight, factor = weights[station.weight], factors[s] if factors else None
            numbers = u[2 * s], u[2 * s + 1]
            next_P = table[draw_features(weight, places_P, temperature, epsilon, *numbers, factor, station)]
        else:
            next_P = _draw_member(table, places_P, u[2 * s])
        ids_P = torch.where(here_P, next_P, ids_P)


def _deal(num_paths: int, num_heads: int, key: Tensor, device: torch.device) -> Tensor:
    """The head at which each walk starts, ``(P,)`` int64."""
    # With fewer walks than output weights, the turn of the first walk moves on from step to step.
    return (torch.arange(num_paths, device=device) - (key % num_heads).to(device)) % num_heads


def _draw_start(ids: Tensor, weight_S: Tensor | None, u_P: Tensor) -> Tensor:
    uniform_P = _uniform_choice(len(ids), u_P)
    if weight_S is None:
        return ids[uniform_P]
    sum_S = weight_S.detach().double().cumsum(0)
    choice_P = torch.searchsorted(sum_S, u_P * sum_S[-1], right=True).clamp(max=len(ids) - 1)
    return ids[torch.where(_drawable(sum_S[-1], sum_S.dtype), choice_P, uniform_P)]


def _start_chances(ids: Tensor, weight_S: Tensor | None) -> Tensor:
    """The probability of each start under ``_draw_start``, ``(S,)`` float64."""
    uniform_S = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64, device=ids.device)
    if weight_S is None:
        return uniform_S
    total = weight_S.detach().double().sum()
    return torch.where(_drawable(total, total.dtype), weight_S.detach().double() / total, uniform_S)


def draw_features(
    weight: Tensor,
    rows_P: Tensor,
    temperature: float,
    epsilon: float,
    u_P: Tensor,
    v_P: Tensor,
    factor_I: Tensor | None = None,
    station: Station | None = None,
) -> Tensor:
    """Draw one input feature ``j`` for each row ``i``; ``station``: how the weight is laid out, where not ``(O, I)``.

        p(j | i) ~ |weight[i, j]| ** (1 / temperature) * factor[j]

    With probability ``epsilon``, where ``v < epsilon``, it is drawn uniformly instead; so it is from a row whose
    products are all zero or not finite. ``u`` and ``v`` are uniform float64 numbers from 0 to below 1. Returns ``(P,)``
    int64.
    """
    size_PI = _step_sizes(weight, rows_P, temperature, factor_I, station)
    width = size_PI.shape[1]
    sum_PI = size_PI.cumsum(1, dtype=torch.float64)
    total_P1 = sum_PI[:, -1:]
    # With right=True a feature of weight zero, whose sum is its neighbour's, is stepped over.
    features_P = torch.searchsorted(sum_PI, u_P[:, None] * total_P1, right=True).squeeze(1)
    features_P = features_P.clamp(max=width - 1)  # rounding can carry u * total to the total
    by_weight_P = _drawable(total_P1.squeeze(1), size_PI.dtype)
    if epsilon > 0:
        by_weight_P &= v_P >= epsilon
    features_P = torch.where(by_weight_P, features_P, _uniform_choice(width, u_P))
    return features_P + _first_features(rows_P, width, station)


def _step_chances(
    weight: Tensor,
    rows_P: Tensor,
    temperature: float,
    epsilon: float,
    factor_I: Tensor | None,
    station: Station | None = None,
) -> Tensor:
    """The probability of each feature of a row's group under ``draw_features``, ``(P, I)`` float64."""
    size_PI = _step_sizes(weight, rows_P, temperature, factor_I, station)
    total_P1 = size_PI.sum(1, keepdim=True, dtype=torch.float64)
    by_weight_PI = torch.where(_drawable(total_P1, size_PI.dtype), size_PI / total_P1, 1 / size_PI.shape[1])
    return (1 - epsilon) * by_weight_PI + epsilon / size_PI.shape[1]


def _step_sizes(
    weight: Tensor, rows_P: Tensor, temperature: float, factor_I: Tensor | None, station: Station | None
) -> Tensor:
    """``|weight[i, j]| ** (1 / temperature) * factor[j]`` for each row ``i``, up to a number per row.

    ``(P, I)``, with the features of the row's group.
    """
    size_PI = _read_rows(weight.detach(), rows_P, station).abs()
    if size_PI.dtype in (torch.float16, torch.bfloat16):
        size_PI = size_PI.float()
    elif not size_PI.is_floating_point():
        size_PI = size_PI.double()
    if size_PI.dim() > 2:
        size_PI = size_PI.flatten(2).sum(2)
    if factor_I is not None:
        size_PI = size_PI.double()  # a product of two small float32 numbers would be zero
    if temperature != 1.0:
        # Divided by the row's largest first: the power of a large weight would overflow.
        size_PI = (size_PI / size_PI.amax(1, keepdim=True)) ** (1 / temperature)
    if factor_I is None:
        return size_PI
    if station is None or station.groups == 1:
        return size_PI * factor_I.detach()
    first_P = _first_features(rows_P, size_PI.shape[1], station)
    return size_PI * factor_I.detach().view(station.groups, -1)[first_P // size_PI.shape[1]]


def _read_rows(weight: Tensor, rows_P: Tensor, station: Station | None) -> Tensor:
    """The numbers of each row: ``(P, I, *kernel)``, with the features of its group."""
    if station is None or not station.transposed:
        return weight.index_select(0, rows_P)
    # (groups, features and rows of a group, *kernel)
    weight = weight.unflatten(0, (station.groups, -1))
    return weight[rows_P // weight.shape[2], :, rows_P % weight.shape[2]]


def _first_features(rows_P: Tensor, width: int, station: Station | None) -> Tensor:
    """The first feature of each row's group, of groups of ``width`` features."""
    if station is None or station.groups == 1:
        return torch.zeros_like(rows_P)
    return rows_P // (station.size // station.groups) * width


def _drawable(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether a sum of numbers of ``dtype`` is that of numbers neither all zero nor with an infinity or a nan."""
    return (total > torch.finfo(dtype).tiny) & (total < inf)


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
        packed += [s.weight, s.base, s.size, int(s.ends), s.groups, int(s.transposed), len(s.targets), *s.targets]
    return packed


@lru_cache(maxsize=64)
def unpack_stations(layout: tuple[int, ...]) -> tuple[Station, ...]:
    """The inverse of ``pack_stations``."""
    stations, at = [], 0
    while at < len(layout):
        weight, base, size, ends, groups, transposed, num_targets = layout[at : at + 7]
        targets = layout[at + 7 : at + 7 + num_targets]
        stations.append(Station(weight, base, size, targets, bool(ends), groups, bool(transposed)))
        at += 7 + num_targets
    return tuple(stations)
