"""Tables: Markdown with aligned columns, and CSV with a line for each of a list of equal dataclasses."""

import csv
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rwfx.files import replacing


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
