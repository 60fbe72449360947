"""Convolutions whose backward pass is confined to some examples: ``rwfx::example_conv``.

In: what ``torch.convolution`` takes, and the examples. Out: what it gives, bit for bit. The backward computes with the
examples alone, by PyTorch's own ``convolution_backward``; all rows (output channels) take part.

Axes: B examples, E examples kept.
"""

import torch
from torch import Tensor

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define(
    "example_conv(Tensor x, Tensor weight, Tensor? bias, Tensor examples, SymInt num_examples, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, SymInt groups, ScalarType? dtype=None) -> Tensor"
)


def example_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    examples: Tensor,
    num_examples: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The convolution of ``x`` with ``weight``; the backward is that of ``examples`` alone.

    With ``g = dL/dy`` and ``h`` equal to ``g`` for the examples and zero for others, ``dx``, ``dw`` and ``db`` are
    those of the dense backward of ``h``.

    Args:
        x: ``(B, C, *spatial)``, one to three spatial dimensions.    weight: ``(O, C / groups, *kernel)``.    bias:
        ``(O,)``. examples: ``(E,)`` int64, sorted, no repeats; as for ``rwfx.ops.row_linear`` it may be written until
        the backward. num_examples: ``B``.    stride, padding, dilation: a number for each spatial dimension.
        groups: as there. dtype: the type to compute in; autocast fills it in.

    Raises:
        ValueError: ``examples`` is not int64 or not one-dimensional, or ``x`` has not so many examples.
    """
    return torch.ops.rwfx.example_conv.default(
        x, weight, bias, examples, num_examples, stride, padding, dilation, groups, dtype
    )


class _ExampleConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, examples, num_examples, stride, padding, dilation, groups, dtype=None):
        if examples.dtype != torch.int64 or examples.dim() != 1:
            raise ValueError(
                f"examples must be a one-dimensional int64 tensor, got {examples.dtype} of shape "
                f"{tuple(examples.shape)}."
            )
        torch._check_value(
            x.shape[0] == num_examples,
            lambda: f"x holds {x.shape[0]} examples and not {num_examples}: {tuple(x.shape)}.",
        )
        ctx.save_for_backward(x, weight)
        # Not saved: it is written in the backward pass.
        ctx.examples, ctx.options = examples, (stride, padding, dilation, groups)
        ctx.bias_size = None if bias is None else [weight.shape[0]]
        ctx.bias_dtype = None if bias is None else bias.dtype
        if dtype is not None:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _convolve(x, weight, bias, *ctx.options)

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():
            raise RuntimeError("rwfx::example_conv has no second derivative: leave create_graph=True out.")
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        wanted = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and ctx.bias_size is not None]
        dx, dw, db = torch.ops.aten.convolution_backward.default(
            g.index_select(0, ctx.examples),
            x.index_select(0, ctx.examples).to(g.dtype),
            weight.to(g.dtype),
            ctx.bias_size,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            wanted,
        )
        if wanted[0]:
            dx = torch.zeros_like(x).index_copy(0, ctx.examples, dx.to(x.dtype))
        dw = dw.to(weight.dtype) if wanted[1] else None
        return dx if wanted[0] else None, dw, db.to(ctx.bias_dtype) if wanted[2] else None, *[None] * 7


def _convolve(x, weight, bias, stride, padding, dilation, groups):
    return torch.ops.aten.convolution.default(
        x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
    )


def _without_gradient(*arguments):
    with torch.no_grad():
        return _ExampleConv.apply(*arguments)


_library.impl("example_conv", _ExampleConv.apply, "Autograd")
_library.impl("example_conv", _without_gradient, "CompositeExplicitAutograd")


def _in_autocast(device: str):
    def kernel(x, *others):
        # Autocast leaves double precision alone.
        lowered = None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.amp.autocast(device, enabled=False):
            return torch.ops.rwfx.example_conv.default(x, *others[:8], lowered)

    return kernel


for _device, _key in {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}.items():
    _library.impl("example_conv", _in_autocast(_device), _key)
