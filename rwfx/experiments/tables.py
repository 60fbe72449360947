"""Tables: Markdown with aligned columns, and CSV with a line for each of a list of equal dataclasses."""

import csv
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

from rwfx.files import replacing

Kind = TypeVar("Kind")


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Give a Markdown table whose columns are aligned in the source too."""
    widths = [max(len(row[index]) for row in [header, *cells]) for index in range(len(header))]
    rule = ["-" * width for width in widths]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, rule, *cells]
    ]
    return "\n".join(f"| {line} |" for line in lines)


def write_csv(path: Path, kind: type, rows: Sequence[Any]) -> None:
    """Write a line for each of ``rows``, all of the dataclass ``kind``, under a line of its fields' names.

    ``None`` is an empty cell.
    """
    names = [column.name for column in fields(kind)]
    with replacing(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)


def read_csv(path: Path, kind: type[Kind]) -> list[Kind]:
    """Read what ``write_csv`` wrote, of a dataclass of strings and numbers; nothing where there is no file.

    A last line that was cut off, as it may be in a copy made while something went wrong, is left out.

    Raises:
        ValueError: another line is not one of ``kind``.
    """
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        text = file.read()
    header, *cells = list(csv.reader(text.splitlines())) or [[]]
    if cells and not text.endswith("\n"):
        cells.pop()
    columns: dict[str, Any] = {column.name: column.type for column in fields(cast(Any, kind))}
    names = list(columns)
    if header != names:
        raise ValueError(f"{str(path)!r} has the columns {', '.join(header)}, not {', '.join(names)}.")
    found = []
    for place, row in enumerate(cells, start=2):
        try:
            values = [type_(cell) for type_, cell in zip(columns.values(), row, strict=True)]
        except ValueError as error:
            raise ValueError(f"line {place} of {str(path)!r} is damaged ({error}): {row}.") from error
        found.append(kind(*values))
    return found
