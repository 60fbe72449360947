"""Schedules: densities that change from step to step, as functions of the step.

In: the number of training forwards so far, an int or an integer tensor. Out: a density, above 0 and at most 1. Give one
to a row policy in place of a number:

    rwfx.TopK(density=rwfx.schedules.DenseFirst(500, rwfx.schedules.Cosine(0.5, 0.05, over=5000)))

A density of 1 keeps every row: that step is dense. Any function of the step will do that works on a tensor, by
arithmetic and ``torch.where`` and without a branch, such as ``lambda step: 0.5 * 0.999**step + 0.05``: it becomes a
part of the compiled graph, so that another density is no new compilation. Should it leave the range, the nearest
density in it counts. The step is counted by the transformed model, with any loop around it, and is a part of its
``sampler_state``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import pi
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from rwfx.arguments import check_number

Schedule = Callable[[Any], Any]


@dataclass(frozen=True)
class _Ramp:
    """From ``start`` to ``end`` over so many steps, in either direction."""

    start: float
    end: float
    over: int

    def __post_init__(self) -> None:
        check_density("start", self.start)
        check_density("end", self.end)
        check_number("over", self.over, Integral, 1)


@dataclass(frozen=True)
class Linear(_Ramp):
    """``start + (end - start) * min(step / over, 1)``, in either direction."""

    def __call__(self, step: Any) -> Tensor:
        """The density of ``step``."""
        return self.start + (self.end - self.start) * _share(step, self.over)


@dataclass(frozen=True)
class Cosine(_Ramp):
    """``end + (start - end) * (1 + cos(pi * min(step / over, 1))) / 2``, in either direction."""

    def __call__(self, step: Any) -> Tensor:
        """The density of ``step``."""
        return self.end + (self.start - self.end) * (1 + torch.cos(pi * _share(step, self.over))) / 2


@dataclass(frozen=True)
class Steps:
    """``start``, and from each step of ``then`` on the density that is given there: ``Steps(0.5, {1000: 0.1})``."""

    start: float
    then: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_density("start", self.start)
        if not isinstance(self.then, Mapping):
            raise TypeError(f"then must map steps to densities, got {self.then!r}.")
        for step, density in self.then.items():
            check_number("a step of then", step, Integral, 1)
            check_density(f"then[{step}]", density)

    def __call__(self, step: Any) -> Tensor:
        """The density of ``step``."""
        step = _tensor(step)
        density = torch.full_like(step, self.start, dtype=torch.float64)
        for since, later in sorted(self.then.items()):
            density = torch.where(step >= since, later, density)
        return density


@dataclass(frozen=True)
class DenseFirst:
    """Dense for the first ``steps`` steps, then ``density``: a number, or a schedule that begins there at step 0."""

    steps: int
    density: "float | Schedule"

    def __post_init__(self) -> None:
        check_number("steps", self.steps, Integral, 1)
        check_density("density", self.density)

    def __call__(self, step: Any) -> Tensor:
        """The density of ``step``."""
        step = _tensor(step)
        return torch.where(step < self.steps, 1.0, density_at(self.density, (step - self.steps).clamp(min=0)))


@dataclass(frozen=True)
class DenseEvery:
    """Dense at every ``steps``-th step, the first at step 0, and ``density`` between: a number or a schedule."""

    steps: int
    density: "float | Schedule"

    def __post_init__(self) -> None:
        check_number("steps", self.steps, Integral, 2)
        check_density("density", self.density)

    def __call__(self, step: Any) -> Tensor:
        """The density of ``step``."""
        step = _tensor(step)
        return torch.where(step % self.steps == 0, 1.0, density_at(self.density, step))


def density_at(density: "float | Schedule", step: Any) -> Tensor:
    """The density that a number or a schedule gives at ``step``: a float64 tensor without dimensions, on its device."""
    at_step = density(step) if callable(density) else density
    return torch.as_tensor(at_step, dtype=torch.float64, device=_tensor(step).device).reshape(())


def check_density(name: str, density: Any) -> None:
    """Refuse what is neither a density nor a schedule that gives one.

    Raises:
        TypeError, ValueError: says so by ``name``.
    """
    if not callable(density):
        if not isinstance(density, Real) or isinstance(density, bool):
            raise TypeError(
                f"{name} must be a number above 0 and at most 1 or a schedule (rwfx.schedules.Linear, Cosine, Steps, "
                f"DenseFirst, DenseEvery, or a function of the step), got {density!r}."
            )
        check_number(name, density, Real, 0, 1, above=True)
        return
    try:
        found = [float(density_at(density, torch.tensor(step))) for step in (0, 1, 1000)]
    except Exception as error:
        raise TypeError(
            f"{name} is the schedule {density!r}, which gives no density for a step that is a tensor "
            f"({type(error).__name__}: {error})."
        ) from error
    for step, value in zip((0, 1, 1000), found, strict=True):
        if not 0 < value <= 1:
            raise ValueError(
                f"{name} is the schedule {density!r}, whose density at step {step} is {value}: not in (0, 1]."
            )


def _share(step: Any, over: int) -> Tensor:
    return (_tensor(step).double() / over).clamp(max=1)


def _tensor(step: Any) -> Tensor:
    """``step`` where it is: ``torch.as_tensor`` would move a tensor to what ``torch.set_default_device`` says."""
    return step if isinstance(step, Tensor) else torch.tensor(step, device="cpu")
