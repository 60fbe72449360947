"""Timing by turns in one process.

In: calls, A, B, C. Out: the time of each in every round. A *round* gives every call one turn, A B C A B C ...,
so that a disturbance of the machine meets all; a *turn* is a call that is not timed and some that are, in a row, of
each as many as take about as long. The first call of a turn finds the caches full of another's weights, as no step of a
training run does.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

Call = Callable[[], object]

TURN_MILLISECONDS = 150.0
"""What the timed calls of a turn should take."""
MOST_CALLS = 100
"""Calls in a turn at most."""


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, the least and the greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise ``values``."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.least:.2f} - {self.greatest:.2f}]"


def ratios(numbers: Sequence[float], over: Sequence[float]) -> list[float]:
    """Divide pair by pair: times of the same round."""
    return [number / other for number, other in zip(numbers, over, strict=True)]


def take_turns(calls: Sequence[Call], rounds: int, device: str, bar: tqdm) -> Iterator[tuple[int, int, float]]:
    """Warm every call up, then give ``rounds`` rounds.

    ``bar`` moves by one for each call's warm-up and for each turn: ``len(calls) * (rounds + 1)`` in all.

    Yields:
        After each turn its round, the call's place in ``calls``, and the milliseconds of one call.
    """
    counts = []
    for call in calls:
        call()  # compiles what is to be compiled
        counts.append(calls_a_turn(min(milliseconds(call, 1, device) for _ in range(3))))
        bar.update()
    for number in range(rounds):
        for place, (call, count) in enumerate(zip(calls, counts, strict=True)):
            call()
            yield number, place, milliseconds(call, count, device)
            bar.update()


def calls_a_turn(each: float) -> int:
    """So many calls of ``each`` milliseconds that they take ``TURN_MILLISECONDS``, and no more than ``MOST_CALLS``."""
    return max(1, min(MOST_CALLS, round(TURN_MILLISECONDS / each)))


def milliseconds(call: Call, count: int, device: str) -> float:
    """Make ``count`` calls in a row and give the milliseconds of one.

    On a CUDA device the time is that between two events of its stream, the waiting for the CPU included.
    """
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            first.record()
            for _ in range(count):
                call()
            last.record()
            torch.cuda.synchronize()
            return first.elapsed_time(last) / count
    started = time.perf_counter()
    for _ in range(count):
        call()
    return 1000 * (time.perf_counter() - started) / count
