"""The transformed model: a ``GraphModule`` that trains on row sets and evaluates as the original does."""

from rwfx.transformed import Transformed
from rwfx.two_graphs import TwoGraphs


class SparseModule(Transformed, TwoGraphs):
    """What ``rwfx.transform`` returns where a graph holds the forward pass.

    In train mode ``graph`` runs: it draws row sets and its backward is confined to them. In eval mode ``eval_graph``
    runs, the original's forward as it was traced.
    """
