"""Row gradients: what a weight's gradient is when only some of its rows have one.

A *row gradient* is a coalesced hybrid ``torch.sparse_coo`` tensor with one sparse dimension, the rows:
indices ``(1, K)``, values ``(K, ...)``. It is the layout of the gradients of ``nn.Embedding(sparse=True)``;
its size and the time to make it grow with the rows kept, not with the weight.
"""

import torch
from torch import Tensor

from rwfx.ops.inductor import let_inductor_compare_sparse


@torch.library.custom_op("rwfx::take_rows", mutates_args=())
def take_rows(dense: Tensor, rows: Tensor) -> Tensor:
    """``rows`` of a dense gradient ``(O, ...)``, copied out as a row gradient of the same shape."""
    return row_gradient(rows.clone(), dense.index_select(0, rows), dense.shape[0])


@take_rows.register_fake
def _(dense, rows):
    let_inductor_compare_sparse()
    values = dense.new_empty((rows.shape[0], *dense.shape[1:]))
    return row_gradient(torch.empty_like(rows), values, dense.shape[0])


@torch.library.custom_op("rwfx::keep_rows", mutates_args=())
def keep_rows(parameter: Tensor, rows: Tensor) -> Tensor:
    """``parameter[rows]``, a copy ``(K, ...)``, whose gradient reaches the parameter as a row gradient."""
    return parameter.index_select(0, rows)


@keep_rows.register_fake
def _(parameter, rows):
    return parameter.new_empty((rows.shape[0], *parameter.shape[1:]))


@torch.library.custom_op("rwfx::keep_parts", mutates_args=())
def keep_parts(parameter: Tensor, rows: list[Tensor], firsts: list[int]) -> list[Tensor]:
    """``parameter[first:][rows]`` for each row set of a part, whose gradients reach the parameter as one row gradient.

    The parts do not overlap and come in the order of their first rows, ``firsts``.
    """
    return [parameter.index_select(0, rows_K + first) for rows_K, first in zip(rows, firsts, strict=True)]


@keep_parts.register_fake
def _(parameter, rows, firsts):
    return [parameter.new_empty((rows_K.shape[0], *parameter.shape[1:])) for rows_K in rows]


@torch.library.custom_op("rwfx::pack_rows", mutates_args=())
def pack_rows(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """The row gradient ``(num_rows, ...)`` with these ``values`` ``(K, ...)``, which are copied."""
    # A copy: a compiled graph may use the memory of an operator's input again.
    return row_gradient(rows.clone(), values.clone(), num_rows)


@pack_rows.register_fake
def _(values, rows, num_rows):
    let_inductor_compare_sparse()
    return row_gradient(torch.empty_like(rows), torch.empty_like(values), num_rows)


def _keep_setup(ctx, inputs, output) -> None:
    # Not saved: where a part of the forward pass that shares these rows has a backward pass of its own, as with
    # reentrant checkpoints, this one runs several times, and autograd would have given them back after the first.
    parameter, ctx.rows = inputs
    ctx.num_rows = parameter.shape[0]


def _keep_backward(ctx, g):
    return pack_rows(g, ctx.rows, ctx.num_rows), None


keep_rows.register_autograd(_keep_backward, setup_context=_keep_setup)


def _keep_parts_setup(ctx, inputs, output) -> None:
    parameter, ctx.rows, ctx.firsts = inputs
    ctx.num_rows = parameter.shape[0]


def _keep_parts_backward(ctx, gradients):
    rows = [rows_K + first for rows_K, first in zip(ctx.rows, ctx.firsts, strict=True)]
    return pack_rows(torch.cat(gradients), torch.cat(rows), ctx.num_rows), [None] * len(rows), None


keep_parts.register_autograd(_keep_parts_backward, setup_context=_keep_parts_setup)


def row_gradient(rows: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """The row gradient ``(num_rows, ...)`` that is made of ``rows`` and ``values`` themselves, with no copy."""
    # The invariants hold by construction; to check them would read the rows on every step.
    return torch.sparse_coo_tensor(
        rows[None], values, (num_rows, *values.shape[1:]), is_coalesced=True, check_invariants=False
    )
