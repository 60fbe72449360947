"""The lines of a file that grows: what is in it is done, and is not done again.

In: a path, and the dataclass of its lines. Out: a ``Book``. A line begins with the fields of an *entry*, which tells a
run apart from every other, and has a field ``plan``, in words: what else decides its numbers. The file is written anew,
beside its place, after every line that is added, so that a program that is killed loses only what it had not finished.
"""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from rwfx.experiments.tables import read_csv, write_csv

Line = TypeVar("Line", bound=Any)
Entry = TypeVar("Entry", bound=Any)


class Book(Generic[Line]):
    """The lines of the file ``path``, those of other plans and entries included.

    Raises:
        ValueError: the file is there, and is another or damaged; a last line that was cut off is left out.
    """

    def __init__(self, path: Path, kind: type[Line]) -> None:
        self.path, self.kind = path, kind
        self.lines: list[Line] = read_csv(path, kind)

    def add(self, *lines: Line) -> None:
        """Add lines, and write the file."""
        self.lines += lines
        write_csv(self.path, self.kind, self.lines)

    def done(self, entries: Iterable[Entry], plan: str) -> dict[Entry, Line]:
        """Give the lines there are about ``entries`` under ``plan``, in the order of the entries."""
        asked = list(entries)
        if not asked:
            return {}
        there = {entry_of(line, type(asked[0])): line for line in self.lines if line.plan == plan}
        return {entry: there[entry] for entry in asked if entry in there}


def entry_of(line: Any, kind: type[Entry]) -> Entry:
    """Give the entry that a line is about."""
    return kind(**{field.name: getattr(line, field.name) for field in fields(kind)})
