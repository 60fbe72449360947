"""The second route: ``torch.export``, once in train and once in eval mode, rebuilt over the model's own tensors.

It runs the forward pass on fake tensors, so that Python is followed wherever it goes; what it decides by a shape
becomes a condition on the shapes of later inputs. The graph calls ATen operators.
"""

import io
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rwfx.capture.freedom import FREEDOMS, Freedom, after, granting, shapes_for
from rwfx.capture.host import Constants, attributes_of, lost_of, scratch_copy, set_mode, shared_copy
from rwfx.capture.inputs import ExampleInputs
from rwfx.capture.rebuild import rebuild
from rwfx.capture.route import CaptureError, Graphs, first_lines, place_of
from rwfx.capture.signature import Signature
from rwfx.capture.streams import undrawn

NAME = "torch.export"


def capture(model: nn.Module, inputs: ExampleInputs | None) -> Graphs:
    """Export ``model`` with the shapes of its inputs left open.

    Raises:
        CaptureError: there are no inputs, or it cannot be exported; names the module, the line and what to do.
    """
    if inputs is None:
        raise CaptureError(
            "torch.export follows Python through branches and shapes, and needs example_inputs to do so: give "
            "example_inputs, a tuple or a dict of arguments of the forward pass."
        )
    signature = Signature(model, inputs)
    host = shared_copy(model)
    constants = Constants(host)
    failures: dict[bool, _Failed] = {}
    graphs, notes = {}, []
    freedom = FREEDOMS[0]
    for mode in (True, False):
        try:
            program, output, freedom, more = _export(model, mode, signature, freedom)
        except _Failed as failed:
            failures[mode] = failed
        else:
            graphs[mode] = rebuild(program, signature, output, host, constants)
            notes += [note for note in more if note not in notes]
    if failures:
        raise CaptureError(_explain(failures))
    return Graphs(host, graphs[True], graphs[False], tuple(notes))


class _Failed(Exception):
    """An export that failed: why, and where in the model."""

    def __init__(self, error: Exception, place: str) -> None:
        super().__init__(f"{place}: {first_lines(error, 1)}")


class _OnLeaves(nn.Module):
    """The model as a function of the tensors alone; remembers what it gave out."""

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.model, self.signature = model, signature
        self.seen = _Seen()

    def forward(self, *tensors: Tensor) -> Any:
        args, kwargs = self.signature.called_with(tensors)
        before = [(module, dict(module._buffers)) for module in self.model.modules()]
        self.seen.output = self.model.forward(*args, **kwargs)
        for module, buffers in before:
            _write_back(module, buffers)
        return self.signature.results_of(self.seen.output)


def _write_back(module: nn.Module, before: dict[str, Tensor | None]) -> None:
    """Let what the forward pass assigned to a buffer be written into it: torch.export forgets assignments."""
    for name, buffer in before.items():
        now = module._buffers[name]
        if now is buffer:
            continue
        if now is None or buffer is None or now.shape != buffer.shape or now.dtype != buffer.dtype:
            raise CaptureError(
                f"the forward pass gives buffer {name!r} of a {type(module).__name__} another shape or dtype, which a "
                "graph does not. Keep its shape, or hold it outside of the model."
            )
        buffer.copy_(now.detach())
        module._buffers[name] = buffer


class _Seen:
    """Holds an output outside of any module's attributes, which torch.export watches."""

    output: Any = None


def _export(
    model: nn.Module, mode: bool, signature: Signature, freedom: Freedom
) -> tuple[ExportedProgram, Any, Freedom, list[str]]:
    """The program, an example of its outputs, the freedom that could be granted, and notes.

    Raises:
        CaptureError: the model does what no graph holds.
        _Failed: ``torch.export`` cannot follow it.
    """
    name = type(model).__name__
    drawn = CaptureError(
        f"{name} draws random numbers in Python (random.random, numpy.random) in its forward pass: what they decide "
        "would be frozen into the graph. Draw them as tensors (torch.rand_like(x)), or switch off what draws them "
        "(layerdrop=0 in a configuration)."
    )
    failed: _Failed | None = None
    left = FREEDOMS[FREEDOMS.index(freedom) :]
    while left:
        freedom = left[0]
        # The forward pass may assign to its modules, also where it fails halfway.
        scratch = scratch_copy(model)
        set_mode(scratch, mode)
        for module in scratch.modules():
            module.__dict__.update(_backward_hooks=OrderedDict(), _backward_pre_hooks=OrderedDict())
        before = attributes_of(scratch)
        root = _OnLeaves(scratch, signature)
        shapes = shapes_for(freedom, signature.tensors)
        try:
            with undrawn(drawn), torch.enable_grad(), granting(freedom), _quiet():
                program = torch.export.export(root, signature.tensors, dynamic_shapes=shapes, strict=False)
        except CaptureError:
            raise
        except Exception as error:
            failed = failed or _Failed(error, place_of(error, scratch))
            left = after(freedom, error)
            continue
        notes = [f"{freedom.note} ({failed})"] if freedom.note and failed else []
        return program, root.seen.output, freedom, [*notes, *lost_of(model, scratch, before, keeps_leaves=False)]
    assert failed is not None
    raise failed


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export prints: its conditions are in the rebuilt graph, its errors in ours."""
    loggers = [logging.getLogger(name) for name in ("torch._export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explain(failures: Mapping[bool, _Failed]) -> str:
    mode, failed = next(iter(failures.items()))
    text = f"torch.export fails in {'train' if mode else 'eval'} mode in {failed}\n"
    if mode and len(failures) == 1:
        return text + (
            "In eval mode it does not: what happens in training alone are branches on random numbers (layerdrop, "
            "stochastic depth, masks drawn for augmentation). Switch that off in the model's configuration "
            "(layerdrop=0, apply_spec_augment=False) and try again."
        )
    return text + (
        "It cannot follow a branch, a loop or a size that depends on the values of a tensor (.item(), nonzero, boolean "
        "indices, if x.sum() > 0). Move that part out of the forward pass, or write it with tensor operations "
        "(torch.where)."
    )
