"""Example policies: which examples of a batch take part in the backward pass.

Give one to ``rwfx.transform(model, examples=...)``, or a fraction, or a number of examples.

All examples take part in the forward pass: the outputs, the loss and the statistics of a batch norm are those of the
whole batch. Where the gradient of the loss arrives at the model's outputs, ``g = dL/dy``, the policy decides by the
norms

    s[b] = |g[b]|        the Euclidean norm over all that belongs to example b, over all outputs

and from there on an example that was dropped counts as if its ``g`` were zero: no weighted call looks at it. A model
whose first steps are behind it has almost no gradient for most examples, and these cost two thirds of what they cost.

Where a fraction is asked for it is rounded up to whole examples, and no shape changes from step to step. An *example*
is one of the first dimension of the model's inputs and outputs: a sequence, for a model of sequences. With
``unit="token"`` it is one of the first two: a place of a sequence. Where tokens are mixed, in attention, say, all take
part, whatever ``g`` left zero; the calls between there and the outputs, such as a language model's head and its last
MLP, compute with the kept tokens alone. Its outputs must then be ``(B, T, ...)`` or ``(B * T, ...)``, and the example
inputs as long as what is trained on: a window that is longer than they are would not be seen to mix tokens.

Under a batch norm the gradient of a kept example reaches dropped ones, through the statistics that they share. What it
brings to the weighted calls below is left out with them: the gradient is that of ``g`` zeroed for the dropped examples
at every weighted call. Everything else is as ever: dropout and weight decay know nothing of it, gradients may be
accumulated (every backward pass has examples of its own), and each rank of a distributed run chooses among its own.
"""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from rwfx.arguments import check_number
from rwfx.policies import Worded, check_flag


@dataclass(frozen=True, repr=False)
class TopExamples(Worded):
    """The examples with the largest gradient at the output: the E with the largest ``s``.

    The gradient is biased towards hard examples, which is what makes training fast where labels are right, and what
    harms where they are wrong (``SampledExamples`` with a ``floor`` then).

    Args:
        fraction: above 0 and at most 1, or a whole number of examples.
        unit: what is kept or dropped, ``"example"`` or ``"token"``.

    Source: A. Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers", arXiv 2019, which drops by
    the loss and in a second forward pass; A. Katharopoulos & F. Fleuret, "Not All Samples Are Created Equal", ICML
    2018, for the gradient at the output in place of the gradient.
    """

    fraction: float | int = 0.3
    unit: Literal["example", "token"] = "example"

    def __post_init__(self) -> None:
        object.__setattr__(self, "fraction", check_fraction("fraction", self.fraction))
        check_unit(self.unit)


@dataclass(frozen=True, repr=False)
class SampledExamples(Worded):
    """Examples drawn without replacement by their gradient at the output: E of B, ``b`` with probability

        p[b] = min(1, c * ((1 - floor) * s[b] / sum(s) + floor / B))        c such that the p add up to E.

    Args:
        fraction: as for ``TopExamples``. floor: from 0 to 1: the share of the probabilities that is uniform; 1 is a
        uniform draw, the control. Wrong labels
            have large gradients: a floor keeps them from filling the batch.
        unbiased: divide a kept example's gradient by its ``p``, so that the expected gradient is that of all examples.
        unit: what is kept or dropped, ``"example"`` or ``"token"``.

    Source: A. Katharopoulos & F. Fleuret, ICML 2018; the draw is that of ``rwfx.Magnitude``.
    """

    fraction: float | int = 0.3
    floor: float = 0.0
    unbiased: bool = False
    unit: Literal["example", "token"] = "example"

    def __post_init__(self) -> None:
        object.__setattr__(self, "fraction", check_fraction("fraction", self.fraction))
        check_unit(self.unit)
        check_number("floor", self.floor, Real, 0, 1)
        check_flag("unbiased", self.unbiased)


@dataclass(frozen=True, repr=False)
class AdaptiveExamples(Worded):
    """As many of the examples with the largest gradient as hold a given share of its square.

    A step *needs* the fewest examples that hold ``share`` of ``sum(s ** 2)``. A running mean of what the steps before
    it needed decides how many one keeps, before its forward pass: the next larger of a few fractions between
    ``at_least`` and ``at_most``, each ``sqrt(2)`` times the last. So the fraction is large where the gradient lies in
    all examples, and falls as it gathers in few. The first step keeps ``at_most``.

    Args:
        share: above 0 and at most 1.
        at_least, at_most: the bounds, above 0 and at most 1.
        memory: from 0 to below 1: of the running mean.
        unit: what is kept or dropped, ``"example"`` or ``"token"``.

    Source: Z. Wang, J. Chen & J. Zhu, "Efficient Backpropagation with Variance-Controlled Adaptive Sampling", ICLR
    2024, for a fraction that follows the gradient's norm.
    """

    share: float = 0.9
    at_least: float = 0.1
    at_most: float = 1.0
    memory: float = 0.9
    unit: Literal["example", "token"] = "example"

    def __post_init__(self) -> None:
        check_unit(self.unit)
        for name in ("share", "at_least", "at_most"):
            check_number(name, getattr(self, name), Real, 0, 1, above=True)
        if self.at_least > self.at_most:
            raise ValueError(f"at_least={self.at_least!r} is above at_most={self.at_most!r}.")
        check_number("memory", self.memory, Real, 0, 1)
        if self.memory == 1:
            raise ValueError("memory must be below 1: with 1 nothing new is ever remembered.")

    @property
    def fractions(self) -> tuple[float, ...]:
        """What may be kept, rising."""
        found = [self.at_least]
        while found[-1] * 2**0.5 < self.at_most:
            found.append(found[-1] * 2**0.5)
        return (*found, self.at_most) if self.at_most > self.at_least else (self.at_most,)


ExamplePolicy = TopExamples | SampledExamples | AdaptiveExamples


def example_policy(examples: Any) -> ExamplePolicy:
    """The policy that ``transform(examples=...)`` was given, or a fraction or a number is short for.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(examples, ExamplePolicy):
        return examples
    if isinstance(examples, bool) or not isinstance(examples, Real):
        raise TypeError(
            "examples must be a fraction, a number of examples, or an example policy (rwfx.TopExamples, "
            f"SampledExamples, AdaptiveExamples), got {examples!r}."
        )
    return TopExamples(check_fraction("examples", examples))


def expected_fraction(policy: ExamplePolicy) -> float:
    """The share of the examples that is kept, as far as it is known before: the least of an adaptive one."""
    if isinstance(policy, AdaptiveExamples):
        return policy.at_least
    return 1.0 if isinstance(policy.fraction, int) else policy.fraction


def check_fraction(name: str, value: Any) -> float | int:
    """``value``, a fraction or a number of examples, as one of Python's own numbers.

    Raises:
        TypeError, ValueError: says what was met.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        check_number(name, value, Integral, 1)
        return int(value)
    check_number(name, value, Real, 0, 1, above=True)
    return float(value)


def check_unit(unit: Any) -> None:
    """Refuse what is no unit of examples.

    Raises:
        ValueError: says what was met.
    """
    if unit not in ("example", "token"):
        raise ValueError(f"unit must be 'example' or 'token', got {unit!r}.")
