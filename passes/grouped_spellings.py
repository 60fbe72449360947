"""The spellings of a grouped product with a stack of matrices, as experts have (``rwfx.passes.spellings``).

All become ``rwfx::grouped_mm(x, weight, offsets, by)``, the weight ``(E, I, O)``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

import rwfx.ops  # noqa: F401  defines the operator named below
from rwfx.passes.spellings import Call, Spelling, operands_of

GROUPED = torch.ops.rwfx.grouped_mm.default


def _grouped_mm(gm: GraphModule, node: Node) -> Call | None:
    names = ("mat_a", "mat_b") if node.target is F.grouped_mm else ("self", "mat2")
    given = operands_of(node, **dict.fromkeys((*names, "offs", "bias", "out_dtype")))
    if given is None or given["offs"] is None or given["bias"] is not None or given["out_dtype"] is not None:
        return None
    return Call(GROUPED, given[names[0]], given[names[1]], given["offs"], ("grouped_mm",))


def _group_by_group(gm: GraphModule, node: Node) -> Call | None:
    """What transformers calls where a graph is captured in another type than bfloat16."""
    given = operands_of(node, input=None, weight=None, offs=None)
    return Call(GROUPED, *given.values(), ("mm",)) if given else None


GROUPED_CALLS: dict[Any, Spelling] = {
    F.grouped_mm: _grouped_mm,
    torch._grouped_mm: _grouped_mm,
    torch.ops.aten._grouped_mm.default: _grouped_mm,
    # By name: they are defined where transformers is imported.
    "transformers.grouped_mm_fallback": _group_by_group,
    "transformers.grouped_mm_fallback.default": _group_by_group,
}
