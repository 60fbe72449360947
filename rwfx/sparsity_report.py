"""The report of a sparsified model: what is stored as non-zeros, and what stayed dense and why."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from rwfx.native import loaded
from rwfx.sparse_flops import SparseFlops, Use, flops_of
from rwfx.sparse_weight import SparseWeight


@dataclass(frozen=True)
class SparsityLine:
    """One parameter with two dimensions or more."""

    weight: str
    shape: tuple[int, ...]  # (O, ...), rows first
    dense_because: str = ""  # empty: it is stored as non-zeros
    nnz: int | None = None
    by: str = ""  # how its products are computed
    transposed: bool = False  # whether the model stores it the other way round
    calls: int = 0  # how many linear calls and convolutions of a forward pass use it
    input_grads: int = 0  # how many of them have an input that needs a gradient
    places: float | None = 1  # of an example, at which a call multiplies it, on average; None: not known

    @property
    def use(self) -> Use | None:
        """What calls on it multiply; None where ``places`` is not known."""
        if self.places is None:
            return None
        size = prod(self.shape)
        at = self.calls * self.places, self.input_grads * self.places
        return Use(size if self.nnz is None else self.nnz, size, self.nnz is not None, self.by or "dense", *at)


@dataclass(frozen=True)
class SparsityReport:
    """What became of each weight."""

    lines: tuple[SparsityLine, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        lines: tuple[SparsityLine, ...],
        weights: Mapping[str, SparseWeight],
        settings: Mapping[str, Any],
        notes: tuple[str, ...],
    ) -> "SparsityReport":
        """The lines with what the weights are now."""
        now = (
            replace(line, nnz=of.nnz, by=_products(of)) if (of := weights.get(line.weight)) is not None else line
            for line in lines
        )
        return cls(tuple(now), settings, notes)

    @property
    def nnz(self) -> int:
        """The non-zeros of all sparse weights."""
        return sum(line.nnz for line in self.lines if line.nnz is not None)

    @property
    def density(self) -> float:
        """The share of their places that has one."""
        return self.nnz / sum(prod(line.shape) for line in self.lines if line.nnz is not None)

    @property
    def flops(self) -> SparseFlops | None:
        """The operations of a training step and an example; None where a convolution's places are not known."""
        return flops_of([line.use for line in self.lines if line.calls])

    def __str__(self) -> str:
        wide = max(len(line.weight) for line in self.lines)
        rows = [f"{'weight':<{wide}}  {'shape':>16}  {'non-zeros':>12}  density  products"]
        for line in self.lines:
            shape = " x ".join(map(str, line.shape))
            if line.nnz is None:
                rows.append(f"{line.weight:<{wide}}  {shape:>16}  {'all':>12}     100%  dense: {line.dense_because}")
                continue
            share = line.nnz / prod(line.shape)
            by = {"nonzeros": "of the non-zeros", "dense": "dense, of a weight filled for the call"}[line.by]
            rows.append(f"{line.weight:<{wide}}  {shape:>16}  {line.nnz:>12,}  {share:7.2%}  {by}")
        rows.append(f"{self.nnz:,} non-zeros, {self.density:.2%} of the sparse weights' places")
        rows.append(_flops_text(self.flops))
        return "\n".join([*rows, *self.notes])


def _products(weight: SparseWeight) -> str:
    """How a weight's products are computed: convolutions with the non-zeros alone only by the CPU kernels."""
    kernels = len(weight.shape) == 2 or (weight.values.device.type == "cpu" and loaded())
    return weight.by if kernels else "dense"


def _flops_text(flops: SparseFlops | None) -> str:
    if flops is None:
        return "FLOPs of a step: not known; example_inputs would tell at how many places a convolution multiplies"
    step, dense = flops.executed("static"), flops.executed_dense
    return (
        f"FLOPs of a training step and an example: {step:,.0f} of {dense:,.0f} ({step / dense:.1%}); by the published "
        f"formula {flops.published('static'):,.0f} of {flops.published('dense'):,.0f}"
    )
