"""Selective backprop in two passes: all examples forward, the largest gradients forward again and backward.

In: a network, and the share of the examples that is kept. Out: a module that is trained in the network's place.

Source: A. Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers", 2019. There an example is kept
with a probability that grows with its loss; here, as by ``rwfx.TopExamples``, those are kept whose gradient at the
output has the largest norm, and the step is dense.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from rwfx.experiments.data import TensorLoader


class TwoPass(nn.Module):
    """A classifier that gives the outputs of the examples it keeps, and which they are.

    Of B examples it keeps ``share * B``, rounded up: those with the largest norm of the gradient of the cross entropy,
    ``softmax(output) - one_hot(target)``.
    """

    def __init__(self, network: nn.Module, share: float) -> None:
        super().__init__()
        self.network, self.share = network, share

    def kept(self, batch: int) -> int:
        """How many of a batch's examples are kept."""
        return math.ceil(self.share * batch)

    def forward(self, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Give the outputs of the kept examples ``(K, O)``, and their places in the batch ``(K,)``."""
        with torch.no_grad():
            g_BO = torch.softmax(self.network(inputs), -1)
            g_BO[torch.arange(len(target), device=target.device), target] -= 1
            chosen_K = g_BO.norm(dim=1).topk(self.kept(len(target)), sorted=False).indices
        return self.network(inputs[chosen_K]), chosen_K


def two_pass_loss(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """The kept examples' part of the mean loss over the batch: they weigh what they weigh in a dense step."""
    output_KO, chosen_K = outputs
    return F.cross_entropy(output_KO, target[chosen_K], reduction="sum") / len(target)


class WithTarget:
    """The batches of a loader with the target as an input too: ``(inputs, target, target)``."""

    def __init__(self, loader: TensorLoader) -> None:
        self.loader = loader

    @property
    def generator(self) -> Generator | None:
        """What the order of the batches is drawn with."""
        return self.loader.generator

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for inputs, target in self.loader:
            yield inputs, target, target
