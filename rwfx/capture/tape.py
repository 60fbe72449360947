"""The last route: one run of the model, written down call by call; its forward pass stays its own code.

In: a model and example inputs. Out: a straight-line graph of what was computed from parameters in one run in train
mode. It is good for finding the weight graph and not for running: sizes, indices and branches are those of the
example, and what no parameter has part in (inputs, masks, indices) is a constant. Each call has in its ``meta``

``shape``    the shape of its value, where that is a tensor;
``module``   the path of the module whose ``forward`` made the call, where that was looked up on the module itself and
             so is one that a class derived from the module's replaces: not that of a base class, called as a function;
``place``    the line that made the call, or that called a function of PyTorch's which did.
"""

import operator
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from types import EllipsisType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from rwfx.capture.host import Constants, scratch_copy, set_mode, shared_copy, untouched
from rwfx.capture.inputs import ExampleInputs
from rwfx.capture.route import PLAIN, PYTORCH, CaptureError, Graphs, first_lines, place_of
from rwfx.capture.structure import leaves_of

NAME = "substitution"
SHAPE, MODULE, PLACE = "shape", "module", "place"
OTHER_BRANCHES = (
    "its weight graph is that of one run, on example_inputs; other branches are not looked at: a weight that one of "
    "them reads outside of its module's forward has a gradient for all its rows from there"
)


def capture(model: nn.Module, inputs: ExampleInputs) -> Graphs:
    """Run ``model`` once in train mode and write down its calls; both graphs are those of this run.

    Raises:
        CaptureError: what was written down is no graph; names the call.
    """
    scratch = scratch_copy(model)
    set_mode(scratch, True)
    host = shared_copy(model)
    tape = Tape(scratch, Constants(host))
    try:
        with untouched(scratch), torch.enable_grad(), tape:
            output = scratch.forward(*inputs.args, **inputs.kwargs)
        graph = tape.finish(output)
        fx.GraphModule(host, graph)
    except Exception as error:
        raise CaptureError(
            f"writing down a run on example_inputs fails in {place_of(error, scratch)}: {first_lines(error)}"
        ) from error
    return Graphs(host, graph, graph, (OTHER_BRANCHES,))


class Tape(TorchFunctionMode):
    """Writes down the calls of torch functions that parameters have part in, while it is the current mode."""

    def __init__(self, model: nn.Module, constants: Constants) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants = constants
        self.parameters = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
        self.forwards: list[str] = []  # the modules whose forward runs
        for path, module in model.named_modules():
            if module is not model:
                self._mark(path, module)
        self.nodes = WeakIdKeyDictionary()  # of the tensors that were read or computed and are still there
        self.computed = WeakIdKeyDictionary()  # those of them that parameters have part in
        self.views = WeakIdKeyDictionary()  # how those were made that may yet be written through

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, and write the call down."""
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        if (func in WRITING or any(map(_is_float, tree_leaves(value)))) and self._has_part((args, kwargs)):
            self._write(func, args, kwargs, value)
        elif _is_float(value) and value._base is not None and value not in self.nodes and value not in self.views:
            self.views[value] = func, args, kwargs
        return value

    def finish(self, output: Any) -> fx.Graph:
        """What was written down, giving out the tensors of ``output`` that parameters have part in."""
        leaves = [leaf for _, part in leaves_of(output) for leaf in tree_leaves(part)]
        given = [self._operand(x) for x in leaves if isinstance(x, Tensor) and self._has_part(x)]
        self.graph.output(tuple(dict.fromkeys(given)))
        self.graph.lint()
        return self.graph

    def _mark(self, path: str, module: nn.Module) -> None:
        """Note when the forward of ``module``, which is a copy for this run, begins and ends."""
        forward = module.forward

        @wraps(forward)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self.forwards.append(path)
            try:
                return forward(*args, **kwargs)
            finally:
                self.forwards.pop()

        module.__dict__["forward"] = marked

    def _has_part(self, operands: Any) -> bool:
        """Whether a parameter has part in one of the operands."""
        tensors = (x for x in tree_leaves(operands) if isinstance(x, Tensor))
        return any(
            id(y) in self.parameters or y in self.computed for x in tensors for y in (x, x._base) if y is not None
        )

    def _write(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        kind, target, args = _spelled(func, args)
        node = self.graph.create_node(kind, target, *tree_map(self._operand, (args, kwargs)))
        node.meta = {MODULE: self.forwards[-1] if self.forwards else None, PLACE: _caller()}
        for at, part in self._tensors(node, args[0] if func in WRITING else value):
            at.meta[SHAPE] = part.shape
            self.nodes[part], self.computed[part] = at, True
        # What is written into a view is in what it is a view of.
        written = args[0] if func in WRITING or (args and value is args[0]) else None
        if isinstance(written, Tensor) and written._base is not None:
            self.computed[written._base] = True

    def _tensors(self, node: fx.Node, value: Any) -> Iterable[tuple[fx.Node, Tensor]]:
        """The tensors in the value of a call, each with its node."""
        if isinstance(value, Tensor):
            yield node, value
        for k, part in enumerate(value if isinstance(value, (tuple, list)) else ()):
            if isinstance(part, (tuple, list)) or _is_float(part):
                yield from self._tensors(self.graph.call_function(operator.getitem, (node, k)), part)

    def _operand(self, x: Any) -> Any:
        """An argument as a graph holds it."""
        if isinstance(x, Tensor):
            if x not in self.nodes:
                self.nodes[x] = self._view(x) if x in self.views else self._read(x)
            return self.nodes[x]
        if isinstance(x, slice):
            return slice(*(self._operand(part) for part in (x.start, x.stop, x.step)))
        if isinstance(x, (*PLAIN, torch.layout, torch.memory_format, EllipsisType)):
            return x
        return x.item() if isinstance(x, np.generic) else None  # a generator, say, which labels have no use for

    def _view(self, x: Tensor) -> fx.Node:
        func, args, kwargs = self.views[x]
        kind, target, args = _spelled(func, args)
        node = self.graph.create_node(kind, target, *tree_map(self._operand, (args, kwargs)))
        node.meta[SHAPE] = x.shape
        return node

    def _read(self, x: Tensor) -> fx.Node:
        path = self.parameters.get(id(x))
        if path is None:
            # Whole numbers may be indices; of others the shape alone is looked at.
            kept = torch.empty_like(x, device="meta") if _is_float(x) else x.detach().clone()
            path = self.constants.name_of(f"tensor_{len(self.graph.nodes)}", kept)
        node = self.graph.get_attr(path)
        node.meta[SHAPE] = x.shape
        return node


WRITING = {Tensor.__setitem__}  # what writes to its first operand and gives nothing

# Reflected operators that have no rule under their own name.
REFLECTED: dict[Any, Callable[..., Any]] = {
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rpow__": operator.pow,
    "__rmatmul__": operator.matmul,
}


def _spelled(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """A call as ``fx`` would hold it: of a method by its name, of a property as ``getattr``."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)  # type: ignore[attr-defined]
    if name in REFLECTED:
        return "call_function", REFLECTED[name], args[::-1]
    if getattr(Tensor, name, None) is not func:
        return "call_function", func, args
    if name.startswith("__") and hasattr(operator, name):
        return "call_function", getattr(operator, name), args
    return "call_method", name, args


def _caller() -> str:
    """The first line outside of PyTorch that led here."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith((*PYTORCH, __file__, "<")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "a line that is not known"


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
