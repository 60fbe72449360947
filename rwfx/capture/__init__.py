"""Capture: a model becomes the graphs of its forward pass, in train mode and in eval mode.

In: any ``nn.Module``, left as it was, and example inputs. Out: a ``Capture``: a *host*, a tree of modules that
shares every parameter and buffer with the model, and two graphs over it.

The routes are a ladder; the first that holds is taken:

1. ``torch.fx.symbolic_trace``: calls of modules and of torch functions. It holds when the model can be traced and, on
   example inputs, both graphs give the model's own outputs and buffers, bit for bit, from the same random stream.
2. ``torch.export``, which needs example inputs: ATen operators, with branches and loops decided by the example and
   every decision about a shape checked at each call.
3. Substitution, which needs example inputs too: the forward pass stays the model's own code, whatever it does, and the
   graph is a run of it written down, in which the weight graph is found (``rwfx.capture.tape``).

Where the first route holds and calls as a whole what has several weights inside (attention, a transformer's layers),
the second is taken if it holds too: it shows them. A model that is set to compute activations again in the backward
pass (``gradient_checkpointing_enable()``) takes the third at once: a graph would keep them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rwfx.capture import exported, symbolic, tape
from rwfx.capture.allowed import check_model
from rwfx.capture.host import shared_copy, untouched
from rwfx.capture.inputs import ExampleInputs, bind_inputs
from rwfx.capture.replay import Replay, same_outputs
from rwfx.capture.route import CaptureError, Graphs

__all__ = ["Capture", "CaptureError", "ExampleInputs", "capture", "same_outputs", "shared_copy", "untouched"]


@dataclass(frozen=True)
class Capture(Graphs):
    """A model as graphs, by the route that held."""

    route: str  # "symbolic_trace", "torch.export" or "substitution"
    inputs: ExampleInputs | None = None  # those of the caller, as arguments of forward


def capture(model: nn.Module, example_inputs: Any = None) -> Capture:
    """Capture ``model`` in train and in eval mode by the first route that holds.

    An argument of ``forward`` that has a default keeps it, unless ``example_inputs`` (a tuple of positional arguments,
    a dict of keyword arguments, a single value, or a batch of a data loader) gives it; calling the graph with another
    value raises. Tensors are free, and so are their shapes where the graph holds for other ones.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: ``example_inputs`` do not fit, or no route holds; names each route, where it failed and what to do.
    """
    check_model(model)
    inputs = bind_inputs(model, example_inputs)
    replay = None if inputs is None else Replay(model, inputs)
    failures: list[CaptureError] = []
    lost: tuple[str, ...] = ()
    if checkpoints(model):
        if inputs is not None:
            return _substitution(model, inputs, "it checkpoints activations, so its forward pass stays the model's own")
        lost = ("activation checkpointing inside of the model is not kept without example_inputs",)
    closed: Capture | None = None
    for route in (symbolic, exported):
        try:
            graphs: Graphs = route.capture(model, inputs)
            notes = () if replay is None else replay.check(graphs)
        except CaptureError as error:
            failures.append(error)
            continue
        found = Capture(graphs.host, graphs.train, graphs.eval, (*graphs.notes, *notes, *lost), route.NAME, inputs)
        if route is exported or inputs is None or not symbolic.is_closed(graphs):
            return found
        closed = found
    if closed is not None:
        why = f"weights inside what is called as a whole stay dense, as torch.export cannot show them: {failures[-1]}"
        return replace(closed, notes=(*closed.notes, why))
    if inputs is not None:
        try:
            return _substitution(model, inputs, _why(failures))
        except CaptureError as error:
            failures.append(error)
    name = type(model).__name__
    raise ValueError("\n".join([f"cannot trace {name}:", *(f"- {error}" for error in failures)])) from failures[0]


def checkpoints(model: nn.Module) -> bool:
    """Whether part of ``model`` is set to compute activations again, as Transformers' and timm's models can be."""
    flags = ("gradient_checkpointing", "grad_checkpointing")
    return any(getattr(module, flag, False) is True for module in model.modules() for flag in flags)


def _substitution(model: nn.Module, inputs: ExampleInputs, why: str) -> Capture:
    graphs = tape.capture(model, inputs)
    return Capture(graphs.host, graphs.train, graphs.eval, (*graphs.notes, why), tape.NAME, inputs)


def _why(failures: Sequence[CaptureError]) -> str:
    return f"no graph holds its forward pass, which stays the model's own: {' '.join(map(str, failures))}".replace(
        "\n", " "
    )
