"""The methods: what each looks for in the backward pass, and how it chooses the next connections.

    gse       prune the smallest, grow the largest gradients of a random subset      Heddes et al. 2024
    rigl      prune the smallest, grow the largest gradients of all                  Evci et al. 2020
    set       prune the smallest, grow at random                                     Mocanu et al. 2018
    snfs      prune the smallest, grow the largest mean gradients of all             Dettmers & Zettlemoyer 2019
    topkast   the largest of all weights, each of which is kept somewhere            Jayakumar et al. 2020
    gradual   prune the smallest, grow none: from dense to sparse                    Zhu & Gupta 2017
    static    the connections stay

SNFS in the scope ``"global"`` is as in its paper: each weight is pruned by the same share, and what is freed is dealt
to weights in proportion to the mean magnitude of the momentum of their connections. In the scope ``"layer"`` a weight
gets back what it gave. It needs a mean gradient for every place of the dense weight.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, isfinite
from typing import Any

import torch
from torch import Generator, Tensor

from rwfx.extremes import largest, smallest_magnitudes
from rwfx.keys import replaced
from rwfx.sparsity import deal
from rwfx.topology.exchange import Prune, at_random, best, exchanged, tails
from rwfx.topology.parts import Part, each, together


@dataclass(frozen=True)
class Moment:
    """What a method is told of an update."""

    share: float
    """Of the connections that may be exchanged; for ``gradual`` the density to come to."""
    scope: str
    options: Mapping[str, Any]
    generator: Generator
    """Random numbers of this update."""


@dataclass(frozen=True)
class Method:
    """What ``Topology`` needs to know of a method."""

    choose: Callable[[Sequence[Part], Moment], list[Tensor]] | None = None
    """The next keys of each part; None: there are no exchanges of connections for connections."""
    alpha: float | None = None
    """The share exchanged at first, by default."""
    rule: Callable[[Mapping[str, Any]], str] | None = None
    """The rule by which candidates are found (``rwfx.ops.probe``), from the options; None: without a backward pass."""
    always: bool = False
    """Whether every backward pass is looked at, and not only the one before an update."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of its own, with what they are by default; None: must be given."""


def _exchange(parts: Sequence[Part], moment: Moment) -> list[Tensor]:
    return SCOPES[moment.scope](parts, lambda part: exchanged(part, moment.share, smallest_magnitudes, best))


def _exchange_at_random(parts: Sequence[Part], moment: Moment) -> list[Tensor]:
    prune, grow = PRUNES[moment.options["prune"]], at_random(moment.generator)
    return SCOPES[moment.scope](parts, lambda part: exchanged(part, moment.share, prune, grow))


def _exchange_by_momentum(parts: Sequence[Part], moment: Moment) -> list[Tensor]:
    if moment.scope == "layer":
        return _exchange(parts, moment)
    # One connection stays, or a weight could lose all.
    prunable = {n: min(ceil(moment.share * len(part.keys)), len(part.keys) - 1) for n, part in enumerate(parts)}
    free = {n: len(part.candidates) for n, part in enumerate(parts)}
    total = min(sum(prunable.values()), sum(free.values()))
    pruned = deal(total, {n: count + TINY for n, count in prunable.items()}, prunable)
    grown = deal(total, {n: (p.wanted if isfinite(p.wanted) else 0) + TINY for n, p in enumerate(parts)}, free)
    return [replaced(p.keys, smallest_magnitudes(p.values, pruned[n]), best(p, grown[n])) for n, p in enumerate(parts)]


def _shrink(parts: Sequence[Part], moment: Moment) -> list[Tensor]:
    def kept(part: Part) -> Tensor:
        stay = part.keys[:0] if part.stay is None else part.stay
        count = min(len(part.keys), max(1, len(stay), round(moment.share * part.places)))
        sizes = part.values.abs().index_fill_(0, stay, torch.inf)
        return part.keys[largest(sizes, count)]

    return SCOPES[moment.scope](parts, kept)


TINY = 1e-30
"""Added to shares, so that not all are zero."""

SCOPES = {"layer": each, "global": together}
PRUNES: Mapping[str, Prune] = {"magnitude": smallest_magnitudes, "tails": tails}

METHODS: Mapping[str, Method] = {
    "gse": Method(
        _exchange, alpha=0.2, rule=lambda o: o["distribution"], options={"distribution": "uniform", "gamma": 1.0}
    ),
    "rigl": Method(_exchange, alpha=0.3, rule=lambda o: "dense"),
    "set": Method(_exchange_at_random, alpha=0.3, options={"prune": "magnitude"}),
    "snfs": Method(_exchange_by_momentum, alpha=0.5, rule=lambda o: "momentum", always=True),
    "topkast": Method(rule=lambda o: "given", always=True, options={"gamma": 1.0}),
    "gradual": Method(_shrink, options={"density": None}),
    "static": Method(),
}
