"""The lines of a file that grows: what is in it is done, and is not done again.

In: a path, and the dataclass of its lines. Out: a ``Book``. The file is written anew, beside its place, after every
line that is added, so that a program that is killed loses only what it had not finished.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Generic, TypeVar

from rwfx.experiments.frontier.entries import Entry, Result, Trial, entry_of
from rwfx.experiments.tables import read_csv, write_csv

Kind = TypeVar("Kind", Trial, Result)


class Book(Generic[Kind]):
    """The lines of the file ``path``, those of other plans, tasks and contenders included.

    Raises:
        ValueError: the file is there, and is another or damaged; a last line that was cut off is left out.
    """

    def __init__(self, path: Path, kind: type[Kind]) -> None:
        self.path, self.kind = path, kind
        self.lines = read_csv(path, kind)

    def add(self, line: Kind) -> None:
        """Add a line, and write the file."""
        self.lines.append(line)
        write_csv(self.path, self.kind, self.lines)

    def done(self, entries: Iterable[Entry], plan: str) -> dict[Entry, Kind]:
        """Give the lines there are about ``entries`` under ``plan``, in the order of the entries."""
        there = {entry_of(line): line for line in self.lines if line.plan == plan}
        return {entry: there[entry] for entry in entries if entry in there}
