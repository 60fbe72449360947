"""The transformed model: a ``GraphModule`` that trains on row sets and evaluates as the original does."""

from torch import nn

from rwfx.passes.sample_rows import SAMPLER
from rwfx.passes.sparse_examples import EXAMPLES
from rwfx.transformed import Transformed
from rwfx.two_graphs import TwoGraphs


class SparseModule(Transformed, TwoGraphs):
    """What ``rwfx.transform`` returns where a graph holds the forward pass.

    In train mode ``graph`` runs: it draws row sets and its backward is confined to them. In eval mode ``eval_graph``
    runs, the original's forward as it was traced.
    """


def check_names(host: nn.Module) -> None:
    """Refuse a model whose parts have names that a transformed model needs itself.

    Raises:
        ValueError: names the part and what to do.
    """
    about = ("lines", "settings", "notes", "meta", SAMPLER, EXAMPLES)
    for name in (*host._modules, *host._parameters, *host._buffers):
        if hasattr(SparseModule, name) or name in about:
            raise ValueError(
                f"the model has a part named {name!r}, which is an attribute of every transformed model. Rename it, or "
                "put the model into a module of its own."
            )
