"""The last pass: what the others promised is looked at before a model is handed out."""

from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule

from rwfx.passes.sample_rows import RowNodes
from rwfx.passes.sparse_backward import MASKED, SPARSE

ROW_OPS = {*SPARSE.values(), *MASKED.values()}


def verify(gm: GraphModule, model: nn.Module, rows: Mapping[str, RowNodes]) -> GraphModule:
    """Give ``gm`` back if it shares the model's parameters and draws every row set that it uses, and only those.

    Raises:
        AssertionError: a pass broke its promise; nothing has been handed out.
    """
    gm.graph.lint()
    # A set of all rows is a constant of the model.
    sets = [node.args[3] for node in gm.graph.nodes if node.target in ROW_OPS]
    used = {node.name for node in sets if node.op != "get_attr"}
    drawn = {of.rows for of in rows.values()}
    assert used == drawn, f"row sets drawn {sorted(drawn)}, used {sorted(used)}"
    original = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        assert original.get(name) is parameter, f"parameter {name!r} is not the model's own"
    return gm
