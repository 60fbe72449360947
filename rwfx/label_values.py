"""What stands for a tensor in a run on labels: the ids of its elements.

Most of a tensor's dimensions (the batch, space, the tokens) tell nothing about which row an element comes from. They
are stored once, as expanded dimensions of stride 0, and the work on labels is done on the *core* without them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


class Labels:
    """The ids of a tensor's elements, as an int64 tensor of its shape; -1: no row.

    ``source`` and ``view`` are those of a view: what is written into it in place is written into its source as well.
    """

    def __init__(
        self, ids: Tensor, source: "Labels | None" = None, view: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.ids, self._source, self._view = ids, source, view

    def write(self, ids: Tensor) -> None:
        """Give the tensor other labels, in place."""
        self.ids = ids.expand(self.ids.shape)
        if self._source is not None and self._view is not None:
            whole = self._source.ids.clone(memory_format=torch.contiguous_format)
            self._view(whole).copy_(self.ids)
            self._source.write(lean(whole))


@dataclass(frozen=True)
class Everywhere:
    """A tensor of unknown shape whose every element has the same id."""

    id: int


class Extremes(NamedTuple):
    """What ``max``, ``topk`` and others along a dimension return."""

    values: Any
    indices: Any


class UnknownShape(Exception):
    """The labels cannot be followed without a shape that only example inputs tell."""


def operands_of(*trees: Any) -> list[Labels | Everywhere]:
    """The labelled tensors in nested arguments, in order."""
    return [leaf for leaf in tree_flatten(trees)[0] if isinstance(leaf, (Labels, Everywhere))]


def has_rows(x: Labels | Everywhere) -> bool:
    """Whether any of its elements comes from a row."""
    return bool((core(x.ids) >= 0).any()) if isinstance(x, Labels) else x.id >= 0


def nowhere(shape: Sequence[int], id: int = -1) -> Labels:
    """A tensor whose every element has the same id, by default none."""
    return Labels(torch.tensor(id).expand(tuple(shape)))


def core(ids: Tensor) -> Tensor:
    """The ids with every dimension that is stored once of size 1."""
    for dim, (size, stride) in enumerate(zip(ids.shape, ids.stride(), strict=True)):
        if size > 1 and stride == 0:
            ids = ids.narrow(dim, 0, 1)
    return ids


def lean(ids: Tensor) -> Tensor:
    """The same ids, with every dimension along which they do not differ stored once."""
    found = ids
    for dim, (size, stride) in enumerate(zip(ids.shape, ids.stride(), strict=True)):
        if size > 1 and (stride == 0 or _same_along(found, dim)):
            found = found.narrow(dim, 0, 1)
    return found if found is ids else found.clone().expand(ids.shape)


def _same_along(ids: Tensor, dim: int) -> bool:
    if not ids.numel() or not torch.equal(ids.select(dim, 0), ids.select(dim, -1)):
        return False
    return bool((ids == ids.narrow(dim, 0, 1)).all())
