"""``rwfx::blank_rows``: row sets of the right size and no content, for a choice in the backward pass.

In: how many rows. Out: tensors whose size the compiler takes for unknown, so that another number is no new compilation.
"""

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

torch.library.define("rwfx::blank_rows", "(Tensor like, Tensor budget, int[] sizes) -> Tensor[]")


@torch.library.impl("rwfx::blank_rows", "default")
def _(like: Tensor, budget: Tensor, sizes: list[int]) -> list[Tensor]:
    """``(K,)`` zeros for each weight, K from ``budget`` ``(1 + weights,)``, whose first number is not used."""
    return [like.new_zeros(count) for count in budget[1:].tolist()]


@torch.library.register_fake("rwfx::blank_rows")
def _(like: Tensor, budget: Tensor, sizes: list[int]) -> list[Tensor]:
    shape_env = torch.library.get_ctx()._shape_env
    return [like.new_empty((allocate_size(shape_env, 1, size),)) for size in sizes]
