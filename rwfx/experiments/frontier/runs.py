"""Runs: contenders trained for a budget, in turns in one process, with a rate that falls by a cosine to zero.

In: an ``Entry``, a task, the products of its network. Out: a trained network, and what it had cost. The *budget* is
counted in operations of products of matrices, and the learning rate follows what is spent of it, so that the schedule
of a contender whose steps cost more or less as it goes, ``AdaptiveExamples``, ends with its budget as any other does.
"""

import copy
import math
from collections.abc import Iterator, Sequence

from torch import Generator, nn

from rwfx.experiments.data import TensorLoader
from rwfx.experiments.frontier.contenders import CONTENDERS, trainer_of
from rwfx.experiments.frontier.cost import Products, confined_to_examples
from rwfx.experiments.frontier.entries import Entry
from rwfx.experiments.frontier.plan import REFERENCE_BATCH, Plan
from rwfx.experiments.frontier.two_pass import TwoPass, WithTarget
from rwfx.experiments.policies.runs import TURN, learning_rate, row_sparse, turn_seconds
from rwfx.experiments.policies.tasks import Task
from rwfx.sparse_module import SparseModule


class Run:
    """An entry that is trained, a few steps at a time.

    Runs of a seed begin with the same weights ``start``, which are left as they are; those of equal batches see the
    same examples in the same order.
    """

    def __init__(self, plan: Plan, entry: Entry, task: Task, start: nn.Module, products: Products) -> None:
        self.entry, self.products = entry, products
        self.budget = budget_of(plan, entry, products)
        self.done, self.examples, self.seconds, self.flops = 0, 0, 0.0, 0
        train = task.split.train
        loader = TensorLoader(train.inputs, train.target, entry.batch, Generator().manual_seed(entry.seed))
        most = 1 + self.budget // products.forward(entry.batch)  # no step is cheaper than its forward pass
        two_pass = CONTENDERS[entry.contender].two_pass is not None
        self.trainer = trainer_of(
            plan,
            entry.contender,
            copy.deepcopy(start),
            train.inputs[: entry.batch],
            entry.lr,
            math.ceil(most / len(loader)),
            entry.seed,
        )
        network = self.trainer.network
        self._confined = confined_to_examples(network) if isinstance(network, SparseModule) else frozenset()
        self._last = 0
        self._records = self.trainer.steps(WithTarget(loader) if two_pass else loader)

    @property
    def network(self) -> nn.Module:
        """What is trained, as the dense network that it is in use."""
        model = self.trainer.model
        return model.network if isinstance(model, TwoPass) else model

    @property
    def progress(self) -> float:
        """The share of its budget that is spent."""
        return self.flops / self.budget

    @property
    def ended(self) -> bool:
        """Whether a further step, like the last, would be further from the budget."""
        return self.done > 0 and self.budget - self.flops < self._last / 2

    @property
    def examples_share(self) -> float:
        """The share of the examples so far that took part in the backward pass."""
        return self.examples / (self.done * self.entry.batch)

    @property
    def row_sparse(self) -> str:
        """How many of its weights are row-sparse, such as ``2 of 3``."""
        return row_sparse(self.trainer.network)

    @property
    def example_sparse(self) -> str:
        """How many of its weights compute with the kept examples alone, such as ``3 of 3``."""
        if CONTENDERS[self.entry.contender].examples is None:
            return ""
        return f"{len(self._confined)} of {len({call.weight for call in self.products.calls})}"

    def take_turn(self, count: int = TURN) -> int:
        """Train ``count`` steps, or to the end; give the operations of them."""
        before, times = self.flops, []
        while len(times) < count and not self.ended:
            for group in self.trainer.optimizer.param_groups:
                group["lr"] = learning_rate(self.entry.lr, self.flops, self.budget)
            past = self.trainer.history.seconds[-1] if self.done else 0.0
            times.append(next(self._records).seconds - past)
            kept, self._last = self._step()
            self.done, self.examples, self.flops = self.done + 1, self.examples + kept, self.flops + self._last
        self.seconds += turn_seconds(times)
        return self.flops - before

    def _step(self) -> tuple[int, int]:
        """Give how many examples took part in the backward pass of the last step, and the step's operations."""
        batch, network = self.entry.batch, self.trainer.network
        if isinstance(network, TwoPass):
            kept = network.kept(batch)
            return kept, self.products.two_passes(batch, kept)
        if not isinstance(network, SparseModule):
            return batch, self.products.dense(batch)
        contender = CONTENDERS[self.entry.contender]
        kept = network.examples[0] if network.examples else batch
        rows = {} if contender.rows is None else {weight: len(of) for weight, of in network.rows.items()}
        return kept, self.products.sparse(batch, dict.fromkeys(self._confined, kept), rows)


def budget_of(plan: Plan, entry: Entry, products: Products) -> int:
    """The operations that a run may spend: its share of those of the whole budget's dense steps."""
    return round(entry.share * plan.steps_of(entry.task) * products.dense(REFERENCE_BATCH))


def take_turns(runs: Sequence[Run]) -> Iterator[tuple[Run, int]]:
    """Train all ``runs`` to their ends: the next turn is that of the run which has spent the least share of its budget.

    Yields:
        After each turn its run and the operations of it.
    """
    while waiting := [run for run in runs if not run.ended]:
        run = min(waiting, key=lambda run: run.progress)
        yield run, run.take_turn()
