"""The replay: graphs are believed only if they give what the model gives, from the same random stream."""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from rwfx.capture.host import scratch_copy, set_mode, untouched
from rwfx.capture.inputs import ExampleInputs
from rwfx.capture.route import CaptureError, Graphs, first_lines, place_of
from rwfx.capture.structure import Access, leaves_of

Leaf = tuple[tuple[Access, ...], Any]


class StopsAtChange(TorchFunctionMode):
    """Fails at the call that changes ``x``."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, and look at ``x``."""
        before = self.x.clone()
        value = func(*args, **(kwargs or {}))
        if not _equal([self.x], [before]):
            raise RuntimeError("changed")
        return value


class Replay:
    """What a model gives on example inputs, in train and in eval mode.

    Raises:
        ValueError: the model fails on them, or changes them.
    """

    def __init__(self, model: nn.Module, inputs: ExampleInputs) -> None:
        self.model, self.inputs = model, inputs
        self.buffers = [name for name, _ in model.named_buffers()]
        self.is_meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        # On the meta device a model's own forward pass may stop at a decision on values, which an export goes around.
        self.expected = {} if self.is_meta else {mode: self._eager(mode) for mode in (True, False)}

    def check(self, graphs: Graphs) -> tuple[str, ...]:
        """Refuse graphs that give other outputs, or leave other buffers, than the model; notes what was not looked at.

        Raises:
            CaptureError: they differ.
        """
        if self.is_meta:
            return ("the model is on the meta device: its graphs were not compared with it",)
        notes = []
        for mode, graph in ((True, graphs.train), (False, graphs.eval)):
            host = scratch_copy(graphs.host)
            set_mode(host, mode)
            found = self._run(GraphModule(host, graph), host, self.inputs)
            if _equal(found, self.expected[mode]):
                continue
            word = "train" if mode else "eval"
            if _equal(self._eager(mode), self.expected[mode]) or not _close(found, self.expected[mode]):
                raise CaptureError(
                    f"the graph gives other outputs than the model on example_inputs in {word} mode, so the forward "
                    "pass does something that tracing froze (a branch or a number computed in Python)."
                )
            notes.append(
                f"in {word} mode the model's own outputs differ from call to call; its graph's are close to them"
            )
        return tuple(notes)

    def _eager(self, mode: bool) -> list[Tensor]:
        scratch = scratch_copy(self.model)
        set_mode(scratch, mode)
        given = self.inputs.in_containers_of_their_own()
        there = list(leaves_of(given.arguments_of(self.model)))
        before = [(path, x, x.clone()) for path, x in there if isinstance(x, Tensor)]
        try:
            found = self._run(scratch, scratch, given)
        except Exception as error:
            raise ValueError(
                f"{type(self.model).__name__} fails on example_inputs in {place_of(error, scratch)}: "
                f"{first_lines(error)}"
            ) from error
        for path, now, then in before:
            if not now.is_meta and not _equal([now], [then]):
                line = self._line_that_changes(now, given, mode)
                now.copy_(then)
                where = "".join(map(str, path[1:]))
                raise ValueError(
                    f"{type(self.model).__name__} changes its input {path[0].key}{where} in place{line}, and a second "
                    "look at the same example would see another one. Let the forward pass work on input.clone()."
                )
        if other := _first_other(there, list(leaves_of(given.arguments_of(self.model)))):
            name, where = other[0].key, "".join(map(str, other[1:]))
            raise ValueError(
                f"{type(self.model).__name__} changes what its input {name} holds, at {name}{where}, which a graph "
                "does not. Let the forward pass put it into a container of its own, such as dict(input)."
            )
        return found

    def _line_that_changes(self, x: Tensor, given: ExampleInputs, mode: bool) -> str:
        """Where the forward pass writes to ``x``; nothing where a second run does not show it."""
        scratch = scratch_copy(self.model)
        set_mode(scratch, mode)
        try:
            with StopsAtChange(x):
                self._run(scratch, scratch, given)
        except Exception as error:
            return f" in {place_of(error, scratch)}"
        return ""

    def _run(self, module: nn.Module, holder: nn.Module, given: ExampleInputs) -> list[Tensor]:
        """The outputs of one call, and then the model's buffers, as ``holder`` has them after it."""
        # In eval mode with gradients: without them attention takes a path of its own, which rounds differently.
        with untouched(holder), torch.set_grad_enabled(not holder.training):
            output = module.forward(*given.args, **given.kwargs)
            buffers = dict(holder.named_buffers())
            return [x.detach().clone() for x in (*_tensors(output), *(buffers[name] for name in self.buffers))]


def same_outputs(model: nn.Module, transformed: nn.Module, inputs: ExampleInputs) -> bool:
    """Whether both give the same outputs, bit for bit, from the same random stream, in their present mode.

    Buffers and the global random stream are left as they were.
    """
    outputs = []
    for module in (model, transformed):
        with untouched(module), torch.set_grad_enabled(not module.training):  # as in Replay
            outputs.append(_tensors(module(*inputs.args, **inputs.kwargs)))
    return _equal(*outputs)


def _first_other(before: Sequence[Leaf], after: Sequence[Leaf]) -> tuple[Access, ...] | None:
    """The way to the first leaf that is another one, or is at another place, than before; None if all are the same."""
    for old, new in zip_longest(before, after):
        at = new or old
        if at is not None and not (old and new and old[0] == new[0] and old[1] is new[1]):
            return at[0]
    return None


def _tensors(output: Any) -> list[Tensor]:
    leaves = [leaf for _, part in leaves_of(output) for leaf in tree_flatten(part)[0]]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return _close(a, b, rtol=0, atol=0)


def _close(a: list[Tensor], b: list[Tensor], **tolerance: Any) -> bool:
    try:
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance)
    except AssertionError:
        return False
    return True
