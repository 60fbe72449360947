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

    Inside it is multiplied by ``scales``, where there are. ``biases`` collects, for each bias seen, the row set of its
    call; ``arrived``, for each weight, the output gradients as they arrive.
    """

    def __init__(
        self, rows: Mapping[int, Tensor], mask_outputs: bool, scales: Mapping[int, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.rows, self.mask_outputs, self.biases = rows, mask_outputs, {}
        self.scales, self.arrived = scales or {}, {}

    def mask(self, weight: Tensor) -> Tensor:
        rows = self.rows[id(weight)]
        scale = self.scales.get(id(weight), torch.ones(len(rows)))
        return torch.zeros(len(weight), dtype=weight.dtype).index_copy(0, rows, scale.to(weight.dtype))

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
        if out.requires_grad:
            out.register_hook(lambda g: self.arrived.setdefault(id(weight), []).append(g.reshape(-1, g.shape[-1])))
        if self.mask_outputs and out.requires_grad:
            mask = self.mask(weight)
            out.register_hook(lambda g: g * mask)
        return out


def masked_gradients(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    rows: Mapping[str, Tensor],
    dx: str,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor | None]:
    """Gradients of ``loss(model)``: with ``dx="rows"`` masked at every weight's output, with ``"full"`` plain
    backpropagation whose parameter gradients are masked afterwards; ``scales`` with ``dx="rows"`` alone."""
    gradients, _ = masked_backward(model, loss, rows, dx, scales)
    return gradients


def masked_backward(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    rows: Mapping[str, Tensor],
    dx: str = "rows",
    scales: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor | None], dict[str, list[Tensor]]]:
    """As ``masked_gradients``; and, by weight, the output gradients ``(B, O)`` that arrive at its calls."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_id = {id(parameters[name]): set_ for name, set_ in rows.items()}
    scales_by_id = {id(parameters[name]): scale for name, scale in (scales or {}).items()}
    model.zero_grad()
    with MaskedCalls(by_id, dx == "rows", scales_by_id) as calls:
        loss(model).backward()
    gradients = {}
    for name, p in model.named_parameters():
        kept = {**calls.biases, **by_id}.get(id(p))
        grad = p.grad
        if dx == "full" and kept is not None and grad is not None:
            grad = torch.zeros_like(grad).index_copy(0, kept, grad[kept])
        gradients[name] = None if grad is None else grad.clone()
    model.zero_grad()
    return gradients, {name: calls.arrived.get(id(parameters[name]), []) for name in rows}


def to_dense(grad: Tensor | None) -> Tensor | None:
    return grad.to_dense() if grad is not None and grad.is_sparse else grad
