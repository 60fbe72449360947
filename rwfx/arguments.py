"""Checks of what a caller gives: what was met, and what is allowed."""

from collections.abc import Iterable
from math import inf
from numbers import Integral
from typing import Any


def check_number(name: str, value: Any, kind: type, low: float, high: float = inf, above: bool = False) -> None:
    """Refuse what is not a number of ``kind`` from ``low`` (or ``above`` it) to ``high``, both finite.

    Raises:
        TypeError, ValueError: says so by ``name``.
    """
    wanted = "a whole number" if kind is Integral else "a number"
    bounds = f"from {low} to {high}" if high < inf and not above else f"above {low}" if above else f"at least {low}"
    if above and high < inf:
        bounds += f" and at most {high}"
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted} {bounds}, got {value!r} ({type(value).__name__}).")
    if not low <= value <= high or (above and value == low) or value == inf:
        raise ValueError(f"{name} must be {wanted} {bounds}, got {value!r}.")


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuse what is none of ``allowed``.

    Raises:
        ValueError: says so by ``name``.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
