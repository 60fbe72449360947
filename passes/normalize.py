"""One spelling for one meaning: every linear call on a parameter becomes ``F.linear(x, weight, bias)``."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node


def normalize(gm: GraphModule) -> GraphModule:
    """Spell ``nn.Linear``, ``x @ w.t()`` and ``torch.addmm(b, x, w.t())`` as ``F.linear``.

    They end in the same kernel, so the outputs stay the same bit for bit. A linear module that does more than
    its class (hooks, a parametrization, a forward of its own) is left as it is.
    """
    graph = copy.deepcopy(gm.graph)
    for node in list(graph.nodes):
        spelling = SPELLINGS.get(node.target) if node.op != "call_module" else _module
        operands = spelling(gm, node) if spelling else None
        if operands is None:
            continue
        with graph.inserting_before(node):
            x, *parameters = operands
            arguments = [graph.get_attr(p) if isinstance(p, str) else p for p in parameters]
            call = graph.call_function(F.linear, (x, *arguments))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        # The transposes and parameters that the old spellings read.
        if not node.users and (node.op == "get_attr" or _untransposed(node) is not None):
            graph.erase_node(node)
    graph.lint()
    return GraphModule(gm, graph)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling ``module`` is ``F.linear`` on its own parameters and nothing else."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and not has_hooks(module)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` is more than its forward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def convolution_of(gm: GraphModule, node: Node) -> nn.Module | None:
    """The module of a call that is a plain convolution of its input with its own weight; None for any other node."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    module = gm.get_submodule(str(node.target))
    kinds = {nn.Conv1d: nn.Conv1d.forward, nn.Conv2d: nn.Conv2d.forward, nn.Conv3d: nn.Conv3d.forward}
    plain = type(module).forward is kinds.get(type(module)) and "forward" not in vars(module) and not has_hooks(module)
    ours = plain and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return module if ours and isinstance(module._parameters.get("weight"), nn.Parameter) else None


def weight_of(gm: GraphModule, node: Node) -> nn.Parameter | None:
    """The parameter ``(O, I)`` that a normalized call is linear in; None for any other node."""
    if node.op != "call_function" or node.target is not F.linear or len(node.args) < 2:
        return None
    return parameter_of(gm, node.args[1]) if _is_parameter(gm, node.args[1], 2) else None


def parameter_of(gm: GraphModule, node: Any) -> nn.Parameter | None:
    """The parameter that a node reads, if it does."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    return gm.get_submodule(owner)._parameters.get(name)


# Each gives (x, weight, bias) of a call that is linear in a parameter, or None. Parameters are names or nodes.


def _module(gm: GraphModule, node: Node) -> tuple[Any, ...] | None:
    module = gm.get_submodule(str(node.target))
    if not is_plain_linear(module):
        return None
    x = node.args[0] if node.args else node.kwargs["input"]
    bias = f"{node.target}.bias" if module._parameters["bias"] is not None else None
    return x, f"{node.target}.weight", bias


def _linear(gm: GraphModule, node: Node) -> tuple[Any, ...] | None:
    names = ("input", "weight", "bias")
    operands = dict(zip(names, node.args, strict=False)) | node.kwargs
    return tuple(operands.get(name) for name in names) if _is_parameter(gm, operands["weight"], 2) else None


def _product(gm: GraphModule, node: Node) -> tuple[Any, ...] | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    x, weight = node.args[0], _untransposed(node.args[1])
    return (x, weight, None) if _is_parameter(gm, weight, 2) and isinstance(x, Node) else None


def _addmm(gm: GraphModule, node: Node) -> tuple[Any, ...] | None:
    if len(node.args) != 3 or node.kwargs:
        return None
    bias, x, weight = node.args[0], node.args[1], _untransposed(node.args[2])
    return (x, weight, bias) if _is_parameter(gm, weight, 2) and _is_parameter(gm, bias, 1) else None


SPELLINGS: dict[Any, Callable[[GraphModule, Node], tuple[Any, ...] | None]] = {
    F.linear: _linear,
    torch.matmul: _product,
    torch.mm: _product,
    operator.matmul: _product,
    "matmul": _product,
    "mm": _product,
    torch.addmm: _addmm,
}

TRANSPOSES = {torch.t, torch.transpose, torch.swapaxes, "t", "transpose", "swapaxes"}


def _untransposed(node: Any) -> Node | None:
    """``w`` of ``w.t()``, ``w.T``, ``w.mT``, ``w.transpose(0, 1)``."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    if node.target in TRANSPOSES and sorted(d % 2 for d in node.args[1:] if isinstance(d, int)) in (
        [],
        [0, 1],
    ):
        return node.args[0]
    if node.target is getattr and node.args[1] in ("T", "mT"):
        return node.args[0]
    return None


def _is_parameter(gm: GraphModule, node: Any, dim: int) -> bool:
    parameter = parameter_of(gm, node)
    return parameter is not None and parameter.dim() == dim
