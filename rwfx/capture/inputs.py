"""Example inputs: what the caller gives becomes arguments of the model's ``forward``."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from rwfx.capture.structure import leaves_of, rebuilt


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def arguments_of(self, model: nn.Module) -> dict[str, Any]:
        """What they give to each named parameter of ``forward``."""
        return dict(inspect.signature(model.forward).bind(*self.args, **self.kwargs).arguments)

    def in_containers_of_their_own(self) -> "ExampleInputs":
        """The same tensors in tuples, lists, dicts and dataclasses that the model may change unseen."""
        args, kwargs = (rebuilt(part, [x for _, x in leaves_of(part)]) for part in (self.args, dict(self.kwargs)))
        return ExampleInputs(args, kwargs)

    def in_order(self, placeholders: Sequence[fx.Node]) -> tuple[Any, ...]:
        """The value of each placeholder of a graph; its default where they give none."""
        found = []
        for k, node in enumerate(placeholders):
            default = node.args[0] if node.args else None
            found.append(self.args[k] if k < len(self.args) else self.kwargs.get(str(node.target), default))
        return tuple(found)


def bind_inputs(model: nn.Module, example_inputs: Any) -> ExampleInputs | None:
    """``example_inputs`` as arguments of ``model.forward``; None without any.

    A tuple holds positional arguments, a mapping (a dict, a ``BatchEncoding``) keyword arguments; any other value is
    the one argument. A batch of a data loader is a pair, often a list, of which the first part alone is for the model:
    it is taken so where the whole does not fit and the first part does.

    Raises:
        ValueError: they do not fit ``forward``, or a list fits in both ways.
    """
    if example_inputs is None:
        return None
    whole = _as_arguments(example_inputs)
    problem = _misfit(model, whole)
    first = None
    if isinstance(example_inputs, (tuple, list)) and len(example_inputs) == 2:
        first = _first_part(model, example_inputs[0])
    if first is not None and (problem or first.kwargs):  # keyword arguments by name are no accident
        return first
    if problem:
        raise ValueError(
            f"example_inputs do not fit {type(model).__name__}.forward{inspect.signature(model.forward)}: {problem}. "
            "Give a tuple of positional arguments, a dict of keyword arguments, or a single value."
        )
    if first is not None and isinstance(example_inputs, list):
        raise ValueError(
            f"example_inputs are a list of two, which fits {type(model).__name__}.forward as two arguments and as a "
            "batch of inputs and labels. Give a tuple for positional arguments, or the inputs alone."
        )
    return whole


def _first_part(model: nn.Module, inputs: Any) -> ExampleInputs | None:
    """The inputs of a batch of inputs and labels; None where the model cannot be called with them alone."""
    ways = (_as_arguments(inputs), ExampleInputs((inputs,), {}))
    return next((way for way in ways if not _misfit(model, way)), None)


def _as_arguments(given: Any) -> ExampleInputs:
    if isinstance(given, Mapping):
        return ExampleInputs((), dict(given))
    if isinstance(given, (tuple, list)) and not hasattr(given, "_fields"):
        return ExampleInputs(tuple(given), {})
    return ExampleInputs((given,), {})


def _misfit(model: nn.Module, inputs: ExampleInputs) -> str:
    """Why ``forward`` cannot be called so; empty where it can."""
    try:
        inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        return str(error)
    return ""
