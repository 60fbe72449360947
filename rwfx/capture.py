"""Capture: a model becomes the graphs of its forward pass, in train mode and in eval mode.

In: any ``nn.Module`` that ``torch.fx`` can trace symbolically, left as it was. Out: a ``Capture``: a *host*,
a tree of modules that shares every parameter and buffer with the model, and two graphs over it.

The host's modules are shallow copies: they hold the very dictionaries of parameters and buffers of the
originals, so that moving, loading or replacing a tensor in one is seen in the other, and have flags
(``training``) of their own, so that ``model.eval()`` does not reach into a training run.
"""

import inspect
import linecache
import operator
import pickle
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class Capture:
    """A model as graphs."""

    host: nn.Module
    train: fx.Graph
    eval: fx.Graph
    notes: tuple[str, ...]  # what the graphs do not do that the model does


def capture(model: nn.Module, example_inputs: Any = None) -> Capture:
    """Trace ``model`` with ``torch.fx.symbolic_trace``'s tracer, once in train and once in eval mode.

    An argument of ``forward`` that has a default keeps it, unless ``example_inputs`` (a tuple, a dict of
    keyword arguments, or a single value) gives it; calling the graph with another value raises.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: the model cannot be traced; names the module, the line and what to do.
    """
    _check_traceable(model)
    args, kwargs = split_inputs(example_inputs)
    # Tracing runs the forward pass, which may assign to its modules: it does so to a copy with tables of its own.
    scratch = shared_copy(model)
    for module in scratch.modules():
        module.__dict__.update(_parameters=dict(module._parameters), _buffers=dict(module._buffers))
    before = {path: _attributes(module) for path, module in scratch.named_modules()}
    graphs = {}
    for mode in (True, False):
        if scratch.training != mode:  # else each module keeps its own: a part may be frozen in eval mode
            scratch.train(mode)
        graphs[mode] = _trace(scratch, type(model).__name__, args, kwargs)
    host = shared_copy(model)
    _keep_constants(scratch, host, graphs.values())
    notes = [*_lost_assignments(scratch, before), *_lost_hooks(scratch)]
    return Capture(host, graphs[True], graphs[False], tuple(notes))


def shared_copy(module: nn.Module, _copies: dict[int, nn.Module] | None = None) -> nn.Module:
    """The same tree of modules, with parameters and buffers shared and everything else its own."""
    copies = {} if _copies is None else _copies
    if id(module) not in copies:
        copy = copies[id(module)] = module.__class__.__new__(module.__class__)
        copy.__dict__.update(module.__dict__)
        copy.__dict__["_modules"] = {
            name: None if child is None else shared_copy(child, copies) for name, child in module._modules.items()
        }
    return copies[id(module)]


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run ``module`` for a look: its buffers and the global random streams are put back afterwards."""
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = sorted({t.device.index for t in module.parameters() if t.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for name, buffer in module.named_buffers():
                buffer.copy_(kept[name])


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as positional and keyword arguments."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _check_traceable(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {name}.")
    if hasattr(model, "_orig_mod"):
        raise ValueError("model is compiled. Transform the model first, then compile what comes out of it.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"model is wrapped in {name}. Transform model.module first, then wrap what comes out of it.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model is a ScriptModule, which torch.fx cannot trace. Give the nn.Module it was made from.")
    if "forward" in vars(model):
        raise ValueError(f"forward of this {name} has been replaced on the instance, where torch.fx does not see it.")
    lazy = [path for path, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"parameter {lazy[0]!r} is lazy and has no shape yet. Run the model once on a batch first.")


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


def _trace(root: nn.Module, model_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph:
    parameters = inspect.signature(type(root).forward).parameters
    given = _bind(root, args, kwargs)
    held = {name: value for name, value in given.items() if isinstance(value, PLAIN)}
    for name, parameter in list(parameters.items())[1:]:
        default = parameter.default
        if default is inspect.Parameter.empty or name in given or isinstance(default, (tuple, list, dict)):
            continue
        if not isinstance(default, PLAIN):
            raise ValueError(
                f"argument {name!r} of {model_name}.forward has a default of type {type(default).__name__}, which a "
                "graph cannot hold. Give it the default None and set the value in the forward pass, or give "
                f"example_inputs with {name!r} in them."
            )
        held[name] = default
    tracer = _Tracer()
    streams = _random_streams()
    try:
        graph = tracer.trace(root, concrete_args=held or None)
    except Exception as error:
        raise ValueError(_explain(error, model_name, tracer.failed_in)) from error
    if _restore_streams(streams):
        raise ValueError(
            f"{model_name} draws random numbers while it is traced (torch.rand, random.random, ...): the drawn "
            "values would be frozen into the graph. Draw them with a module such as nn.Dropout, or from a "
            "tensor of the forward pass (torch.rand_like(x))."
        )
    # The tracer renames an argument that it holds at its default; its callers know it by its own name.
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, list(parameters)[1:], strict=False):
        if name in held:
            node.target = name
    graph._tracer_cls = fx.Tracer
    graph.lint()
    return graph


# What an argument can be held at: the graph checks that it has this value.
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


def _bind(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args and not kwargs:
        return {}
    try:
        return inspect.signature(root.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ValueError(f"example_inputs do not fit {type(root).__name__}.forward: {error}.") from error


def _random_streams() -> tuple[Tensor, bytes]:
    others = random.getstate(), np.random.get_state()  # noqa: NPY002  the global stream is what a model may read
    return torch.get_rng_state(), pickle.dumps(others)


def _restore_streams(before: tuple[Tensor, bytes]) -> bool:
    """Whether a global random stream was drawn from; torch's is put back."""
    state, others = _random_streams()
    torch.set_rng_state(before[0])
    return not (torch.equal(state, before[0]) and others == before[1])


def _explain(error: Exception, model_name: str, path: str | None) -> str:
    torch_home = str(Path(torch.__file__).parent)
    own = str(Path(__file__))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_home, own, "<"))
    ]
    place = f"module {path!r}" if path else model_name
    if frames:
        line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
        place += f", {frames[-1].filename}:{frames[-1].lineno}: `{line}`"
    return (
        f"cannot trace {model_name} (in {place}): {type(error).__name__}: {error}\n"
        "rwfx captures a model with torch.fx.symbolic_trace, which follows the operations on tensors and cannot "
        "follow Python control flow or conversions that depend on a tensor's values or shape. Move that part out of "
        "the forward pass or write it with tensor operations (torch.where, x.size(0) passed on as it is); for an "
        "optional argument that the forward pass branches on, give example_inputs with exactly the arguments you use."
    )


def _keep_constants(scratch: nn.Module, host: nn.Module, graphs: Any) -> None:
    """Move tensors that tracing made (``x + torch.arange(5)``) onto the host, outside its ``state_dict``."""
    constants = nn.Module()
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "get_attr" and "." not in node.target and not hasattr(host, node.target):
                if not hasattr(constants, node.target):
                    constants.register_buffer(node.target, getattr(scratch, node.target), persistent=False)
                node.target = f"_traced_constants.{node.target}"
    if len(constants._buffers):
        host._modules["_traced_constants"] = constants


def _lost_assignments(scratch: nn.Module, before: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{path + '.' if path else ''}{name} is assigned in the forward pass; the transformed model does not assign it"
        for path, module in scratch.named_modules()
        for name, value in _attributes(module).items()
        if name not in ("training", "_modules")
        and not name.startswith("_tensor_constant")
        and (name not in before[path] or before[path][name] is not value)
    ]


def _lost_hooks(scratch: nn.Module) -> list[str]:
    lost = [
        f"{path} has backward hooks; the transformed model does not call them"
        for path, module in scratch.named_modules()
        if path
        and (module._backward_hooks or module._backward_pre_hooks)
        and not fx.Tracer().is_leaf_module(module, path)
    ]
    if type(scratch).get_extra_state is not nn.Module.get_extra_state:
        lost.append(f"{type(scratch).__name__} has extra state; the transformed model's state_dict is without it")
    return lost


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {**module.__dict__, **module._buffers}
