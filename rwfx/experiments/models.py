"""The networks the experiments train; equal seeds give equal weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Make a perceptron with ReLUs between linear layers of ``widths``."""
    layers: list[nn.Module] = []
    with seeded(seed):
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def character_mlp(vocabulary: int, context: int, embedding: int, hidden: Sequence[int], seed: int) -> nn.Sequential:
    """Make a network that predicts the next of ``vocabulary`` characters from the last ``context``.

    The characters' vectors, of ``embedding`` numbers, are joined and go through a perceptron: ``(B, context)`` int64
    to ``(B, vocabulary)``.

    Source: Y. Bengio, R. Ducharme, P. Vincent, C. Jauvin, "A Neural Probabilistic Language Model", JMLR 2003, without
    its direct connections.
    """
    with seeded(seed):
        table = nn.Embedding(vocabulary, embedding)
    return nn.Sequential(table, nn.Flatten(), *mlp((context * embedding, *hidden, vocabulary), seed))


def cnn(channels: Sequence[int], side: int, classes: int, seed: int) -> nn.Sequential:
    """Make a network of convolutions, ``(B, channels[0], side, side)`` to ``(B, classes)``.

    Each convolution, 3 x 3, is followed by a ReLU and by pooling that halves both sides; a linear head ends it.
    """
    layers: list[nn.Module] = []
    left = side // 2 ** (len(channels) - 1)
    with seeded(seed):
        for inputs, outputs in pairwise(channels):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * left * left, classes))


def residual_cnn(channels: Sequence[int], blocks: int, classes: int, seed: int) -> nn.Module:
    """Make a residual network of convolutions, ``(B, 3, side, side)`` to ``(B, classes)``.

    There are ``blocks`` blocks of each number of ``channels``, and each number but the first halves the sides. With
    ``(64, 128, 256, 512)`` and 2 it is the ResNet-18 of K. He et al., "Deep Residual Learning for Image Recognition",
    CVPR 2016, with the stem that is used on images of 32 x 32: one convolution, 3 x 3.
    """
    with seeded(seed):
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0])]
        layers.append(nn.ReLU())
        for k, (inputs, outputs) in enumerate(pairwise((channels[0], *channels))):
            layers.append(_Residual(inputs, outputs, 2 if k else 1))
            layers += [_Residual(outputs, outputs, 1) for _ in range(blocks - 1)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs) for _ in range(2)])
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False)).append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(h)) + self.shortcut(x))


def sentence_transformer(words: int, length: int, width: int, heads: int, blocks: int, seed: int) -> nn.Module:
    """Make a transformer that tells two classes of sentences: ``(B, length)`` int64, 0 being blank, to ``(B, 2)``."""
    with seeded(seed):
        return SentenceTransformer(words, length, width, heads, blocks)


def encoder(width: int, heads: int, blocks: int, classes: int, seed: int) -> nn.Module:
    """Make blocks of a transformer and a head on the mean of the tokens: ``(B, L, width)`` to ``(B, classes)``."""
    with seeded(seed):
        return Encoder(width, heads, blocks, classes)


class Encoder(nn.Module):
    """Blocks as those of ``SentenceTransformer``, over tokens that are vectors already."""

    def __init__(self, width: int, heads: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(width, heads) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, h_BLW: Tensor) -> Tensor:
        """Give the score of each class."""
        for block in self.blocks:
            h_BLW = block(h_BLW)
        return self.head(self.norm(h_BLW).mean(1))


class SentenceTransformer(nn.Module):
    """Words and their places, blocks of attention and perceptron, the mean over the words, and a head.

    Source: A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017; the norms before, as in R. Xiong et al., "On
    Layer Normalization in the Transformer Architecture", ICML 2020.
    """

    def __init__(self, words: int, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList([_Block(width, heads) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)

    def forward(self, words_BL: Tensor) -> Tensor:
        """Give the score of each class."""
        blank_BL = words_BL == 0
        h_BLW = self.words(words_BL) + self.places
        for block in self.blocks:
            h_BLW = block(h_BLW, ~blank_BL[:, None, None])
        said_BL1 = (~blank_BL).unsqueeze(-1).to(h_BLW.dtype)
        return self.head((self.norm(h_BLW) * said_BL1).sum(1) / said_BL1.sum(1))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm, self.query, self.key = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.join = nn.Linear(width, width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, h_BLW: Tensor, read_BHLL: Tensor | None = None) -> Tensor:
        """``read_BHLL``: which tokens each may read, broadcast; all by default."""
        n_BLW = self.norm(h_BLW)
        q, k, v = self._cut(self.query(n_BLW)), self._cut(self.key(n_BLW)), self._cut(self.value(n_BLW))
        seen_BHLS = F.scaled_dot_product_attention(q, k, v, read_BHLL)
        h_BLW = h_BLW + self.join(seen_BHLS.transpose(1, 2).flatten(2))
        return h_BLW + self.perceptron(h_BLW)

    def _cut(self, h_BLW: Tensor) -> Tensor:
        """Cut the width into heads: ``(B, H, L, S)``."""
        return h_BLW.unflatten(-1, (self.heads, self.size)).transpose(1, 2)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw what is drawn in the block from ``seed``, and leave the streams outside as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
