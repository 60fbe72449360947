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
    """The memory of a walk policy; ``update`` before a draw, then ``of_ids``, and of these ``factors`` and
    ``of_starts``."""

    ids: Tensor
    use: Tensor
    row: Tensor
    sizes: Tensor
    places: Tensor
    ones: Tensor
    taken: Tensor
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
            "sizes": sizes,
            "places": torch.arange(sum(map(graph.rows, kept))),
            "ones": torch.ones(len(graph) + 1),
            "taken": torch.zeros(int(sizes.sum())),
            "value": torch.full((int(sizes.sum()),), options.optimism if isinstance(options, LearnedWalk) else 0.0),
        }
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)
        # A table of -1, the end of a walk, leads to the number behind all ids.
        self.tables = Buffers(
            torch.where(s.feature_map < 0, len(graph), s.feature_map) if isinstance(s, WeightUse) else s.members
            for s in graph.stations
        )
        self.shares = Buffers(_shares(s) if isinstance(s, Junction) else torch.zeros(0) for s in graph.stations)
        self._junctions = [(k, s.base) for k, s in enumerate(graph.stations) if isinstance(s, Junction)]
        last = {k for k, s in enumerate(graph.stations) if isinstance(s, WeightUse) and (s.feature_map < 0).all()}
        self._without = last.union(k for k, _ in self._junctions)
        self.starts = Buffers(graph.heads.values())

    def update(self, last: Tensor) -> None:
        """Take in what was seen of the last step, whose row sets are ``last``."""
        options = self.options
        # A backward pass that overflowed tells nothing of its rows, and is not to be remembered.
        seen_N = torch.cat(self.seen.tensors()).nan_to_num(0.0, 0.0, 0.0)
        # Only what a backward pass has written since: not every forward pass has one.
        new_U = self._sums((seen_N != self.taken).float()) > 0
        new_N = new_U.float().index_select(0, self.use)
        self.taken.copy_(seen_N)
        if isinstance(options, AdaptiveWalk):
            self.value.lerp_(seen_N, (1 - options.memory) * new_N)
        elif isinstance(options, LearnedWalk):
            drawn_N = self._was_drawn(last)
            mean_U = self._sums(seen_N * drawn_N) / self._sums(drawn_N).clamp(min=1)
            usefulness_N = seen_N / mean_U.clamp(min=1e-30).index_select(0, self.use)
            # To the usefulness of a row that was drawn, to optimism of another.
            towards_N = (usefulness_N - options.optimism) * drawn_N + options.optimism
            self.value.lerp_(towards_N, (drawn_N * (options.rate - options.forget) + options.forget) * new_N)
        else:
            self.value.copy_(seen_N)

    def of_ids(self) -> Tensor:
        """What walks follow: a number for every id, and 1 behind them."""
        options, value_N = self.options, self.value
        if isinstance(options, AdaptiveWalk):
            # Over its use's mean; where all are zero, the smallest number leaves them so.
            mean_U = (self._sums(value_N) / self.sizes).clamp(min=1e-30)
            value_N = value_N / mean_U.index_select(0, self.use) + options.floor
        elif isinstance(options, LearnedWalk):
            value_N = value_N.clamp(min=options.floor)
        if isinstance(options, AdaptiveWalk | LearnedWalk):
            # As large as the power of it can be without an infinity, and sums of that.
            value_N = value_N.clamp(max=1e30 ** (1 / max(options.power, 1))) ** options.power
        value_G = self.ones.index_copy(0, self.ids, value_N)
        for k, base in self._junctions:
            members, shares = self.tables.get_buffer(str(k)), self.shares.get_buffer(str(k))
            value_G[base : base + len(members)] = (value_G[members] * shares).sum(1)
        return value_G

    def factors(self, value_G: Tensor) -> list[Tensor]:
        """For each station the ``(I,)`` factors of its features; of a junction, and where every walk ends, nothing."""
        tables = self.tables.tensors()
        return [value_G[:0] if k in self._without else value_G.index_select(0, of) for k, of in enumerate(tables)]

    def of_starts(self, value_G: Tensor) -> list[Tensor]:
        """For each head the weights of its starts."""
        return [value_G.index_select(0, ids) for ids in self.starts.tensors()]

    def _sums(self, x_N: Tensor) -> Tensor:
        """Sums over the rows of each use, ``(U,)``."""
        return torch.segment_reduce(x_N, "sum", lengths=self.sizes, unsafe=True)

    def _was_drawn(self, last: Tensor) -> Tensor:
        """1 for the rows in ``last`` and 0 for others, ``(N,)``."""
        num_rows = len(self.places)
        numbers = last[len(last) - num_rows :]
        is_row = self.places < last[len(last) - num_rows - 1]
        drawn = self.value.new_zeros(num_rows + 1)
        return drawn.index_fill_(0, torch.where(is_row, numbers, num_rows), 1.0).index_select(0, self.row)


def observed_uses(graph: WeightGraph, kept: Sequence[str], options: RandomWalk) -> list[WeightUse]:
    """The uses whose gradients are looked at: all of the weights kept, or for plain walks those where walks start."""
    everywhere = isinstance(options, AdaptiveWalk | LearnedWalk)
    heads = {id(graph.stations[station]) for station in graph.heads}
    return [use for use in graph.uses if use.weight in kept and (everywhere or id(use) in heads)]


def _shares(junction: Junction) -> Tensor:
    """The share of each member in the mean of a junction's ids, ``(ids, members)``."""
    sums = junction.ways
    return (torch.diff(sums, dim=1, prepend=torch.zeros_like(sums[:, :1])) / sums[:, -1:]).float()
