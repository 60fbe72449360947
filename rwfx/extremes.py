"""The largest and the smallest of many numbers, by place.

``rwfx::extremes`` is an operator: here for every device, by ``torch.topk``, and on a CPU in
``rwfx/native/extremes.cpp``, digit by digit, in a few passes over the numbers. Where not all of some equal numbers are
taken, the kernel takes those at the lowest places; other devices do not promise which. NaN is larger than all, as
``torch.topk`` has it.

Axes: N numbers, K that are taken.
"""

import torch
from torch import Tensor

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define("extremes(Tensor numbers, SymInt count, bool largest, bool magnitudes) -> Tensor")


def largest(numbers: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest of ``(N,)`` are: ``(K,)``, in order."""
    return torch.ops.rwfx.extremes.default(numbers, count, True, False)


def largest_magnitudes(numbers: Tensor, count: int) -> Tensor:
    """Where the ``count`` farthest from zero are: ``(K,)``, in order."""
    return torch.ops.rwfx.extremes.default(numbers, count, True, True)


def smallest_magnitudes(numbers: Tensor, count: int) -> Tensor:
    """Where the ``count`` nearest to zero are: ``(K,)``, in order."""
    return torch.ops.rwfx.extremes.default(numbers, count, False, True)


def _extremes(numbers: Tensor, count: int, largest: bool, magnitudes: bool) -> Tensor:
    sizes = numbers.abs() if magnitudes else numbers
    return sizes.topk(count, largest=largest, sorted=False).indices.sort().values


_library.impl("extremes", _extremes, "CompositeExplicitAutograd")


@torch.library.register_fake("rwfx::extremes", lib=_library)
def _(numbers: Tensor, count: int, largest: bool, magnitudes: bool) -> Tensor:
    return numbers.new_empty(count, dtype=torch.int64)
