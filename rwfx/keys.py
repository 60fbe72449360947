"""Keys: which places of a weight, as sorted and distinct numbers, and what is done with sets of them.

What a key says of a place is in ``rwfx.nonzeros``. Each function is an operator: here for every device, by sorting and
bisection, and on a CPU in ``rwfx/native/keys.cpp``, by a few passes over the keys.

Axes: N keys, M others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define("replaced(Tensor keys, Tensor pruned, Tensor grown) -> Tensor")
_library.define("without(Tensor keys, Tensor others) -> Tensor")
_library.define("distinct_keys(Tensor drawn) -> Tensor")
_library.define("carried(Tensor before, Tensor after, Tensor[] numbers) -> (Tensor[], Tensor)")


def replaced(keys: Tensor, pruned: Tensor, grown: Tensor) -> Tensor:
    """Without those at the positions ``pruned``, in order, and with the keys ``grown``, none of which was there."""
    return torch.ops.rwfx.replaced.default(keys, pruned, grown)


def without(keys: Tensor, others: Tensor) -> Tensor:
    """Those of ``keys`` that are not among ``others``."""
    return torch.ops.rwfx.without.default(keys, others)


def distinct_keys(drawn: Tensor) -> Tensor:
    """Keys in any order, not negative, sorted and each once."""
    return torch.ops.rwfx.distinct_keys.default(drawn)


def carried(before: Tensor, after: Tensor, numbers: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Of each of ``numbers``, which lie at the keys ``before``, what lies at ``after``, with 0 at the new keys.

    Given with it is how many keys are new, ``()``.
    """
    return torch.ops.rwfx.carried.default(before, after, list(numbers))


def _replaced(keys: Tensor, pruned: Tensor, grown: Tensor) -> Tensor:
    kept = torch.ones_like(keys, dtype=torch.bool).index_fill_(0, pruned, False)
    return torch.cat([keys[kept], grown]).sort().values


def _without(keys: Tensor, others: Tensor) -> Tensor:
    return keys[~_found(others, keys)[0]]


def _carried(before: Tensor, after: Tensor, numbers: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    stays, place = _found(before, after)
    if not len(before):
        return [part.new_zeros(len(after)) for part in numbers], (~stays).sum()
    return [part[place].masked_fill_(~stays, 0) for part in numbers], (~stays).sum()


def _found(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Which of ``wanted`` are among ``keys``, and where; of others the place is of no meaning."""
    if not len(keys):
        return torch.zeros_like(wanted, dtype=torch.bool), torch.zeros_like(wanted)
    place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return keys[place] == wanted, place


_library.impl("replaced", _replaced, "CompositeExplicitAutograd")
_library.impl("without", _without, "CompositeExplicitAutograd")
_library.impl("distinct_keys", torch.unique, "CompositeExplicitAutograd")
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


@torch.library.register_fake("rwfx::carried", lib=_library)
def _(before: Tensor, after: Tensor, numbers: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    return [part.new_empty(len(after)) for part in numbers], after.new_empty(())
