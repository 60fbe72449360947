"""A call with a sparse weight as its backward pass sees it, asked for gradients at any places of the dense weight.

In: the call's input ``x``, its output's gradient ``g`` and where the weight has its numbers. Out: gradients at chosen
keys, all of them, or sums over the batch. A convolution is a linear call whose batch has an entry for each example and
output pixel, with the pixel's patch as its input; it is computed without making the patches.

Axes: B entries of the batch, I columns and O rows of the weight, G groups, M keys.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwfx.nonzeros import columns_of


class WeightedCall(NamedTuple):
    """``y = x W^T`` or, with ``options``, a convolution, and ``g = dL/dy``.

    ``options`` are kernel, stride, padding and dilation, two numbers each, and the number of groups; empty for a linear
    call. The other parts are those of ``rwfx.ops.sparse_linear``.
    """

    g: Tensor
    x: Tensor
    values: Tensor
    ccol_indices: Tensor
    row_indices: Tensor
    crow_indices: Tensor
    options: Sequence[int]
    by: str

    @property
    def rows(self) -> int:
        """O."""
        return len(self.crow_indices) - 1

    @property
    def columns(self) -> int:
        """I."""
        return len(self.ccol_indices) - 1

    @property
    def groups(self) -> int:
        """G: row ``o`` reads the inputs of group ``o // (O / G)``."""
        return self.options[-1] if self.options else 1

    @property
    def entries(self) -> int:
        """B."""
        return self.g.numel() // self.rows

    def gradients(self, keys: Tensor) -> Tensor:
        """``(M,)``: of the keys alone, which are sorted and distinct."""
        index = *columns_of(keys, self.rows, self.columns), self.crow_indices
        nothing = self.values.new_zeros(len(keys))
        if not self.options:
            return torch.ops.rwfx.sparse_linear_backward.default(self.g, self.x, nothing, *index, False, True, self.by)[
                1
            ]
        return torch.ops.rwfx.sparse_conv_backward.default(
            self.g, self.x, nothing, *index, *self._options, False, True, self.by
        )[1]

    def dense_gradient(self) -> Tensor:
        """``(I * O,)``: of every place, in the order of keys."""
        if not self.options:
            return (self.x.reshape(-1, self.columns).t() @ self.g.reshape(-1, self.rows)).flatten()
        return self._patch_product(self.x, self.g, self.rows).flatten(1).t().flatten()

    def sums(self, sign: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of every input and every row the sum over the batch, ``(G, I)`` and ``(O,)``.

        With ``sign``, ``(B,)``, of what it makes of the values; without, of their absolute values.
        """
        x, g = (self.x.abs(), self.g.abs()) if sign is None else (self.x, self.g)
        sign = x.new_ones(self.entries) if sign is None else sign.to(x)
        if not self.options:
            return (sign @ x.reshape(-1, self.columns))[None], sign @ g.reshape(-1, self.rows)
        signs = sign.view(g.shape[0], 1, *g.shape[2:])
        of_inputs = self._patch_product(x, signs.expand(-1, self.groups, -1, -1), self.groups)
        return of_inputs.flatten(1), (g * signs).sum((0, 2, 3))

    @property
    def _options(self) -> tuple[list[int], list[int], list[int], list[int], int]:
        kernel, stride, padding, dilation = (list(self.options[n : n + 2]) for n in range(0, 8, 2))
        return kernel, stride, padding, dilation, self.groups

    def _patch_product(self, x: Tensor, g: Tensor, rows: int) -> Tensor:
        """The gradient of a weight of so many rows: sums over the batch of patches times ``g``."""
        kernel, *options, groups = self._options
        weight = x.new_empty(()).expand(rows, x.shape[1] // groups, *kernel)
        return torch.ops.aten.convolution_backward(
            g, x, weight, None, *options, False, [0, 0], groups, [False, True, False]
        )[1]


class ConvOptions(NamedTuple):
    """A convolution's options in two dimensions: of one in one dimension, of an image with one line."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def conv_options(
    dimensions: int,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> ConvOptions:
    """The options of ``F.conv1d`` or ``F.conv2d``, a number or as many as there are dimensions.

    Raises:
        TypeError: they are something else, as ``padding="same"``.
    """

    def pair(name: str, given: int | Sequence[int], of_one_line: int) -> list[int]:
        several = [given] if isinstance(given, int) else list(given)
        if isinstance(given, str) or len(several) not in (1, dimensions):
            raise TypeError(f"{name} must be a number, or {dimensions} of them, got {given!r}.")
        several *= dimensions if len(several) == 1 else 1
        return [of_one_line] * (2 - dimensions) + several

    return ConvOptions(pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1), groups)


def flat_options(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> list[int]:
    """A convolution's options as ``WeightedCall`` has them."""
    return [*kernel, *stride, *padding, *dilation, groups]
