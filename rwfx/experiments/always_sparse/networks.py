"""The networks of the papers on always-sparse training, each for images of any size and with a factor for its widths.

In: an ``Image``, the factor, and a seed. Out: a network, ``(B, channels, side, side)`` to ``(B, classes)``; the
perceptrons take the images flattened.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwfx.experiments.always_sparse.vit import TinyViT
from rwfx.experiments.models import mlp, seeded


@dataclass(frozen=True)
class Image:
    """What there is to tell apart."""

    channels: int
    side: int
    classes: int

    @property
    def features(self) -> int:
        """The numbers of an image."""
        return self.channels * self.side**2


HIDDEN = (1024, 1024, 1024)
"""The widths of ``perceptron`` between its inputs and its outputs."""


def perceptron(image: Image, width: float, seed: int, hidden: Sequence[int] = HIDDEN) -> nn.Module:
    """A perceptron with ReLUs."""
    return mlp((image.features, *(scaled(of, width) for of in hidden), image.classes), seed)


def set_perceptron(image: Image, width: float, seed: int) -> nn.Module:
    """The perceptron 4000-1000-4000 with dropout of SET, with ReLUs where the paper has SReLUs.

    Source: D. Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity
    inspired by network science", Nature Communications 2018.
    """
    layers: list[nn.Module] = []
    inputs = image.features
    with seeded(seed):
        for hidden in (4000, 1000, 4000):
            outputs = scaled(hidden, width)
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.3)]
            inputs = outputs
        return nn.Sequential(*layers, nn.Linear(inputs, image.classes))


def resnet56(image: Image, width: float, seed: int) -> nn.Module:
    """The residual network of 56 layers for CIFAR, whose shortcuts have no weights.

    Source: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, option A: 0.85 million
    parameters.
    """
    with seeded(seed):
        network = _ResNet(image, [scaled(of, width) for of in (16, 32, 64)], blocks=9)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        return network


def vgg16(image: Image, width: float, seed: int) -> nn.Module:
    """VGG-16 with a quarter of its channels, norms of batches, and a head of 512 units.

    Source: ``vgg16-small`` in the code of M. Heddes et al., "Always-Sparse Training by Growing Connections with Guided
    Stochastic Exploration", 2024. Images of less than 32 x 32 are halved as often as they can be.
    """
    layers: list[nn.Module] = []
    inputs, side = image.channels, image.side
    with seeded(seed):
        for channels, count in ((16, 2), (32, 2), (64, 3), (128, 3), (128, 3)):
            for _ in range(count):
                outputs = scaled(channels, width)
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            if side > 1:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        head = scaled(512, width)
        layers += [nn.Flatten(), nn.Linear(inputs * side**2, head), nn.ReLU(), nn.Dropout()]
        return nn.Sequential(*layers, nn.Linear(head, head), nn.ReLU(), nn.Dropout(), nn.Linear(head, image.classes))


def vit(image: Image, width: float, seed: int) -> nn.Module:
    """A transformer over patches of 4 x 4, without a token for the class.

    Source: ``simple-vit-tiny`` in the code of M. Heddes et al., 2024: width 512, 4 blocks, 6 heads of 64, perceptrons
    of 256; after L. Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022.
    """
    with seeded(seed):
        # Sines and cosines of two axes take four numbers each.
        dim = 4 * scaled(128, width)
        return TinyViT(image.channels, image.side, image.classes, dim, 4, 6, scaled(64, width), scaled(256, width))


def wide_resnet(image: Image, width: float, seed: int, depth: int = 22, widen: int = 2) -> nn.Module:
    """A wide residual network of ``depth`` layers, its channels ``widen`` times those of ``resnet56``.

    Source: S. Zagoruyko, N. Komodakis, "Wide Residual Networks", BMVC 2016; with 22 and 2 that of U. Evci et al.,
    "Rigging the Lottery", ICML 2020.
    """
    assert (depth - 4) % 6 == 0
    with seeded(seed):
        channels = [scaled(widen * of, width) for of in (16, 32, 64)]
        return _WideResNet(image, scaled(16, width), channels, (depth - 4) // 6)


MODELS: Mapping[str, Callable[[Image, float, int], nn.Module]] = {
    "mlp": perceptron,
    "set-mlp": set_perceptron,
    "resnet56": resnet56,
    "vgg16": vgg16,
    "vit": vit,
    "wrn22-2": wide_resnet,
}
"""By the names of the command."""

FLAT = ("mlp", "set-mlp")
"""Those that take images flattened."""


def scaled(width: int, factor: float) -> int:
    """``width`` times ``factor``, at least 1."""
    return max(1, round(width * factor))


class _ResNet(nn.Module):
    def __init__(self, image: Image, channels: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image.channels, channels[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels[0])
        inputs, found = channels[0], []
        for stage, outputs in enumerate(channels):
            for block in range(blocks):
                found.append(_Block(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*found)
        self.head = nn.Linear(inputs, image.classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(torch.relu(self.norm(self.stem(x))))
        return self.head(h.mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first_norm(self.first(x)))
        h = self.second_norm(self.second(h))
        if self.stride > 1 or self.more:
            before = self.more // 2
            # Every second place, and channels of zeros on both sides.
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.more - before))
        return torch.relu(h + x)


class _WideResNet(nn.Module):
    def __init__(self, image: Image, stem: int, channels: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image.channels, stem, 3, padding=1, bias=False)
        inputs, found = stem, []
        for stage, outputs in enumerate(channels):
            for block in range(blocks):
                found.append(_WideBlock(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*found)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, image.classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(h.mean((2, 3)))


class _WideBlock(nn.Module):
    """Norm and ReLU come before each convolution; the shortcut branches off after the first pair of them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = torch.relu(self.first_norm(x))
        h = self.second(torch.relu(self.second_norm(self.first(n))))
        return h + (x if self.shortcut is None else self.shortcut(n))
