"""The last pass: what the others promised is looked at before a model is handed out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from rwfx.capture import untouched
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


def same_outputs(model: nn.Module, transformed: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether both give the same outputs, bit for bit, from the same random stream, in their present mode.

    Buffers and the global random stream are left as they were.
    """
    outputs = []
    for module in (model, transformed):
        with untouched(module):
            outputs.append(module(*args, **kwargs))
    first, second = ([x for x in tree_flatten(output)[0] if isinstance(x, Tensor)] for output in outputs)
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
