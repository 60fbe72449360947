"""What a training step of an always-sparse model takes in products of matrices: as published, and as executed.

In: a ``Use`` of each weight by the model's linear calls and convolutions. Out: floating point operations of a step and
an example, a multiply-add counting two. Other products, as those of attention, are the same for every method and are
not counted.

A forward pass takes ``2 p n`` of a weight that calls use at p places of an example, with n numbers. With ``f_S`` for
that of all non-zeros and ``f_D`` for that of all places, an update of the topology every T steps, and ``gamma``
candidates for each non-zero, a step takes in the mean

    static, SET   3 f_S
    RigL          (3 f_S T + 2 f_S + f_D) / (T + 1)            Evci et al. 2020
    GSE           (3 f_S T + (2 + gamma) f_S) / (T + 1)        by the same counting
    SNFS          2 f_S + f_D                                  Evci et al. 2020
    Top-KAST      2 f_S + min(f_D, (1 + gamma) f_S)            by the same counting
    dense         3 f_D

These take an update for a step of its own, every product for one with the non-zeros alone, and the first layer for one
that gives its input a gradient. What is *executed* differs in all three: a weight whose products are dense at its
density takes f_D, an input that needs no gradient gets none, and a step that updates the topology trains as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PUBLISHED: Mapping[str, Callable[[float, float, int, float], float]] = {
    "static": lambda f_S, f_D, T, gamma: 3 * f_S,
    "set": lambda f_S, f_D, T, gamma: 3 * f_S,
    "gradual": lambda f_S, f_D, T, gamma: 3 * f_S,
    "rigl": lambda f_S, f_D, T, gamma: (3 * f_S * T + 2 * f_S + f_D) / (T + 1),
    "gse": lambda f_S, f_D, T, gamma: (3 * f_S * T + (2 + gamma) * f_S) / (T + 1),
    "snfs": lambda f_S, f_D, T, gamma: 2 * f_S + f_D,
    "topkast": lambda f_S, f_D, T, gamma: 2 * f_S + min(f_D, (1 + gamma) * f_S),
    "dense": lambda f_S, f_D, T, gamma: 3 * f_D,
}
"""A step of each method; of ``gradual`` one with the non-zeros that there are now."""

CANDIDATES: Mapping[str, Callable[[int, int, float], float]] = {
    "rigl": lambda n, places, gamma: places,
    # A weight with more than half of its places taken has all others as candidates.
    "gse": lambda n, places, gamma: min(gamma * n, places - n) if 2 * n <= places else places - n,
    "snfs": lambda n, places, gamma: places,
    "topkast": lambda n, places, gamma: min(gamma * n, places - n),
}
"""How many gradients a method computes of a weight to choose where it grows, beside those of its n non-zeros."""

EVERY_STEP = ("snfs", "topkast")
"""The methods that compute them at every step, not only where the topology changes."""


@dataclass(frozen=True)
class Use:
    """A weight, and what calls on it multiply."""

    nnz: int
    """Its non-zeros; of a dense weight all its places."""
    size: int
    """The places in it."""
    is_sparse: bool
    by: str
    """How its products are computed: ``"nonzeros"`` or ``"dense"``."""
    forward_places: float
    """The places of an example at which calls multiply it, all calls together."""
    input_places: float
    """Those of the calls whose input needs a gradient."""

    @property
    def multiplied(self) -> int:
        """The numbers that a product with it multiplies."""
        return self.nnz if self.by == "nonzeros" else self.size


@dataclass(frozen=True)
class SparseFlops:
    """The operations of a step and an example."""

    uses: tuple[Use, ...]

    @property
    def sparse_forward(self) -> float:
        """f_S: a forward pass of the non-zeros, and of what stayed dense. It is what inference takes, as published."""
        return sum(2 * use.forward_places * use.nnz for use in self.uses)

    @property
    def dense_forward(self) -> float:
        """f_D: a forward pass of the dense model."""
        return sum(2 * use.forward_places * use.size for use in self.uses)

    @property
    def executed_inference(self) -> float:
        """A forward pass, as executed."""
        return sum(2 * use.forward_places * use.multiplied for use in self.uses)

    def published(self, method: str, interval: int = 1000, gamma: float = 1.0) -> float:
        """A training step by the formula above.

        Raises:
            ValueError: there is none for ``method``.
        """
        _check(method)
        return PUBLISHED[method](self.sparse_forward, self.dense_forward, interval, gamma)

    def executed(self, method: str, interval: int = 1000, gamma: float = 1.0) -> float:
        """A training step, with its share of an update every ``interval`` steps, as executed.

        Raises:
            ValueError: ``method`` is not known.
        """
        _check(method)
        if method == "dense":
            return self.executed_dense
        step = sum(2 * (2 * use.forward_places + use.input_places) * use.multiplied for use in self.uses)
        every = 1 if method in EVERY_STEP else interval
        return step + self.candidates(method, gamma) / every

    @property
    def executed_dense(self) -> float:
        """A training step of the dense model, as executed."""
        return sum(2 * (2 * use.forward_places + use.input_places) * use.size for use in self.uses)

    def candidates(self, method: str, gamma: float = 1.0) -> float:
        """What choosing where to grow takes, each time: at most, as candidates that were drawn twice count once.

        Of a weight whose products are dense they are taken from all gradients.
        """
        if method not in CANDIDATES:
            return 0
        sparse = [use for use in self.uses if use.is_sparse]
        counts = [CANDIDATES[method](u.nnz, u.size, gamma) if u.by == "nonzeros" else u.size for u in sparse]
        return sum(2 * use.forward_places * count for use, count in zip(sparse, counts, strict=True))


def _check(method: str) -> None:
    if method not in PUBLISHED:
        raise ValueError(f"method must be one of {', '.join(map(repr, PUBLISHED))}, got {method!r}.")


def flops_of(uses: Sequence[Use | None]) -> SparseFlops | None:
    """The operations of a model; None where the places of a weight are not known."""
    known = [use for use in uses if use is not None]
    return SparseFlops(tuple(known)) if len(known) == len(uses) else None
