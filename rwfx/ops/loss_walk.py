"""``rwfx::pick_by_walks``: examples and rows by one draw of walks that start where the gradient of the loss arrives.

In: the output, the blank lists of a step's examples and rows, and the weight graph as ``rwfx::walk`` takes it. Out:
the output. In its backward the gradient ``g`` ``(B, O)`` becomes one more weight above all others: its rows are the
examples, its features the output units. A walk starts at example ``b`` with a probability proportional to ``sum
|g[b]|``, steps to output unit ``o`` with ``p(o | b) ~ |g[b, o]| ** (1 / temperature)``, so to a pair ``(b, o)``, and
goes on through the weights from there.

Axes: B examples, O output units.
"""

import torch
from torch import Tensor

from rwfx.ops.observe import record_
from rwfx.ops.walk import Station, pack_stations, unpack_stations

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define(
    "pick_by_walks(Tensor output, Tensor kept, Tensor[] rows, Tensor[] chosen, Tensor[] weights, int[] kept_weights, "
    "Tensor[] tables, int head, int[] layout, Tensor state, int num_paths, float temperature, float epsilon, "
    "bool whole=False) -> Tensor"
)
_library.define(
    "walk_from_loss(Tensor g, SymInt count, int[] counts, Tensor[] weights, int[] kept_weights, Tensor[] tables, "
    "int head, int[] layout, Tensor state, int num_paths, float temperature, float epsilon) -> Tensor[]"
)


def walk_from_loss(
    g: Tensor,
    count: int,
    counts: list[int],
    weights: list[Tensor],
    kept_weights: list[int],
    tables: list[Tensor],
    head: int,
    layout: list[int],
    state: Tensor,
    num_paths: int,
    temperature: float,
    epsilon: float,
) -> list[Tensor]:
    """Draw walks from the pairs of ``g`` ``(B, ..., O)``; give ``count`` examples and ``counts`` rows of each weight
    kept.

    ``head`` is the station whose rows are the output units, in order. Everything else is as for ``rwfx::walk``; walks:
    the given number, or with 0 four for each of the largest set asked for. What is not finite in ``g`` counts as the
    largest.
    """
    size_BO = g.abs().reshape(g.shape[0], -1, g.shape[-1]).sum(1, dtype=torch.float32)
    finite = size_BO.isfinite()
    largest = torch.where(finite, size_BO, 0.0).amax()
    size_BO = torch.where(finite, size_BO, largest.clamp(min=1.0) * 1e9)
    stations = unpack_stations(tuple(layout))
    base, num_examples = stations[-1].base + stations[-1].size, len(size_BO)
    above = Station(len(weights), base, num_examples, (head,), False)
    ids = torch.arange(base, base + num_examples, device=g.device)
    units = torch.arange(stations[head].base, stations[head].base + stations[head].size, device=g.device)
    rows_of = {station.weight: station.size for station in stations}
    sizes = sum(rows_of[k] for k in kept_weights) + num_examples
    *rows, examples, _ = torch.ops.rwfx.walk.default(
        [*weights, size_BO],
        [*kept_weights, len(weights)],
        [*tables, units],
        [len(stations)],
        [ids],
        pack_stations((*stations, above)),
        state,
        state.new_zeros(len(kept_weights) + 2 + sizes),
        num_paths or 4 * max(count, *counts),
        temperature,
        epsilon,
        1,
        [*counts, count],
        1,
        None,
        [size_BO.sum(1)],
        None,
        False,
    )
    return [examples, *rows]


_library.impl("walk_from_loss", walk_from_loss, "CompositeExplicitAutograd")


@torch.library.register_fake("rwfx::walk_from_loss", lib=_library)
def _(g, count, counts, *_):
    return [g.new_empty((n,), dtype=torch.int64) for n in (count, *counts)]


class _PickByWalks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, kept, rows, chosen, weights, *walk_and_whole):
        *walk, whole = walk_and_whole
        # Not saved: these are written in the backward pass, and a weight may be by then.
        ctx.kept, ctx.rows, ctx.chosen, ctx.weights, ctx.walk, ctx.whole = kept, rows, chosen, weights, walk, whole
        return output.clone()

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError("rwfx::pick_by_walks has no second derivative: leave create_graph=True out.")
        counts = [len(of) for of in ctx.rows]
        weights = [weight.detach() for weight in ctx.weights]
        examples, *drawn = torch.ops.rwfx.walk_from_loss.default(g, ctx.kept.shape[0], counts, weights, *ctx.walk)
        ctx.kept.copy_(examples)
        for of, chosen, rows in zip(ctx.rows, ctx.chosen, drawn, strict=True):
            of.copy_(rows)
            record_(chosen, rows)
        dx = g if ctx.whole else torch.zeros_like(g).index_copy(0, examples, g.index_select(0, examples))
        return dx, *[None] * 13


def _pick(output, *arguments):
    return _PickByWalks.apply(output, *arguments, *[False] * (13 - len(arguments)))  # a default is not handed on


_library.impl("pick_by_walks", _pick, "Autograd")
_library.impl("pick_by_walks", lambda output, *_: output.clone(), "CompositeExplicitAutograd")
