"""Parts: what a method chooses from, of one weight or of all weights as if they were one.

Axes: N non-zeros, M candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from rwfx.keys import without

Choose = Callable[["Part"], Tensor]
"""The next keys of a part, sorted and distinct."""


@dataclass(frozen=True)
class Part:
    """A weight, its candidates, and how much they are wanted."""

    places: int
    """Of the dense weight: keys are below."""
    keys: Tensor
    """``(N,)``: where its numbers are, sorted."""
    values: Tensor
    """``(N,)``: what they are."""
    candidates: Tensor
    """``(M,)``: sorted keys where it has none."""
    scores: Tensor
    """``(M,)``: the larger the magnitude, the sooner a candidate is taken."""
    wanted: float = 0.0
    """How much more connections of this weight are wanted than those of another; only ``snfs`` asks."""
    stay: Tensor | None = None
    """Positions of connections that are not pruned, in order."""

    @property
    def prunable(self) -> int:
        """How many connections may be pruned."""
        return len(self.keys) - (0 if self.stay is None else len(self.stay))

    def pruned(self, prune: Callable[[Tensor, int], Tensor], count: int) -> Tensor:
        """Positions of the ``count`` connections that ``prune`` chooses by their values, of those that may be."""
        if self.stay is None:
            return prune(self.values, count)
        may = without(torch.arange(len(self.keys), device=self.keys.device), self.stay)
        return may[prune(self.values[may], count)]


def each(parts: Sequence[Part], choose: Choose) -> list[Tensor]:
    """Choose in each part by itself."""
    return [choose(part) for part in parts]


def together(parts: Sequence[Part], choose: Choose) -> list[Tensor]:
    """Choose in all parts at once; each keeps its largest value, so that none loses all."""
    first = list(accumulate((part.places for part in parts), initial=0))
    position = list(accumulate((len(part.keys) for part in parts), initial=0))
    largest = [part.values.abs().argmax() + at for part, at in zip(parts, position, strict=False) if len(part.keys)]
    whole = Part(
        first[-1],
        torch.cat([part.keys + start for part, start in zip(parts, first, strict=False)]),
        torch.cat([part.values for part in parts]),
        torch.cat([part.candidates + start for part, start in zip(parts, first, strict=False)]),
        torch.cat([part.scores for part in parts]),
        stay=torch.stack(largest),
    )
    keys = choose(whole)
    bounds = torch.searchsorted(keys, torch.tensor(first, device=keys.device)).tolist()
    return [keys[a:b] - start for (a, b), start in zip(pairwise(bounds), first, strict=False)]
