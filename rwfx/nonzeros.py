"""Non-zeros: where a sparse weight has its numbers, as keys and as the index that products read.

A weight has ``O`` rows and ``I`` columns; a convolution's columns are its input channel and kernel places, flattened.
A *key* is the place of one number, ``column * O + row``. The keys of a weight are sorted and distinct, so its numbers
lie column by column, as in ``torch.sparse_csc``: ``dx = W^T g`` and ``dW`` read them as they lie, and ``y = W x`` by
rows, through an order kept beside.

``rwfx::columns_of``, ``rwfx::rows_of`` and ``rwfx::keys_of`` are operators: here for every device, by sorting, and on a
CPU in ``rwfx/native/index.cpp``, by a few passes over keys, rows and columns.

Axes: N non-zeros, O rows, I columns.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from rwfx.keys import distinct_keys, replaced

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define("columns_of(Tensor keys, SymInt rows, SymInt columns) -> (Tensor, Tensor)")
_library.define("rows_of(Tensor ccol_indices, Tensor row_indices, SymInt rows) -> (Tensor, Tensor, Tensor)")
_library.define("keys_of(Tensor ccol_indices, Tensor row_indices, SymInt rows) -> Tensor")

LARGEST = 2**31 - 1
"""Rows, columns and non-zeros are counted in int32."""


class Index(NamedTuple):
    """The same places by columns and by rows, int32."""

    ccol_indices: Tensor  # (I + 1,): the numbers of column i are ccol_indices[i] to ccol_indices[i + 1]
    row_indices: Tensor  # (N,)
    crow_indices: Tensor  # (O + 1,)
    col_indices: Tensor  # (N,), row by row
    order: Tensor  # (N,): the number at col_indices[n] is number order[n] of the columns


def index_of(keys: Tensor, rows: int, columns: int) -> Index:
    """The index of keys ``(N,)`` int64; that they are sorted, distinct and below ``rows * columns`` is a promise.

    Raises:
        ValueError: by the kernels, where keys are out of order or beyond; repeated ones are not looked for.
    """
    by_columns = columns_of(keys, rows, columns)
    return Index(*by_columns, *rows_of(*by_columns, rows))


def columns_of(keys: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The index by columns alone, ``ccol_indices`` and ``row_indices``."""
    return torch.ops.rwfx.columns_of.default(keys, rows, columns)


def rows_of(ccol_indices: Tensor, row_indices: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The index by rows, from that by columns: ``crow_indices``, ``col_indices`` and ``order``."""
    return torch.ops.rwfx.rows_of.default(ccol_indices, row_indices, rows)


def keys_of(ccol_indices: Tensor, row_indices: Tensor, rows: int) -> Tensor:
    """The keys of an index, ``(N,)`` int64: the inverse of ``index_of``."""
    return torch.ops.rwfx.keys_of.default(ccol_indices, row_indices, rows)


def draw_keys(rows: int, columns: int, count: int, generator: Generator | None = None) -> Tensor:
    """``count`` of all ``rows * columns`` places, every set of so many equally likely: G(n, M).

    Takes time and memory in proportion to ``count``: no list of all places, no mask. A place is drawn again where it
    has been drawn before; a set of more than half is what a smaller set leaves.
    """
    places = rows * columns
    if count > places // 2:
        left_out = draw_keys(rows, columns, places - count, generator)
        kept = torch.ones(places, dtype=torch.bool, device="cpu").index_fill_(0, left_out, False)
        return kept.nonzero().flatten()
    keys = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(keys) < count:
        missing = count - len(keys)
        # A few more than are missing: drawn places repeat. Those too many are taken out at random, which favours none.
        more = torch.randint(places, (missing + missing // 8 + 8,), generator=generator, device="cpu")
        keys = distinct_keys(torch.cat([keys, more]))
    surplus = len(keys) - count
    if surplus:
        out = torch.randperm(len(keys), generator=generator, device="cpu")[:surplus]
        keys = replaced(keys, out.sort().values, keys[:0])
    return keys


def check_size(rows: int, columns: int, nnz: int, name: str) -> None:
    """Refuse a weight that int32 cannot count.

    Raises:
        ValueError: names it.
    """
    if max(rows, columns, nnz) > LARGEST:
        raise ValueError(
            f"weight {name!r} has {rows} rows, {columns} columns and {nnz} non-zeros; at most {LARGEST} can be counted."
        )


def _starts(sorted_or_not: Tensor, size: int) -> Tensor:
    """Where each of ``size`` groups starts when the members are sorted by group."""
    counts = torch.bincount(sorted_or_not, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _columns_of(keys: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return _starts(keys // rows, columns).to(torch.int32), (keys % rows).to(torch.int32)


def _rows_of(ccol_indices: Tensor, row_indices: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    row = row_indices.long()
    order = row.argsort(stable=True)
    by_rows = _starts(row, rows), _column_of_each(ccol_indices, len(row))[order], order
    crow_indices, col_indices, order = (part.to(torch.int32) for part in by_rows)
    return crow_indices, col_indices, order


def _keys_of(ccol_indices: Tensor, row_indices: Tensor, rows: int) -> Tensor:
    return _column_of_each(ccol_indices, len(row_indices)) * rows + row_indices


def _column_of_each(ccol_indices: Tensor, count: int) -> Tensor:
    counts = ccol_indices.long().diff()
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=count)


_library.impl("columns_of", _columns_of, "CompositeExplicitAutograd")
_library.impl("rows_of", _rows_of, "CompositeExplicitAutograd")
_library.impl("keys_of", _keys_of, "CompositeExplicitAutograd")


@torch.library.register_fake("rwfx::columns_of", lib=_library)
def _(keys: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return keys.new_empty(columns + 1, dtype=torch.int32), keys.new_empty(len(keys), dtype=torch.int32)


@torch.library.register_fake("rwfx::rows_of", lib=_library)
def _(ccol_indices: Tensor, row_indices: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return row_indices.new_empty(rows + 1), torch.empty_like(row_indices), torch.empty_like(row_indices)


@torch.library.register_fake("rwfx::keys_of", lib=_library)
def _(ccol_indices: Tensor, row_indices: Tensor, rows: int) -> Tensor:
    return torch.empty_like(row_indices, dtype=torch.int64)
