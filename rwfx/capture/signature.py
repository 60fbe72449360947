"""The arguments of a model's ``forward``: which are free, which are held, and the tensors in them."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rwfx.capture.inputs import ExampleInputs
from rwfx.capture.route import PLAIN, CaptureError
from rwfx.capture.structure import Access, leaves_of, rebuilt

RESULTS = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)  # leaves of an output that change from call to call


@dataclass(frozen=True)
class Argument:
    """One argument that a graph takes."""

    name: str
    way: tuple[Access, ...]  # to its value among the arguments of forward
    default: Any  # ``inspect.Parameter.empty``: none
    value: Any  # of the example, or the default


class Signature:
    """The arguments of ``model.forward``, with the values of example inputs and, where they give none, the defaults.

    Raises:
        CaptureError: a value is neither a tensor nor a number, a string or a nest of them.
    """

    def __init__(self, model: nn.Module, inputs: ExampleInputs) -> None:
        self.model_name = type(model).__name__
        self.bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
        tensors = [x for _, x in leaves_of(dict(self.bound.arguments)) if isinstance(x, Tensor)]
        # One tensor in two places is two inputs: what one of them is used for says nothing of the other.
        self.tensors = tuple(x.clone() if any(x is y for y in tensors[:k]) else x for k, x in enumerate(tensors))
        self.arguments = tuple(self._arguments())
        for argument in self.arguments:
            for path, leaf in leaves_of(argument.value):
                if not isinstance(leaf, (Tensor, *PLAIN)):
                    raise CaptureError(
                        f"argument {argument.name}{''.join(map(str, path))} of {self.model_name}.forward is of type "
                        f"{type(leaf).__name__}, which a graph cannot hold. Give tensors, numbers and strings, or "
                        "tuples, lists, dicts and dataclasses of them."
                    )

    def called_with(self, tensors: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example's positional and keyword arguments, with other tensors in the places of its own."""
        given = iter(tensors)
        example = dict(self.bound.arguments)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for _, leaf in leaves_of(example)]
        bound = inspect.BoundArguments(self.bound.signature, rebuilt(example, leaves))
        return bound.args, bound.kwargs

    def results_of(self, output: Any) -> tuple[Any, ...]:
        """The leaves of an output that change from call to call.

        Raises:
            CaptureError: another leaf is no number or string, so that a graph cannot hold it.
        """
        for path, leaf in leaves_of(output):
            if not isinstance(leaf, (*RESULTS, *PLAIN)):
                raise CaptureError(
                    f"{self.model_name} gives out an object of type {type(leaf).__name__}"
                    f"{' at ' + ''.join(map(str, path)) if path else ''}, which a graph cannot make. Give out tensors "
                    "in tuples, lists, dicts, named tuples or dataclasses (a cache: use_cache=False)."
                )
        return tuple(leaf for _, leaf in leaves_of(output) if isinstance(leaf, RESULTS))

    def _arguments(self) -> Iterable[Argument]:
        has_default = False
        for name, parameter in self.bound.signature.parameters.items():
            given = self.bound.arguments.get(name, parameter.default)
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                several = self.bound.arguments.get(name, ())
                named = several.items() if isinstance(several, dict) else enumerate(several)
                for key, value in named:
                    own = key if isinstance(key, str) else f"{name}_{key}"
                    yield Argument(own, (Access(name, False), Access(key, False)), self._default(has_default), value)
                continue
            default = parameter.default
            if default is parameter.empty or any(isinstance(leaf, Tensor) for _, leaf in leaves_of(given)):
                default = self._default(has_default)
            has_default = default is not parameter.empty
            yield Argument(name, (Access(name, False),), default, given)

    @staticmethod
    def _default(is_needed: bool) -> Any:
        # Python allows no argument without a default behind one that has one.
        return None if is_needed else inspect.Parameter.empty
