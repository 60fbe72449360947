"""How many non-zeros each weight of a model gets.

In: the shapes of the weights and the density of them all together. Out: a number for each, which add up to
``round(density * places)`` exactly.

    er        proportional to n_in + n_out                  Erdos-Renyi (Mocanu et al. 2018)
    erk       proportional to n_in + n_out + kernel sizes   with channels alone as n_in (Evci et al. 2020)
    uniform   proportional to n_in * n_out                  every weight with the density of all

Of a convolution ``er`` counts each place of the kernel as an input, ``n_in = C / groups * kh * kw`` (Heddes et al.
2024). A weight that would get more than it has places becomes whole, and what is left over is dealt to the others by
the same rule.
"""

from collections.abc import Callable, Mapping, Sequence
from math import floor, prod
from typing import Any, Literal

Init = Literal["er", "erk", "uniform"]

SHARES: Mapping[str, Callable[[Sequence[int]], int]] = {
    "er": lambda shape: prod(shape[1:]) + shape[0],
    "erk": lambda shape: sum(shape),
    "uniform": lambda shape: prod(shape),
}


def count_nonzeros(shapes: Mapping[str, Sequence[int]], density: float, init: Init) -> dict[str, int]:
    """The number of non-zeros of each weight, at least one and at most all.

    Raises:
        ValueError: the density gives fewer than one non-zero to a weight.
    """
    places = {name: prod(shape) for name, shape in shapes.items()}
    total = round(density * sum(places.values()))
    if total < len(shapes):
        raise ValueError(
            f"density={density} leaves {total} non-zeros for {len(shapes)} weights with {sum(places.values())} places; "
            f"each needs one: give at least {len(shapes) / sum(places.values()):.2g}."
        )
    return deal(total, {name: SHARES[init](shape) for name, shape in shapes.items()}, places, least=1)


def deal(total: int, share: Mapping[Any, float], most: Mapping[Any, int], least: int = 0) -> dict[Any, int]:
    """Whole numbers in proportion to ``share``, none above ``most`` and none below ``least``, that add up to ``total``.

    What is over where a number would be above is dealt to the others by the same rule. ``total`` is at most the sum of
    ``most``, and the shares are above zero.
    """
    exact: dict[str, float] = {}
    left, open_ = float(total), set(share)
    while open_:
        scale = left / sum(share[name] for name in open_)
        whole = {name for name in open_ if share[name] * scale >= most[name]}
        if not whole:
            exact |= {name: share[name] * scale for name in open_}
            break
        exact |= {name: float(most[name]) for name in whole}
        left -= sum(most[name] for name in whole)
        open_ -= whole
    return _whole_numbers({name: exact[name] for name in share}, total, most, least)


def _whole_numbers(exact: Mapping[Any, float], total: int, most: Mapping[Any, int], least: int) -> dict[Any, int]:
    """Rounded so that they add up to ``total``: those with the largest remainder up, the others down."""
    counts = {name: min(most[name], max(least, floor(number))) for name, number in exact.items()}
    by_remainder = sorted(exact, key=lambda name: exact[name] - floor(exact[name]), reverse=True)
    missing = total - sum(counts.values())
    while missing:
        step = 1 if missing > 0 else -1
        for name in by_remainder if step > 0 else reversed(by_remainder):
            if missing and least <= counts[name] + step <= most[name]:
                counts[name] += step
                missing -= step
    return counts
