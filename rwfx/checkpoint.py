"""Checkpoints: everything a run needs to go on as if it had never been stopped.

In: a ``Checkpoint`` and a path. Out: one file, whole or absent, read back with
``torch.load(weights_only=True)``, so that a file from elsewhere cannot run code.

The *position* of a run is an epoch and the number of batches of it already trained on. A loader cannot be
asked to start there, so a resumed run goes back to the random state in which the epoch began, lets the
loader give the batches it has seen once more, and only then takes on the random state of the checkpoint.
"""

import os
import random
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from rwfx.files import replacing
from rwfx.sparse_weight import SparseWeight

FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A run after a step. Tensors, numbers, strings and plain containers of them, nothing else."""

    configuration: dict[str, Any]
    """What must be equal for the run to be the same run; see ``differences``."""
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    sampler: dict[str, Tensor]
    """The row sampler's private random stream and last rows; empty for a dense run."""
    topology: dict[str, Any]
    """The topology's state; empty where no connections move."""
    history: dict[str, list[Any]]
    epoch: int
    batch: int
    """Batches of ``epoch`` already trained on."""
    epoch_start: dict[str, Any]
    """The ``random_state`` in which the epoch began."""
    now: dict[str, Any]
    """The ``random_state`` after the step."""


def save(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` beside ``path`` and rename it onto ``path``."""
    content = {column.name: getattr(checkpoint, column.name) for column in fields(Checkpoint)}
    with replacing(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint, with its tensors on the CPU.

    Raises:
        ValueError: the file is truncated or damaged (torch writes a CRC-32 of every tensor, which is
            checked), or is no checkpoint of a run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, pickle and torch raise a dozen types between them
        raise ValueError(_unreadable(path, f"{type(error).__name__}: {error}")) from error
    if damaged:
        raise ValueError(_unreadable(path, f"the contents of {damaged!r} do not match their checksum"))
    names = {column.name for column in fields(Checkpoint)}
    if not isinstance(content, dict) or content.keys() != {"format", *names}:
        raise ValueError(_unreadable(path, "it does not hold what RandomWalkTrainer writes"))
    if content.pop("format") != FORMAT:
        raise ValueError(_unreadable(path, f"it is not of format {FORMAT}, the one this version reads"))
    return Checkpoint(**content)


def _unreadable(path: str | os.PathLike[str], reason: str) -> str:
    return (
        f"checkpoint {os.fspath(path)!r} cannot be read: {reason}. Nothing was changed. "
        f"Give another file, or remove it to start from the beginning."
    )


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Say in words what differs between this run's configuration and a checkpoint's."""
    missing = "nothing"
    return [
        f"{name} is {here.get(name, missing)!r} here and {there.get(name, missing)!r} in the file"
        for name in dict.fromkeys([*here, *there])
        if here.get(name, missing) != there.get(name, missing)
    ]


def shapes(model: nn.Module) -> dict[str, str]:
    """Give each ``state_dict`` entry's dtype and shape, in words; of a sparse weight that of the dense one.

    How many non-zeros it has may change while it trains.
    """
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseWeight)}
    within = tuple(f"{name}." for name in sparse)
    dense = {
        f"model entry {name!r}": f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and not name.startswith(within)
    }
    return dense | {
        f"sparse weight {name!r}": f"{str(weight.values.dtype).removeprefix('torch.')} {tuple(weight.shape)}"
        for name, weight in sparse.items()
    }


def random_state(generators: Sequence[Generator] = ()) -> dict[str, Any]:
    """Read the state of every stream a training step may draw from, and of ``generators``."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": _plain(np.random.get_state(legacy=False)),  # noqa: NPY002  (users' transforms draw from it)
        "python": random.getstate(),
        "generators": [generator.get_state() for generator in generators],
    }


def restore_random_state(state: Mapping[str, Any], generators: Sequence[Generator] = ()) -> None:
    """Put every stream back to ``state``, which ``random_state`` gave for as many ``generators``."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
    for generator, value in zip(generators, state["generators"], strict=True):
        generator.set_state(value)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random streams after the block as they were before it."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def loader_generators(loader: Any) -> list[Generator]:
    """Find the ``torch.Generator`` objects of a loader, its sampler and its batch sampler, each once."""
    found: dict[int, Generator] = {}
    pending, seen = [loader], set()
    while pending:
        holder = pending.pop(0)
        if holder is None or id(holder) in seen:
            continue
        seen.add(id(holder))
        generator = getattr(holder, "generator", None)
        if isinstance(generator, Generator):
            found[id(generator)] = generator
        pending += [getattr(holder, name, None) for name in ("sampler", "batch_sampler")]
    return list(found.values())


def _plain(state: Any) -> Any:
    """Turn numpy's arrays and numbers into lists and numbers, which ``weights_only`` loads."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray | np.generic) else state
