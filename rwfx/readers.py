"""Why a parameter stays dense that no linear call or convolution uses: what reads it instead.

In: a normalized graph and a parameter. Out: a reason, for the report.
"""

from torch import nn
from torch.fx import GraphModule, Node

from rwfx.label_rules import bare_name
from rwfx.passes.parameters import parameter_of
from rwfx.weight_views import VIEWS


def no_call_because(gm: GraphModule, parameter: nn.Parameter, owner: str) -> str:
    """Say what reads ``parameter``, which belongs to a module of the class ``owner``; a view of it is not named."""
    readers = dict.fromkeys(name for node in gm.graph.nodes for name in _readers(gm, node, parameter))
    if not readers:
        return f"the forward pass does not use it (it belongs to {owner})"
    return f"{' and '.join(readers)}: no plain linear call or convolution uses it (it belongs to {owner})"


def _readers(gm: GraphModule, node: Node, parameter: nn.Parameter) -> list[str]:
    """The names of the operations that read ``parameter`` at ``node``."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return [type(module).__name__] if any(p is parameter for p in module.parameters()) else []
    return _users(node) if parameter_of(gm, node) is parameter else []


def _users(node: Node) -> list[str]:
    found = []
    for user in node.users:
        name = "the output" if user.op == "output" else bare_name(user.target)
        found += _users(user) if name in VIEWS else [name]
    return found
