"""Dense references: the gradients that row sets should give, by plain autograd in float64 and masks."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
    torch.addmm,
}


class MaskedCalls(TorchFunctionMode):
    """Runs a model as it is, and zeroes the gradient of every linear call's output outside its row set.

    ``biases`` collects, for each bias seen, the row set of its call.
    """

    def __init__(self, rows: Mapping[int, Tensor], mask_outputs: bool) -> None:
        super().__init__()
        self.rows, self.mask_outputs, self.biases = rows, mask_outputs, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            operands = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            weight, bias = operands["weight"], operands.get("bias")
        elif func in PRODUCTS:
            weight, bias = args[-1]._base, args[0] if func is torch.addmm else None
        else:
            return out
        rows = self.rows.get(id(weight))
        if rows is None:
            return out
        if bias is not None:
            self.biases[id(bias)] = rows
        if self.mask_outputs and out.requires_grad:
            mask = torch.zeros(out.shape[-1], dtype=out.dtype).index_fill(0, rows, 1)
            out.register_hook(lambda g: g * mask)
        return out


def masked_gradients(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], rows: Mapping[str, Tensor], dx: str
) -> dict[str, Tensor | None]:
    """Gradients of ``loss(model)``: with ``dx="rows"`` masked at every weight's output, with ``"full"`` plain
    backpropagation whose parameter gradients are masked afterwards."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_id = {id(parameters[name]): set_ for name, set_ in rows.items()}
    model.zero_grad()
    with MaskedCalls(by_id, mask_outputs=dx == "rows") as calls:
        loss(model).backward()
    gradients = {}
    for name, p in model.named_parameters():
        kept = {**calls.biases, **by_id}.get(id(p))
        grad = p.grad
        if dx == "full" and kept is not None and grad is not None:
            grad = torch.zeros_like(grad).index_copy(0, kept, grad[kept])
        gradients[name] = None if grad is None else grad.clone()
    model.zero_grad()
    return gradients


def to_dense(grad: Tensor | None) -> Tensor | None:
    return grad.to_dense() if grad is not None and grad.is_sparse else grad
