"""Top-KAST: the connections are the largest of all weights, of which those next in size are trained as well.

For a weight with ``K`` non-zeros, ``theta`` the whole of it, ``A`` the places of its ``K`` largest magnitudes and
``B \\ A`` those of the ``gamma K`` largest after them (Jayakumar et al. 2020):

    forward and dx    theta on A                    what the sparse weight stores
    trained           theta on A and on B \\ A       gradients of B \\ A come from the weight's probe, in every step
    at an update      A and B anew, by magnitude

``theta`` lies on the CPU, dense; it is read and written at an update only. At first it is the sparse weight on ``A``,
and elsewhere drawn as for a dense weight, uniformly with the standard deviation ``1 / sqrt(I)``: most of it is smaller
than what a sparsified model stores.

The paper's exploration loss, ``|theta_A|^2 + |theta_{B \\ A}|^2 / D`` with the density ``D``, is the weight decay of
the optimizer: ``B \\ A`` is a parameter group of its own, marked with ``"explored": True``, with ``1 / D`` of the
decay. (A scheduler of learning rates that was made before does not know that group.) What comes into ``A`` or
``B \\ A`` starts with an optimizer state of 0.

Axes: I columns and O rows of the weight, N connections, E explored places.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from rwfx.extremes import largest, largest_magnitudes
from rwfx.keys import origins
from rwfx.ops.probe import FOUND
from rwfx.sparse_weight import SparseWeight
from rwfx.topology.moving import carry_state, move
from rwfx.topology.ranks import agree_on_mean


class Exploration:
    """``theta`` and what is trained outside of the sparse weights."""

    def __init__(self, weights: Mapping[str, SparseWeight], optimizer: Optimizer, gamma: float, seed: int) -> None:
        self.optimizer = optimizer
        generator = Generator().manual_seed(seed)
        self._all = {name: _Explored(weight, gamma, generator) for name, weight in weights.items()}
        density = sum(w.nnz for w in weights.values()) / sum(w.rows * w.columns for w in weights.values())
        for group in list(optimizer.param_groups):
            own = {id(parameter) for parameter in group["params"]}
            explored = [e.values for e in self._all.values() if id(e.weight.values) in own]
            if explored:
                options = {name: value for name, value in group.items() if name != "params"}
                decay = options.get("weight_decay", 0) / density
                optimizer.add_param_group({**options, "params": explored, "weight_decay": decay, "explored": True})
        optimizer.register_step_pre_hook(self._agree)

    def update(self) -> dict[str, int]:
        """Choose ``A`` and ``B`` anew; give how many connections of each weight are new."""
        trained = {name: explored for name, explored in self._all.items() if explored.weight.values.requires_grad}
        return {name: explored.update(self.optimizer) for name, explored in trained.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that is not in the sparse weights."""
        return {
            name: {"theta": e.theta.clone(), "keys": e.probe.keys.clone(), "values": e.values.detach().clone()}
            for name, e in self._all.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a ``state_dict``."""
        for name, explored in self._all.items():
            explored.theta.copy_(state[name]["theta"])
            explored.probe.keys.copy_(state[name]["keys"])
            explored.values.copy_(state[name]["values"])

    def _agree(self, *_: Any) -> None:
        for explored in self._all.values():
            if explored.values.grad is not None:
                agree_on_mean(explored.values.grad)


def check_unexplored(optimizer: Optimizer) -> None:
    """Refuse an optimizer that trains the explored places of another topology."""
    if any(group.get("explored") for group in optimizer.param_groups):
        raise ValueError(
            'the optimizer has the groups of another Topology with method="topkast": give this one an optimizer of its '
            "own, made anew."
        )


class _Explored:
    """Of one weight: ``theta``, ``(I * O,)``, and the values at the probe's keys, a parameter, ``(E,)``."""

    def __init__(self, weight: SparseWeight, gamma: float, generator: Generator) -> None:
        assert weight.probe is not None
        self.weight, self.probe = weight, weight.probe
        places, like = weight.rows * weight.columns, weight.values
        bound = sqrt(3 / weight.columns)
        self.theta = (torch.rand(places, generator=generator, device="cpu") * 2 - 1).mul_(bound).to(like.dtype)
        self.theta[weight.keys().cpu()] = like.detach().cpu()
        count = min(max(1, int(gamma * weight.nnz)), places - weight.nnz)
        self.probe.fit(weight, count, count)
        explored = self._next_after(weight.keys().cpu(), count)
        self.probe.keys.copy_(explored)
        self.values = nn.Parameter(self.theta[explored].to(like.device))
        like.register_post_accumulate_grad_hook(self._take_gradient)

    def update(self, optimizer: Optimizer) -> int:
        """``A`` and ``B \\ A`` anew; how many connections are new."""
        weight, values = self.weight, self.values.detach()
        self.theta[weight.keys().cpu()] = weight.values.detach().cpu()
        self.theta[self.probe.keys.cpu()] = values.cpu()
        keys = largest_magnitudes(self.theta, weight.nnz)
        explored = self._next_after(keys, len(values))
        new = move(weight, weight.keys(), keys.to(values.device), optimizer)
        weight.values.detach().copy_(self.theta[keys])
        before, after = self.probe.keys, explored.to(values.device)
        carry_state(optimizer, self.values, origins(before, after))
        before.copy_(after)
        values.copy_(self.theta[explored])
        return new

    def _next_after(self, keys: Tensor, count: int) -> Tensor:
        return largest(self.theta.abs().index_fill_(0, keys, -1), count)

    def _take_gradient(self, _: Tensor) -> None:
        # Here, so that what scales or clips gradients before the optimizer's step finds it.
        if self.weight.probe is self.probe and int(self.probe.state[0]) == FOUND:
            grad = self.probe.grads.clone()
            self.values.grad = grad if self.values.grad is None else self.values.grad + grad
            # The next pass is added up in ``grad``, which ``zero_grad`` clears.
            self.probe.look(True, given=len(grad))
