"""``rwfx::walk``: the row sets of one step, drawn by random walks over a weight graph.

In: the weights, the graph's tables, the state of a random stream. Out: a sorted row set per weight.

The graph arrives as *stations* in execution order. A station owns a range of global ids; it is either the
use of a weight, one id per row, whose table says which id feeds each input feature (-1: none), or a
*junction*, one id per feature that several ids lead to, whose table lists these *members*. An id only ever
points to ids below it, so one sweep over the stations in reverse order completes every walk, whatever
their number: the loops here run over stations and weights, never over walks or rows.

Axes: P walks at a station, I input features, R all rows of all weights whose row sets are asked for.
"""

from collections.abc import Iterator
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


@torch.library.custom_op("rwfx::walk", mutates_args=())
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
        state: ``(2,)`` int64 on the CPU, the stream's seed and the number of steps so far.
        last: the row sets of the last draw, as this call gave them.
        num_paths, temperature, epsilon, min_rows, resample_every: as in ``rwfx.transform``.

    Returns:
        A row set per kept weight, then what to pass as ``last`` next time: ``(len(kept) + 1 + R,)`` int64, where
        each weight's rows begin and the last one's end, and then the rows, numbered among all rows of the kept
        weights, filled up with zeros.
    """
    seed, step = state.tolist()
    sizes = tuple(weights[k].shape[0] for k in kept)
    if step % resample_every:
        return [*read_last(last, sizes), last.clone()]

    generator = torch.Generator(last.device).manual_seed(mix(seed, step))
    stations = unpack_stations(tuple(layout))
    first_row = dict(zip(kept, accumulate(sizes, initial=0), strict=False))
    walks = sweep(stations, weights, tables, heads, starts, num_paths, temperature, epsilon, generator)
    visits = [rows_P + first_row[stations[s].weight] for s, _, rows_P in walks if stations[s].weight in first_row]
    seen_R = torch.zeros(sum(sizes), dtype=torch.bool, device=last.device)
    if visits:
        seen_R.index_fill_(0, torch.cat(visits), True)
    visited_V, bounds, ends = _gather_seen(seen_R, sizes)
    lacking = [k for k, size in enumerate(sizes) if ends[k + 1] - ends[k] < min(min_rows, size)]
    for k in lacking:
        seen_O = seen_R.split(sizes)[k]
        unseen = (~seen_O).nonzero().squeeze(1)
        shuffled = torch.randperm(len(unseen), generator=generator, device=unseen.device)
        seen_O[unseen[shuffled[: min(min_rows, sizes[k]) - (ends[k + 1] - ends[k])]]] = True
    if lacking:
        visited_V, bounds, ends = _gather_seen(seen_R, sizes)
    last = torch.cat([bounds, visited_V, last.new_zeros(len(seen_R) - len(visited_V))])
    return [*_split_rows(visited_V, ends, sizes), last]


def _gather_seen(seen_R: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, list[int]]:
    """The numbers of the rows seen, and where among them each weight's begin, as a tensor and as a list."""
    visited_V = seen_R.nonzero().squeeze(1)
    bounds = torch.searchsorted(visited_V, _first_rows(sizes, seen_R.device))
    return visited_V, bounds, bounds.tolist()


def read_last(last: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """The row sets that ``last`` holds, of weights with ``sizes`` rows each."""
    ends = last[: len(sizes) + 1].tolist()
    return _split_rows(last[len(sizes) + 1 :][: ends[-1]], ends, sizes)


def _split_rows(visited_V: Tensor, ends: list[int], sizes: tuple[int, ...]) -> list[Tensor]:
    parts = visited_V.split([b - a for a, b in pairwise(ends)])
    return [part - first for part, first in zip(parts, accumulate(sizes, initial=0), strict=False)]


@lru_cache(maxsize=64)
def _first_rows(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(sizes, initial=0)), device=device)


@walk.register_fake
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
    resample_every,
):
    shape_env = torch.library.get_ctx()._shape_env

    def row_set(size):
        # What new_dynamic_size() does, but for its refusal unless the user has set
        # torch._dynamo.config.capture_dynamic_output_shape_ops: a plain torch.compile(model) would be cut in two here.
        # A symbolic size happens only where an operator test makes every size symbolic.
        bounds = (min(min_rows, size), size) if isinstance(size, int) else ()
        return last.new_empty((allocate_size(shape_env, *bounds),))

    return [*[row_set(weights[k].shape[0]) for k in kept], torch.empty_like(last)]


def sweep(
    stations: tuple[Station, ...],
    weights: list[Tensor],
    tables: list[Tensor],
    heads: list[int],
    starts: list[Tensor],
    num_paths: int,
    temperature: float,
    epsilon: float,
    generator: torch.Generator,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk all paths from the outputs to the inputs; yield ``(station, walks, rows)`` at every weight use.

    ``walks`` and ``rows`` are ``(P,)`` int64: which of the ``num_paths`` walks come by, and at which row.
    The walks are dealt out to the output weights in turn; each starts uniformly over its weight's ids.
    """
    waiting: list[list[tuple[Tensor, Tensor]]] = [[] for _ in stations]

    def send(walks_P: Tensor, ids_P: Tensor, targets: tuple[int, ...], ends: bool) -> None:
        if len(targets) == 1 and not ends:
            if len(ids_P):
                waiting[targets[0]].append((walks_P, ids_P))
            return
        for target in targets:
            station = stations[target]
            here = (ids_P >= station.base) & (ids_P < station.base + station.size)
            send(walks_P[here], ids_P[here], (target,), ends=False)

    # With fewer walks than output weights, the turn of the first walk moves on from step to step.
    turn = generator.initial_seed() % len(heads)
    for k, (head, ids) in enumerate(zip(heads, starts, strict=True)):
        walks_P = torch.arange(num_paths, device=ids.device)[(k + turn) % len(heads) :: len(heads)]
        u_P = torch.rand(len(walks_P), generator=generator, device=ids.device)
        send(walks_P, ids[_uniform(len(ids), u_P)], (head,), ends=False)

    for s in reversed(range(len(stations))):
        if not waiting[s]:
            continue
        station, table = stations[s], tables[s]
        walks_P, ids_P = (part[0] if len(part) == 1 else torch.cat(part) for part in zip(*waiting[s], strict=True))
        waiting[s] = []
        rows_P = ids_P - station.base if station.base else ids_P
        if station.weight >= 0:
            yield s, walks_P, rows_P
            features_P = draw_features(weights[station.weight], rows_P, temperature, epsilon, generator)
            ids_P = table[features_P]
        else:
            ids_P = _draw_member(table, rows_P, generator)
        send(walks_P, ids_P, station.targets, station.ends)


def draw_features(
    weight: Tensor, rows_P: Tensor, temperature: float, epsilon: float, generator: torch.Generator
) -> Tensor:
    """One input feature ``j`` per visited row ``i``, ``p(j | i) ~ |weight[i, j]| ** (1 / temperature)``.

    With probability ``epsilon`` the draw is uniform instead; so it is from a row that is all zero or not
    finite. Returns ``(P,)`` int64.
    """
    size_PI = weight.index_select(0, rows_P).abs()
    if size_PI.dtype in (torch.float16, torch.bfloat16):
        size_PI = size_PI.float()
    if temperature != 1.0:
        # Divided by the row's largest first: the power of a large weight would overflow.
        size_PI = (size_PI / size_PI.amax(1, keepdim=True)) ** (1 / temperature)
    sum_PI = size_PI.cumsum_(1)
    total_P1 = sum_PI[:, -1:]
    u_P1 = torch.rand(len(rows_P), 1, generator=generator, device=rows_P.device, dtype=sum_PI.dtype)
    # u is at most one minus half a unit in the last place, so that u * total stays below a normal total. With
    # right=True a feature of weight zero, whose sum is its neighbour's, is stepped over.
    features_P = torch.searchsorted(sum_PI, u_P1 * total_P1, right=True).view(-1)
    tiny = torch.finfo(total_P1.dtype).tiny
    if epsilon == 0 and total_P1.is_cpu:
        low, high = total_P1.aminmax()
        if tiny < low.item() and high.item() < inf:
            return features_P
    total_P = total_P1.squeeze(1)
    by_weight_P = (total_P > tiny) & (total_P < inf)
    v_P, w_P = torch.rand(2, len(rows_P), generator=generator, device=rows_P.device)
    return torch.where(by_weight_P & (w_P >= epsilon), features_P, _uniform(weight.shape[1], v_P))


def _draw_member(table: Tensor, places_P: Tensor, generator: torch.Generator) -> Tensor:
    members_PM, bits_PM = table[:, places_P]
    sum_PM = bits_PM.contiguous().view(torch.float64)
    u_P1 = torch.rand(len(places_P), 1, generator=generator, device=table.device, dtype=torch.float64)
    choice_P1 = (u_P1 * sum_PM[:, -1:] >= sum_PM[:, :-1]).sum(1, keepdim=True)
    return members_PM.gather(1, choice_P1).squeeze(1)


def _uniform(n: int, u: Tensor) -> Tensor:
    return (u * n).long()  # below n, as above


def mix(seed: int, step: int) -> int:
    """A 63-bit seed for one step of a stream: SplitMix64 (Steele et al. 2014), neighbours far apart."""
    mask = (1 << 64) - 1
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


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
