"""What the operators on rows refuse."""

import torch
from torch import Tensor


def check_rows(
    num_rows: int, rows: Tensor, scale: Tensor | None, seen: Tensor | None, chosen: Tensor | None, kept: bool
) -> None:
    """Refuse what is no row set of so many rows, or does not fit it.

    Raises:
        ValueError: ``rows`` is not int64 or not one-dimensional, ``scale``, ``seen`` or ``chosen`` has another type or
            shape, or ``chosen`` is given beside what belongs to rows that are known before (``scale``, ``kept``).
    """
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(
            f"rows must be a one-dimensional int64 tensor of row numbers, got {rows.dtype} of shape "
            f"{tuple(rows.shape)}."
        )
    if chosen is not None and (scale is not None or kept):
        raise ValueError(
            f"{'scale' if scale is not None else 'kept_weight and kept_bias'} cannot be given with chosen: they belong "
            "to rows that are known in the forward pass, and these are chosen in the backward pass."
        )
    if scale is not None:
        if not scale.is_floating_point() or scale.dim() != 1:
            raise ValueError(
                f"scale must be a one-dimensional floating-point tensor, got {scale.dtype} of shape "
                f"{tuple(scale.shape)}."
            )
        # Not an if: a compiler does not know these sizes, and is told that they are equal.
        torch._check_value(
            scale.shape[0] == rows.shape[0],
            lambda: f"scale must have a number for each of the {rows.shape[0]} rows, got {scale.shape[0]}.",
        )
    for name, buffer, dtype, more in (("seen", seen, torch.float32, 0), ("chosen", chosen, torch.int64, 1)):
        shape = (num_rows + more,)
        if buffer is not None and (buffer.dtype != dtype or buffer.shape != shape):
            raise ValueError(
                f"{name} must be a {dtype} tensor of shape {shape}, got {buffer.dtype} of shape {tuple(buffer.shape)}."
            )


def check_examples(examples: Tensor) -> None:
    """Refuse what is no choice of examples.

    Raises:
        ValueError: it is not int64 or not one-dimensional.
    """
    if examples.dtype != torch.int64 or examples.dim() != 1:
        raise ValueError(
            f"examples must be a one-dimensional int64 tensor, got {examples.dtype} of shape {tuple(examples.shape)}."
        )
