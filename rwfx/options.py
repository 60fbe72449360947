"""The options of ``rwfx.transform``, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import distributed

from rwfx.arguments import check_number
from rwfx.break_even import CostModel
from rwfx.draws import starts_at_loss
from rwfx.examples import ExamplePolicy, TopExamples, example_policy
from rwfx.policies import Policy, RandomWalk, TopK, Uniform
from rwfx.where import Where, given_places


@dataclass(frozen=True)
class Options:
    """What is to be done with a model; ``rwfx.transform`` says what each is."""

    policy: Policy
    examples: ExamplePolicy | None
    include: tuple[Where, ...]
    exclude: tuple[Where, ...]
    mode: Literal["sparse", "masked"]
    dx: Literal["rows", "full"]
    grad: Literal["dense", "rows"]
    seed: int | None
    resample_every: int
    break_even: bool | CostModel

    def costs_on(self, device: str) -> CostModel | None:
        """By what it is weighed whether a row-sparse backward pays; None: nothing is."""
        if self.mode != "sparse":  # masking saves nothing, whatever the weight
            return None
        if isinstance(self.break_even, CostModel):
            return self.break_even
        # Measured for a CPU alone: elsewhere only the caller can say.
        return CostModel() if self.break_even and device == "cpu" else None


def checked_options(
    num_paths: Any = None,
    density: Any = None,
    rows: Any = None,
    examples: Any = None,
    include: Any = "all",
    exclude: Any = (),
    mode: Any = "sparse",
    dx: Any = None,
    grad: Any = "dense",
    seed: Any = None,
    resample_every: Any = 1,
    break_even: Any = True,
) -> Options:
    """The options that arguments of ``rwfx.transform`` stand for.

    Raises:
        TypeError, ValueError: one is not allowed, or two do not go together.
    """
    of_examples = None if examples is None else example_policy(examples)
    policy = _policy(rows, num_paths, density, of_examples)
    _check_choices(mode, dx, grad, seed, break_even)
    _check_policy(policy, mode, resample_every)
    if of_examples is not None and mode == "masked":
        raise ValueError('examples with mode="masked": masking saves nothing to compare with. Use mode="sparse".')
    if starts_at_loss(policy) and not (isinstance(of_examples, TopExamples) and type(policy) is RandomWalk):
        raise ValueError(
            'start="loss" draws examples and rows together: it is for RandomWalk, with examples= a fraction or a '
            "number; "
            f"got rows={policy!r}, examples={examples!r}."
        )
    return Options(
        policy,
        of_examples,
        given_places("include", include),
        given_places("exclude", exclude),
        mode,
        dx or ("full" if mode == "masked" else "rows"),
        grad,
        None if seed is None else int(seed),
        resample_every,
        break_even,
    )


def common_seed() -> int:
    """One number of ``torch.manual_seed``'s stream, the same on every rank."""
    seeds = [int(torch.randint(2**62, (), device="cpu"))]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(seeds)
    return seeds[0]


def _policy(rows: Any, num_paths: Any, density: Any, of_examples: ExamplePolicy | None) -> Policy:
    if rows is None and num_paths is None and density is None and of_examples is not None:
        return Uniform(1.0)
    if rows is None:
        return RandomWalk(num_paths, density)
    if not isinstance(rows, Policy):
        raise TypeError(
            f"rows must be a row policy (rwfx.RandomWalk, AdaptiveWalk, LearnedWalk, TopK, Uniform, Magnitude), got "
            f"{rows!r}."
        )
    for name, given in (("num_paths", num_paths), ("density", density)):
        if given is not None:
            raise ValueError(f"{name}={given!r} beside rows={rows!r}: give it to the policy.")
    return rows


def _check_policy(policy: Policy, mode: str, resample_every: Any) -> None:
    check_number("resample_every", resample_every, Integral, 1)
    if isinstance(policy, TopK) and mode == "masked":
        raise ValueError(
            'TopK with mode="masked": what masking compares with is the choice before the forward, and TopK chooses '
            'in the backward pass. Use mode="sparse", or another policy.'
        )
    if isinstance(policy, RandomWalk) and policy.unbiased and resample_every > 1:
        raise ValueError(
            f"unbiased=True with resample_every={resample_every}: the probabilities are those of a fresh draw. Use "
            "resample_every=1, or rwfx.Uniform or rwfx.Magnitude."
        )


def _check_choices(mode: Any, dx: Any, grad: Any, seed: Any, break_even: Any) -> None:
    choices: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
        "mode": (mode, ("sparse", "masked")),
        "dx": (dx, ("rows", "full", None)),
        "grad": (grad, ("dense", "rows")),
    }
    for name, (value, allowed) in choices.items():
        if not any(value is choice or value == choice for choice in allowed):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    if seed is not None:
        check_number("seed", seed, Integral, 0, 2**63 - 1)
    if not isinstance(break_even, bool | CostModel):
        raise TypeError(f"break_even must be True, False or a rwfx.CostModel, got {break_even!r}.")
