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
from typing import Literal

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
    share = {name: SHARES[init](shape) for name, shape in shapes.items()}
    exact: dict[str, float] = {}
    left, open_ = float(total), set(shapes)
    while open_:
        scale = left / sum(share[name] for name in open_)
        whole = {name for name in open_ if share[name] * scale >= places[name]}
        if not whole:
            exact |= {name: share[name] * scale for name in open_}
            break
        exact |= {name: float(places[name]) for name in whole}
        left -= sum(places[name] for name in whole)
        open_ -= whole
    return _whole_numbers({name: exact[name] for name in shapes}, total, places)


def _whole_numbers(exact: Mapping[str, float], total: int, places: Mapping[str, int]) -> dict[str, int]:
    """Rounded so that they add up to ``total``: those with the largest remainder up, the others down."""
    counts = {name: min(places[name], max(1, floor(number))) for name, number in exact.items()}
    by_remainder = sorted(exact, key=lambda name: exact[name] - floor(exact[name]), reverse=True)
    missing = total - sum(counts.values())
    while missing:
        step = 1 if missing > 0 else -1
        for name in by_remainder if step > 0 else reversed(by_remainder):
            if missing and 1 <= counts[name] + step <= places[name]:
                counts[name] += step
                missing -= step
    return counts
