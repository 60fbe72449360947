"""What a node of a graph reads and calls: a parameter of the model, a module that does no more than its class."""

from typing import Any

from torch import nn
from torch.fx import GraphModule, Node


def parameter_of(gm: GraphModule, node: Any) -> nn.Parameter | None:
    """The parameter that a node reads, if it does."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    return gm.get_submodule(owner)._parameters.get(name)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` is more than its forward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def is_plain(module: nn.Module, kind: type[nn.Module], methods: tuple[str, ...] = ("forward",)) -> bool:
    """Whether calling ``module`` is what its class ``kind`` does with a weight of its own, and nothing else.

    Not with hooks, a parametrization, or one of the ``methods`` of ``kind`` overridden.
    """
    return computes_as(module, kind, methods) and not has_hooks(module)


def computes_as(module: nn.Module, kind: type[nn.Module], methods: tuple[str, ...] = ("forward",)) -> bool:
    """The same of its forward alone, around which there may be hooks."""
    return (
        isinstance(module, kind)
        and all(getattr(type(module), name) is getattr(kind, name) and name not in vars(module) for name in methods)
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and "bias" in module._parameters
    )
