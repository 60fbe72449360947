"""Keys: which places of a weight, as sorted and distinct numbers, and what is done with sets of them.

What a key says of a place is in ``rwfx.nonzeros``. Each function is an operator: here for every device, by sorting and
bisection, and on a CPU in ``rwfx/native/keys.cpp``, by a few passes over the keys. That keys are sorted and distinct is
a promise: kernels refuse what they cannot work with, and do not look for more.

Axes: N keys, M others.
"""

import torch
from torch import Tensor

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define("replaced(Tensor keys, Tensor pruned, Tensor grown) -> Tensor")
_library.define("without(Tensor keys, Tensor others) -> Tensor")
_library.define("distinct_keys(Tensor drawn) -> Tensor")
_library.define("origins(Tensor before, Tensor after) -> Tensor")
_library.define("carried(Tensor numbers, Tensor origin) -> Tensor")


def replaced(keys: Tensor, pruned: Tensor, grown: Tensor) -> Tensor:
    """Without those at the positions ``pruned``, in order, and with the keys ``grown``, none of which was there."""
    return torch.ops.rwfx.replaced.default(keys, pruned, grown)


def without(keys: Tensor, others: Tensor) -> Tensor:
    """Those of ``keys`` that are not among ``others``."""
    return torch.ops.rwfx.without.default(keys, others)


def distinct_keys(drawn: Tensor) -> Tensor:
    """Keys in any order, not negative, sorted and each once."""
    return torch.ops.rwfx.distinct_keys.default(drawn)


def origins(before: Tensor, after: Tensor) -> Tensor:
    """Where each key of ``after`` was among those ``before``, int32; -1 of a new one."""
    return torch.ops.rwfx.origins.default(before, after)


def carried(numbers: Tensor, origin: Tensor) -> Tensor:
    """Of ``numbers``, which lie at the keys before, what lies at those after; 0 at the new ones."""
    return torch.ops.rwfx.carried.default(numbers, origin)


def _replaced(keys: Tensor, pruned: Tensor, grown: Tensor) -> Tensor:
    kept = torch.ones_like(keys, dtype=torch.bool).index_fill_(0, pruned, False)
    return torch.cat([keys[kept], grown]).sort().values


def _without(keys: Tensor, others: Tensor) -> Tensor:
    return keys[_origins(others, keys) < 0]


def _origins(before: Tensor, after: Tensor) -> Tensor:
    if not len(before):
        return torch.full_like(after, -1, dtype=torch.int32)
    place = torch.searchsorted(before, after).clamp_(max=len(before) - 1)
    return place.masked_fill_(before[place] != after, -1).to(torch.int32)


def _carried(numbers: Tensor, origin: Tensor) -> Tensor:
    if not len(numbers):
        return numbers.new_zeros(len(origin))
    return numbers.index_select(0, origin.clamp(min=0)).masked_fill_(origin < 0, 0)


_library.impl("replaced", _replaced, "CompositeExplicitAutograd")
_library.impl("without", _without, "CompositeExplicitAutograd")
_library.impl("distinct_keys", torch.unique, "CompositeExplicitAutograd")
_library.impl("origins", _origins, "CompositeExplicitAutograd")
_library.impl("carried", _carried, "CompositeExplicitAutograd")


@torch.library.register_fake("rwfx::replaced", lib=_library)
def _(keys: Tensor, pruned: Tensor, grown: Tensor) -> Tensor:
    return keys.new_empty(len(keys) - len(pruned) + len(grown))


@torch.library.register_fake("rwfx::without", lib=_library)
def _(keys: Tensor, others: Tensor) -> Tensor:
    return keys.new_empty(torch.library.get_ctx().new_dynamic_size())


@torch.library.register_fake("rwfx::distinct_keys", lib=_library)
def _(drawn: Tensor) -> Tensor:
    return drawn.new_empty(torch.library.get_ctx().new_dynamic_size())


@torch.library.register_fake("rwfx::origins", lib=_library)
def _(before: Tensor, after: Tensor) -> Tensor:
    return torch.empty_like(after, dtype=torch.int32)


@torch.library.register_fake("rwfx::carried", lib=_library)
def _(numbers: Tensor, origin: Tensor) -> Tensor:
    return numbers.new_empty(len(origin))
