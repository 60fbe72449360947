"""Dense references: the gradients that row sets should give, by plain autograd in float64 and masks."""

from collections.abc import Callable, Collection, Mapping

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


class KeptCalls(MaskedCalls):
    """And zeroes the gradient of dropped examples behind every linear call but those with the weights of ``others``."""

    def __init__(
        self,
        kept: Tensor,
        num_examples: int,
        others: set[int],
        rows: Mapping[int, Tensor],
        mask_outputs: bool,
        scales: Mapping[int, Tensor],
    ) -> None:
        super().__init__(rows, mask_outputs, scales)
        self.taking_part = torch.zeros(num_examples, dtype=torch.float64).index_fill(0, kept, 1)
        self.others = others

    def confined(self, g: Tensor) -> Tensor:
        return (g.reshape(len(self.taking_part), -1) * self.taking_part[:, None]).view(g.shape)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        if func is F.linear:
            weight = (kwargs or {}).get("weight", args[1] if len(args) > 1 else None)
        elif func in PRODUCTS:
            weight = args[-1]._base
        else:
            return out
        if isinstance(weight, nn.Parameter) and id(weight) not in self.others and out.requires_grad:
            out.register_hook(self.confined)
        return out


def kept_gradients(
    model: nn.Module,
    forward: Callable[[nn.Module], object],
    loss: Callable[[object], Tensor],
    kept: Tensor,
    num_examples: int,
    rows: Mapping[str, Tensor] | None = None,
    dx: str = "rows",
    scales: Mapping[str, Tensor] | None = None,
    factors: Tensor | None = None,
    others: Collection[str] = (),
) -> dict[str, Tensor | None]:
    """Gradients of ``loss(forward(model))`` where dropped examples count as zero at the outputs and behind every linear
    call, and rows as in ``masked_gradients``.

    ``factors`` ``(B,)`` multiply the examples at the outputs; calls with the weights of ``others`` see all examples.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows, scales = ({id(parameters[name]): v for name, v in (of or {}).items()} for of in (rows, scales))
    calls = KeptCalls(kept, num_examples, {id(parameters[name]) for name in others}, rows, dx == "rows", scales)
    model.zero_grad()
    with calls:
        output = forward(model)
    for leaf in torch.utils._pytree.tree_leaves(output):
        if leaf.dim() and len(leaf) == num_examples and leaf.requires_grad:
            leaf.register_hook(calls.confined)
            if factors is not None:
                leaf.register_hook(lambda g: g * factors.view(-1, *[1] * (g.dim() - 1)))
    loss(output).backward()
    gradients = {}
    for name, p in model.named_parameters():
        of = {**calls.biases, **rows}.get(id(p)) if dx == "full" else None
        grad = None if p.grad is None else p.grad.clone()
        gradients[name] = grad if grad is None or of is None else torch.zeros_like(grad).index_copy(0, of, grad[of])
    model.zero_grad()
    return gradients


def gradients_at(outputs: object, loss: Callable[[object], Tensor], num_examples: int) -> list[Tensor]:
    """The gradient of the loss at each output with an entry for every example."""
    leaves = [y for y in torch.utils._pytree.tree_leaves(outputs) if y.dim() and len(y) == num_examples]
    return list(torch.autograd.grad(loss(outputs), leaves, retain_graph=True))


def sizes_of_examples(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of everything that belongs to an example."""
    return torch.stack([torch.cat([g[b].flatten() for g in gradients]).norm() for b in range(len(gradients[0]))])


def chances_of(sizes: Tensor, count: int, floor: float) -> Tensor:
    """``min(1, c * ((1 - floor) * s / sum(s) + floor / B))`` with ``c`` found by halving."""
    share = (1 - floor) * sizes / sizes.sum() + floor / len(sizes)
    low, high = 0.0, count / float(share.min())
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if float((c * share).clamp(max=1).sum()) < count else (low, c)
    return (high * share).clamp(max=1)
