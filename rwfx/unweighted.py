"""Why a parameter with rows is the weight of no call: what reads it instead."""

import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from rwfx.label_rules import bare_name
from rwfx.passes.normalize import CONVOLUTIONS
from rwfx.passes.parameters import has_hooks
from rwfx.readers import Readers, owned

_LOOKED_UP = "its rows are looked up, and those that are not have no gradient"
_RECURRENT = "a recurrent layer multiplies with it again and again, each time with what it gave before"
_SEVERAL = "{} multiplies with it as several matrices at once, of experts or heads"
_OTHER_PRODUCT = "{} multiplies with it otherwise than x @ w.t() does, as from the left"
_COMPUTED = "the forward pass computes a weight from it"
_HOOKED = "its module has hooks, so that it is called as it is"

# Also as operators of ATen, which they stay on what is no parameter.
_WEIGHTED = {bare_name(call) for call in (F.linear, F.grouped_mm, *CONVOLUTIONS)}
_BY_OPERATION = {
    **dict.fromkeys(("embedding", "embedding_bag"), _LOOKED_UP),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _RECURRENT),
    **dict.fromkeys(("bmm", "baddbmm", "einsum", "matmul", "grouped_mm", "grouped_mm_fallback"), _SEVERAL),
}
_BY_MODULE: dict[type[nn.Module], str] = {
    nn.Embedding: _LOOKED_UP,
    nn.EmbeddingBag: _LOOKED_UP,
    nn.RNNBase: _RECURRENT,
    nn.RNNCellBase: _RECURRENT,
}


def why_unweighted(gm: GraphModule, own: nn.Parameter, readers: Readers) -> str:
    """The reason for a parameter of a normalized graph's model; empty where what reads it says none."""
    reading = readers.get(own, ())
    for node in reading:
        if any(p is own for p in owned(gm, node)):
            return _of_module(gm.get_submodule(str(node.target)))
    for node in reading:
        operation = "" if node.op == "call_module" else bare_name(node.target)  # a module may have any name
        if operation in _BY_OPERATION:
            why = _BY_OPERATION[operation]
            return (_OTHER_PRODUCT if why == _SEVERAL and own.dim() == 2 else why).format(operation)
        if _is_weight(node):
            return _COMPUTED
    return "" if reading else "the forward pass does not read it"


def _of_module(module: nn.Module) -> str:
    if is_parametrized(module):
        return _COMPUTED
    if has_hooks(module):
        return _HOOKED
    return next((why for kind, why in _BY_MODULE.items() if isinstance(module, kind)), "")


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
