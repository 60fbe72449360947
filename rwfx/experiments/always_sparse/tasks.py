"""Tasks: the images of a data set in three parts, and a network for them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor, nn

from rwfx.experiments.always_sparse.networks import FLAT, MODELS, Image, perceptron
from rwfx.experiments.always_sparse.plan import Plan
from rwfx.experiments.data import load
from rwfx.experiments.policies.tasks import Split, split_off

SHIFT = 4
"""The most pixels by which an image is moved to a side."""


@dataclass(frozen=True)
class ImageTask:
    """Data, and a network to learn them with."""

    image: Image
    split: Split
    network: Callable[[float, int], nn.Module]
    """Makes it from a factor for its widths and a seed."""

    @property
    def example(self) -> Tensor:
        """A small batch."""
        return self.split.train.inputs[:2]


def task_of(plan: Plan) -> ImageTask:
    """Load the data of ``plan`` and describe its network.

    Raises:
        ValueError: the data are not there, or the network cannot take them.
    """
    data = load(plan.dataset, plan.data_dir)
    image = Image(data.channels, data.side, data.classes)
    make = partial(perceptron, hidden=plan.hidden) if plan.model == "mlp" else MODELS[plan.model]
    with torch.device("meta"):
        make(image, plan.width, 0)  # refuses images that it cannot take
    split = split_off(data if plan.model in FLAT else data.as_images(), plan.device)
    if plan.batch_size > len(split.train.target):
        raise ValueError(
            f"a batch of {plan.batch_size} is more than the {len(split.train.target)} examples that are trained on."
        )
    return ImageTask(image, split, partial(make, image))


def augmented(x: Tensor, image: Image, generator: Generator) -> Tensor:
    """Move each image by up to ``SHIFT`` pixels to each side, filling with zeros, and mirror half of them.

    Args:
        x: ``(B, channels, side, side)`` or, as a data set has them flattened, ``(B, F)``.
    """
    flat = x.dim() == 2
    if flat:
        x = x.unflatten(1, (image.side, image.side, image.channels)).permute(0, 3, 1, 2)
    count = len(x)
    down, right = torch.randint(2 * SHIFT + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    windows = nn.functional.pad(x, [SHIFT] * 4).unfold(2, image.side, 1).unfold(3, image.side, 1)
    moved = windows[torch.arange(count), :, down, right]
    moved = torch.where(mirrored.to(x.device)[:, None, None, None], moved.flip(3), moved)
    return moved.permute(0, 2, 3, 1).flatten(1) if flat else moved
