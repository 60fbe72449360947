"""The sparsified model: a ``GraphModule`` whose weights are stored as their non-zeros."""

from typing import Any

from rwfx.sparse_weight import SparseWeight
from rwfx.sparsity_report import SparsityLine, SparsityReport
from rwfx.two_graphs import TwoGraphs


class SparsifiedModule(TwoGraphs):
    """What ``rwfx.sparsify`` returns.

    Attributes:
        settings: how it was made: density, init, growth, values, seed, and the route by which it was captured.
    """

    lines: tuple[SparsityLine, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def sparse_weights(self) -> dict[str, SparseWeight]:
        """The weights that are stored as non-zeros, by the names of the dense ones, each once."""
        return {path: module for path, module in self.named_modules() if isinstance(module, SparseWeight)}

    @property
    def nnz(self) -> int:
        """The non-zeros of all sparse weights."""
        return sum(weight.nnz for weight in self.sparse_weights.values())

    @property
    def report(self) -> SparsityReport:
        """What is stored as non-zeros, what stayed dense and why."""
        return SparsityReport.of(self.lines, self.sparse_weights, self.settings, self.notes)
