"""Find the linear calls whose leading dimensions hold the examples of the batch one after the other.

Only such a call can leave examples out of its backward pass. Elsewhere, after a transpose of batch and sequence or an
operation across examples, it computes with all of them.
"""

import copy
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from rwfx.capture import untouched
from rwfx.label_rules import bare_name, operation_of
from rwfx.passes.grouped_spellings import GROUPED
from rwfx.passes.normalize import CONVOLUTIONS, weight_of
from rwfx.passes.outputs import outputs_of
from rwfx.passes.read_columns import POINTWISE, POINTWISE_MODULES
from rwfx.passes.weights import weights_of

MARK = "follows_examples"  # of a call, in its ``meta``
BATCH = "holds_the_batch"  # of the input whose first dimension counts the examples
ENTRIES = "has_an_entry_for_each_example"  # of what is given out
TOKENS = "counts_tokens"  # of what is given out, where its first two dimensions do and not its first

# Within an example whatever their arguments. A batch norm is across examples; what goes through it is left out with
# them.
WITHIN = POINTWISE | frozenset(
    name
    for names in (
        "linear layer_norm rms_norm group_norm instance_norm batch_norm conv1d conv2d conv3d",
        "conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d",
        "avg_pool1d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d adaptive_avg_pool1d embedding size",
        "Conv1d Conv2d Conv3d MaxPool1d MaxPool2d AvgPool1d AvgPool2d AdaptiveAvgPool1d AdaptiveAvgPool2d",
        "AdaptiveMaxPool2d Embedding",
    )
    for name in names.split()
)
# Within an example where they do not act on the first dimension.
ALONG = frozenset(["softmax", "log_softmax", "cat", "concat", "mean", "sum", "amax", "flatten"])


def follow_examples(
    gm: GraphModule, inputs: tuple[Any, ...] | None, unit: Literal["example", "token"] = "example"
) -> tuple[GraphModule, tuple[str, ...]]:
    """Mark the linear calls on a parameter that follow the examples, in ``node.meta``; the graph is otherwise the same.

    ``inputs``, one for each placeholder, decide by a trial: the gradient of one example's output may arrive in that
    example's places alone. Without them, or where they are one example, only what is known to work within examples is
    followed. Also returns a note for every call that is not marked. With ``unit="token"`` the first two dimensions
    count the examples, and nothing is followed without a trial.

    Raises:
        ValueError: no input is a tensor, or there are no inputs that could tell tokens apart.
    """
    marked = GraphModule(gm, copy.deepcopy(gm.graph))
    calls = weights_of(marked)
    placeholders = [node for node in marked.graph.nodes if node.op == "placeholder"]
    values: tuple[Any, ...] = inputs or (None,) * len(placeholders)
    batches = [(node, x) for node, x in zip(placeholders, values, strict=True) if inputs is None or _is_batch(x)]
    if not batches:
        raise ValueError("examples= needs an input that is a tensor whose first dimension counts the examples.")
    node, batch = batches[0]
    node.meta[BATCH] = True
    counted = 2 if unit == "token" else 1
    tried = _is_batch(batch) and batch.dim() >= counted and min(batch.shape[:counted]) > 1
    if unit == "token" and not tried:
        raise ValueError(
            'examples= with unit="token" needs example_inputs that show which calls keep tokens apart: the first '
            "input a tensor of two sequences of two tokens or more."
        )
    lead = batch.shape[:counted] if tried else None
    following, with_entries = _known(marked, node) if lead is None else _tried(marked, calls, values, lead)
    notes = []
    for node in outputs_of(marked.graph):
        node.meta[ENTRIES] = node.name in with_entries
        node.meta[TOKENS] = with_entries.get(node.name) == 2
    for node in calls:
        if node.name in following and node.target is not GROUPED:
            node.meta[MARK] = True
        else:
            why = f"its leading dimensions do not hold the {unit}s one after the other"
            if unit == "token":
                why += ", or tokens are mixed behind it"
            if not tried:
                why = (
                    "only example_inputs with two examples or more can tell where its examples are, or whether they "
                    "are mixed on the way to the outputs"
                )
            if node.target is GROUPED:  # by chance an example's trial may sort them so
                why = "what it multiplies is sorted by expert"
            notes.append(f"{calls[node].name} computes with all {unit}s: {why}")
    return marked, tuple(notes)


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _known(gm: GraphModule, batch: Node) -> tuple[set[str], dict[str, int]]:
    """The nodes whose values are known to hold one example after the other, and from which every way to the outputs is
    known to as well; and the nodes of which the former is known, each with 1.

    Of the inputs that is ``batch`` alone: another may be a table that all examples share.
    """
    known: set[str] = {batch.name}
    constants: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op != "placeholder" and constants.issuperset(node.all_input_nodes):
            constants.add(node)
        if _is_within(gm, node, known, constants):
            known.add(node.name)
    apart = set(known)
    for node in reversed(gm.graph.nodes):
        if not all(user.op == "output" or user.name in apart or _is_last(user) for user in node.users):
            apart.discard(node.name)
    return apart, dict.fromkeys(known, 1)


def _is_last(node: Node) -> bool:
    """Whether it gives an output without examples, or none that has a gradient."""
    name = bare_name(node.target)
    total = name in ("mean", "sum") and len(node.args) == 1 and not node.kwargs
    return name in ("argmax", "argmin", "detach", "size") or (total and all(user.op == "output" for user in node.users))


def _is_within(gm: GraphModule, node: Node, known: Collection[str], constants: Collection[Node]) -> bool:
    """Whether its values hold one example after the other, as do those of the nodes that are ``known`` to; the
    ``constants`` are of the model alone, as is the transpose of a weight."""
    from_examples = [n for n in node.all_input_nodes if n.name in known or n not in constants]
    if not from_examples or not all(n.name in known for n in from_examples):
        return False
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, nn.Flatten):
            return module.start_dim >= 1
        if isinstance(module, nn.Softmax | nn.LogSoftmax):
            return module.dim not in (0, None)
        return type(module) in POINTWISE_MODULES or operation_of(module) in WITHIN
    if node.op not in ("call_function", "call_method"):
        return False
    name = bare_name(node.target)
    if name == "getattr":
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    if name == "getitem":
        return _keeps_examples(*node.args)
    if name in ALONG:
        dim = node.kwargs.get("dim", node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0))
        dims = dim if isinstance(dim, list | tuple) else [dim]
        # The last one may be the first.
        return all(isinstance(d, int) and (d > 0 or (d == -1 and _has_features(gm, from_examples[0]))) for d in dims)
    if name == "pad":  # the padding of a convolution ends before the examples
        pad: Any = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
        return all(2 * CONVOLUTIONS.get(user.target, 0) >= len(pad) for user in node.users)
    if name in POINTWISE:
        return not any(_adds_dimensions(gm, n) for n in node.all_input_nodes)
    # What is no pointwise operation multiplies with its other arguments: a product of two batches is across examples.
    return name in WITHIN and len(from_examples) == 1 and from_examples[0] in (*node.args[:1], *node.kwargs.values())


def _has_features(gm: GraphModule, node: Node) -> bool:
    """Whether its values are known to have a dimension besides that of the examples."""
    while node.op != "placeholder":
        if weight_of(gm, node) is not None:
            return True
        name = bare_name(node.target) if node.op != "call_module" else operation_of(gm.get_submodule(str(node.target)))
        sliced = name == "getitem" and _keeps_examples(*node.args) and not _is_one(node.args[1])
        if not sliced and name not in POINTWISE | {
            "layer_norm",
            "batch_norm",
            "softmax",
            "log_softmax",
            "cat",
            "concat",
        }:
            return False
        node = next(n for n in node.all_input_nodes if n.op != "get_attr")
    return False


def _is_one(index: Any) -> bool:
    """Whether an index takes one of a dimension, which is gone then."""
    return any(isinstance(i, int) for i in (index if isinstance(index, tuple) else (index,)))


def _keeps_examples(of: Any, index: Any) -> bool:
    """Whether an index leaves the first dimension as it is and adds none; or takes a number of a shape."""
    if isinstance(of, Node) and bare_name(of.target) in ("getattr", "size"):
        return True
    first, *others = index if isinstance(index, tuple) else (index,)
    return (first is Ellipsis or first == slice(None)) and all(isinstance(i, int | slice) for i in others)


def _adds_dimensions(gm: GraphModule, node: Node) -> bool:
    """Whether a constant of the model may put a dimension before that of the examples."""
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    constant = getattr(gm.get_submodule(owner), name)
    return isinstance(constant, Tensor) and constant.dim() > 2 and constant.shape[0] > 1


def _tried(
    gm: GraphModule, calls: Collection[Node], inputs: tuple[Any, ...], lead: torch.Size
) -> tuple[set[str], dict[str, int]]:
    """The calls at which the gradient of one example's output arrives in that example's places alone; and what is given
    out with an entry for each example, with the number of its dimensions that count them.

    ``lead``: the sizes of the dimensions of the inputs that count the examples.
    """
    num_examples = lead.numel()
    convolutions = {node.name for node in calls if node.target in CONVOLUTIONS}
    given_out = set(outputs_of(gm.graph))
    outputs: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    counted: dict[str, int] = {}

    class Calls(fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            if _is_passed_over(gm, n):
                value = self.fetch_args_kwargs_from_env(n)[0][0]
            else:
                value = super().run_node(n)
            if n in calls:
                # Also where nothing before it is trained.
                value = value.detach().clone().requires_grad_() if not value.requires_grad else value
                outputs[n.name] = value
            if n in given_out and isinstance(value, Tensor):
                for shape in (lead, torch.Size([num_examples])):
                    if value.shape[: len(shape)] == shape:
                        leaves[n.name], counted[n.name] = value, len(shape)
            return value

    # A weight that is zero bars the way to what is behind it, until it is trained.
    zeros = {p: p.detach() == 0 for p in gm.parameters() if p.is_floating_point() and (p == 0).any()}
    with untouched(gm), torch.enable_grad():
        try:
            with torch.no_grad():
                for p, zero in zeros.items():
                    p.copy_(torch.where(zero, 0.1 * torch.randn_like(p), p))
            Calls(gm).run(*inputs)
            trained = [y for y in leaves.values() if y.requires_grad]
            return _apart(trained, outputs, num_examples, convolutions), counted
        finally:
            with torch.no_grad():
                for p, zero in zeros.items():
                    p.masked_fill_(zero, 0)


# A dropout could hide a way by chance; a batch norm is across examples by intention: what goes through it is left out.
_PASSED_OVER = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "batch_norm"}


def _is_passed_over(gm: GraphModule, node: Node) -> bool:
    """Whether a trial takes what comes in for what comes out."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd)
    return node.op in ("call_function", "call_method") and bare_name(node.target) in _PASSED_OVER


def _apart(
    leaves: list[Tensor], outputs: Mapping[str, Tensor], num_examples: int, convolutions: Collection[str]
) -> set[str]:
    """Of ``outputs``, those in whose places the gradient of one example's ``leaves`` arrives, and in no others."""
    following = {name for name, y in outputs.items() if _holds(y, num_examples, name in convolutions)}
    reached = set()
    for example in {0, 1, num_examples // 2, num_examples - 1} if leaves else ():
        of_example = [y.reshape(num_examples, -1)[example] for y in leaves]
        loss = sum((y * torch.randn_like(y)).sum() for y in of_example)
        arrived = torch.autograd.grad([loss], list(outputs.values()), allow_unused=True, retain_graph=True)
        for name, g in zip(outputs, arrived, strict=True):
            if g is not None and name in following:
                places = g.reshape(num_examples, -1).ne(0).any(1)
                if places[example]:
                    reached.add(name)
                places[example] = False
                if places.any():
                    following.discard(name)
    return following & reached


def _holds(y: Tensor, num_examples: int, is_convolution: bool) -> bool:
    """Whether ``y`` can hold so many examples: a convolution's one by one, a linear call's also by several places."""
    if is_convolution:
        return len(y) == num_examples
    return y.dim() > 1 and y.shape[:-1].numel() % num_examples == 0
