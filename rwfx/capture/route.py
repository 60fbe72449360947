"""What every route of the capture gives: graphs, or an error that says where it failed and what to do."""

import linecache
import os
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import fx, nn


@dataclass(frozen=True)
class Graphs:
    """A model as one route captured it."""

    host: nn.Module
    train: fx.Graph
    eval: fx.Graph
    notes: tuple[str, ...]  # what the graphs do not do that the model does


class CaptureError(ValueError):
    """A route does not hold for a model."""


# What an argument can be held at: the graph checks that it has this value.
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


PYTORCH = (str(Path(torch.__file__).parent) + os.sep,)  # where its own files are


def place_of(error: BaseException, root: nn.Module, path: str | None = None) -> str:
    """Where in the model's own code an error was raised: the module and the line, as far as they are known.

    ``path``: the module, where the caller knows it.
    """
    foreign = (*PYTORCH, *(str(Path(of).parent) for of in (np.__file__, __file__)), "<")
    paths = {id(module): path for path, module in root.named_modules()}
    frames = [(frame, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    for frame, _ in frames:
        path = paths.get(id(frame.f_locals.get("self"))) or path
    place = f"module {path!r}" if path else type(root).__name__
    written = [(frame, number) for frame, number in frames if not frame.f_code.co_filename.startswith(foreign)]
    if written:
        frame, number = written[-1]
        file = frame.f_code.co_filename
        place += f", {file}:{number}: `{linecache.getline(file, number).strip()}`"
    return place


def first_lines(error: BaseException, most: int = 3) -> str:
    """The kind of an error and the first lines of its message: torch's can be pages long."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:most])}"
