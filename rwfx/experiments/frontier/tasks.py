"""Tasks: what every contender is given to learn.

In: a plan, and the name of a task. Out: a ``Task``, of the kinds of ``policies.tasks`` and three more: ``noisy-mnist``,
a fifth of whose training labels are wrong; ``cifar10``, with a network of convolutions; ``sst2``, with a transformer.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Generator, nn

from rwfx.experiments.data import DataSet, load
from rwfx.experiments.models import cnn, sentence_transformer
from rwfx.experiments.policies import tasks as policies_tasks
from rwfx.experiments.policies.tasks import METRICS, Setting, Task, images, split_off
from rwfx.experiments.sentences import load_sst2

WRONG = 0.2
"""The share of wrong labels in ``noisy-mnist``."""
CHANNELS = (3, 32, 64, 64)
"""Of the network of convolutions: its input's, and of each layer."""
WIDTH, HEADS, BLOCKS = 64, 4, 2
"""Of the transformer."""
LENGTH, WORDS = 32, 4096
"""Words of a sentence, and different words; see ``sentences``."""


def task_of(plan: Setting, name: str) -> Task:
    """Load the data of the task ``name`` and describe its network.

    Raises:
        ValueError: the data are not there.
    """
    own: dict[str, Callable[[Setting], Task]] = {"noisy-mnist": _noisy, "cifar10": _cifar10, "sst2": _sst2}
    return own[name](plan) if name in own else policies_tasks.task_of(plan, name)


def with_wrong_labels(data: DataSet, share: float) -> DataSet:
    """Give ``data`` with that share of its training labels replaced by others, the same always, each as likely."""
    # Not the seed of split_off: with the same order, all wrong labels would be those of the validation part.
    generator = Generator().manual_seed(1)
    target = data.train_target.clone()
    chosen = torch.randperm(len(target), generator=generator)[: round(share * len(target))]
    # From 1 to one less than there are classes: added, modulo the classes, it gives any label but the right one.
    steps = torch.randint(1, data.classes, (len(chosen),), generator=generator)
    target[chosen] = (target[chosen] + steps) % data.classes
    return replace(data, train_target=target)


def _noisy(plan: Setting) -> Task:
    """Validation is split off the noisy training data: who has wrong labels has them there too."""
    task = images(plan, "noisy-mnist", with_wrong_labels(load("mnist", plan.data_dir), WRONG))
    return replace(task, about=f"{task.about}, {WRONG:.0%} of the training and validation labels wrong")


def _cifar10(plan: Setting) -> Task:
    data = load("cifar10", plan.data_dir)
    widths = ", ".join(map(str, CHANNELS[1:]))
    return _task(
        plan, data.as_images(), partial(cnn, CHANNELS, data.side, 10), f"convolutions 3 x 3 of {widths} channels"
    )


def _sst2(plan: Setting) -> Task:
    make = partial(sentence_transformer, WORDS, LENGTH, WIDTH, HEADS, BLOCKS)
    about = f"transformer, {BLOCKS} blocks of width {WIDTH}, the first {LENGTH} words of a sentence as {WORDS} hashes"
    return _task(plan, load_sst2(plan.data_dir, LENGTH, WORDS), make, f"{about}, tested on the development set")


def _task(plan: Setting, data: DataSet, make: Callable[[int], nn.Module], about: str) -> Task:
    split = split_off(data, plan.device)
    return Task(data.name, split, lambda seed: make(seed).to(plan.device), METRICS["accuracy"], about)
