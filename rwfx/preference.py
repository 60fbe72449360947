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

import rwfx.ops  # noqa: F401  defines the operator
from rwfx.policies import AdaptiveWalk, LearnedWalk, RandomWalk
from rwfx.sampler import Buffers, KeepsTypes
from rwfx.stations import Junction, WeightUse
from rwfx.weight_graph import WeightGraph


class Preference(KeepsTypes):
    """The memory of a walk policy; ``follow`` before a draw, and of what it gives ``factors``."""

    place: Tensor
    use: Tensor
    row: Tensor
    sizes: Tensor
    one: Tensor
    taken: Tensor
    value: Tensor

    def __init__(self, graph: WeightGraph, kept: Sequence[str], options: RandomWalk) -> None:
        super().__init__()
        self._rule, self._num_rows = rule_of(options), sum(map(graph.rows, kept))
        self.sees_all = not isinstance(options, LearnedWalk)  # or only the rows drawn
        observed = observed_uses(graph, kept, options)
        self.calls = tuple(s.node for s in observed)
        self.seen = Buffers(torch.zeros(s.rows, dtype=torch.float32) for s in observed)
        sizes = torch.tensor([s.rows for s in observed])
        first_row = dict(zip(kept, torch.tensor([0, *(graph.rows(name) for name in kept)]).cumsum(0), strict=False))
        ids = torch.cat([torch.arange(s.base, s.base + s.rows) for s in observed])
        start = options.optimism if isinstance(options, LearnedWalk) else 0.0
        constants = {
            # For every id its row among the observed ones; the others, and what is behind the ids, have the 1 behind.
            "place": torch.full((len(graph) + 1,), int(sizes.sum())).index_copy(0, ids, torch.arange(len(ids))),
            "use": torch.arange(len(observed)).repeat_interleave(sizes),
            # Among all rows of the kept weights, as a sampler's ``last`` numbers them.
            "row": torch.cat([torch.arange(s.rows) + first_row[s.weight] for s in observed]),
            "sizes": sizes,
            "one": torch.ones(1, dtype=torch.float32),
            "taken": torch.zeros(int(sizes.sum()), dtype=torch.float32),
            "value": torch.full((int(sizes.sum()),), start, dtype=torch.float32),
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

    def follow(self, last: Tensor) -> Tensor:
        """Take in what was seen of the last step, whose row sets are ``last``; give what walks follow now.

        That is a number for every id, and 1 behind them.
        """
        taken, value, preference_N = torch.ops.rwfx.remember.default(
            self.seen.tensors(),
            self.taken,
            self.value,
            self.sizes,
            self.use,
            self.row,
            last,
            self._num_rows,
            *self._rule,
        )
        self.taken.copy_(taken)
        self.value.copy_(value)
        value_G = torch.cat([preference_N, self.one]).index_select(0, self.place)
        for k, base in self._junctions:
            members, shares = self.tables.get_buffer(str(k)), self.shares.get_buffer(str(k))
            value_G[base : base + len(members)] = (value_G[members] * shares).sum(1)
        return value_G

    def factors(self, value_G: Tensor) -> list[Tensor]:
        """For each station the ``(I,)`` factors of its features; of a junction, and where every walk ends, nothing."""
        tables = self.tables.tensors()
        return [value_G[:0] if k in self._without else value_G.index_select(0, of) for k, of in enumerate(tables)]


def rule_of(options: RandomWalk) -> tuple[bool, float, float, float, float, float]:
    """The numbers of a policy's rule as ``rwfx::remember`` takes them."""
    if isinstance(options, LearnedWalk):
        return True, options.rate, options.forget, options.optimism, options.floor, options.power
    if isinstance(options, AdaptiveWalk):
        return False, 1 - options.memory, 0.0, 0.0, options.floor, options.power
    return False, 1.0, 0.0, 0.0, 0.0, 1.0  # start="gradient": the last gradient itself


def observed_uses(graph: WeightGraph, kept: Sequence[str], options: RandomWalk) -> list[WeightUse]:
    """The uses whose gradients are looked at: all of the weights kept, or for plain walks those where walks start."""
    everywhere = isinstance(options, AdaptiveWalk | LearnedWalk)
    heads = {id(graph.stations[station]) for station in graph.heads}
    return [use for use in graph.uses if use.weight in kept and (everywhere or id(use) in heads)]


def _shares(junction: Junction) -> Tensor:
    """The share of each member in the mean of a junction's ids, ``(ids, members)``."""
    sums = junction.ways
    return (torch.diff(sums, dim=1, prepend=torch.zeros_like(sums[:, :1])) / sums[:, -1:]).float()
