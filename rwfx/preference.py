"""What walks remember: a number for each row, and the factors by which walks prefer some features to others.

In: the magnitudes that the last backward pass saw, ``seen``, a tensor per use of a weight. Out: ``factors``, for each
station the ``(I,)`` numbers that its ``|W[i, j]|`` are multiplied with. A *use* that nobody observes (of a weight that
is dense) has the factor 1 for all of its rows; so has a feature that no row produces. Where rows are added, a feature
has the mean of theirs.

The rows of all observed uses lie one after the other, ``N`` of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rwfx.labels import Junction, WeightUse
from rwfx.policies import AdaptiveWalk, LearnedWalk, RandomWalk
from rwfx.sampler import Buffers, KeepsTypes
from rwfx.weight_graph import WeightGraph


class Preference(KeepsTypes):
    """The memory of a walk policy; ``update`` before a draw, then ``factors`` and ``of_starts``."""

    ids: Tensor
    use: Tensor
    row: Tensor
    value: Tensor

    def __init__(self, graph: WeightGraph, kept: Sequence[str], options: RandomWalk) -> None:
        super().__init__()
        self.options = options
        observed = observed_uses(graph, kept, options)
        self.calls = tuple(s.node for s in observed)
        self.seen = Buffers(torch.zeros(s.rows) for s in observed)
        sizes = torch.tensor([s.rows for s in observed])
        first_row = dict(zip(kept, torch.tensor([0, *(graph.rows(name) for name in kept)]).cumsum(0), strict=False))
        constants = {
            "ids": torch.cat([torch.arange(s.base, s.base + s.rows) for s in observed]),
            "use": torch.arange(len(observed)).repeat_interleave(sizes),
            # Among all rows of the kept weights, as a sampler's ``last`` numbers them.
            "row": torch.cat([torch.arange(s.rows) + first_row[s.weight] for s in observed]),
            "value": torch.full((int(sizes.sum()),), options.optimism if isinstance(options, LearnedWalk) else 0.0),
        }
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)
        self._num_uses, self._num_ids, self._num_rows = len(observed), len(graph), sum(map(graph.rows, kept))
        # A table of -1, the end of a walk, leads to the number behind all ids.
        self.tables = Buffers(
            torch.where(s.feature_map < 0, self._num_ids, s.feature_map) if isinstance(s, WeightUse) else s.members
            for s in graph.stations
        )
        self.shares = Buffers(_shares(s) if isinstance(s, Junction) else torch.zeros(0) for s in graph.stations)
        self._junctions = [(k, s.base) for k, s in enumerate(graph.stations) if isinstance(s, Junction)]
        self.starts = Buffers(graph.heads.values())

    def update(self, last: Tensor) -> None:
        """Take in what was seen of the last step, whose row sets are ``last``."""
        options = self.options
        seen_N = torch.cat(self.seen.tensors())
        if isinstance(options, AdaptiveWalk):
            self.value.mul_(options.memory).add_(seen_N, alpha=1 - options.memory)
        elif isinstance(options, LearnedWalk):
            drawn_N = self._was_drawn(last)
            mean_N = self._mean(seen_N * drawn_N) / self._mean(drawn_N).clamp(min=1 / self._num_ids)
            usefulness_N = torch.where(mean_N > 0, seen_N / mean_N, self.value)
            learned_N = options.rate * (usefulness_N - self.value)
            self.value.add_(torch.where(drawn_N > 0, learned_N, options.forget * (options.optimism - self.value)))
        else:
            self.value.copy_(seen_N)

    def factors(self) -> list[Tensor]:
        """For each station the ``(I,)`` factors of its features; of a junction nothing."""
        value_G = self._of_ids()
        tables, junctions = self.tables.tensors(), {k for k, _ in self._junctions}
        return [value_G.new_empty(0) if k in junctions else value_G[table] for k, table in enumerate(tables)]

    def of_starts(self) -> list[Tensor]:
        """For each head the weights of its starts."""
        value_G = self._of_ids()
        return [value_G[ids] for ids in self.starts.tensors()]

    def _of_ids(self) -> Tensor:
        """A number for every id, and 1 behind them."""
        options, value_N = self.options, self.value
        if isinstance(options, AdaptiveWalk):
            mean_N = self._mean(value_N)
            value_N = (torch.where(mean_N > 0, value_N / mean_N, 0.0) + options.floor) ** options.power
        elif isinstance(options, LearnedWalk):
            value_N = value_N.clamp(min=options.floor) ** options.power
        value_G = torch.ones(self._num_ids + 1, device=value_N.device).index_copy(0, self.ids, value_N.float())
        for k, base in self._junctions:
            members, shares = self.tables.get_buffer(str(k)), self.shares.get_buffer(str(k))
            value_G[base : base + len(members)] = (value_G[members] * shares).sum(1)
        return value_G

    def _mean(self, value_N: Tensor) -> Tensor:
        """The mean over the rows of each use, for every row."""
        ones_N = torch.ones_like(value_N)
        sum_U, size_U = (value_N.new_zeros(self._num_uses).index_add(0, self.use, x) for x in (value_N, ones_N))
        return (sum_U / size_U)[self.use]

    def _was_drawn(self, last: Tensor) -> Tensor:
        """1 for the rows in ``last`` and 0 for others, ``(N,)``."""
        numbers = last[len(last) - self._num_rows :]
        is_row = torch.arange(self._num_rows, device=last.device) < last[len(last) - self._num_rows - 1]
        drawn = self.value.new_zeros(self._num_rows + 1).index_fill(
            0, torch.where(is_row, numbers, self._num_rows), 1.0
        )
        return drawn[self.row]


def observed_uses(graph: WeightGraph, kept: Sequence[str], options: RandomWalk) -> list[WeightUse]:
    """The uses whose gradients are looked at: all of the weights kept, or for plain walks those where walks start."""
    everywhere = isinstance(options, AdaptiveWalk | LearnedWalk)
    heads = {id(graph.stations[station]) for station in graph.heads}
    return [use for use in graph.uses if use.weight in kept and (everywhere or id(use) in heads)]


def _shares(junction: Junction) -> Tensor:
    """The share of each member in the mean of a junction's ids, ``(ids, members)``."""
    sums = junction.ways
    return (torch.diff(sums, dim=1, prepend=torch.zeros_like(sums[:, :1])) / sums[:, -1:]).float()
