"""The spellings of a convolution with a weight: modules, functions and ATen operators (``rwfx.passes.spellings``).

All become ``F.convNd(x, weight, bias, stride, padding, dilation, groups)`` or
``F.conv_transposeNd(x, weight, bias, stride, padding, output_padding, groups, dilation)``, with a list of one number
for each spatial dimension. What is padded with anything but zeros, or by ``padding="same"`` with one more on the right,
is padded by ``F.pad`` before it, as PyTorch does.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from rwfx.computed_weights import computed_from
from rwfx.passes.parameters import is_plain, parameter_of
from rwfx.passes.spellings import Call, Spelling, operands_of

CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}  # to the number of spatial dimensions
TRANSPOSED: dict[Any, int] = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}


def _convolution(target: Any, given: dict[str, Any], kernel: Sequence[int]) -> Call | None:
    """The call with these arguments; None where one is not known before it runs."""
    size = CONVOLUTIONS[target]
    stride, dilation = _each(given["stride"], size), _each(given["dilation"], size)
    padding, pad = _padding(given["padding"], kernel, stride, dilation, size)
    return _call(target, given, stride, padding, dilation, given["groups"], pad=pad)


def _transposed(target: Any, given: dict[str, Any], kernel: Sequence[int]) -> Call | None:
    size = TRANSPOSED[target]
    names = "stride", "padding", "output_padding", "dilation"
    stride, padding, output_padding, dilation = (_each(given[name], size) for name in names)
    return _call(target, given, stride, padding, output_padding, given["groups"], dilation)


def _call(target: Any, given: dict[str, Any], *options: Any, pad: tuple[Any, ...] | None = None) -> Call | None:
    known = all(o is not None for o in options) and isinstance(given["groups"], int)
    return Call(target, given["input"], given["weight"], given["bias"], options, pad) if known else None


def _each(value: Any, size: int) -> list[int] | None:
    """A number for each spatial dimension; None if one is symbolic."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    values *= size if len(values) == 1 else 1
    return values if all(isinstance(v, int) for v in values) else None


def _padding(
    padding: Any, kernel: Sequence[int], stride: list[int] | None, dilation: list[int] | None, size: int
) -> tuple[list[int] | None, tuple[Any, ...] | None]:
    """The padding as numbers, and what is to be padded before where it is not the same on both sides."""
    if not isinstance(padding, str):
        return _each(padding, size), None
    if padding == "valid":
        return [0] * size, None
    if padding != "same" or dilation is None or stride != [1] * size:
        return None, None
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    more = [t % 2 for t in total]
    # From the last dimension to the first, left and right.
    pad = ([n for m in reversed(more) for n in (0, m)],) if any(more) else None
    return [t // 2 for t in total], pad


def _module(target: Any, gm: GraphModule, node: Node) -> Call | None:
    module: Any = gm.get_submodule(str(node.target))
    given = operands_of(node, input=None)
    if given is None or not is_plain(module, *MODULES[target]):
        return None
    bias = None if module._parameters["bias"] is None else f"{node.target}.bias"
    return call_of_module(target, module, given["input"], f"{node.target}.weight", bias)


def call_of_module(target: Any, module: Any, x: Any, weight: Any, bias: Any) -> Call | None:
    """What a plain module calls with the input ``x``; ``weight`` and ``bias`` are what its own are written as."""
    names = "stride", "padding", "output_padding", "dilation", "groups"
    given = {"input": x, "weight": weight, "bias": bias} | {name: getattr(module, name) for name in names}
    kernel = module.weight.shape[2:]
    if target in TRANSPOSED:
        return _transposed(target, given, kernel)
    if module.padding_mode == "zeros":
        return _convolution(target, given, kernel)
    call = _convolution(target, given | {"padding": 0}, kernel)
    pad = list(module._reversed_padding_repeated_twice), module.padding_mode
    return None if call is None else call._replace(pad=pad)


def _function(target: Any, gm: GraphModule, node: Node) -> Call | None:
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    if target in TRANSPOSED:
        defaults = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    given = operands_of(node, input=None, weight=None, bias=None, **defaults)
    if given is None or not (kernel := _kernel(gm, given["weight"])):
        return None
    return (_transposed if target in TRANSPOSED else _convolution)(target, given, kernel)


def _convolution_of_any_size(gm: GraphModule, node: Node) -> Call | None:
    names = "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups"
    given = operands_of(node, **dict.fromkeys(names))
    kernel = [] if given is None else _kernel(gm, given["weight"])
    if given is None or not 1 <= len(kernel) <= 3:
        return None
    if given["transposed"]:
        return _transposed(list(TRANSPOSED)[len(kernel) - 1], given, kernel)
    return _convolution(list(CONVOLUTIONS)[len(kernel) - 1], given, kernel)


def _kernel(gm: GraphModule, weight: Any) -> Sequence[int]:
    parameter = parameter_of(gm, weight)
    if parameter is None:
        parameter = computed_from(gm, weight)
    return [] if parameter is None else parameter.shape[2:]


_FORWARD, _BOTH = ("forward",), ("forward", "_conv_forward")
MODULES: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.conv1d: (nn.Conv1d, _BOTH),
    F.conv2d: (nn.Conv2d, _BOTH),
    F.conv3d: (nn.Conv3d, _BOTH),
    F.conv_transpose1d: (nn.ConvTranspose1d, _FORWARD),
    F.conv_transpose2d: (nn.ConvTranspose2d, _FORWARD),
    F.conv_transpose3d: (nn.ConvTranspose3d, _FORWARD),
}
CONV_MODULES: dict[type[nn.Module], Spelling] = {kind: partial(_module, f) for f, (kind, _) in MODULES.items()}
_aten = torch.ops.aten
CONV_CALLS: dict[Any, Spelling] = {
    **{f: partial(_function, f) for f in (*CONVOLUTIONS, *TRANSPOSED)},
    _aten.conv1d.default: partial(_function, F.conv1d),
    _aten.conv1d.padding: partial(_function, F.conv1d),
    _aten.conv2d.default: partial(_function, F.conv2d),
    _aten.conv2d.padding: partial(_function, F.conv2d),
    _aten.conv3d.default: partial(_function, F.conv3d),
    _aten.conv3d.padding: partial(_function, F.conv3d),
    _aten.conv_transpose1d.default: partial(_function, F.conv_transpose1d),
    _aten.conv_transpose2d.input: partial(_function, F.conv_transpose2d),
    _aten.conv_transpose3d.input: partial(_function, F.conv_transpose3d),
    torch.convolution: _convolution_of_any_size,
    _aten.convolution.default: _convolution_of_any_size,
}
