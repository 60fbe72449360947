"""Non-zeros: where a sparse weight has its numbers, as keys and as the index that products read.

A weight has ``O`` rows and ``I`` columns; a convolution's columns are its input channel and kernel places, flattened.
A *key* is the place of one number, ``column * O + row``. The keys of a weight are sorted and distinct, so its numbers
lie column by column, as in ``torch.sparse_csc``: ``dx = W^T g`` and ``dW`` read them as they lie, and ``y = W x`` by
rows, through an order kept beside.

``rwfx::index_of``, ``rwfx::find_keys``, ``rwfx::merge_keys`` and ``rwfx::distinct_keys`` are operators: here for every
device, by sorting and bisection, and on a CPU in ``rwfx/native/keys.cpp``, by a few passes over keys, rows and columns.

Axes: N non-zeros, O rows, I columns, M keys that are asked for.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define("index_of(Tensor keys, SymInt rows, SymInt columns) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define("find_keys(Tensor keys, Tensor wanted) -> (Tensor, Tensor)")
_library.define("merge_keys(Tensor keys, Tensor others) -> Tensor")
_library.define("distinct_keys(Tensor drawn) -> Tensor")

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
        ValueError: by the kernels, where they see that they are not.
    """
    return Index(*torch.ops.rwfx.index_of.default(keys, rows, columns))


def columns_of(keys: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The index by columns alone, ``ccol_indices`` and ``row_indices``."""
    return _starts(keys // rows, columns).to(torch.int32), (keys % rows).to(torch.int32)


def keys_of(ccol_indices: Tensor, row_indices: Tensor, rows: int) -> Tensor:
    """The keys of an index, ``(N,)`` int64: the inverse of ``index_of``."""
    counts = ccol_indices.long().diff()
    col = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(row_indices))
    return col * rows + row_indices


def largest(sizes: Tensor, count: int) -> Tensor:
    """The places of the ``count`` largest, in order."""
    return sizes.topk(count, sorted=False).indices.sort().values


def without(keys: Tensor, others: Tensor) -> Tensor:
    """Those of ``keys`` that are not among ``others``; both sorted and distinct."""
    return keys[~find_keys(others, keys)[0]]


def find_keys(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Which of ``wanted``, ``(M,)`` in any order, are among ``keys``, sorted and distinct, and where.

    Of one that is not there the place is where it would be, or the last: something may be read there.
    """
    return torch.ops.rwfx.find_keys.default(keys, wanted)


def merge_keys(keys: Tensor, others: Tensor) -> Tensor:
    """Both together, sorted, of sorted ones."""
    return torch.ops.rwfx.merge_keys.default(keys, others)


def distinct_keys(drawn: Tensor) -> Tensor:
    """Keys in any order, not negative, sorted and each once."""
    return torch.ops.rwfx.distinct_keys.default(drawn)


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
        keys = keys[torch.ones(len(keys), dtype=torch.bool, device="cpu").index_fill_(0, out, False)]
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


def _index_of(keys: Tensor, rows: int, columns: int) -> tuple[Tensor, ...]:
    col, row = keys // rows, keys % rows
    order = row.argsort(stable=True)
    by_rows = _starts(row, rows), col[order], order
    return (*columns_of(keys, rows, columns), *(part.to(torch.int32) for part in by_rows))


def _find_keys(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    if not len(keys):
        return torch.zeros_like(wanted, dtype=torch.bool), torch.zeros_like(wanted)
    place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return keys[place] == wanted, place


def _merge_keys(keys: Tensor, others: Tensor) -> Tensor:
    return torch.cat([keys, others]).sort().values


_library.impl("index_of", _index_of, "CompositeExplicitAutograd")
_library.impl("find_keys", _find_keys, "CompositeExplicitAutograd")
_library.impl("merge_keys", _merge_keys, "CompositeExplicitAutograd")
_library.impl("distinct_keys", torch.unique, "CompositeExplicitAutograd")


@torch.library.register_fake("rwfx::index_of", lib=_library)
def _(keys: Tensor, rows: int, columns: int) -> tuple[Tensor, ...]:
    return tuple(keys.new_empty(n, dtype=torch.int32) for n in (columns + 1, len(keys), rows + 1, len(keys), len(keys)))


@torch.library.register_fake("rwfx::find_keys", lib=_library)
def _(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(wanted, dtype=torch.bool), torch.empty_like(wanted)


@torch.library.register_fake("rwfx::merge_keys", lib=_library)
def _(keys: Tensor, others: Tensor) -> Tensor:
    return keys.new_empty(len(keys) + len(others))


@torch.library.register_fake("rwfx::distinct_keys", lib=_library)
def _(drawn: Tensor) -> Tensor:
    return drawn.new_empty(torch.library.get_ctx().new_dynamic_size())
