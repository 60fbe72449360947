"""What a training step costs: operations counted, and scalars updated."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rwfx.checkpoint import random_state_kept

# Attention on a CPU, which not every version of PyTorch counts of itself.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
}


def flop_counter() -> FlopCounterMode:
    """A context that counts the floating point operations of products and of attention."""
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION)


def dense_flops(network: nn.Module, inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Count the floating point operations of a dense forward and backward of ``network`` on ``inputs``.

    Returns all of them, and those of products of matrices, as which linear calls are run.

    It is done by doing it, with gradients, buffers and random streams left as they were.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with random_state_kept(), flop_counter() as counter:
        outputs = torch.func.functional_call(network, buffers, tuple(inputs))
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        total = sum(leaf.sum() for leaf in leaves if leaf.requires_grad)
        assert isinstance(total, Tensor)
        torch.autograd.grad(total, parameters, allow_unused=True)
    by_operator = counter.get_flop_counts()["Global"]
    return counter.get_total_flops(), sum(by_operator.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def updated_scalars(parameters: Iterable[nn.Parameter]) -> int:
    """Count the scalars of the gradients: those of its rows only where a gradient is row-sparse."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return sum(
        gradient.coalesce().values().numel() if gradient.is_sparse else gradient.numel() for gradient in gradients
    )
