"""Operators on rows: each a dense PyTorch operator that computes, in its backward pass, some rows only.

They know tensors and row sets, and nothing of graphs or models.
"""

from rwfx import native
from rwfx.ops.conv import masked_conv, row_conv
from rwfx.ops.examples import pick_examples
from rwfx.ops.experts import masked_grouped_mm, row_grouped_mm
from rwfx.ops.grouped_mm import grouped_mm
from rwfx.ops.linear import masked_linear, row_linear
from rwfx.ops.magnitude import draw_by_norm
from rwfx.ops.observe import observe_, record_, top_rows
from rwfx.ops.remember import remember
from rwfx.ops.row_gradient import keep_parts, keep_rows, pack_rows, take_rows
from rwfx.ops.sparse_conv import sparse_conv
from rwfx.ops.sparse_linear import sparse_linear
from rwfx.ops.walk import walk

__all__ = [
    "draw_by_norm",
    "grouped_mm",
    "keep_parts",
    "keep_rows",
    "masked_conv",
    "masked_grouped_mm",
    "masked_linear",
    "observe_",
    "pack_rows",
    "pick_examples",
    "record_",
    "remember",
    "row_conv",
    "row_grouped_mm",
    "row_linear",
    "sparse_conv",
    "sparse_linear",
    "take_rows",
    "top_rows",
    "walk",
]

native.load_if_built()
