"""Files that are whole or absent: written beside their place, then renamed onto it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` when the block ends without an error.

    It is written as ``path`` + ``.partial``, flushed to the disk and renamed, so that a process killed at any
    moment leaves at ``path`` either the old file or the new one. Folders on the way are made. After an
    error in the block ``path`` is as it was and the partial file is gone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        with open(partial, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make the renaming itself survive a power cut, where folders can be opened at all."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
