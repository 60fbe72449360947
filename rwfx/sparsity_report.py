"""The report of a sparsified model: what is stored as non-zeros, and what stayed dense and why."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

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
            replace(line, nnz=weights[line.weight].nnz, by=weights[line.weight].by) if line.weight in weights else line
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

    def __str__(self) -> str:
        wide = max(len(line.weight) for line in self.lines)
        rows = [f"{'weight':<{wide}}  {'shape':>16}  {'non-zeros':>12}  density  products"]
        for line in self.lines:
            shape = " x ".join(map(str, line.shape))
            if line.nnz is None:
                rows.append(f"{line.weight:<{wide}}  {shape:>16}  {'all':>12}     100%  dense: {line.dense_because}")
                continue
            share = line.nnz / prod(line.shape)
            by = {"nonzeros": "of the non-zeros", "dense": "dense, masked: faster at this density"}[line.by]
            rows.append(f"{line.weight:<{wide}}  {shape:>16}  {line.nnz:>12,}  {share:7.2%}  {by}")
        rows.append(f"{self.nnz:,} non-zeros, {self.density:.2%} of the sparse weights' places")
        return "\n".join([*rows, *self.notes])
