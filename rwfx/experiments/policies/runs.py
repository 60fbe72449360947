"""Runs: contenders trained in turns in one process, with a learning rate that falls by a cosine to zero.

In: contenders, a starting network, examples. Out: ``Point``s, what a run had cost and how good it was at some of its
steps. A *turn* is some steps of one run in a row; its first step finds the caches full of another run's weights, as no
step of a run by itself does, so it counts as long as the median of the others.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from torch import Generator, nn

from rwfx.experiments.data import TensorLoader
from rwfx.experiments.policies.contenders import Contender, trainer_of
from rwfx.experiments.policies.plan import Plan
from rwfx.experiments.policies.tasks import Part
from rwfx.sparse_module import SparseModule

TURN = 25
"""Steps of a turn."""


@dataclass(frozen=True)
class Point:
    """A run after one of its steps."""

    step: int
    seconds: float
    """Forward, backward, update and ``zero_grad``."""
    parameter_updates: int
    flops: int
    metric: float
    earlier_metric: float | None
    """Of what the network had learned before, in fine-tuning."""


@dataclass(frozen=True)
class Result:
    """A finished run on test data."""

    task: str
    contender: Contender
    seed: int
    lr: float
    sparse: str
    """How many of its weights were row-sparse, such as ``2 of 3``."""
    earlier_before: float | None
    """The metric of what the network had learned before, as this run began."""
    points: tuple[Point, ...]

    @property
    def end(self) -> Point:
        """The last point."""
        return self.points[-1]


class Run:
    """A contender that is trained, a few steps at a time.

    Runs of equal seeds see equal batches in equal order, those of a smaller batch the same examples; ``start`` is left
    as it is.
    """

    def __init__(
        self, plan: Plan, contender: Contender, start: nn.Module, train: Part, whole: int, lr: float, seed: int
    ) -> None:
        self.contender, self.lr, self.seed = contender, lr, seed
        self.steps, self.done, self.seconds = contender.steps(whole), 0, 0.0
        order = Generator().manual_seed(seed)
        loader = TensorLoader(train.inputs, train.target, contender.batch(plan.batch_size), order)
        epochs = math.ceil(self.steps / len(loader))
        inputs = train.inputs[: loader.batch_size]
        self.trainer = trainer_of(plan, contender, copy.deepcopy(start), inputs, self.steps, epochs, seed)
        self._records = self.trainer.steps(loader)

    @property
    def network(self) -> nn.Module:
        """What is trained, as the dense network that it is in use."""
        return self.trainer.model

    @property
    def parameter_updates(self) -> int:
        """Scalars updated so far."""
        return self.trainer.history.parameter_updates[-1]

    @property
    def flops(self) -> int:
        """Operations so far."""
        return self.trainer.history.flops[-1]

    @property
    def sparse(self) -> str:
        """How many of its weights are row-sparse."""
        return row_sparse(self.trainer.network)

    def take_turn(self, count: int) -> None:
        """Train ``count`` steps."""
        times = []
        for step in range(self.done, self.done + count):
            for group in self.trainer.optimizer.param_groups:
                group["lr"] = learning_rate(self.lr, step, self.steps)
            before = self.trainer.history.seconds[-1] if step else 0.0
            times.append(next(self._records).seconds - before)
        self.done += count
        self.seconds += turn_seconds(times)


def row_sparse(network: nn.Module) -> str:
    """Say how many of the weights of ``network`` are row-sparse, such as ``2 of 3``; nothing of a dense one."""
    if not isinstance(network, SparseModule):
        return ""
    lines = [line for line in network.report.lines if line.calls]
    return f"{sum(not line.dense_because for line in lines)} of {len(lines)}"


def learning_rate(lr: float, step: int, steps: int) -> float:
    """``lr * (1 + cos(pi * step / steps)) / 2``, for ``step`` from 0 to below ``steps``, or of whatever is spent."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


def turn_seconds(times: Sequence[float]) -> float:
    """The seconds of a turn: the first step counts as the median of the others."""
    first, *others = times
    return sum(others) + (median(others) if others else first)


def take_turns(runs: Sequence[Run]) -> Iterator[tuple[Run, int]]:
    """Train all ``runs`` to their ends, by turns; a shorter run sits out some, so that all end together.

    Yields:
        After each turn its run and how many steps it took.
    """
    rounds = math.ceil(max(run.steps for run in runs) / TURN)
    for number in range(1, rounds + 1):
        for run in runs:
            due = run.steps if number == rounds else run.steps * number // (rounds * TURN) * TURN
            if count := due - run.done:
                run.take_turn(count)
                yield run, count
