"""What a training run did, as data: one record a step, kept as plain columns.

A *record* is the state of the run after a step: what it has cost so far and how well it does.
"""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from rwfx.files import replacing


@dataclass(frozen=True)
class Record:
    """The run after one step. ``seconds``, ``parameter_updates`` and ``flops`` count from the first step."""

    step: int
    """1 for the first step."""
    seconds: float
    """Forward, backward and optimizer; loading data, evaluating and writing checkpoints are left out."""
    parameter_updates: int
    """Scalars that the optimizer has updated."""
    flops: int
    """Floating point operations of the weighted calls, forward and backward, 2 per multiply-add."""
    loss: float
    test_accuracy: float | None = None
    """Between 0 and 1; ``None`` where the run was not evaluated after this step."""


COLUMNS = tuple(column.name for column in fields(Record))


@dataclass
class History:
    """The records of a run: a sequence of ``Record``, and one list of equal length per column."""

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    parameter_updates: list[int] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    test_accuracy: list[float | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, index: int) -> Record:
        return Record(**{name: column[index] for name, column in self.columns().items()})

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def append(self, record: Record) -> None:
        """Add the record of the next step."""
        for name, column in self.columns().items():
            column.append(getattr(record, name))

    def columns(self) -> dict[str, list[Any]]:
        """Give the columns by name, in the order of ``Record``'s fields: the lists themselves."""
        return {name: getattr(self, name) for name in COLUMNS}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line a record under a line of column names; an absent test accuracy is an empty cell."""
        with replacing(path, "w") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(zip(*self.columns().values(), strict=True))
