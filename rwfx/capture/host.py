"""Hosts: copies of a tree of modules that share its tensors.

The modules of a host are shallow copies: they hold the very dictionaries of parameters and buffers of the
originals, so that moving, loading or replacing a tensor in one is seen in the other, and have flags
(``training``) of their own, so that ``model.eval()`` does not reach into a training run.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from rwfx.capture.route import PLAIN, CaptureError
from rwfx.capture.streams import put_back
from rwfx.capture.structure import leaves_of

CONSTANTS = "_traced_constants"  # the part of a host that holds the tensors that a graph needs and the model has not


def shared_copy(module: nn.Module) -> nn.Module:
    """The same tree of modules, with parameters and buffers shared and everything else its own."""
    copies: dict[int, nn.Module] = {}
    copied = _shared_copy(module, copies)
    for copy in copies.values():
        for name, value in copy.__dict__.items():
            # A method that is kept as an attribute (self.forward = self.forward_fast) is the copy's own.
            if isinstance(value, MethodType) and id(value.__self__) in copies:
                copy.__dict__[name] = MethodType(value.__func__, copies[id(value.__self__)])
    return copied


def _shared_copy(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in copies:
        copy = copies[id(module)] = module.__class__.__new__(module.__class__)
        copy.__dict__.update(module.__dict__)
        copy.__dict__["_modules"] = {
            name: None if child is None else _shared_copy(child, copies) for name, child in module._modules.items()
        }
    return copies[id(module)]


def scratch_copy(model: nn.Module) -> nn.Module:
    """A shared copy with tables of its own: its forward pass may assign parameters and buffers without being seen."""
    scratch = shared_copy(model)
    for module in scratch.modules():
        module.__dict__.update(_parameters=dict(module._parameters), _buffers=dict(module._buffers))
    return scratch


def set_mode(module: nn.Module, train: bool) -> None:
    """Train or eval mode, where it has the other: else each part keeps its own, as one may be frozen in eval mode."""
    if module.training != train:
        module.train(train)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run ``module`` for a look: its buffers and the global random streams are put back afterwards."""
    # The tensors, not their names: a forward pass may put others there.
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = sorted({t.device.index for t in module.parameters() if t.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices), put_back():
        try:
            yield
        finally:
            for buffer, before in kept:
                if buffer.shape != before.shape:  # as the statistics of an observer, which begin empty
                    buffer.resize_(before.shape)
                buffer.copy_(before)


class Constants:
    """Puts tensors that tracing made (``x + torch.arange(5)``) onto a host, outside its ``state_dict``."""

    def __init__(self, host: nn.Module) -> None:
        self.host = host
        self.held = nn.Module()

    def name_of(self, name: str, tensor: Tensor) -> str:
        """The path by which a graph reads ``tensor``, which tracing called ``name``.

        Raises:
            CaptureError: it is a parameter of the host, which as a constant would have no gradient.
        """
        for parameter, other in () if tensor.is_meta else self.host.named_parameters():
            if other.numel() and not other.is_meta and other.data_ptr() == tensor.data_ptr():
                raise CaptureError(
                    f"the forward pass reads {parameter} by another way than from its module (its .data, or a function "
                    "that was compiled or holds the model): a graph would hold it as a constant, without a gradient. "
                    "Read it from the module, and compile what comes out of the transformation."
                )
        taken = self.held._buffers.get(name)
        if taken is not None and not (taken is tensor or _equal(taken, tensor)):
            return self.name_of(f"{name}_eval", tensor)
        if taken is None:
            self.held.register_buffer(name, tensor, persistent=False)
            self.host._modules[CONSTANTS] = self.held
        return f"{CONSTANTS}.{name}"


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and not a.is_meta and torch.equal(a, b)


def attributes_of(root: nn.Module) -> dict[str, dict[str, Any]]:
    """The attributes and buffers of each module, by its path."""
    return {path: _attributes(module) for path, module in root.named_modules()}


def lost_of(
    model: nn.Module, scratch: nn.Module, before: Mapping[str, Mapping[str, Any]], *, keeps_leaves: bool
) -> tuple[str, ...]:
    """What the graphs do not do that ``model`` does, where ``scratch`` was traced and had the attributes ``before``.

    ``keeps_leaves``: whether a module of ``torch.nn`` is called as it is, with its hooks.
    """
    return (*_lost_assignments(scratch, before), *_lost_hooks(model, keeps_leaves))


def _lost_assignments(scratch: nn.Module, before: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{path + '.' if path else ''}{name} is assigned in the forward pass; the transformed model does not assign it"
        for path, module in scratch.named_modules()
        for name, value in _attributes(module).items()
        if name not in ("training", "_modules")
        and not name.startswith("_tensor_constant")
        and (name not in before[path] or not _unchanged(before[path][name], value))
    ]


def _lost_hooks(model: nn.Module, keeps_leaves: bool) -> list[str]:
    inlined = [
        (path, module)
        for path, module in model.named_modules()
        if path and not (keeps_leaves and fx.Tracer().is_leaf_module(module, path))
    ]
    lost = [
        f"{path} has backward hooks; the transformed model does not call them"
        for path, module in inlined
        if module._backward_hooks or module._backward_pre_hooks
    ]
    lost += [
        f"{path} has forward hooks; what they compute is in the graph, and they are not called again"
        for path, module in inlined
        if module._forward_hooks or module._forward_pre_hooks
    ]
    if type(model).get_extra_state is not nn.Module.get_extra_state:
        lost.append(f"{type(model).__name__} has extra state; the transformed model's state_dict is without it")
    return lost


def _unchanged(before: Any, after: Any) -> bool:
    if before is after:
        return True
    # torch.export takes the attributes of every module apart and puts equal ones in their places.
    pairs = list(zip_longest(leaves_of(before), leaves_of(after)))
    return type(before) is type(after) and all(x and y and x[0] == y[0] and _is_same(x[1], y[1]) for x, y in pairs)


def _is_same(before: Any, after: Any) -> bool:
    return before is after or (isinstance(before, PLAIN) and type(before) is type(after) and before == after)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {**module.__dict__, **module._buffers}
