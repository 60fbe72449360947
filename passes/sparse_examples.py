"""Leave examples out of the backward pass: a choice at the outputs, and weighted calls that follow it."""

import copy
import operator
from collections.abc import Collection
from typing import Any

from torch import ops
from torch.fx import Graph, GraphModule, Node

import rwfx.ops  # noqa: F401  defines the operators named below
from rwfx.example_sampler import ExampleSampler
from rwfx.examples import AdaptiveExamples, SampledExamples
from rwfx.label_rules import bare_name
from rwfx.loss_walk import LossWalkSampler
from rwfx.passes.follow_examples import BATCH, ENTRIES, MARK
from rwfx.passes.normalize import num_rows
from rwfx.passes.read_columns import ROW_LINEAR
from rwfx.passes.sample_rows import SAMPLER
from rwfx.passes.sparse_backward import SPARSE, on_rows
from rwfx.sampler import RowSampler

EXAMPLES = "example_sampler"  # the name of the submodule
PICK = ops.rwfx.pick_examples.default
PICK_BY_WALKS = ops.rwfx.pick_by_walks.default


def sparse_examples(gm: GraphModule, sampler: ExampleSampler, row_sampler: RowSampler) -> GraphModule:
    """Let the outputs choose the examples of a step, and the weighted calls that follow the examples compute with
    these alone.

    ``gm`` may have row-sparse calls; other weighted calls become such with a set of all their rows. Which ones follow
    the examples ``follow_examples`` has marked. The outputs are unchanged, bit for bit. The gradients are those of a
    network in which, behind each of these calls and behind the outputs, the gradient of a dropped example is zero.
    """
    confined = GraphModule(gm, copy.deepcopy(gm.graph))
    confined.add_module(EXAMPLES, sampler)
    graph = confined.graph
    batch = batch_of(graph)
    assert batch is not None
    first = batch.next  # an input may also come behind a check of another
    while first.op == "placeholder":
        first = first.next
    with graph.inserting_before(first):
        num_examples = graph.call_method("size", (batch, 0))
        made = graph.call_module(EXAMPLES, (num_examples,))
        kept = graph.create_node("call_function", operator.getitem, (made, 0), name="kept_examples")
        state = graph.create_node("call_function", operator.getitem, (made, 1), name="examples_state")
    told = {"examples": kept, "num_examples": num_examples}
    calls = set()
    for node in list(graph.nodes):
        if not node.meta.get(MARK):
            continue
        if node.target in SPARSE.values():
            node.kwargs = {**node.kwargs, **told}
            calls.add(node)
        else:
            count = num_rows(confined, node)
            sampler.add_rows(count)
            with graph.inserting_before(node):
                rows = graph.get_attr(f"{EXAMPLES}.all_rows.{count}")
                arguments = on_rows(node, rows)
                call = graph.create_node("call_function", SPARSE[node.target], arguments, dict(told), name=node.name)
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
            calls.add(call)
    if isinstance(row_sampler, LossWalkSampler) and row_sampler.kept:
        _pick_by_walks(confined, row_sampler, calls, kept)
    else:
        _pick(confined, sampler, calls, kept, num_examples, state)
    graph.lint()
    confined.recompile()
    return confined


def _pick_by_walks(gm: GraphModule, sampler: LossWalkSampler, calls: Collection[Node], kept: Node) -> None:
    """Send the output through the operator that draws examples and rows.

    Raises:
        ValueError: the outputs are not those of one linear call.
    """
    graph = gm.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    outputs = [node for node in output.all_input_nodes if node.op not in ("placeholder", "get_attr")]
    if len(outputs) != 1 or outputs[0] not in calls or outputs[0].target is not ROW_LINEAR:
        raise ValueError(
            'start="loss" needs a model whose one output is that of a linear call that follows the examples.'
        )
    (drawn,) = (node for node in graph.nodes if node.op == "call_module" and node.target == SAMPLER)
    sets = {node.args[1]: node for node in drawn.users}
    with graph.inserting_after(drawn):
        state = graph.call_function(operator.getitem, (drawn, len(sampler.kept)))
    with graph.inserting_before(output):
        chosen = [graph.get_attr(f"{SAMPLER}.chosen.{k}") for k in range(len(sampler.kept))]
        tables = [graph.get_attr(f"{SAMPLER}._tables.{k}") for k in range(len(sampler._tables.tensors()))]
        kept_weights, head, layout, *rule = sampler.walk_arguments()
        rows = [sets[k] for k in range(len(sampler.kept))]
        whole = list(outputs[0].users) == [output]
        arguments = (
            outputs[0],
            kept,
            rows,
            chosen,
            list(drawn.args),
            kept_weights,
            tables,
            head,
            layout,
            state,
            *rule,
            whole,
        )
        picked = graph.call_function(PICK_BY_WALKS, arguments)
    output.replace_input_with(outputs[0], picked)


def batch_of(graph: Graph) -> Node | None:
    """The input whose first dimension counts the examples."""
    return next((node for node in graph.nodes if node.meta.get(BATCH)), None)


def _pick(
    gm: GraphModule, sampler: ExampleSampler, calls: Collection[Node], kept: Node, num_examples: Node, state: Node
) -> None:
    """Send all outputs through the operator that chooses."""
    graph = gm.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    outputs = [
        node for node in output.all_input_nodes if node.op not in ("placeholder", "get_attr") and not _is_number(node)
    ]
    options: dict[str, Any] = dict(sampler.options)
    without = [k for k, node in enumerate(outputs) if not node.meta.get(ENTRIES)]
    if without:
        options["without"] = without
    if without and options.get("unbiased"):
        raise ValueError(
            f"unbiased=True needs outputs with an entry for each example, and {outputs[without[0]].name} has none: "
            "what a loss takes from it reaches the weights by the kept examples alone, with no weight of their own."
        )
    if isinstance(sampler.policy, SampledExamples):
        options["state"] = state
    with graph.inserting_before(output):
        if isinstance(sampler.policy, AdaptiveExamples):
            options["needed"] = graph.get_attr(f"{EXAMPLES}.needed")
        options["whole"] = all(node in calls and list(node.users) == [output] for node in outputs)
        picked = graph.call_function(PICK, (outputs, kept, num_examples), options)
        items = [graph.call_function(operator.getitem, (picked, k)) for k in range(len(outputs))]
    for node, item in zip(outputs, items, strict=True):
        output.replace_input_with(node, item)


def _is_number(node: Node) -> bool:
    """Whether it is about a shape: no tensor."""
    name = bare_name(node.target)
    if node.op == "call_method" and name in ("size", "dim", "numel"):
        return True
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    computed = node.op == "call_function" and getattr(operator, name, None) is node.target and node.all_input_nodes
    return bool(computed) and all(map(_is_number, node.all_input_nodes))
