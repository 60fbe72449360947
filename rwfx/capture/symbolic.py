"""The first route: ``torch.fx.symbolic_trace``'s tracer, once in train and once in eval mode.

It follows the operations on tensors without data: the graph calls modules of ``torch.nn`` and functions of ``torch``,
and cannot hold a branch of Python that depends on a tensor's values or shape.
"""

import inspect
import operator
from collections.abc import Callable, Iterable
from functools import partialmethod
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from rwfx.capture.host import Constants, attributes_of, lost_of, scratch_copy, set_mode, shared_copy
from rwfx.capture.inputs import ExampleInputs
from rwfx.capture.route import PLAIN, CaptureError, Graphs, place_of
from rwfx.capture.streams import undrawn

NAME = "symbolic_trace"


def capture(model: nn.Module, inputs: ExampleInputs | None) -> Graphs:
    """Trace ``model`` symbolically.

    Raises:
        CaptureError: it cannot be traced; names the module, the line and what to do.
    """
    # Tracing runs the forward pass, which may assign to its modules.
    scratch = scratch_copy(model)
    before = attributes_of(scratch)
    given = {} if inputs is None else inputs.arguments_of(model)
    graphs = {}
    for mode in (True, False):
        set_mode(scratch, mode)
        graphs[mode] = _trace(scratch, type(model).__name__, given)
    host = shared_copy(model)
    _keep_constants(scratch, host, graphs.values())
    return Graphs(host, graphs[True], graphs[False], lost_of(model, scratch, before, keeps_leaves=True))


# Modules with weights inside that the tracer calls as a whole.
CLOSED = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def is_closed(graphs: Graphs) -> bool:
    """Whether the graph calls as a whole what has weights inside: such a module, a parametrized one, or a library's
    function on weights."""
    return any(
        isinstance(module := graphs.host.get_submodule(str(node.target)), CLOSED) or is_parametrized(module)
        if node.op == "call_module"
        else node.op == "call_function" and _is_foreign(node.target) and _reads_weights(graphs.host, node)
        for node in graphs.train.nodes
    )


def _is_foreign(function: Any) -> bool:
    """Whether it is none of PyTorch's or Python's own: a function that the tracer was told to leave alone."""
    package = str(getattr(function, "__module__", "torch")).partition(".")[0]
    return package not in ("torch", "_operator", "builtins", "math")


def _reads_weights(host: nn.Module, node: fx.Node) -> bool:
    names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    parameters = dict(host.named_parameters(remove_duplicate=False))
    return any(name in parameters and parameters[name].dim() >= 2 for name in names)


def _trace(root: nn.Module, model_name: str, given: dict[str, Any]) -> fx.Graph:
    parameters = inspect.signature(type(root).forward).parameters
    held = {name: value for name, value in given.items() if isinstance(value, PLAIN)}
    for name, parameter in list(parameters.items())[1:]:
        default = parameter.default
        if default is inspect.Parameter.empty or name in given or isinstance(default, (tuple, list, dict)):
            continue
        if not isinstance(default, PLAIN):
            raise CaptureError(
                f"argument {name!r} of {model_name}.forward has a default of type {type(default).__name__}, which a "
                "graph cannot hold. Give it the default None and set the value in the forward pass, or give "
                f"example_inputs with {name!r} in them."
            )
        held[name] = default
    tracer = _Tracer()
    drawn = CaptureError(
        f"{model_name} draws random numbers while it is traced (torch.rand, random.random, ...): the drawn "
        "values would be frozen into the graph. Draw them with a module such as nn.Dropout, or from a "
        "tensor of the forward pass (torch.rand_like(x))."
    )
    with undrawn(drawn):
        try:
            graph = tracer.trace(root, concrete_args=held or None)
        except Exception as error:
            raise CaptureError(_explain(error, root, model_name, tracer.failed_in)) from error
    # The tracer renames an argument that it holds at its default; its callers know it by its own name.
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, list(parameters)[1:], strict=False):
        if name in held:
            node.target = name
    graph._tracer_cls = fx.Tracer
    graph.lint()
    return graph


class _Proxy(fx.Proxy):
    """``fx.Proxy`` that keeps ``h += 1`` an operation in place, as another name of ``h`` may be read later."""

    def _in_place(self, operation: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    __iadd__ = partialmethod(_in_place, operator.iadd)
    __isub__ = partialmethod(_in_place, operator.isub)
    __imul__ = partialmethod(_in_place, operator.imul)
    __itruediv__ = partialmethod(_in_place, operator.itruediv)
    __ifloordiv__ = partialmethod(_in_place, operator.ifloordiv)
    __imod__ = partialmethod(_in_place, operator.imod)
    __ipow__ = partialmethod(_in_place, operator.ipow)
    __iand__ = partialmethod(_in_place, operator.iand)
    __ior__ = partialmethod(_in_place, operator.ior)
    __ixor__ = partialmethod(_in_place, operator.ixor)


class _Tracer(fx.Tracer):
    """``fx.Tracer`` that refuses what a graph cannot hold, and remembers in which module it failed."""

    failed_in: str | None = None
    # A buffer that the forward pass updates is updated by the graph, not while tracing.
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.contexts = _contexts()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        if _contexts() != self.contexts:
            raise ValueError(
                "the forward pass switches gradients or autocast on or off for a part of itself "
                "(torch.no_grad, torch.enable_grad, torch.autocast), which a graph does not record; write detach() "
                "for no_grad, and put autocast around the whole call of the model"
            )
        return super().create_proxy(*args, **kwargs)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise


def _contexts() -> tuple[Any, ...]:
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _explain(error: Exception, root: nn.Module, model_name: str, path: str | None) -> str:
    place = place_of(error, root, path)
    return (
        f"torch.fx.symbolic_trace fails in {place}: {type(error).__name__}: {error}\n"
        "It follows the operations on tensors and cannot follow Python control flow or conversions that depend on a "
        "tensor's values or shape. Move that part out of the forward pass or write it with tensor operations "
        "(torch.where, x.size(0) passed on as it is); for an optional argument that the forward pass branches on, give "
        "example_inputs with exactly the arguments you use."
    )


def _keep_constants(scratch: nn.Module, host: nn.Module, graphs: Iterable[fx.Graph]) -> None:
    constants = Constants(host)
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "get_attr" and "." not in node.target and not hasattr(host, node.target):
                node.target = constants.name_of(node.target, getattr(scratch, node.target))
