"""The models of the zoo: three suites, each a module that lists its names and builds what a name means.

In: suites and patterns of names. Out: entries; and for each, a model in train mode and inputs for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from torch import nn

from rwfx.experiments.zoo import hugging_face, timm_models, torchvision_models

Built = tuple[nn.Module, Any]


@dataclass(frozen=True)
class Suite:
    """A library of models."""

    title: str
    names: Callable[[], Sequence[str]]
    build: Callable[[str], Built]  # the model, and its example inputs as ``rwfx.transform`` takes them


SUITES = {
    "hugging_face": Suite("Hugging Face", hugging_face.names, hugging_face.build),
    "timm": Suite("timm", timm_models.names, timm_models.build),
    "torchvision": Suite("torchvision", torchvision_models.names, torchvision_models.build),
}


@dataclass(frozen=True)
class Entry:
    """A model of the zoo."""

    suite: str
    model: str

    def __str__(self) -> str:
        return f"{self.suite}/{self.model}"


def entries(suites: Sequence[str], models: Sequence[str] = ("*",)) -> tuple[Entry, ...]:
    """The models of the suites whose names fit one of the patterns."""
    return tuple(
        Entry(suite, name)
        for suite in suites
        for name in SUITES[suite].names()
        if any(fnmatch(name, pattern) for pattern in models)
    )


def build(entry: Entry) -> Built:
    """Make a model and inputs for it, by torch's random stream."""
    return SUITES[entry.suite].build(entry.model)
