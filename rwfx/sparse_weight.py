"""A weight of which only the non-zeros are stored, as a module in the place of a parameter.

``model.fc1.weight`` is then a ``SparseWeight``, with the parameter ``model.fc1.weight.values``. It is called with what
the dense weight's call was given beside it: ``self.fc1.weight(x, self.fc1.bias)``.

Axes: N non-zeros, O rows, I columns (of a convolution, input channel and kernel places flattened).
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rwfx.nonzeros import Index, check_size, columns_of, index_of, keys_of, rows_of
from rwfx.ops.sparse_conv import sparse_conv
from rwfx.ops.sparse_linear import Asked, By, dense_weight, sparse_linear
from rwfx.ops.weighted_call import conv_options, flat_options
from rwfx.probe import Probe
from rwfx.sparse_cost import faster


class SparseWeight(nn.Module):
    """The non-zeros of a weight of ``shape``, ``(O, I)`` or ``(O, channels / groups, *kernel)`` with one or two sizes.

    Attributes:
        values: the numbers, a parameter, ``(N,)``, column by column. Their gradient is dense, so any optimizer of
            ``torch.optim`` trains them.
        ccol_indices, row_indices: buffers, int32, where they are; see ``rwfx.nonzeros``. With ``values`` and
            ``dense_shape``, the shape as a tensor, they are the module's ``state_dict``.
        crow_indices, col_indices, order: the same by rows, made anew from them wherever they change.
        shape: of the dense weight.
        transposed: whether the dense weight's parameter is stored as its transpose, as in ``x @ w``.
        by: how products are computed, ``"nonzeros"`` or ``"dense"``; see ``rwfx.ops.sparse_linear``.
        probe: what looks for candidates in the backward pass, if a ``rwfx.Topology`` has put it there.

    Args:
        keys: ``(N,)`` int64, sorted and distinct, ``column * O + row``.    values: ``(N,)``.
        by: ``"auto"`` takes what is faster (``rwfx.sparse_cost``), also when there are more or fewer non-zeros later.

    Raises:
        ValueError: keys and values do not fit each other or the shape.
    """

    values: nn.Parameter
    ccol_indices: Tensor
    row_indices: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    order: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        keys: Tensor,
        values: Tensor,
        transposed: bool = False,
        by: Asked = "auto",
    ) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        if not 2 <= len(self.shape) <= 4:
            raise ValueError(f"shape must be (O, I) or (O, channels / groups, *kernel) in 1-d or 2-d, got {shape}.")
        self._check(keys, values)
        self.transposed = transposed
        self._asked_by: Asked = by
        self.probe: Probe | None = None
        self.values = nn.Parameter(values.detach().clone())
        self.register_buffer("dense_shape", torch.tensor(self.shape, device=values.device))
        for name, part in zip(Index._fields, index_of(keys, self.rows, self.columns), strict=True):
            self.register_buffer(name, part, persistent=name in ("ccol_indices", "row_indices"))
        self._choose()

    def forward(self, x: Tensor, bias: Tensor | None = None, *options: Any) -> Tensor:
        """The call with the dense weight: ``F.linear(x, W, bias)``, ``F.conv1d(x, W, bias, *options)`` or ``F.conv2d``.

        Of a convolution's options (stride, padding, dilation, groups) those that are left out are as there.

        Raises:
            TypeError, ValueError: ``x`` does not fit the weight, or is not of floating point.
        """
        kernel = self.shape[2:]
        if not kernel:
            y = sparse_linear(x, self.values, bias, self.index, self.by)
            return y if self.probe is None else self.probe(y, x, self, [])
        options = conv_options(len(kernel), *options)
        is_line = len(kernel) == 1
        if is_line:  # as of an image with one line
            if x.dim() not in (2, 3):
                raise ValueError(f"x must be (B, C, L) or (C, L), got the shape {list(x.shape)}.")
            x, kernel = x.unsqueeze(-2), (1, *kernel)
        y = sparse_conv(x, self.values, bias, self.index, kernel, *options, by=self.by)
        y = y if self.probe is None else self.probe(y, x, self, flat_options(kernel, *options))
        return y.squeeze(-2) if is_line else y

    @property
    def rows(self) -> int:
        """O."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """I."""
        return prod(self.shape[1:])

    @property
    def nnz(self) -> int:
        """N."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """The share of the places that have a number."""
        return self.nnz / (self.rows * self.columns)

    @property
    def index(self) -> Index:
        """Where the numbers are."""
        return Index(self.ccol_indices, self.row_indices, self.crow_indices, self.col_indices, self.order)

    def keys(self) -> Tensor:
        """The places as keys, ``(N,)`` int64, sorted."""
        return keys_of(self.ccol_indices, self.row_indices, self.rows)

    @torch.no_grad()
    def move_(self, keys: Tensor, values: Tensor) -> None:
        """Put other numbers at other places, in place: of as many, no tensor is replaced.

        Of another count, the tensors inside of ``values`` and of the buffers are replaced, and ``values`` has no
        gradient then.

        Raises:
            ValueError: keys and values do not fit each other or the shape; nothing has changed then.
        """
        self._check(keys, values)
        if len(values) == self.nnz:
            _copy((self.ccol_indices, self.row_indices), columns_of(keys, self.rows, self.columns))
            by_rows = rows_of(self.ccol_indices, self.row_indices, self.rows)
            _copy((self.crow_indices, self.col_indices, self.order), by_rows)
            self.values.copy_(values)
        else:
            self.values.grad = None
            given = values.detach().to(self.values)
            # While a graph of an earlier step lives, autograd expects gradients of the old shape, which a number of
            # another type makes it forget.
            self.values.data = given.to(torch.float32 if given.dtype == torch.float64 else torch.float64)
            self.values.data = given
            for name, part in zip(Index._fields, index_of(keys, self.rows, self.columns), strict=True):
                setattr(self, name, part.to(self.values.device))
            self._choose()

    def to_dense(self) -> Tensor:
        """The dense weight, of ``shape``; gradients flow to ``values``."""
        return dense_weight(self.values, self.ccol_indices, self.row_indices, self.rows).reshape(self.shape)

    def _choose(self) -> None:
        asked = self._asked_by
        self.by: By = faster(self.shape, self.nnz, self.values.device) if asked == "auto" else asked

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseWeight":
        super()._apply(fn, recurse)
        self._choose()  # on another device another way may be faster
        return self

    def extra_repr(self) -> str:
        """Its shape and how much of it is stored."""
        return f"{tuple(self.shape)}, {self.nnz} non-zeros ({self.density:.2%}), by={self.by!r}"

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if keys.shape != values.shape or keys.dim() != 1 or keys.dtype != torch.int64:
            raise ValueError(
                f"keys must be one int64 number for each value, got {keys.dtype} of shape {tuple(keys.shape)} for "
                f"values of shape {tuple(values.shape)}."
            )
        check_size(self.rows, self.columns, len(keys), "sparse")
        places = self.rows * self.columns
        if len(keys) and (bool((keys[1:] <= keys[:-1]).any()) or not 0 <= int(keys[0]) <= int(keys[-1]) < places):
            raise ValueError(f"keys must be sorted, without repeats, from 0 to below {places} = {tuple(self.shape)}.")

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """Take over numbers and places, as many as there are; the index by rows is made anew."""
        names = "values", "ccol_indices", "row_indices", "dense_shape"
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        name = prefix.removesuffix(".")
        if len(given) < len(names):
            if given:
                lacking = ", ".join(sorted(set(names) - given.keys()))
                errors.append(f"sparse weight {name!r} is loaded whole or not at all; what is loaded has no {lacking}.")
            missing.extend(prefix + name for name in names if name not in given)
            return
        unexpected.extend(key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) not in names)
        values, ccol_indices, row_indices, shape = given.values()
        loaded = tuple(shape.tolist())
        if loaded != tuple(self.shape):
            errors.append(f"sparse weight {name!r} has the shape {tuple(self.shape)}, and what is loaded has {loaded}.")
            return
        try:
            if not _is_index(ccol_indices, row_indices, self.rows):
                raise ValueError(f"its places do not lie in {self.rows} rows and {self.columns} columns.")
            self.move_(keys_of(ccol_indices, row_indices, self.rows).to(self.values.device), values.to(self.values))
        except ValueError as error:
            errors.append(f"sparse weight {name!r} cannot take what is loaded: {error}")


def _copy(to: Sequence[Tensor], of: Sequence[Tensor]) -> None:
    for old, new in zip(to, of, strict=True):
        old.copy_(new)


def _is_index(ccol_indices: Tensor, row_indices: Tensor, rows: int) -> bool:
    starts_and_ends = int(ccol_indices[0]) == 0 and int(ccol_indices[-1]) == len(row_indices)
    in_range = not len(row_indices) or (int(row_indices.min()) >= 0 and int(row_indices.max()) < rows)
    return starts_and_ends and in_range and bool((ccol_indices.diff() >= 0).all())
