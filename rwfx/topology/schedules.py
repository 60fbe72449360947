"""How the share of connections that is exchanged decays from the first step to the last.

In: the progress ``t / T_end``, from 0 to 1. Out: a factor of ``alpha``, 1 at 0.
"""

from collections.abc import Callable, Mapping
from math import cos, pi

DECAYS: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + cos(pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
