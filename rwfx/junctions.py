"""The register of a run on labels: it gives out ids, to the rows of weight uses and to the places where several meet.

Where the ids of many places are asked for at once, equal sets of ids get one junction id.
"""

from collections import Counter

import torch
from torch import Tensor

from rwfx.label_values import core
from rwfx.stations import Junction, Station, WeightUse, leaves

MOST_MEMBERS = 4096
"""A place that more ids lead to shares one id with all such places of its node: any row of what they come from."""

MOST_PLACES = 1 << 16
"""Where two tensors would meet in more different places, one of them counts as any of its rows."""


class Register:
    """The stations so far, and the notes on what could only be followed roughly."""

    def __init__(self) -> None:
        self.stations: list[Station] = []
        self.notes: list[str] = []
        self.node = ""  # the call that is being followed
        self._size = 0
        self._ways = torch.empty(0, dtype=torch.float64)  # for each id the rows behind it
        self._calls: Counter[str] = Counter()

    def use(
        self, weight: str, rows: int, feature_map: Tensor, groups: int = 1, kernel: int = 1, transposed: bool = False
    ) -> Tensor:
        """A use of a weight; gives the ids of its rows."""
        self._calls[weight] += 1
        calls = self._calls[weight]
        name = weight if calls == 1 else f"{weight}#{calls}"
        base = self._claim(torch.ones(rows, dtype=torch.float64))
        self.stations.append(WeightUse(name, weight, self.node, base, rows, feature_map, groups, kernel, transposed))
        return torch.arange(base, base + rows)

    def meet(self, ids: list[Tensor]) -> Tensor:
        """The ids where tensors of one shape are added."""
        cores = [core(i) for i in ids]
        shape = torch.broadcast_shapes(*[c.shape for c in cores])
        lines = torch.stack([c.expand(shape).reshape(-1) for c in cores], 1)
        several_N, sets_JM, set_S = _sets(lines)
        if len(sets_JM) > MOST_PLACES:
            counts = [len(c[c >= 0].unique()) for c in cores]
            fewest = min((k for k, count in enumerate(counts) if count > 1), key=counts.__getitem__)
            self.notes.append(f"{self.node}: too many pairs of rows meet; walks cross one of them to any row like it")
            spread = torch.where(cores[fewest] < 0, -1, self.any_of(cores[fewest].reshape(-1)))
            return self.meet([*ids[:fewest], spread.expand(ids[fewest].shape), *ids[fewest + 1 :]])
        return self._joined(lines, several_N, sets_JM, set_S).reshape(shape).expand(ids[0].shape)

    def reduce(self, ids: Tensor, dims: list[int]) -> Tensor:
        """The ids where ``dims``, not negative, are pooled into one place each."""
        whole, ids = ids, core(ids)
        kept = [d for d in range(ids.dim()) if d not in dims]
        shape = [1 if d in dims else size for d, size in enumerate(ids.shape)]
        places = ids.permute(*kept, *dims).reshape(-1, ids.numel() // max(1, _product(shape)))
        found = self.gather(places).reshape(shape)
        return found.expand([1 if d in dims else size for d, size in enumerate(whole.shape)])

    def any_of(self, ids: Tensor) -> int:
        """One id that leads to all of ``ids``; -1 where they are none."""
        ids = ids.unique()
        ids = ids[ids >= 0]
        return int(self.gather(ids[None])) if len(ids) else -1

    def gather(self, ids_NM: Tensor) -> Tensor:
        """One id for each place ``(N,)`` that the ids ``(N, M)`` lead to: theirs, or that of a new junction."""
        return self._joined(ids_NM, *_sets(ids_NM))

    def _joined(self, ids_NM: Tensor, several_N: Tensor, sets_JM: Tensor, set_S: Tensor) -> Tensor:
        ids_N = ids_NM.amax(1)
        if not len(sets_JM):
            return ids_N
        wide_J = (~_repeats(sets_JM)).sum(1) > MOST_MEMBERS
        if bool(wide_J.any()) and len(wide_J) > 1:
            self.notes.append(f"{self.node}: places that more than {MOST_MEMBERS} rows lead to are one place")
            found_J = torch.empty(len(sets_JM), dtype=torch.int64)
            found_J[wide_J] = self._junction(sets_JM[wide_J].unique()[None])
            found_J[~wide_J] = self._junction(sets_JM[~wide_J])
        else:
            found_J = self._junction(sets_JM)
        return ids_N.masked_scatter(several_N, found_J[set_S])

    def choose(self, one: Tensor, other: Tensor, share: float) -> Tensor:
        """The ids, of tensors of one shape, where a walk goes on at ``other`` with the probability ``share``."""
        cores = core(one), core(other)
        shape = torch.broadcast_shapes(*[c.shape for c in cores])
        one_N, other_N = (c.expand(shape).reshape(-1) for c in cores)
        both_N = (one_N >= 0) & (other_N >= 0) & (one_N != other_N)
        found_N = torch.maximum(one_N, other_N)
        if bool(both_N.any()):
            members_J2, place_S = _distinct(torch.stack([one_N[both_N], other_N[both_N]], 1))
            ways_J = self._ways[members_J2[:, 0]]
            found = self._junction(members_J2, torch.stack([ways_J * (1 - share), ways_J], 1))
            found_N = found_N.masked_scatter(both_N, found[place_S])
        return found_N.reshape(shape).expand(torch.broadcast_shapes(one.shape, other.shape))

    def share_rows(self, one: int, other: int) -> bool:
        """Whether a row is behind both ids."""
        return bool(torch.isin(*(leaves(self.stations, torch.tensor([i])) for i in (one, other))).any())

    def _junction(self, members_JM: Tensor, ways_JM: Tensor | None = None) -> Tensor:
        """The new ids of places that lead to ``members_JM``, sorted in each, with the idle ones repeated."""
        if ways_JM is None:
            idle_JM = _repeats(members_JM)
            most = int((~idle_JM).sum(1).max()) if len(members_JM) else 0
            members_JM, idle_JM = members_JM[:, :most], idle_JM[:, :most]
            ways_JM = self._ways[members_JM].masked_fill(idle_JM, 0).cumsum(1)
        base = self._claim(ways_JM[:, -1])
        self.stations.append(Junction(self.node, base, members_JM, ways_JM))
        return torch.arange(base, base + len(members_JM))

    def _claim(self, ways: Tensor) -> int:
        base, self._size = self._size, self._size + len(ways)
        if self._size > len(self._ways):
            self._ways = torch.cat([self._ways, torch.zeros(max(self._size, 1024), dtype=torch.float64)])
        self._ways[base : self._size] = ways
        return base


def _sets(ids_NM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sets of several ids among the lines: which lines are such, ``(N,)``, the distinct ones, and which is where.

    A set is a sorted line, in which repeats and "no row" have become one more of the largest id.
    """
    several_N = ((ids_NM != ids_NM.amax(1, keepdim=True)) & (ids_NM >= 0)).any(1)
    sorted_SM = _sorted(ids_NM[several_N])
    idle_SM = (sorted_SM < 0) | _repeats(sorted_SM)
    return several_N, *_distinct(_sorted(torch.where(idle_SM, sorted_SM[:, -1:], sorted_SM)))


def _sorted(ids_NM: Tensor) -> Tensor:
    return torch.stack(torch.aminmax(ids_NM, dim=1), 1) if ids_NM.shape[1] == 2 else ids_NM.sort(1).values


def _distinct(lines_NM: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct lines, in the order in which they come, and which of them each line is.

    Lines are told apart by their products with random numbers: ``torch.unique`` compares them one by one, which takes
    a hundred times as long.
    """
    count = lines_NM.shape[1]
    random_M = torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(0))
    keys_J, key_N = (lines_NM * random_M).sum(1).unique(return_inverse=True)
    places_N = torch.arange(len(lines_NM))
    first_J = torch.full((len(keys_J),), len(lines_NM)).scatter_reduce_(0, key_N, places_N, "amin")
    order_J = first_J.argsort()
    rank_J = torch.empty_like(order_J).index_put_((order_J,), torch.arange(len(order_J)))
    return lines_NM[first_J[order_J]], rank_J[key_N]


def _repeats(sorted_NM: Tensor) -> Tensor:
    """Where an entry equals its left neighbour."""
    repeats = torch.zeros_like(sorted_NM, dtype=torch.bool)
    repeats[:, 1:] = sorted_NM[:, 1:] == sorted_NM[:, :-1]
    return repeats


def _product(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
