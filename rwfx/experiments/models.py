"""The networks the experiments train."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


def mlp(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Make a perceptron with ReLUs between linear layers of ``widths``; equal seeds give equal weights."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def character_mlp(vocabulary: int, context: int, embedding: int, hidden: Sequence[int], seed: int) -> nn.Sequential:
    """Make a network that predicts the next of ``vocabulary`` characters from the last ``context``.

    The characters' vectors, of ``embedding`` numbers, are joined and go through a perceptron: ``(B, context)`` int64
    to ``(B, vocabulary)``. Equal seeds give equal weights.

    Source: Y. Bengio, R. Ducharme, P. Vincent, C. Jauvin, "A Neural Probabilistic Language Model", JMLR 2003, without
    its direct connections.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        table = nn.Embedding(vocabulary, embedding)
    return nn.Sequential(table, nn.Flatten(), *mlp((context * embedding, *hidden, vocabulary), seed))
