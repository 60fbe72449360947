"""What a backward pass may note of an output's gradient: the magnitudes of its rows, and the choice of the largest.

The *magnitude* of a row is the sum over the batch of its output gradient's absolute values, by which meProp's unified
rule keeps rows (Sun et al. 2017). It is summed in float32, whatever the gradient's type.

These are the implementations for every device; ``rwfx/native/linear.cpp`` has those for a CPU.

Axes: B the leading dimensions flattened, O rows of the weight, K rows of the set.
"""

import torch
from torch import Tensor

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define("observe_(Tensor(a!) seen, Tensor g, Tensor? rows=None) -> ()")
_library.define("top_rows(Tensor g, SymInt count) -> Tensor")
_library.define("record_(Tensor(a!) chosen, Tensor rows) -> ()")


def observe_(seen: Tensor, g: Tensor, rows: Tensor | None = None) -> None:
    """``seen[r] = sum over B of |g[b, r]|`` for each ``r`` of ``rows``; the others keep their value.

    Args:
        seen: ``(O,)`` float32, overwritten.
        g: ``(*, O)``, any leading shape, floating point.
        rows: ``(K,)`` int64, sorted, no repeats; None: all rows.
    """
    torch.ops.rwfx.observe_.default(seen, g, rows)


def top_rows(g: Tensor, count: int) -> Tensor:
    """The ``count`` rows with the largest ``sum over B of |g[b, r]|``, ``(count,)`` int64, sorted.

    Of equal rows the lower is taken. A magnitude that is not finite counts as the largest, so that a gradient that is
    nan reaches the weights, as it does in a dense backward pass.

    Args:
        g: ``(*, O)``, any leading shape, floating point; ``(O,)`` may be what ``observe_`` wrote.
        count: from 0 to ``O``.

    Raises:
        ValueError: ``count`` is out of its range.
    """
    return torch.ops.rwfx.top_rows.default(g, count)


def record_(chosen: Tensor, rows: Tensor) -> None:
    """Write a row set into a buffer: ``chosen[0] = K``, ``chosen[1:K + 1] = rows``, zeros behind.

    Args:
        chosen: ``(O + 1,)`` int64, overwritten.    rows: ``(K,)`` int64.
    """
    torch.ops.rwfx.record_.default(chosen, rows)


def rows_of_step(g_BO: Tensor, rows: Tensor, seen: Tensor | None, seen_all: bool, chosen: Tensor | None) -> Tensor:
    """The row set of a backward pass with the output gradient ``g_BO``: ``rows``, or as many chosen here.

    ``seen`` gets the magnitudes of all rows, or of the row set alone; ``chosen`` the rows that were chosen.
    """
    size_O = None
    if seen is not None and seen_all:
        observe_(seen, g_BO)
        size_O = seen
    if chosen is not None:
        rows = top_rows(g_BO if size_O is None else size_O, rows.shape[0])
        record_(chosen, rows)
    if seen is not None and not seen_all:
        observe_(seen, g_BO, rows)
    return rows


def _observe(seen: Tensor, g: Tensor, rows: Tensor | None = None) -> None:
    g_BO = g.reshape(-1, g.shape[-1])
    if rows is None:
        seen.copy_(_magnitudes(g_BO))
    else:
        seen.index_copy_(0, rows, _magnitudes(g_BO.index_select(1, rows)))


def _top_rows(g: Tensor, count: int) -> Tensor:
    if not 0 <= count <= g.shape[-1]:
        raise ValueError(f"top_rows takes from 0 to all {g.shape[-1]} rows, got count={count}.")
    size_O = _magnitudes(g.reshape(-1, g.shape[-1]))
    size_O = size_O.where(size_O.isfinite(), torch.inf)
    # Not topk, which takes any of equal rows.
    return size_O.sort(descending=True, stable=True).indices[:count].sort().values


def _record(chosen: Tensor, rows: Tensor) -> None:
    chosen.zero_()
    chosen[:1].fill_(len(rows))  # not chosen[0] = K, a copy from the CPU that a GPU's step would wait for
    chosen[1 : len(rows) + 1] = rows


def _magnitudes(g_BO: Tensor) -> Tensor:
    return g_BO.abs().sum(0, dtype=torch.float32)


_library.impl("observe_", _observe, "CompositeExplicitAutograd")
_library.impl("top_rows", _top_rows, "CompositeExplicitAutograd")
_library.impl("record_", _record, "CompositeExplicitAutograd")

torch.library.register_fake("rwfx::observe_", lambda seen, g, rows=None: None, lib=_library)
torch.library.register_fake("rwfx::top_rows", lambda g, count: g.new_empty(count, dtype=torch.int64), lib=_library)
torch.library.register_fake("rwfx::record_", lambda chosen, rows: None, lib=_library)
