"""Row policies: how the rows of a step are chosen. Give one to ``rwfx.transform(model, rows=...)``.

A policy is data: what is asked for, and the equations by which it is done. It acts in one of two places, which the
transformed graph shows:

*before the forward*, where a sampler draws the row sets from the weights, from what it remembers and from its own
random stream: ``RandomWalk``, ``AdaptiveWalk``, ``LearnedWalk``, ``Uniform``, ``Magnitude``;

*in the backward*, where each call chooses its rows from the gradient that arrives: ``TopK``.

``density`` is everywhere a share of a weight's rows, rounded up: a number, a schedule (``rwfx.schedules``), or a
mapping from names of weights or modules (``*`` and ``?`` match any letters, the first that matches counts) to either;
a weight that no name matches stays dense. Without names, so does a weight that gives outputs and nothing else. With
numbers no shape changes from step to step; with a schedule the density may change at every step, and nothing is
compiled again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from rwfx.arguments import check_number
from rwfx.schedules import Schedule, check_density

Density = float | Schedule
Densities = Density | Mapping[str, Density]
Start = str | Tensor | Sequence[float] | Mapping[str, Tensor | Sequence[float]]


class Worded:
    """A ``repr`` that leaves out what is as by default."""

    def __repr__(self) -> str:
        given = [f for f in fields(self) if getattr(self, f.name) is not f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"


@dataclass(frozen=True, repr=False)
class RandomWalk(Worded):
    """The rows that random walks visit, from the outputs back to the inputs.

    A walk starts at a row of an output weight and steps towards the input: at row ``i`` it draws input feature ``j``
    with

        p(j | i) = (1 - epsilon) * |W[i, j]| ** (1 / temperature) / (sum over j')  +  epsilon / (number of features)

    and goes on at the row that produces feature ``j``.

    Args:
        num_paths: walks a step; 50 where ``density`` is not given either, and with ``density`` by default four times as
            many as the largest row set.
        density: every row set then has so many rows: those that the first walks come by, and where the walks visit
            fewer, others as well, uniformly without replacement.
        temperature: above 0; towards 0 a walk takes the largest weight, and the higher it is the more it takes any.
        epsilon: from 0 to 1, the probability of a uniform step.
        min_rows: a row set with fewer rows is filled up to so many, uniformly without replacement.
        start: at which rows of an output weight walks start. ``"uniform"``; ``"gradient"``, in proportion to the last
            output gradient's magnitude, sum over the batch of ``|g|``; ``"labels"``, as often as each row is a label
            given to ``sparse_model.start_from(labels)`` before the forward (a classifier's head, a vocabulary); or a
            weight per row, for several output weights by their names. ``"loss"`` is the walk in full, with
            ``transform(examples=...)``: walks start at pairs of an example ``b`` and an output unit ``o``,

                p(b) ~ sum over o of |g[b, o]|        p(o | b) ~ |g[b, o]| ** (1 / temperature)        g = dL/dy

            so that one draw, in the backward pass, gives the examples and, through the weights, the rows; the other
            starts are what is left of it where the examples are all kept and ``g`` is not yet known. It needs a
            ``density``, and a model whose outputs are those of one linear call.
        unbiased: divide a row's output gradient by the probability with which the row is in its set, so that the
            expected gradient is the dense one. The probability is exact: that of the drawn walks, given where they
            stood one weight above. It needs a model whose weights form a tree (no residual additions, no weight used
            twice) and row sets as the walks visit them (no ``density``, ``min_rows`` at most 1, new rows at every
            step).

    Source: the weight graph's random walks are this library's own; importance weighting is Horvitz & Thompson, "A
    Generalization of Sampling Without Replacement from a Finite Universe", JASA 1952.
    """

    num_paths: int | None = None
    density: Densities | None = None
    temperature: float = 1.0
    epsilon: float = 0.0
    min_rows: int = 1
    start: Start = "uniform"
    unbiased: bool = False

    def __post_init__(self) -> None:
        if self.num_paths is not None:
            check_number("num_paths", self.num_paths, Integral, 1)
        if self.density is not None:
            check_densities(self.density)
        check_number("temperature", self.temperature, Real, 0, above=True)
        check_number("epsilon", self.epsilon, Real, 0, 1)
        check_number("min_rows", self.min_rows, Integral, 0)
        if self.start is None or (isinstance(self.start, str) and self.start not in STARTS):
            raise ValueError(
                f"start must be one of {', '.join(map(repr, STARTS))} or weights per row, got {self.start!r}."
            )
        check_flag("unbiased", self.unbiased)
        floored = isinstance(self, AdaptiveWalk | LearnedWalk)
        if self.unbiased and isinstance(self.start, str) and not (self.start == "uniform" or floored):
            raise ValueError(
                f"unbiased=True with start={self.start!r}: a row at which no walk can start would never have a "
                "gradient. "
                'Use start="uniform", or weights that are all above zero.'
            )
        if self.unbiased and (self.density is not None or self.min_rows > 1):
            raise ValueError(
                "unbiased=True knows the probability of a row that walks visit, not of one that is added: it needs "
                "num_paths in place of density, and min_rows at most 1. Uniform and Magnitude are unbiased at any "
                "density."
            )


STARTS = ("uniform", "gradient", "labels", "loss")


@dataclass(frozen=True, repr=False)
class AdaptiveWalk(RandomWalk):
    """Walks that also follow the gradient that each row was last seen to have.

    With ``s`` the running mean of each row's output-gradient magnitude, which a backward pass sees for every row at no
    further product,

        s[r]     = memory * s[r] + (1 - memory) * sum over the batch of |g[., r]|        after each backward
        p(j | i) ~ |W[i, j]| ** (1 / temperature) * (s[j] / mean(s) + floor) ** power

    where ``s[j]`` is that of the row which produces feature ``j``. The input gradient of a row-sparse call is then
    computed in all its columns (a plain walk's is confined to those that are read). ``s`` is a part of
    ``sampler_state``.

    Args:
        power: how sharply the walks follow ``s``; 0 is a plain walk.
        memory: from 0 to below 1.
        floor: above 0; what keeps rows in play whose gradient was zero.
        others: as for ``RandomWalk``; ``start="gradient"`` here follows ``(s / mean(s) + floor) ** power``.
    """

    start: Start = "gradient"
    power: float = 4.0
    memory: float = 0.9
    floor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("power", self.power, Real, 0)
        check_number("memory", self.memory, Real, 0, 1)
        if self.memory == 1:
            raise ValueError("memory must be below 1: with 1 nothing new is ever remembered.")
        check_number("floor", self.floor, Real, 0, above=True)


@dataclass(frozen=True, repr=False)
class LearnedWalk(RandomWalk):
    """Walks that learn from the rows they chose: a bandit with an optimistic start.

    Each row has a preference ``q``, at first ``optimism``. After a step with the row set ``R`` the *usefulness* of its
    rows is their share of the gradient, ``u[r] = m[r] / mean(m[R])`` with ``m[r]`` the sum over the batch of ``|g[.,
    r]|``, and

        q[r] = q[r] + rate * (u[r] - q[r])               r in R
        q[r] = q[r] + forget * (optimism - q[r])         other rows: what was once useless may no longer be
        p(j | i) ~ |W[i, j]| ** (1 / temperature) * max(q[j], floor) ** power

    Only the gradient of the chosen rows is looked at, so that a step costs what a plain walk's does. ``q`` is a part of
    ``sampler_state``.

    Args:
        rate, forget: from 0 to 1.    optimism: above 0; useful rows have ``u = 1`` on average.
        power, floor: as for ``AdaptiveWalk``; ``start="gradient"`` here follows ``max(q, floor) ** power``.

    Source: R. Sutton & A. Barto, *Reinforcement Learning*, 2nd ed., 2018: constant step size (equation 2.5) and
    optimistic initial values (section 2.6). Forgetting towards the optimistic value is this library's own.
    """

    power: float = 4.0
    rate: float = 0.3
    forget: float = 0.003
    optimism: float = 2.0
    floor: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("power", self.power, Real, 0)
        check_number("rate", self.rate, Real, 0, 1)
        check_number("forget", self.forget, Real, 0, 1)
        check_number("optimism", self.optimism, Real, 0, above=True)
        check_number("floor", self.floor, Real, 0, above=True)


@dataclass(frozen=True, repr=False)
class TopK(Worded):
    """The rows with the largest gradient of this very step, chosen in the backward pass:

        R = the K rows with the largest sum over the batch of |g[., r]|

    which is meProp's unified rule. What a call hands on is already confined to its rows when the call before it
    chooses. ``sparse_model.rows`` is that of the last backward.

    Source: X. Sun, X. Ren, S. Ma, H. Wang, "meProp: Sparsified Back Propagation for Accelerated Deep Learning with
    Reduced Overfitting", ICML 2017.
    """

    density: Densities

    def __post_init__(self) -> None:
        check_densities(self.density)


@dataclass(frozen=True, repr=False)
class Uniform(Worded):
    """Rows drawn uniformly without replacement, K of O: the control of every other choice.

    Args:
        unbiased: multiply a kept row's output gradient by ``O / K``, the exact inverse of its probability, so that the
            expected gradient is the dense one; no gradient may pass a weight twice.
    """

    density: Densities
    unbiased: bool = False

    def __post_init__(self) -> None:
        check_densities(self.density)
        check_flag("unbiased", self.unbiased)


@dataclass(frozen=True, repr=False)
class Magnitude(Worded):
    """Rows drawn without replacement by the size of their weights, K of O.

    Row ``r`` is in the set with probability

        p[r] = min(1, c * |W[r]| ** power)        |W[r]| the Euclidean norm, c such that the p add up to K

    drawn by systematic sampling in random order, which has exactly these probabilities. ``power=0`` is uniform; a
    large one keeps the rows with the largest norms.

    Args:
        refresh: compute the norms anew, and draw a new order, every so many steps (under a schedule at every step).
        unbiased: divide a kept row's output gradient by ``p[r]``; no gradient may pass a weight twice.

    Source: W. Madow, "On the Theory of Systematic Sampling, II", Annals of Mathematical Statistics 1949; in random
    order: H. Hartley & J. Rao, "Sampling with Unequal Probabilities and without Replacement", ibid. 1962.
    """

    density: Densities
    power: float = 1.0
    refresh: int = 20
    unbiased: bool = False

    def __post_init__(self) -> None:
        check_densities(self.density)
        check_flag("unbiased", self.unbiased)
        check_number("power", self.power, Real, 0)
        check_number("refresh", self.refresh, Integral, 1)


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        TypeError: names it.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


Policy = RandomWalk | TopK | Uniform | Magnitude


def check_densities(density: Any) -> None:
    """Refuse what is no density, schedule, or mapping from names to either.

    Raises:
        TypeError, ValueError: says what was met.
    """
    if not isinstance(density, Mapping):
        check_density("density", density)
        return
    if not density:
        raise ValueError("density is an empty mapping: it must name at least one weight or module.")
    for name, of in density.items():
        if not isinstance(name, str):
            raise TypeError(f"density must map names of weights or modules (str) to densities, got the name {name!r}.")
        check_density(f"density[{name!r}]", of)
