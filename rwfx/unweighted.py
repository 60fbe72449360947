"""Why a parameter with rows is the weight of no call: what reads it instead."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from rwfx.label_rules import bare_name
from rwfx.passes.normalize import CONVOLUTIONS
from rwfx.passes.parameters import has_hooks
from rwfx.weight_views import like_view

_LOOKED_UP = "its rows are looked up, and those that are not have no gradient"
_RECURRENT = "a recurrent layer multiplies with it again and again, each time with what it gave before"
_EXPERTS = "{} multiplies with several matrices at once, as experts do"
_COMPUTED = "the forward pass computes a weight from it"

# Also as operators of ATen, which they stay on what is no parameter.
_WEIGHTED = {bare_name(call) for call in (F.linear, *CONVOLUTIONS)}
_BY_OPERATION = {
    **dict.fromkeys(("embedding", "embedding_bag"), _LOOKED_UP),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _RECURRENT),
    **dict.fromkeys(("bmm", "baddbmm", "einsum", "matmul", "grouped_mm", "grouped_mm_fallback"), _EXPERTS),
}
_BY_MODULE: dict[type[nn.Module], str] = {
    nn.Embedding: _LOOKED_UP,
    nn.EmbeddingBag: _LOOKED_UP,
    nn.RNNBase: _RECURRENT,
    nn.RNNCellBase: _RECURRENT,
}


def why_unweighted(gm: GraphModule, own: nn.Parameter) -> str:
    """The reason for a parameter of a normalized graph's model; empty where what reads it says none."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if any(p is own for p in module.parameters()):
                return _of_module(module)
    readers = list(_readers(gm, own))
    for node in readers:
        if bare_name(node.target) in _BY_OPERATION:
            return _BY_OPERATION[bare_name(node.target)].format(bare_name(node.target))
        if _is_weight(node):
            return _COMPUTED
    return "" if readers else "the forward pass does not read it"


def _of_module(module: nn.Module) -> str:
    if is_parametrized(module) or has_hooks(module):
        return _COMPUTED
    return next((why for kind, why in _BY_MODULE.items() if isinstance(module, kind)), "")


def _readers(gm: GraphModule, parameter: nn.Parameter) -> Iterator[Node]:
    """The calls that read the parameter or a view of it."""
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method") or like_view(gm, node) is not None:
            continue
        if any((found := like_view(gm, n)) is not None and found[0] is parameter for n in node.all_input_nodes):
            yield node


def _is_weight(node: Node) -> bool:
    """Whether a call multiplies with what comes of ``node``."""
    seen, queue = {node}, [node]
    while queue:
        at = queue.pop()
        for user in at.users:
            weighted = user.op in ("call_function", "call_method") and bare_name(user.target) in _WEIGHTED
            if weighted and len(user.args) > 1 and user.args[1] is at:
                return True
            if user not in seen and not weighted:
                seen.add(user)
                queue.append(user)
    return False
