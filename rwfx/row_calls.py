"""Modules whose calls have a row-sparse backward, in a model whose forward pass stays its own code.

A plain ``nn.Linear`` or convolution, or a ``Conv1D`` of Hugging Face (a linear layer that stores its weight the other
way round), becomes one of a class derived from its own, whose forward gives the same numbers and whose backward is
confined to the row set of the step. All modules that hold one weight share its ``StepRows``.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwfx.derived import Derived
from rwfx.passes.conv_spellings import MODULES, call_of_module
from rwfx.passes.parameters import computes_as
from rwfx.passes.sparse_backward import MASKED, SPARSE, operands_on_rows
from rwfx.passes.spellings import Call

# What a call of a module is, with the class and the methods that make it so.
KINDS: Mapping[Any, tuple[type[nn.Module], tuple[str, ...]]] = {F.linear: (nn.Linear, ("forward",)), **MODULES}


def can_be_row_sparse(module: nn.Module) -> bool:
    """Whether its forward is that of ``nn.Linear``, a convolution or ``Conv1D``, with a weight of its own."""
    return is_transposed(module) or any(computes_as(module, *kind) for kind in KINDS.values())


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a plain ``Conv1D`` of Hugging Face: ``x @ weight + bias``."""
    kind = _conv1d()
    return kind is not None and computes_as(module, kind)


def _conv1d() -> type[nn.Module] | None:
    """That class; None where nobody has imported it, so that no module is of it."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


@dataclass
class StepRows:
    """What the calls on one weight need in this step. Of all this ``how`` alone goes into a copy or a file."""

    how: tuple[str, str, str]  # mode, dx and grad of rwfx.transform
    is_running: bool = False  # the forward pass that draws the rows
    rows: Tensor | None = None  # None: the calls are the model's own
    scale: Tensor | None = None
    chosen: Tensor | None = None
    seen: Sequence[Tensor | None] = ()  # for each call of the step, in order
    seen_all: bool = True
    calls: int = 0  # so far
    kept: dict[str, Tensor] = field(default_factory=dict)  # rows of parameters, gathered once for all calls

    def __reduce__(self) -> tuple[Any, ...]:
        return StepRows, (self.how,)


class RowSparse(Derived):
    """A module with a weight, whose calls have a backward on the row set of the step."""

    _rwfx_step: StepRows
    _rwfx_bias: str  # its name among all those that ``StepRows.kept`` may hold

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module's own class gives."""
        step = self._rwfx_step
        if step.rows is None or not torch.is_grad_enabled() or not (step.is_running or _in_backward()):
            return super().forward(*args, **kwargs)
        call = _call_of(self, *args, **kwargs)
        x = call.x if call.pad is None else F.pad(call.x, *call.pad)
        mode, dx, grad = step.how
        operands = operands_on_rows(call.target, (x, call.weight, call.bias, *call.options), step.rows)
        more: dict[str, Any] = {}
        if step.scale is not None:
            more["scale"] = step.scale
        if step.chosen is not None:
            more["chosen"] = step.chosen
        elif grad == "rows":
            more["kept_weight"] = _kept(step, "weight", call.weight)
            more["kept_bias"] = None if call.bias is None else _kept(step, self._rwfx_bias, call.bias)
        if step.calls < len(step.seen) and step.seen[step.calls] is not None:
            more |= {"seen": step.seen[step.calls], "seen_all": step.seen_all}
        step.calls += 1
        return (SPARSE if mode == "sparse" else MASKED)[call.target](*operands, dx, grad, **more)


def _in_backward() -> bool:
    """Whether a backward pass runs: what is called in it belongs to a forward pass that is computed again."""
    return torch._C._current_graph_task_id() != -1


def _call_of(module: nn.Module, input: Any, output_size: list[int] | None = None) -> Call:
    """What the module's own forward calls; ``output_size`` is of transposed convolutions."""
    kind = _conv1d()
    if kind is not None and isinstance(module, kind):
        weight: Any = module.weight
        return Call(F.linear, input, weight.t(), module.bias)
    target = next(target for target, (kind, _) in KINDS.items() if isinstance(module, kind))
    if target is F.linear:
        return Call(target, input, module.weight, module.bias)
    call = call_of_module(target, module, input, module.weight, module.bias)
    assert call is not None  # the options of a module are numbers
    if output_size is None:
        return call
    stride, padding, _, groups, dilation = call.options
    transposed: Any = module
    added = transposed._output_padding(input, output_size, stride, padding, module.kernel_size, len(stride), dilation)
    return call._replace(options=(stride, padding, added, groups, dilation))


def _kept(step: StepRows, name: str, parameter: Tensor) -> Tensor:
    """The rows of a parameter, whose gradients of all calls are summed before they become a row gradient."""
    if name not in step.kept:
        step.kept[name] = torch.ops.rwfx.keep_rows.default(parameter, step.rows)
    return step.kept[name]
