"""The stations of a weight graph: the uses of its weights, and the junctions between them.

Every station owns a range of *ids*, ``base`` to ``base + size``, and says which lower ids each of them leads to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightUse:
    """One linear call or convolution with a weight; its row ``i`` has the global id ``base + i``.

    In a convolution a row is an output channel and a feature an input channel. With ``groups`` row ``i`` reads
    ``features / groups`` of them, from feature ``(i // (rows / groups)) * (features / groups)`` on.
    """

    name: str  # the weight's; the second call on the same weight is "fc.weight#2"
    weight: str  # the parameter, by the first of its names; or the view of one that it is (``rwfx.weight_views``)
    node: str  # the call in the graph
    base: int
    rows: int
    feature_map: Tensor  # (features,) int64: the id that feeds each input feature, -1 for none
    groups: int = 1
    kernel: int = 1  # the numbers of a weight between one feature and one row
    transposed: bool = False  # whether the weight is (features, rows / groups, *kernel)

    @property
    def size(self) -> int:
        """The number of its ids."""
        return self.rows


@dataclass(frozen=True)
class Junction:
    """Places that several rows lead to; place ``i`` has the id ``base + i`` and leads to ``members[i]``.

    ``ways[i]`` is the running sum, over the members, of what each is chosen in proportion to: the rows behind it, so
    that a draw is uniform over the rows that were added, however the additions were nested. Attention has shares of its
    own (``rwfx.label_products``).
    """

    node: str  # the call that added or pooled them
    base: int
    members: Tensor  # (size, M) int64 ids; a place with fewer repeats its last one, with no weight
    ways: Tensor  # (size, M) float64, never falling along M

    @property
    def size(self) -> int:
        """The number of its ids."""
        return len(self.members)


Station = WeightUse | Junction


def leaves(stations: Sequence[Station], ids: Tensor) -> Tensor:
    """The ids of weight rows that ``ids`` lead to across junctions; distinct, sorted."""
    flags = torch.zeros(stations[-1].base + stations[-1].size if stations else 0, dtype=torch.bool)
    flags[ids[ids >= 0]] = True
    for s in reversed(stations):
        if isinstance(s, Junction):
            here = flags[s.base : s.base + s.size]
            flags[s.members[here]] = True
            here.zero_()
    return flags.nonzero().squeeze(1)
