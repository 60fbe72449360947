"""Which is faster: products with the non-zeros of a weight, or with a dense weight that is filled for the call."""

from collections.abc import Sequence
from math import prod

import torch

from rwfx.native import loaded
from rwfx.ops.sparse_linear import By

# Up to which density the non-zeros are faster, by our kernels and by PyTorch's: measured, see docs/always_sparse.md.
KERNELS, STOCK = 0.3, 0.05


def faster(shape: Sequence[int], nnz: int, device: torch.device) -> By:
    """The faster way to compute with ``nnz`` non-zeros of a weight of ``shape``, by what was measured on a CPU.

    Elsewhere, and without the CPU kernels, PyTorch's own sparse products are taken for the sparsest linear weights.
    """
    density = nnz / prod(shape)
    if device.type == "cpu" and loaded():
        return "nonzeros" if density <= KERNELS else "dense"
    return "nonzeros" if len(shape) == 2 and density <= STOCK else "dense"
