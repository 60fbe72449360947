"""Contenders: the ways to train that are compared.

*gse, rigl, set, snfs, topkast, static*  the non-zeros alone, moved by ``rwfx.Topology`` (static: not moved).
*gradual*      dense at first, pruned to the density as it is trained; its products stay dense, as at first.
*dense*        the network itself.
*small-dense*  the network with all widths made smaller by one factor, until it has as many parameters as the sparse
               ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import rwfx
from rwfx.experiments.always_sparse.plan import DENSE, SMALL, Plan
from rwfx.experiments.always_sparse.tasks import ImageTask
from rwfx.topology import Topology
from rwfx.topology.methods import METHODS


@dataclass
class Trained:
    """What a run trains."""

    network: nn.Module
    optimizer: Optimizer
    topology: Topology | None = None
    """None where nothing moves."""


def trained(plan: Plan, task: ImageTask, method: str, density: float, seed: int, lr: float, steps: int) -> Trained:
    """Make the network of a contender, with its optimizer and, where there is one, its topology."""
    network = network_of(plan, task, method, density, seed).to(plan.device)
    optimizer = optimizer_of(plan, network, lr)
    if method in (DENSE, SMALL, "static"):
        return Trained(network, optimizer)
    return Trained(network, optimizer, topology_of(plan, network, optimizer, method, density, seed, steps))


def network_of(plan: Plan, task: ImageTask, method: str, density: float, seed: int) -> nn.Module:
    """Make the network of a contender."""
    if method == DENSE:
        return task.network(plan.width, seed)
    if method == SMALL:
        return task.network(small_width(plan, task, density), seed)
    start: dict[str, Any] = {"density": 1.0 if method == "gradual" else density, "growth": method, "init": plan.init}
    network = task.network(plan.width, seed).to(plan.device)
    return rwfx.sparsify(network, seed=seed, example_inputs=(task.example,), **start)


def optimizer_of(plan: Plan, network: nn.Module, lr: float) -> Optimizer:
    """Make the optimizer, with the fused update, as for a dense network."""
    options: dict[str, Any] = {"lr": lr, "weight_decay": plan.weight_decay, "fused": True}
    if plan.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), momentum=plan.momentum, nesterov=plan.nesterov, **options)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[plan.optimizer]
    return kind(network.parameters(), **options)


def topology_of(
    plan: Plan, network: nn.Module, optimizer: Optimizer, method: str, density: float, seed: int, steps: int
) -> Topology:
    """Make what moves the non-zeros, with the options that the method has."""
    rules = METHODS[method]
    own = {"gamma": plan.gamma, "distribution": plan.distribution, "density": density}
    options: dict[str, Any] = {name: own[name] for name in rules.options if name in own}
    if rules.alpha is not None:
        options["alpha"] = plan.alpha
    options |= {"interval": plan.interval, "schedule": plan.schedule, "scope": plan.scope, "seed": seed}
    return Topology(network, optimizer, method, end=plan.end_of(steps), **options)


def small_width(plan: Plan, task: ImageTask, density: float) -> float:
    """The factor for the widths of a dense network with as many parameters as a sparse one, or hardly fewer."""
    sparse = network_of(plan, task, "static", density, 0)
    target = sum(parameter.numel() for parameter in sparse.parameters())
    low, high = 0.0, plan.width
    for _ in range(30):
        middle = (low + high) / 2
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in task.network(middle, 0).parameters())
        low, high = (middle, high) if count <= target else (low, middle)
    return low
