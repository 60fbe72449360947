"""What a speed measurement is to measure: its sizes, its parts and how each is taken.

A *size* is a perceptron with ReLUs, a batch, and the numbers of paths to measure it with. It is spelled
``WIDTHS@BATCH:PATHS``, such as ``784-256-128-10@128:10,50,200``.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rwfx.experiments.models import encoder, residual_cnn
from rwfx.experiments.speed.sparse_plan import ALWAYS_SPARSE, AlwaysSparse, check_always_sparse

PARTS = {
    "steps": "Step times",
    "examples": "Steps that leave out examples as well as rows",
    "networks": "Steps of networks of convolutions and of attention",
    "memory": "Memory",
    "sampler": "The row sampler by itself",
    "build": "Building and compiling",
    "always-sparse": "Always-sparse training",
}
"""The parts of a measurement, in the order in which they are taken, and their titles."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """A perceptron to measure: its widths, its batch, and its numbers of paths."""

    widths: tuple[int, ...]
    batch_size: int
    num_paths: tuple[int, ...]

    @property
    def name(self) -> str:
        """The widths, joined by hyphens."""
        return "-".join(map(str, self.widths))

    def __str__(self) -> str:
        return f"{self.name}@{self.batch_size}:{','.join(map(str, self.num_paths))}"


@dataclass(frozen=True)
class Thin:
    """A perceptron whose steps keep a share of the examples and of the rows."""

    widths: tuple[int, ...]
    batch_size: int
    examples: float
    rows: float

    @property
    def size(self) -> Size:
        """Without the shares."""
        return Size(self.widths, self.batch_size, ())


THIN = (
    Thin((784, 2048, 2048, 10), 256, 0.3, 0.25),
    Thin((784, 1024, 1024, 10), 64, 0.5, 0.25),
)
"""What the part *examples* measures."""


CLASSES = 10
"""What the networks tell apart."""


@dataclass(frozen=True)
class Network:
    """A network, its batch, and the share of the rows that its steps keep."""

    name: str
    make: Callable[[int], nn.Module]
    """From a seed."""
    example: tuple[int, ...]
    """The shape of one: an image's, or tokens and their width."""
    batch_size: int
    density: float
    optimizer: str
    """``SGD``, with momentum, or ``AdamW``."""

    @property
    def is_of_images(self) -> bool:
        """Whether an example has channels and two sides."""
        return len(self.example) == 3


NETWORKS = (
    Network("ResNet-18", partial(residual_cnn, (64, 128, 256, 512), 2, CLASSES), (3, 32, 32), 64, 0.1, "SGD"),
    Network("4 blocks of ViT-S", partial(encoder, 384, 6, 4, CLASSES), (197, 384), 8, 0.1, "AdamW"),
    Network("4 blocks of BERT-base", partial(encoder, 768, 12, 4, CLASSES), (128, 768), 8, 0.1, "AdamW"),
)
"""What the part *networks* measures."""

SIZES = {
    "cpu": (
        Size((784, 256, 128, 10), 128, (10, 50, 200)),
        Size((784, 1024, 1024, 10), 128, (50,)),
        Size((784, 2048, 2048, 10), 256, (50,)),
        Size((1024, 4096, 4096, 1024), 512, (200,)),
        Size((784, 1024, 1024, 10), 64, (400,)),
    ),
    "cuda": (
        Size((1024, 4096, 4096, 1024), 4096, (200,)),
        Size((8192, 8192, 8192, 8192), 8192, (400,)),
    ),
}
"""What is measured where nothing is chosen, by type of device."""


@dataclass(frozen=True)
class Draws:
    """What the sampler is timed on: one large draw, and two series, each with one of the numbers growing."""

    layers: int = 12
    width: int = 4096
    num_paths: int = 10_000
    series_layers: int = 3
    series_paths: tuple[int, ...] = (100, 300, 1000, 3000, 10_000)
    """At the middle one of ``series_widths``."""
    series_widths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """With the middle one of ``series_paths``."""


@dataclass(frozen=True)
class Plan:
    """What to measure and where to write it."""

    out: Path = Path("results/speed")
    parts: tuple[str, ...] = tuple(PARTS)
    sizes: tuple[Size, ...] = SIZES["cpu"]
    thin: tuple[Thin, ...] = THIN
    networks: tuple[Network, ...] = NETWORKS
    rounds: int = 20
    compiled: bool = True
    """Whether what goes through ``torch.compile`` is measured too."""
    masked: bool = False
    """Whether ``mode="masked"`` is a contender too."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    """Of the model and the data."""
    walk_options: dict[str, Any] = field(default_factory=dict)
    transform_options: dict[str, Any] = field(default_factory=dict)
    draws: Draws = Draws()
    always_sparse: AlwaysSparse = ALWAYS_SPARSE
    deep_layers: int = 100
    """Layers of the network whose transformation is timed."""
    repeats: int = 5
    """Of what is measured once a process: transformations and first compiled steps."""


def read_size(text: str) -> Size:
    """Read ``784-256-128-10@128:10,50,200``.

    Raises:
        ValueError: it is spelled in another way, has a zero, or names a number of paths twice.
    """
    found = re.fullmatch(r"(\d+(?:-\d+)+)@(\d+):(\d+(?:,\d+)*)", text)
    widths, paths = ([int(n) for n in re.split("[-,]", found[k])] if found else [0] for k in (1, 3))
    if found is None or min(*widths, *paths, int(found[2])) < 1 or len(set(paths)) < len(paths):
        raise ValueError(
            "a size is WIDTHS@BATCH:PATHS, such as 784-256-128-10@128:10,50,200: at least two widths, joined by "
            f"hyphens, and different numbers of paths, all from 1; given {text!r}."
        )
    return Size(tuple(widths), int(found[2]), tuple(paths))


def read_parts(text: str) -> tuple[str, ...]:
    """Read ``steps,memory``; the order is that of ``PARTS``.

    Raises:
        ValueError: a part is not known.
    """
    asked = text.split(",")
    unknown = [part for part in asked if part not in PARTS]
    if unknown:
        raise ValueError(f"the parts are {', '.join(PARTS)}; given {unknown[0]!r}.")
    return tuple(part for part in PARTS if part in asked)


def check_plan(plan: Plan) -> None:
    """Refuse numbers that make no measurement.

    Raises:
        ValueError: names the number or the size.
    """
    for name, given in {"rounds": plan.rounds, "repeats": plan.repeats}.items():
        if given < 1:
            raise ValueError(f"{name} must be at least 1; given {given}.")
    check_always_sparse(plan.always_sparse)
    ((most, count),) = Counter((size.name, size.batch_size) for size in plan.sizes).most_common(1)
    if count > 1:
        raise ValueError(f"a size is there twice: {most[0]}@{most[1]}. Give all its numbers of paths at once.")
