"""Tasks: what every contender is given to learn, and how well it did.

In: a plan, which says where the data lie, and the name of a task. Out: a ``Task``: a network to begin with, and
examples in three parts. The learning rates are chosen on *validation*, a tenth that is split off the training data;
*test* is for the final runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from rwfx.experiments.data import DataSet, TensorLoader, load, load_text, windows
from rwfx.experiments.models import character_mlp, mlp

CONTEXT, EMBEDDING = 16, 32
"""Of the language model: the characters that it sees, and the numbers that stand for one."""

JUDGED = 10_000
"""Windows of a text that a network is judged on, at most."""


class Setting(Protocol):
    """What a task needs to know of a plan."""

    @property
    def data_dir(self) -> Path | None:
        """The folder with the data."""
        ...

    @property
    def hidden(self) -> tuple[int, ...]:
        """The widths of a perceptron between its inputs and its outputs."""
        ...

    @property
    def device(self) -> str:
        """Where data and network are."""
        ...


@dataclass(frozen=True)
class Metric:
    """A number that says how well a network does."""

    name: str
    unit: str
    scale: float
    """What the unit multiplies it with."""
    sign: int
    """1 where more is better, -1 where less is."""


METRICS = {"accuracy": Metric("accuracy", "%", 100, 1), "loss": Metric("loss", "nats per character", 1, -1)}


@dataclass(frozen=True)
class Part:
    """Examples: inputs ``(N, ...)``, targets ``(N,)`` int64."""

    inputs: Tensor
    target: Tensor


@dataclass(frozen=True)
class Split:
    """The three parts of a data set; none shares an example with another."""

    train: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class Task:
    """Data, and a network to learn them with."""

    name: str
    split: Split
    network: Callable[[int], nn.Module]
    """Makes the network of a seed."""
    metric: Metric
    about: str
    """The network and the data, in words."""
    earlier: Split | None = None
    """What the network has learned before, in fine-tuning."""
    earlier_classes: slice | None = None
    """The classes of that. It is measured among them: with later ones to choose from, those are all that is named."""


def task_of(plan: Setting, name: str) -> Task:
    """Load the data of the task ``name`` and describe its network.

    Raises:
        ValueError: the data are not there.
    """
    if name == "shakespeare":
        return _language(plan)
    if name in ("classes", "digits-classes"):
        data = load("digits" if name == "digits-classes" else "mnist", plan.data_dir)
        half = data.classes // 2
        return images(plan, name, data.only(range(half, data.classes)), data.only(range(half)))
    if name == "transfer":
        return images(plan, name, load("fashion-mnist", plan.data_dir), load("mnist", plan.data_dir))
    return images(plan, name, load(name, plan.data_dir))


def images(plan: Setting, name: str, data: DataSet, earlier: DataSet | None = None) -> Task:
    """Give the task to tell the classes of ``data`` by a perceptron, after those of ``earlier`` if there are any."""
    widths = (data.features, *plan.hidden, max(of.classes for of in (data, earlier) if of is not None))
    about = f"MLP {'-'.join(map(str, widths))}"
    if earlier is not None:
        about += f", first trained on {_described(earlier)}, then on {_described(data)}"
    return Task(
        name,
        split_off(data, plan.device),
        lambda seed: mlp(widths, seed).to(plan.device),
        METRICS["accuracy"],
        about,
        None if earlier is None else split_off(earlier, plan.device),
        None if earlier is None else slice(int(earlier.train_target.min()), earlier.classes),
    )


def split_off(data: DataSet, device: str) -> Split:
    """Split a tenth of the training data off, the same examples always, as validation."""
    order = torch.randperm(len(data.train_inputs), generator=Generator().manual_seed(0))
    tenth = len(order) // 10
    validation, train = (
        Part(data.train_inputs[chosen].to(device), data.train_target[chosen].to(device))
        for chosen in (order[:tenth], order[tenth:])
    )
    return Split(train, validation, Part(data.test_inputs.to(device), data.test_target.to(device)))


def measure(network: nn.Module, part: Part, metric: Metric, classes: slice | None = None) -> float:
    """Give ``metric`` of ``network`` on the examples of ``part``: the share that it names, or its mean loss.

    It has only ``classes`` to choose from, a slice of the outputs, where they are given.
    """
    classes = classes or slice(0, None)
    total = 0.0
    network.eval()
    with torch.no_grad():
        for inputs, target in TensorLoader(part.inputs, part.target, 2048):
            output, target = network(inputs)[:, classes], target - classes.start
            if metric is METRICS["accuracy"]:
                total += int((output.argmax(-1) == target).sum())
            else:
                total += float(F.cross_entropy(output, target, reduction="sum"))
    return total / len(part.target)


def _described(data: DataSet) -> str:
    return f"{data.name} (classes {int(data.train_target.min())}-{int(data.train_target.max())})"


def _language(plan: Setting) -> Task:
    """Cut the text into eight tenths and a bit to train on, a tenth of the rest before the last tenth, and the last."""
    text = load_text(plan.data_dir)
    codes = text.codes.to(plan.device)
    test = len(codes) - len(codes) // 10
    validation = test - test // 10
    if len(codes) // 10 <= CONTEXT or validation <= CONTEXT:
        raise ValueError(
            f"the text has {len(codes)} characters: too few for windows of {CONTEXT} in each of its parts."
        )
    split = Split(
        Part(*windows(codes[:validation], CONTEXT)),
        _judged(Part(*windows(codes[validation:test], CONTEXT))),
        _judged(Part(*windows(codes[test:], CONTEXT))),
    )
    widths = (CONTEXT * EMBEDDING, *plan.hidden, len(text.vocabulary))
    make = partial(character_mlp, len(text.vocabulary), CONTEXT, EMBEDDING, plan.hidden)
    about = f"{CONTEXT} characters of {len(text.vocabulary)}, embedding {EMBEDDING}, MLP {'-'.join(map(str, widths))}"
    return Task("shakespeare", split, lambda seed: make(seed).to(plan.device), METRICS["loss"], about)


def _judged(part: Part) -> Part:
    """Choose ``JUDGED`` of the examples, the same always."""
    chosen = torch.randperm(len(part.target), generator=Generator().manual_seed(0))[:JUDGED].to(part.target.device)
    return Part(part.inputs[chosen], part.target[chosen])
