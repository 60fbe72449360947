"""An exported program becomes a plain ``fx.Graph`` over the model's own tensors, arguments and outputs.

``torch.export`` gives a flat function of lifted parameters and tensors. The rebuilt graph reads parameters and buffers
from the host by their names, takes the arguments of ``forward`` by theirs, and gives out what ``forward`` does.
"""

import inspect
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx._symbolic_trace import _assert_is_none
from torch.fx.node import map_arg

from rwfx.capture.host import Constants
from rwfx.capture.route import CaptureError
from rwfx.capture.signature import RESULTS, Signature
from rwfx.capture.sizes import check_sizes
from rwfx.capture.structure import Access, leaves_of, rebuilt

# Checks of dtype and device, which the example's were.
SKIPPED = {torch.ops.aten._assert_tensor_metadata.default}
GRADIENT_SWITCH = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST_SWITCH = torch.ops.higher_order.wrap_with_autocast


def rebuild(
    program: ExportedProgram, signature: Signature, output: Any, host: nn.Module, constants: Constants
) -> fx.Graph:
    """The graph of ``program``, which is the model as a function of the tensors in its arguments.

    ``output``: what the model gave out while it was exported, in whose structure the results are given out.

    Raises:
        CaptureError: the program holds something that a plain graph cannot.
    """
    graph = fx.Graph()
    tensors, names = _take_arguments(graph, signature)
    check_sizes(graph, program, tensors, names)
    body = _Body(graph, host)
    values: dict[fx.Node, Any] = {}
    given = iter(tensors)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            values[node] = next(given)
        else:
            values[node] = body.read(_path(spec, program, host, constants))
    results = body.copy(program.graph, program.graph_module, values)
    # Before functionalisation a program mutates in place, and gives out what its caller asked for alone.
    assert all(spec.kind is OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs)
    graph.output(_in_structure(graph, output, results))
    _drop_unread(graph)
    graph.lint()
    return graph


def _take_arguments(graph: fx.Graph, signature: Signature) -> tuple[list[fx.Node], list[str]]:
    """The nodes of the tensors in the arguments and what to call them; what is held is checked."""
    nodes = []
    for argument in signature.arguments:
        default = () if argument.default is inspect.Parameter.empty else (argument.default,)
        nodes.append(graph.create_node("placeholder", argument.name, default, name=argument.name))
    tensors, names = [], []
    for argument, node in zip(signature.arguments, nodes, strict=True):
        is_free = any(isinstance(leaf, torch.Tensor) for _, leaf in leaves_of(argument.value))
        if is_free and argument.default is None:
            message = f"argument {argument.name} is missing: the graph was captured with it"
            graph.call_function(torch._assert, (graph.call_function(operator.is_not, (node, None)), message))
        parts: dict[tuple[Access, ...], fx.Node] = {(): node}
        for path, leaf in leaves_of(argument.value):
            for k in range(len(path)):
                if path[: k + 1] not in parts:
                    get = getattr if path[k].is_attribute else operator.getitem
                    parts[path[: k + 1]] = graph.call_function(get, (parts[path[:k]], path[k].key))
            name = argument.name + "".join(map(str, path))
            if isinstance(leaf, torch.Tensor):
                tensors.append(parts[path])
                names.append(name)
            else:
                _hold(graph, parts[path], name, leaf)
    return tensors, names


def _hold(graph: fx.Graph, node: fx.Node, name: str, value: Any) -> None:
    message = f"{name} has been specialized to have value {value!r} but got another value"
    if value is None:
        graph.call_function(_assert_is_none, (node, message))
    else:
        graph.call_function(torch._assert, (graph.call_function(operator.eq, (node, value)), message))


def _path(spec: Any, program: ExportedProgram, host: nn.Module, constants: Constants) -> str:
    """By what name the host has a tensor that the program was lifted out of."""
    path = _own(spec.target)
    if spec.kind is InputKind.PARAMETER:
        tensor = host.get_parameter(path)
        return next(name for name, parameter in host.named_parameters() if parameter is tensor)
    if spec.kind is InputKind.BUFFER:
        return path
    tensor = program.constants.get(spec.target)
    if not isinstance(tensor, torch.Tensor):
        raise CaptureError(
            f"the forward pass uses {spec.target!r} of type {type(tensor).__name__}, which a graph of tensors cannot "
            "hold (the packed weights of a quantised model?). Transform the float model, and quantise after training."
        )
    for name, parameter in host.named_parameters():
        if parameter is tensor:
            return name
    return constants.name_of(spec.target.rpartition(".")[2], tensor)


def _own(target: str | None) -> str:
    """A name of the exported program, in which the model is the part ``model``, as the model's own."""
    assert target is not None
    return target.removeprefix("model.")


class _Body:
    """Copies the operators of exported graphs into one graph."""

    def __init__(self, graph: fx.Graph, host: nn.Module) -> None:
        self.graph, self.host = graph, host
        self.has_gradients = True

    def read(self, path: str) -> fx.Node:
        """The node that reads a parameter or buffer."""
        return self.graph.create_node("get_attr", path, name=path.replace(".", "_"))

    def copy(self, graph: fx.Graph, owner: nn.Module, values: dict[fx.Node, Any]) -> Sequence[Any]:
        """Append what ``graph`` computes; ``values`` has those of its placeholders. Gives the values of its outputs."""
        kinds: dict[str, set[Any]] = {}
        for node in graph.nodes:
            if node.op == "call_function":
                kinds.setdefault(_module_of(node), set()).add(node.target)
        for node in graph.nodes:
            args, kwargs = (map_arg(a, lambda n: values[n]) for a in (node.args, node.kwargs))
            if node.op == "get_attr":
                values[node] = getattr(owner, node.target)
            elif node.op == "output":
                return args[0]
            elif node.op == "call_function" and node.target not in SKIPPED:
                values[node] = self._call(node, args, kwargs, is_all_it_does=len(kinds[_module_of(node)]) == 1)
        raise AssertionError("a graph without outputs")

    def _call(self, node: fx.Node, args: Any, kwargs: Any, is_all_it_does: bool) -> Any:
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            return args[0][args[1]]
        if node.target is GRADIENT_SWITCH:
            return self._under_gradient_switch(node, *args)
        if node.target is AUTOCAST_SWITCH:
            return self._under_autocast(*args)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"the forward pass uses {node.target}, which a plain graph does not hold.")
        module = _module_of(node).replace(".", "_")
        operation = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
        name = module if module and is_all_it_does else f"{module}_{operation}".strip("_")
        made = self.graph.create_node("call_function", node.target, args, kwargs, name=name)
        made.meta = _meta_of(node)
        return made

    def _under_gradient_switch(self, node: fx.Node, is_on: bool, body: fx.GraphModule, *inputs: Any) -> Sequence[Any]:
        """Without gradients: on detached inputs, so that the graph needs no switch."""
        if is_on and not self.has_gradients:
            raise CaptureError(
                "the forward pass switches gradients on inside of a part that has them switched off, which a graph "
                "does not record. Write detach() in place of torch.no_grad()."
            )
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        values = dict(zip(placeholders, inputs, strict=True))
        if is_on:
            return self.copy(body.graph, body, values)
        detached = {n: self._detached(n, value) for n, value in values.items()}
        outer, self.has_gradients = self.has_gradients, False
        results = list(self.copy(body.graph, body, dict(detached)))
        self.has_gradients = outer
        # An input that is handed out as it is keeps its gradient.
        back = {id(new): values[n] for n, new in detached.items()}
        return [back.get(id(result), result) for result in results]

    def _detached(self, placeholder: fx.Node, value: Any) -> Any:
        example = placeholder.meta.get("val")
        if isinstance(example, torch.Tensor) and (example.is_floating_point() or example.is_complex()):
            return self.graph.call_function(torch.ops.aten.detach.default, (value,))
        return value

    def _under_autocast(
        self, device: str, dtype: torch.dtype, is_on: bool, cache: bool, body: fx.GraphModule, *inputs: Any
    ) -> Sequence[Any]:
        entered = self.graph.call_function(_enter_autocast, (device, dtype, is_on, cache))
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        results = self.copy(body.graph, body, dict(zip(placeholders, inputs, strict=True)))
        self.graph.call_function(_exit_autocast, (entered,))
        return results


def _module_of(node: fx.Node) -> str:
    """The path of the module that computes a node, as the model names it."""
    stack = node.meta.get("nn_module_stack") or {}
    key = next(reversed(stack), "")
    path = stack[key][0] if stack else ""
    path = path if re.match(r"model\b", path) else ""
    return path.removeprefix("model").removeprefix(".")


def _meta_of(node: fx.Node) -> dict[str, Any]:
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    modules = {key: (_own(path), kind) for key, (path, kind) in stack.items() if path.startswith("model")}
    return {"nn_module_stack": modules, "stack_trace": node.meta.get("stack_trace")}


def _in_structure(graph: fx.Graph, output: Any, results: Sequence[Any]) -> Any:
    given = iter(results)
    leaves = [next(given) if isinstance(leaf, RESULTS) else leaf for _, leaf in leaves_of(output)]
    return rebuilt(output, leaves, lambda kind, *args, **kwargs: graph.call_function(kind, args, kwargs))


def _drop_unread(graph: fx.Graph) -> None:
    """Parameters and sizes that nothing reads."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or node.target is torch.ops.aten.sym_size.int):
            graph.erase_node(node)
