"""One repair of ``torch.compile``'s inductor, without which some models with row gradients do not compile.

After its graph passes, inductor compares the storages of the fake tensors it recomputes, and a sparse tensor
has none: ``NotImplementedError: Cannot access storage of SparseTensorImpl`` (pytorch/pytorch#170761, open
at torch 2.15). It happens as soon as a pass touches an input of an operator that returns a sparse tensor.
"""

import sys
from typing import Any

import torch
from torch import Tensor


def let_inductor_compare_sparse() -> None:
    """Make inductor take every sparse tensor for one of its own; nothing is loaded if inductor is not."""
    fx_utils: Any = sys.modules.get("torch._inductor.fx_utils")
    get_storage = getattr(fx_utils, "get_storage", None)
    if get_storage is None or hasattr(get_storage, "also_sparse"):
        return

    def storage_or_self(t: Tensor) -> int:
        return get_storage(t) if torch._C._has_storage(t) else id(t)

    storage_or_self.also_sparse = True  # type: ignore[attr-defined]
    fx_utils.get_storage = storage_or_self
