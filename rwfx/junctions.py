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
        if len(lines) > MOST_PLACES and len(_canonical(lines).unique(dim=0)) > MOST_PLACES:
            several = [k for k, c in enumerate(cores) if c.max() != c.min()]
            fewest = min(several, key=lambda k: len(cores[k].unique()))
            self.notes.append(
                f"{self.node}: too many pairs of rows meet; walks cross one side of them to any of its rows"
            )
            spread = torch.where(cores[fewest] < 0, -1, self.any_of(cores[fewest].reshape(-1)))
            return self.meet([*ids[:fewest], spread.expand(ids[fewest].shape), *ids[fewest + 1 :]])
        return self.gather(lines).reshape(shape).expand(ids[0].shape)

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
        ids_N = ids_NM.amax(1)
        several_N = ((ids_NM != ids_N[:, None]) & (ids_NM >= 0)).any(1)
        if not bool(several_N.any()):
            return ids_N
        members_JM, place_S = _canonical(ids_NM[several_N]).unique(dim=0, return_inverse=True)
        wide_J = (~_repeats(members_JM)).sum(1) > MOST_MEMBERS
        found_J = torch.empty(len(members_JM), dtype=torch.int64)
        if bool(wide_J.any()) and len(wide_J) > 1:
            self.notes.append(f"{self.node}: places that more than {MOST_MEMBERS} rows lead to are one place")
            found_J[wide_J] = self._junction(members_JM[wide_J].unique()[None])
            wide_J = ~wide_J
            found_J[wide_J] = self._junction(members_JM[wide_J])
        else:
            found_J = self._junction(members_JM)
        return ids_N.masked_scatter(several_N, found_J[place_S])

    def choose(self, one: Tensor, other: Tensor, share: float) -> Tensor:
        """The ids, of tensors of one shape, where a walk goes on at ``other`` with the probability ``share``."""
        cores = core(one), core(other)
        shape = torch.broadcast_shapes(*[c.shape for c in cores])
        one_N, other_N = (c.expand(shape).reshape(-1) for c in cores)
        both_N = (one_N >= 0) & (other_N >= 0) & (one_N != other_N)
        found_N = torch.maximum(one_N, other_N)
        if bool(both_N.any()):
            members_J2, place_S = torch.stack([one_N[both_N], other_N[both_N]], 1).unique(dim=0, return_inverse=True)
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


def _canonical(ids_NM: Tensor) -> Tensor:
    """Equal sets as equal lines: sorted, and of repeats and "no row" one more of the largest id."""
    sorted_NM = ids_NM.sort(1).values
    idle_NM = (sorted_NM < 0) | _repeats(sorted_NM)
    return torch.where(idle_NM, sorted_NM[:, -1:], sorted_NM).sort(1).values


def _repeats(sorted_NM: Tensor) -> Tensor:
    """Where an entry equals its left neighbour."""
    repeats = torch.zeros_like(sorted_NM, dtype=torch.bool)
    repeats[:, 1:] = sorted_NM[:, 1:] == sorted_NM[:, :-1]
    return repeats


def _product(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
