"""What a training step costs in products of matrices, without the step being taken.

In: a network and an example of its inputs. Out: ``Products``, which gives the floating point operations of a step for a
batch of B examples of which k take part in the backward pass, on K of the O rows of each weight. A multiply-add counts
as two. With ``f`` the operations of a weighted call (linear or convolution) on one example,

    forward   B f
    backward  k f K / O  for the weight  +  k f K / O  for the call's input, unless that is the network's own

with k = B for a call that ``rwfx.transform`` could not confine to the kept examples. Products without a weight, as in
attention, have no rows, and are done for the whole batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from rwfx.cost import dense_flops, flop_counter
from rwfx.sparse_module import SparseModule


@dataclass(frozen=True)
class Call:
    """A weighted call."""

    weight: str
    rows: int
    forward: int
    """Operations of one example."""
    input_grad: bool
    """Whether the backward pass needs the gradient of its input."""


@dataclass(frozen=True)
class Products:
    """The products of a forward and a backward pass of a network."""

    calls: tuple[Call, ...]
    other_forward: int
    """Operations of one example in products without a weight."""
    other_backward: int

    def forward(self, batch: int) -> int:
        """Operations of a forward pass."""
        return batch * (sum(call.forward for call in self.calls) + self.other_forward)

    def dense(self, batch: int) -> int:
        """Operations of a step of plain training."""
        return self.sparse(batch, {}, {})

    def sparse(self, batch: int, examples: Mapping[str, int], rows: Mapping[str, int]) -> int:
        """Operations of a step whose backward pass is confined: by weight, to so many ``examples`` and ``rows``."""
        weighted = sum(
            examples.get(call.weight, batch)
            * call.forward
            * (1 + call.input_grad)
            * rows.get(call.weight, call.rows)
            // call.rows
            for call in self.calls
        )
        return self.forward(batch) + weighted + batch * self.other_backward

    def two_passes(self, batch: int, kept: int) -> int:
        """Operations of a forward pass of all examples, then a dense step on ``kept``."""
        return self.forward(batch) + self.dense(kept)


def products_of(network: nn.Module, inputs: Tensor) -> Products:
    """Count the products of ``network``, whose weights belong to ``nn.Linear`` and ``nn.Conv2d``, by one dense step."""
    calls: list[Call] = []
    hooks = [
        module.register_forward_hook(_recorder(calls, f"{path}.weight", len(inputs)))
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        total, _ = dense_flops(network, (inputs,))
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad(), flop_counter() as counter:
        network(inputs)
    forward = counter.get_total_flops() // len(inputs)
    weighted_forward = sum(call.forward for call in calls)
    weighted_backward = sum(call.forward * (1 + call.input_grad) for call in calls)
    other_forward, other_backward = forward - weighted_forward, total // len(inputs) - forward - weighted_backward
    assert min(other_forward, other_backward) >= 0
    return Products(tuple(calls), other_forward, other_backward)


def confined_to_examples(network: SparseModule) -> frozenset[str]:
    """The weights whose calls compute with the kept examples alone in the backward pass."""
    found = (node.args[1] for node in network.graph.nodes if node.kwargs.get("examples") is not None)
    return frozenset(str(weight.target) for weight in found if isinstance(weight, Node) and weight.op == "get_attr")


def _recorder(calls: list[Call], weight: str, batch: int) -> Any:
    def record(module: nn.Linear | nn.Conv2d, given: Sequence[Tensor], output: Tensor) -> None:
        # Each number of the output is a sum of as many products as a row of the weight has numbers.
        forward = 2 * output.numel() * module.weight[0].numel() // batch
        calls.append(Call(weight, len(module.weight), forward, given[0].requires_grad))

    return record
