"""What takes turns: dense, masked and sparse steps of one perceptron, and the parts of a step by themselves.

In: a ``Plan`` and a ``Size``. Out: ``Contender``s, which begin with the same weights and see one batch of random
numbers. A *step* is forward, backward and Adam. The *kinds* are

``dense``      a step of the model itself, with ``torch.optim.Adam(fused=True)``.
``sparse``     a step of ``transform(model, num_paths, grad="rows")``, with ``rwfx.optim.Adam``.
``masked``     the same with ``mode="masked"``: dense products, masked afterwards.
``forward``    the dense model's forward alone, without the loss, in train mode and recorded for a backward.
``sampler``    the sparse model's row sampler alone, on that model's weights.
``optimizer``  the row optimizer's step alone, again and again on the gradients of one sparse backward: they and
               what they update lie in a warmer cache than in a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import rwfx.optim
from rwfx.experiments.models import mlp
from rwfx.experiments.speed.plan import Plan, Size
from rwfx.experiments.speed.turns import Call
from rwfx.passes.sample_rows import SAMPLER
from rwfx.policies import RandomWalk
from rwfx.sampler import RowSampler
from rwfx.transform import transform
from rwfx.transformed import Transformed

SEED = 0


@dataclass(frozen=True)
class Contender:
    """Something to be timed."""

    kind: str
    num_paths: int | None
    """``None`` where no rows are drawn."""
    compiled: bool
    call: Call
    network: nn.Module

    def kept(self) -> float | None:
        """Of a sparse step the share of the backward's products that the last draw kept, K of O rows of each."""
        if self.kind != "sparse":
            return None
        assert isinstance(self.network, Transformed)
        return self.network.report.kept_share


def contenders(plan: Plan, size: Size) -> list[Contender]:
    """Make every contender of ``size``, in the order in which they take turns."""
    how = (False, True) if plan.compiled else (False,)
    found = [_forward(plan, size, compiled) for compiled in how]
    found += [_step(plan, size, "dense", None, compiled) for compiled in how]
    for num_paths in size.num_paths:
        if plan.masked:
            found += [_step(plan, size, "masked", num_paths, compiled) for compiled in how]
        sparse = [_step(plan, size, "sparse", num_paths, compiled) for compiled in how]
        found += [*sparse, _sampler(sparse[0]), _optimizer(plan, size, num_paths)]
    return found


def build(plan: Plan, size: Size, kind: str, num_paths: int | None) -> tuple[nn.Module, Optimizer]:
    """Make the network of a ``dense``, ``masked`` or ``sparse`` step, and its optimizer."""
    model = mlp(size.widths, SEED).to(plan.device, plan.dtype)
    if kind == "dense":
        return model, torch.optim.Adam(model.parameters(), fused=True)
    assert num_paths is not None
    network = sparsify(plan, model, num_paths, kind)
    return network, rwfx.optim.Adam(network.parameters())


def sparsify(plan: Plan, model: nn.Module, num_paths: int, kind: str = "sparse", **options: Any) -> Transformed:
    """Transform ``model`` as every part of a measurement does."""
    assert kind in ("masked", "sparse")
    options = {**plan.transform_options, **options}
    walk = RandomWalk(num_paths, **plan.walk_options)
    return transform(model, rows=walk, mode=kind, grad="rows", seed=SEED, **options)


def batch(plan: Plan, size: Size) -> tuple[Tensor, Tensor]:
    """Make the batch of random numbers and its target."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(size.batch_size, size.widths[0], generator=generator)
    target = torch.randint(size.widths[-1], (size.batch_size,), generator=generator)
    return inputs.to(plan.device, plan.dtype), target.to(plan.device)


def batch_loss(plan: Plan, size: Size, network: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """Give the forward of a step with its loss."""
    inputs, target = batch(plan, size)
    return lambda: F.cross_entropy(network(inputs), target)


def train_step(loss: Callable[[], Tensor], optimizer: Optimizer) -> Call:
    """Give a step."""

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _forward(plan: Plan, size: Size, compiled: bool) -> Contender:
    network, _ = build(plan, size, "dense", None)
    inputs, _ = batch(plan, size)
    called = torch.compile(network, fullgraph=True) if compiled else network
    return Contender("forward", None, compiled, lambda: called(inputs), network)


def _step(plan: Plan, size: Size, kind: str, num_paths: int | None, compiled: bool) -> Contender:
    network, optimizer = build(plan, size, kind, num_paths)
    stepped = torch.compile(network, fullgraph=True) if compiled else network
    return Contender(kind, num_paths, compiled, train_step(batch_loss(plan, size, stepped), optimizer), network)


def _sampler(sparse: Contender) -> Contender:
    assert isinstance(sparse.network, Transformed)
    return Contender("sampler", sparse.num_paths, False, draw(sparse.network), sparse.network)


def _optimizer(plan: Plan, size: Size, num_paths: int) -> Contender:
    network, optimizer = build(plan, size, "sparse", num_paths)
    batch_loss(plan, size, network)().backward()
    return Contender("optimizer", num_paths, False, optimizer.step, network)


def draw(network: Transformed) -> Call:
    """Give a call that draws the row sets of a step, as the forward of ``network`` does."""
    sampler = network.get_submodule(SAMPLER)
    assert isinstance(sampler, RowSampler)
    weights = [network.get_parameter(name) for name in sampler.crossed]
    return lambda: sampler(*weights)
