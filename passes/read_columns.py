"""Confine the gradient of a row-sparse call's input to the columns that anything reads.

Where only pointwise operations lie between a row-sparse call and the one that produced its input, the gradient of that
input goes back, number by number, to an operator that reads the columns of its own row set and no others. So the other
columns need not be computed: a second factor of density on the product ``dx = g @ W``, and all gradients of parameters
stay as they are. A call that chooses its rows in the backward pass, or notes the magnitudes of all of them, reads every
column: what it feeds is not confined.

Where examples are left out as well (``rwfx.passes.sparse_examples``), a gradient that goes from one call straight to
another is handed over without them.
"""

import copy
import operator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from rwfx.label_rules import bare_name
from rwfx.ops.linear import ACTIVATIONS
from rwfx.passes.parameters import has_hooks

ROW_LINEAR = torch.ops.rwfx.row_linear.default
PLACES = {argument.name: place for place, argument in enumerate(ROW_LINEAR._schema.arguments)}

# What row_linear can do itself, by class; by bare name it is ACTIVATIONS.
ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}
# One number in, one number out, of one tensor and with nothing trained.
POINTWISE = ACTIVATIONS.keys() | frozenset(
    name
    for names in (
        "relu6 leaky_relu rrelu elu selu celu mish hardswish hardsigmoid hardtanh hardshrink softshrink tanhshrink",
        "threshold softplus softsign logsigmoid dropout alpha_dropout abs neg negative square exp log1p sin cos erf",
        "clamp clamp_min clamp_max clip add sub mul multiply div truediv to type float double half bfloat16 contiguous",
        "clone identity",
    )
    for name in names.split()
)
POINTWISE_MODULES = {
    *ACTIVATION_MODULES, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.Softplus, nn.Softsign,
    nn.LogSigmoid, nn.Dropout, nn.AlphaDropout, nn.Identity,
}  # fmt: skip


def read_columns(gm: GraphModule) -> GraphModule:
    """Tell each row-sparse call which columns of its input's gradient are read, where not all may be.

    An activation that is read by that call alone becomes a part of it, so that its backward is confined as well. The
    outputs and the gradients of parameters are unchanged; that of an activation in between may have zeros more.
    """
    confined = GraphModule(gm, copy.deepcopy(gm.graph))
    calls = [node for node in confined.graph.nodes if node.target is ROW_LINEAR and _argument(node, "dx") == "rows"]
    for call in calls:
        feeding = _feeding(confined, call)
        of_examples = _argument(call, "examples") is not None
        if feeding is None or (_reads_all(feeding) and not of_examples):
            continue
        if not _reads_all(feeding):
            _tell(call, "columns", _argument(feeding, "rows"))
        activated = _argument(call, "x")
        activation = _activation(confined, activated, call)
        if activation:
            _tell(call, "x", activated.all_input_nodes[0])
            _tell(call, "activation", activation)
            confined.graph.erase_node(activated)
        source = _argument(call, "x")
        if source.target is not ROW_LINEAR or list(source.users) != [call]:
            continue
        if not of_examples:
            _tell(call, "direct", True)
        elif _argument(source, "examples") is _argument(call, "examples") and not _notes_own_rows(source):
            _tell(call, "direct", True)
            _tell(source, "packed", "rows" if _reads_all(source) else "columns")
    confined.graph.lint()
    confined.recompile()
    return confined


def _feeding(gm: GraphModule, call: Node) -> Node | None:
    """The row-sparse call that a call's input comes from by nothing but pointwise operations, if there is one."""
    at, between = _argument(call, "x"), call.prev
    while isinstance(at, Node):
        # What changes a value under the hands of its readers is in the way too, whether or not its result is used.
        while between is not at:
            if _in_place(gm, between) and not _is_pointwise(gm, between):
                return None
            between = between.prev
        if at.target is ROW_LINEAR:
            return at
        if not _is_pointwise(gm, at):
            return None
        (at,) = at.all_input_nodes
    return None


def _reads_all(call: Node) -> bool:
    """Whether the backward of a row-sparse call reads more of its output's gradient than its row set."""
    all_seen = _argument(call, "seen") is not None and _argument(call, "seen_all")
    return _argument(call, "dx") != "rows" or _argument(call, "chosen") is not None or all_seen


def _notes_own_rows(call: Node) -> bool:
    """Whether it notes the magnitudes of its row set alone, which it looks for in a gradient that is laid out in
    full."""
    return _argument(call, "seen") is not None and not _argument(call, "seen_all")


def _argument(call: Node, name: str) -> Any:
    """What a row-sparse call is given, in its place, by name or by default."""
    place = PLACES[name]
    if place < len(call.args):
        return call.args[place]
    return call.kwargs.get(name, ROW_LINEAR._schema.arguments[place].default_value)


def _tell(call: Node, name: str, value: Any) -> None:
    """Give a row-sparse call an argument: by name, if it has none in that place."""
    if PLACES[name] < len(call.args):
        call.update_arg(PLACES[name], value)
    else:
        call.update_kwarg(name, value)


def _is_pointwise(gm: GraphModule, node: Node) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return type(module) in POINTWISE_MODULES and not has_hooks(module)
    return node.op in ("call_function", "call_method") and bare_name(node.target) in POINTWISE


def _activation(gm: GraphModule, node: Node, reader: Node) -> str:
    """The name of the activation that ``node`` is and that only ``reader`` reads; else empty."""
    if list(node.users) != [reader] or len(node.all_input_nodes) != 1:
        return ""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        name = ACTIVATION_MODULES.get(type(module), "")
        plain = getattr(module, "approximate", "none") == "none"
    else:
        name = bare_name(node.target)
        # Not gelu(x, approximate="tanh"), nor relu(x, True).
        plain = len(node.args) + len(node.kwargs.keys() - {"inplace"}) == 1
    # Computed by its reader, it is computed later. Where others hold its input, also as a view under another name, they
    # may change that until then, and in place it would change what they read.
    movable = _alone(node) or (not _in_place(gm, node) and _next_call(node) is reader)
    return name if name in ACTIVATIONS and plain and movable else ""


def _in_place(gm: GraphModule, node: Node) -> bool:
    """Whether ``node`` writes to its input."""
    if node.op == "call_module":
        return bool(getattr(gm.get_submodule(str(node.target)), "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    augmented = getattr(operator, name, None) is node.target and name.startswith("i")  # operator.iadd is +=
    return bool(node.kwargs.get("inplace") or "out" in node.kwargs or name.endswith("_") or augmented)


def _alone(node: Node) -> bool:
    """Whether nothing but ``node`` reads what lies between it and the row-sparse call that feeds it."""
    while node.target is not ROW_LINEAR:
        (node,) = node.all_input_nodes
        if len(node.users) > 1:
            return False
    return True


def _next_call(node: Node) -> Node:
    """What runs right after ``node``."""
    node = node.next
    while node.op == "get_attr":
        node = node.next
    return node
