"""A small training run, in this process or as one of its own that a test can kill."""

import random
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from rwfx.files import replacing
from rwfx.train import RandomWalkTrainer

EPOCHS, EXAMPLES, BATCH = 3, 30, 4
STEPS = EPOCHS * -(-EXAMPLES // BATCH)

TOPOLOGIES = {
    "gse of all weights": {"scope": "global"},
    "graest": {"distribution": "graest"},
    "snfs": {"method": "snfs"},
    "topkast": {"method": "topkast"},
}
"""Modes of training with few non-zeros."""


class NoisyExamples(Dataset):
    """Examples that draw from every global stream when they are read, as augmentations do."""

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return torch.linspace(-1, 1, 6) * (index % 5) + 0.1 * noise, index % 3


def global_order():
    return DataLoader(NoisyExamples(), BATCH, shuffle=True)


def own_order():
    return DataLoader(NoisyExamples(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(5))


def sampler_order():
    sampler = RandomSampler(NoisyExamples(), generator=torch.Generator().manual_seed(6))  # pyright: ignore
    return DataLoader(NoisyExamples(), BATCH, sampler=sampler)


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def make_trainer(mode, path=None, **options):
    seed_everything(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    options = {"epochs": EPOCHS, "lr": 0.01, "checkpoint": path, "progress": False, **options}
    if mode in TOPOLOGIES:
        topology = {"interval": 3, "end": 20, **TOPOLOGIES[mode]}
        return RandomWalkTrainer(model, "always_sparse", density=0.3, topology=topology, **options)
    return RandomWalkTrainer(model, mode, num_paths=3, **options)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


def run(mode, loader, path, telling, ends=True):
    """Train, tell the number of each step through the pipe ``telling``, and write the weights unless killed.

    A run that does not end by itself can be killed at any step, the last one included.
    """
    torch.set_num_threads(1)
    trainer = make_trainer(mode, path + ".pt", checkpoint_every=2)
    for record in trainer.steps(globals()[loader](), resume=True):
        telling.send(record.step)
    if not ends:
        time.sleep(600)
    with replacing(path + ".weights") as file:
        torch.save(weights(trainer), file)
