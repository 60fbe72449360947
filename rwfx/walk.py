"""Random walks over the weight graph, and the module that draws a model's row sets with them.

In: a ``WeightGraph`` and its weights. Out: row sets, or the walks themselves. A *walk* starts at a row of an
output weight and steps towards the input: at row ``i`` it draws an input feature ``j`` with probability

    p(j | i) ~ |W[i, j]| ** (1 / temperature)        (with probability epsilon uniformly instead)

and goes on at the row that produces feature ``j``; where several rows are added there, at one of them, each
with the same probability; where none is, it ends.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from rwfx.labels import Junction, WeightUse
from rwfx.ops.walk import Station, mix, pack_stations, read_last, sweep
from rwfx.weight_graph import WeightGraph


@dataclass(frozen=True)
class WalkOptions:
    """How the walks of a step are drawn; ``rwfx.transform`` describes each."""

    num_paths: int
    density: float | None = None
    temperature: float = 1.0
    epsilon: float = 0.0
    min_rows: int = 1
    resample_every: int = 1


def rows_kept(num_rows: int, options: WalkOptions) -> int:
    """How many rows the set of a weight has under ``density``."""
    assert options.density is not None
    # Less what a decimal loses in binary: 0.07 of 100 rows are 7.
    return max(ceil(options.density * num_rows - 1e-9), min(options.min_rows, num_rows), 1)


def random_walks(
    graph: WeightGraph,
    weights: Mapping[str, Tensor],
    num_paths: int,
    *,
    temperature: float = 1.0,
    epsilon: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Draw walks and return the walks themselves.

    Args:
        graph: from ``rwfx.weight_graph``.    weights: by name, such as ``dict(model.named_parameters())``.
        seed: equal seeds give equal walks.

    Returns:
        ``(num_paths, len(graph.uses))`` int64: the row at which each walk passes each linear call, in
        execution order; -1 where it does not pass.
    """
    names = list(graph.names)
    stations, tables = stations_of(graph, names)
    tensors = [weights[name].detach() for name in names]
    device = tensors[0].device
    visits = sweep(
        stations,
        tensors,
        [table.to(device) for table in tables],
        list(graph.heads),
        [ids.to(device) for ids in graph.heads.values()],
        num_paths,
        temperature,
        epsilon,
        mix(*torch.tensor([seed, 0])),
    )
    passes = [rows_P for _, rows_P in visits]
    return torch.stack(passes[::-1], 1)


def stations_of(graph: WeightGraph, names: Sequence[str]) -> tuple[tuple[Station, ...], list[Tensor]]:
    """The graph as the operator ``rwfx::walk`` takes it: stations, and a table for each."""
    stations, tables = [], []
    for number, s in enumerate(graph.stations):
        targets = graph.station_of(graph.sources(number)).unique().tolist()
        ends = -1 in targets
        crossed = names.index(s.weight) if isinstance(s, WeightUse) else -1
        stations.append(Station(crossed, s.base, s.size, tuple(t for t in targets if t >= 0), ends))
        # The bits of the float64 ways in an int64: a table that is moved to bfloat16 with its model stays as it is.
        junction = isinstance(s, Junction)
        tables.append(torch.stack([s.members, s.ways.view(torch.int64)]) if junction else s.feature_map)
    return tuple(stations), tables


class RowSampler(nn.Module):
    """Draws the row sets of a training step; it lives in the transformed model's graph.

    Called with the weights of ``crossed``, in order, it returns a row set for each weight of ``kept``. Without
    gradients nothing is drawn, and the row sets that are returned are empty.

    It has no entries in a ``state_dict``, so that a transformed model's are those of its original; what a
    resumed run needs is in ``state`` (seed, steps) and ``last`` (the last draw).
    """

    state: Tensor
    last: Tensor

    def __init__(self, graph: WeightGraph, kept: Sequence[str], options: WalkOptions, seed: int) -> None:
        super().__init__()
        self.options = options
        self.kept = tuple(kept)
        self.crossed = tuple(graph.names)
        self._kept = [self.crossed.index(name) for name in kept]
        stations, tables = stations_of(graph, self.crossed)
        self._layout = pack_stations(stations)
        self._heads = list(graph.heads)
        self._tables = _Buffers(tables)
        self._starts = _Buffers(graph.heads.values())
        self.sizes = tuple(graph.rows(name) for name in kept)
        self._exactly = [] if options.density is None else [rows_kept(n, options) for n in self.sizes]
        last = torch.zeros(len(kept) + 1 + sum(self.sizes), dtype=torch.int64)
        self.register_buffer("last", last, persistent=False)
        state, tick = torch.tensor([seed, 0]), torch.tensor([0, 1])
        if self._exactly:  # moves with the model: nothing of a step has to come back from a GPU
            self.register_buffer("state", state, persistent=False)
            self.register_buffer("_tick", tick, persistent=False)
        else:  # stays on the CPU wherever the model goes: reading it never waits for a GPU
            self.state, self._tick = state, tick

    def forward(self, *weights: Tensor) -> list[Tensor]:
        """Row sets for this step: ``(K,)`` int64, sorted, one per weight of ``kept``."""
        if not torch.is_grad_enabled():
            return [self.last.new_empty(0)] * len(self.kept)
        options = self.options
        *rows, last = torch.ops.rwfx.walk.default(
            weights,
            self._kept,
            self._tables.tensors(),
            self._heads,
            self._starts.tensors(),
            self._layout,
            self.state,
            self.last,
            options.num_paths,
            options.temperature,
            options.epsilon,
            options.min_rows,
            self._exactly,
            options.resample_every,
        )
        self.last.copy_(last)
        self.state.add_(self._tick)
        return rows

    def row_sets(self) -> dict[str, Tensor]:
        """The row sets of the last draw, by weight; empty before the first."""
        return dict(zip(self.kept, read_last(self.last, self.sizes), strict=True))

    def sampler_state(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on with the same draws."""
        return {"state": self.state.cpu().clone(), "last": self.last.cpu().clone()}

    def load_sampler_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``sampler_state`` was taken.

        Raises:
            ValueError: the state is that of another model or is incomplete; nothing is changed then.
        """
        own = self.sampler_state()
        for name, tensor in own.items():
            given = state.get(name)
            if not isinstance(given, Tensor) or given.shape != tensor.shape or given.dtype != tensor.dtype:
                met = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
                raise ValueError(
                    f"sampler state {name!r} is {met}, this model needs {tensor.dtype} {tuple(tensor.shape)}: "
                    "it was saved from a model with other weights or other weights kept dense."
                )
        if not self._could_draw(state["last"]):
            raise ValueError("sampler state 'last' holds rows that this model does not have: it is another model's.")
        for name in own:
            getattr(self, name).copy_(state[name])

    def _could_draw(self, last: Tensor) -> bool:
        """Whether ``last`` holds sorted rows of these weights, or is what it is before the first draw."""
        ends = last[: len(self.sizes) + 1].tolist()
        if ends[0] != 0 or ends != sorted(ends) or ends[-1] > sum(self.sizes):
            return False
        return all(
            len(rows) <= size and (rows.diff() > 0).all() and (rows >= 0).all() and (rows < size).all()
            for rows, size in zip(read_last(last, self.sizes), self.sizes, strict=True)
        )


class _Buffers(nn.Module):
    """A list of tensors that moves with its module and has no part in the ``state_dict``."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        for k, tensor in enumerate(tensors):
            self.register_buffer(str(k), tensor, persistent=False)

    def tensors(self) -> list[Tensor]:
        return list(self._buffers.values())  # type: ignore[arg-type]
