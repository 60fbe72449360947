"""Data sets as whole tensors, a text as numbers, and a loader of shuffled batches.

In: the name of a data set. Out: a ``DataSet``, its inputs flattened and standardised with the mean and
deviation of the training set (of each colour channel); or a ``Text``, and its windows. Batches are cut out by
index: gathering 128 items one by one, as a ``DataLoader`` does, takes longer than the step they are for.
"""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from rwfx.experiments.extras import require

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rwfx"
"""Where data sets are downloaded to when no folder is given."""

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
"""The data sets read by ``torchvision.datasets``, and their classes there."""

DATA_SETS = ("digits", *TORCHVISION)

TEXT = Path("tinyshakespeare") / "input.txt"
"""Where the text lies in the folder of the data; it may also lie there without a folder of its own."""


@dataclass(frozen=True)
class DataSet:
    """Examples of ``F`` features: inputs ``(N, F)`` float32, targets ``(N,)`` int64."""

    name: str
    train_inputs: Tensor
    train_target: Tensor
    test_inputs: Tensor
    test_target: Tensor

    @property
    def features(self) -> int:
        """F."""
        return self.train_inputs.shape[1]

    @property
    def classes(self) -> int:
        """How many different targets there are."""
        return int(self.train_target.max()) + 1

    @property
    def channels(self) -> int:
        """Of its images: 3 where F is three squares, 1 where it is a square."""
        return 1 if math.isqrt(self.features) ** 2 == self.features else 3

    @property
    def side(self) -> int:
        """Of its images."""
        return math.isqrt(self.features // self.channels)

    def as_images(self) -> "DataSet":
        """Give the same data set with inputs ``(N, channels, side, side)``."""
        shape = self.side, self.side, self.channels
        names = ("train_inputs", "test_inputs")
        return replace(
            self, **{name: getattr(self, name).unflatten(1, shape).permute(0, 3, 1, 2).contiguous() for name in names}
        )

    def to(self, device: torch.device | str) -> "DataSet":
        """Give the same data set on ``device``."""
        names = ("train_inputs", "train_target", "test_inputs", "test_target")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def only(self, classes: range) -> "DataSet":
        """Give the examples of these classes; a target keeps its number."""
        parts: dict[str, Tensor] = {}
        for part in ("train", "test"):
            target = getattr(self, f"{part}_target")
            chosen = (target >= classes.start) & (target < classes.stop)
            parts |= {f"{part}_inputs": getattr(self, f"{part}_inputs")[chosen], f"{part}_target": target[chosen]}
        return replace(self, **parts)


@dataclass(frozen=True)
class Text:
    """``N`` characters: ``codes`` ``(N,)`` int64, places in ``vocabulary``, the characters that there are, sorted."""

    codes: Tensor
    vocabulary: str


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> DataSet:
    """Read the data set ``name``, one of ``DATA_SETS``.

    ``digits`` comes with scikit-learn. The others are read from ``data_dir`` (or ``CACHE``) in torchvision's
    layout, without any network where they are there, and downloaded into it where they are not.

    Raises:
        ValueError: there is no such data set, or it is not in the folder and cannot be downloaded.
    """
    if name not in DATA_SETS:
        raise ValueError(f"the data set must be one of {', '.join(DATA_SETS)}; given {name!r}.")
    if name == "digits":
        return _digits()
    root = CACHE if data_dir is None else Path(data_dir)
    train_images, train_target = _torchvision(name, root, train=True)
    test_images, test_target = _torchvision(name, root, train=False)
    mean, deviation = _channel_statistics(train_images)
    return DataSet(
        name,
        ((train_images - mean) / deviation).flatten(1),
        train_target,
        ((test_images - mean) / deviation).flatten(1),
        test_target,
    )


def load_text(data_dir: str | os.PathLike[str] | None = None) -> Text:
    """Read tiny Shakespeare: ``data_dir`` (or ``CACHE``) is the file or holds ``TEXT``.

    Raises:
        ValueError: the file is not there, or is no text; it is not downloaded.
    """
    root = CACHE if data_dir is None else Path(data_dir)
    found = [path for path in (root, root / TEXT, root / TEXT.name) if path.is_file()]
    if not found:
        raise ValueError(
            f"{TEXT.name} of tiny Shakespeare is not in {os.fspath(root)!r}, and is not downloaded. Get it from "
            f"github.com/karpathy/char-rnn, data/{TEXT.as_posix()}, put it there as {TEXT.as_posix()}, or give its "
            "folder with --data-dir."
        )
    try:
        text = found[0].read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(found[0])!r} is no text in UTF-8: {error}") from error
    if not text:
        raise ValueError(f"{os.fspath(found[0])!r} is empty.")
    vocabulary = "".join(sorted(set(text)))
    places = {character: place for place, character in enumerate(vocabulary)}
    return Text(torch.tensor([places[character] for character in text]), vocabulary)


def windows(codes: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Give every ``context`` characters in a row, ``(N - context, context)``, and the one after, ``(N - context,)``.

    Both are views: of a text no copy is made until a batch is cut out.
    """
    every = codes.unfold(0, context + 1, 1)
    return every[:, :context], every[:, context]


def _digits() -> DataSet:
    """Read scikit-learn's 1797 digits of 8 x 8 pixels; every fifth of them is for testing."""
    data, target = require("sklearn.datasets").load_digits(return_X_y=True)
    inputs, target = torch.tensor(data, dtype=torch.float32), torch.tensor(target, dtype=torch.int64)
    testing = torch.arange(len(inputs)) % 5 == 4
    mean, deviation = inputs[~testing].mean(), inputs[~testing].std()
    inputs = (inputs - mean) / deviation
    return DataSet("digits", inputs[~testing], target[~testing], inputs[testing], target[testing])


def _torchvision(name: str, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Give images ``(N, H, W)`` or ``(N, H, W, 3)`` between 0 and 1, and targets ``(N,)``."""
    kind = getattr(require("torchvision.datasets"), TORCHVISION[name])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            data = kind(root, train=train, download=False)
    except RuntimeError:
        try:
            data = kind(root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{name} is not in {str(root)!r} and cannot be downloaded ({error}). Give the folder that "
                f"holds torchvision's files of it with --data-dir, or connect this machine to the network."
            ) from error
    images = torch.as_tensor(data.data).to(torch.float32) / 255
    return images, torch.as_tensor(data.targets, dtype=torch.int64)


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and deviation over all pixels, of each channel where there are channels."""
    axes = list(range(min(images.dim(), 3)))
    return images.mean(axes), images.std(axes)


class TensorLoader:
    """Batches ``(inputs, target)`` of whole tensors; every pass over it is an epoch.

    Args:
        inputs: ``(N, ...)``.    target: ``(N,)``, on the same device.
        batch_size: examples a batch. A last, smaller batch is left out when shuffling, else kept.
        generator: shuffles anew every epoch with this generator; without one the order is that of the data.
    """

    def __init__(self, inputs: Tensor, target: Tensor, batch_size: int, generator: Generator | None = None) -> None:
        if generator is not None and batch_size > len(inputs):
            raise ValueError(f"a batch of {batch_size} is more than the {len(inputs)} examples there are.")
        self.inputs, self.target = inputs, target
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self) -> int:
        examples = len(self.inputs)
        return -(-examples // self.batch_size) if self.generator is None else examples // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = None
        if self.generator is not None:
            order = torch.randperm(len(self.inputs), generator=self.generator).to(self.inputs.device)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = slice(start, start + self.batch_size)
            chosen = chosen if order is None else order[chosen]
            yield self.inputs[chosen], self.target[chosen]
