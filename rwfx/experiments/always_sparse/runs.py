"""Runs: contenders trained one after the other, with the time and the operations that they take.

In: an ``Entry``. Out: its network, trained, and what it had cost at each evaluation. A *second* is one of forward,
backward, update, ``zero_grad`` and the topology's update; batches are made and networks judged while the clock stands.
"""

import math
import statistics
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import rwfx
from rwfx.experiments.always_sparse.contenders import trained
from rwfx.experiments.always_sparse.entries import Entry
from rwfx.experiments.always_sparse.plan import DENSE, SMALL, Plan
from rwfx.experiments.always_sparse.tasks import ImageTask, augmented
from rwfx.experiments.data import TensorLoader
from rwfx.experiments.policies.runs import learning_rate as cosine
from rwfx.sparse_flops import EVERY_STEP, SparseFlops
from rwfx.sparse_memory import memory_of
from rwfx.sparsified import SparsifiedModule


class Run:
    """An entry that is trained. Runs of a seed see the same examples in the same order."""

    def __init__(self, plan: Plan, task: ImageTask, entry: Entry) -> None:
        self.plan, self.task, self.entry = plan, task, entry
        self.steps = plan.steps_of(len(task.split.train.target))
        self.done, self.flops, self.published_flops = 0, 0.0, 0.0
        self.times: list[float] = []
        self.topology_seconds = 0.0
        self.trained = trained(plan, task, entry.method, entry.density, entry.seed, entry.lr, self.steps)
        self._updates, self._flops = 0, self.flops_now()

    @property
    def seconds(self) -> float:
        """So far."""
        return sum(self.times) + self.topology_seconds

    @property
    def step_ms(self) -> float:
        """The median over the steps so far."""
        return 1000 * statistics.median(self.times)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.trained.network.parameters())

    @property
    def nnz(self) -> int:
        """The non-zeros of the sparse weights."""
        network = self.trained.network
        return network.nnz if isinstance(network, SparsifiedModule) else 0

    @property
    def bytes(self) -> int:
        """Of parameters, gradients, optimizer state, index and topology."""
        network, optimizer = self.trained.network, self.trained.optimizer
        if isinstance(network, SparsifiedModule):
            return memory_of(network, optimizer, self.trained.topology).sparse.total
        state = [held for of in optimizer.state.values() for held in of.values() if isinstance(held, Tensor)]
        return sum(tensor.nbytes for tensor in state) + sum(2 * of.nbytes for of in network.parameters())

    def train(self) -> Iterator[int]:
        """Train to the end.

        Yields:
            At each evaluation, the last one at the end, how many steps are done.
        """
        train, seed = self.task.split.train, self.entry.seed
        loader = TensorLoader(train.inputs, train.target, self.plan.batch_size, Generator().manual_seed(seed))
        generator = Generator().manual_seed(seed)
        stops = {round(self.steps * number / self.plan.evaluations) for number in range(1, self.plan.evaluations + 1)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # what dropout and the topology draw
            while self.done < self.steps:
                for inputs, target in loader:
                    if self.plan.augment:
                        inputs = augmented(inputs, self.task.image, generator)
                    self._step(inputs, target)
                    if self.done in stops:
                        yield self.done
                    if self.done == self.steps:
                        break

    def _step(self, inputs: Tensor, target: Tensor) -> None:
        network, optimizer, topology = self.trained.network, self.trained.optimizer, self.trained.topology
        network.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.plan, self.entry.lr, self.done, self.steps)
        started = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), target).backward()
        optimizer.step()
        _wait(self.plan.device)
        stepped = time.perf_counter()
        if topology is not None:
            topology.step()
            _wait(self.plan.device)
            self.topology_seconds += time.perf_counter() - stepped
        self.times.append(stepped - started)
        self.done += 1
        self._count(len(target))

    def _count(self, batch: int) -> None:
        """Count the operations of the last step."""
        method, plan = self.entry.method, self.plan
        updates = 0 if self.trained.topology is None else self.trained.topology.updates
        moves = updates > self._updates
        if moves:  # what the weights have may have become fewer, or others
            self._updates, self._flops = updates, self.flops_now()
        kind = "dense" if method in (DENSE, SMALL) else method
        step = self._flops.executed_dense if kind == "dense" else self._flops.executed("static")
        step += self._flops.candidates(kind, plan.gamma) * (moves or kind in EVERY_STEP)
        self.flops += batch * step
        self.published_flops += batch * self._flops.published(kind, plan.interval, plan.gamma)

    def flops_now(self) -> SparseFlops:
        """The operations of a step and an example, with the non-zeros there are."""
        network = self.trained.network
        if not isinstance(network, SparsifiedModule):
            # What the report of a sparsified network says of the dense one depends on neither density nor topology.
            network = rwfx.sparsify(network, 0.5, seed=0, example_inputs=(self.task.example,))
        flops = network.report.flops
        assert flops is not None
        return flops


def learning_rate(plan: Plan, lr: float, step: int, steps: int) -> float:
    """The rate of ``step``, from 0 to below ``steps``."""
    share = step / steps
    if share < plan.warmup:
        return lr * (1e-4 + (1 - 1e-4) * share / plan.warmup)
    if plan.decay == "cosine":
        return cosine(lr, step, steps)
    return lr * math.prod(plan.drop_to for drop in plan.drops if share >= drop and plan.decay == "drops")


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
