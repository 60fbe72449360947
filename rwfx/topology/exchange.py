"""An exchange: of a part, as many connections pruned as grown.

With ``A`` the connections, ``S`` the candidates, none of them in ``A``, and the share ``alpha_t``::

    k = min(ceil(alpha_t |A|), |S|)      P = the k connections of A to prune      G = the k best candidates of S
    A <- (A \\ P) u G

``S`` is found before anything is pruned, so what is pruned cannot be grown in the same exchange. RigL's own code lets
it be, and keeps its value then: here every method is as GSE and SET have it, and grown values are 0.
"""

from collections.abc import Callable
from math import ceil

import torch
from torch import Generator, Tensor

from rwfx.extremes import largest_magnitudes, smallest_magnitudes
from rwfx.keys import replaced
from rwfx.nonzeros import draw_keys
from rwfx.topology.parts import Part

Prune = Callable[[Tensor, int], Tensor]
"""Which ``k`` of the values are pruned, as positions in order."""

Grow = Callable[[Part, int], Tensor]
"""Which keys are grown, sorted, at most ``k``."""


def exchanged(part: Part, share: float, prune: Prune, grow: Grow) -> Tensor:
    """The part's keys after an exchange, sorted."""
    grown = grow(part, min(ceil(share * len(part.keys)), part.prunable))
    return replaced(part.keys, part.pruned(prune, len(grown)), grown)


def tails(values: Tensor, count: int) -> Tensor:
    """The smallest positive and the largest negative values, of each as many as its share; zero counts as positive.

    Mocanu et al. (2018) take the share of both signs; where one sign has larger values throughout, it is pruned too.
    """
    negative, positive = (values < 0).nonzero().flatten(), (values >= 0).nonzero().flatten()
    of_negative = min(round(count * len(negative) / max(len(values), 1)), len(negative), count)
    of_negative = max(of_negative, count - len(positive))
    of_each = (negative, of_negative), (positive, count - of_negative)
    return torch.cat([sign[smallest_magnitudes(values[sign], k)] for sign, k in of_each]).sort().values


def best(part: Part, count: int) -> Tensor:
    """The candidates with the largest scores."""
    return part.candidates[largest_magnitudes(part.scores, min(count, len(part.scores)))]


def at_random(generator: Generator) -> Grow:
    """Any free places, every set of so many equally likely; there need be no candidates."""

    def grow(part: Part, count: int) -> Tensor:
        free = part.places - len(part.keys)
        # The free place number r has key r + (the connections before it): of connection n, keys[n] - n are before.
        rank = draw_keys(1, free, min(count, free), generator).to(part.keys.device)
        before = part.keys - torch.arange(len(part.keys), device=part.keys.device)
        return rank + torch.searchsorted(before, rank, right=True)

    return grow
