"""Sentences with a label, as numbers: SST-2, films praised or not.

In: a folder with ``sst2/train.tsv`` and ``sst2/dev.tsv``, a line of names and then ``sentence<TAB>label``. Out: a
``DataSet`` whose inputs are words, ``(N, length)`` int64. A word's number is its hash: no vocabulary is learned, and
two words may share a number. Number 0 is the *blank* after the end of a sentence.
"""

import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from rwfx.experiments.data import CACHE, DataSet

BLANK = 0


def load_sst2(data_dir: str | os.PathLike[str] | None = None, length: int = 32, words: int = 4096) -> DataSet:
    """Read SST-2 from ``data_dir`` (or ``CACHE``); its development set, which alone has labels, is for testing.

    Args:
        data_dir: the folder that holds ``sst2``.
        length: words of a sentence; a shorter one is filled up with blanks, of a longer one the end is left out.
        words: the different numbers there are, with the blank.

    Raises:
        ValueError: a file is not there, or a line of it is no sentence with a label; it is not downloaded.
    """
    root = (CACHE if data_dir is None else Path(data_dir)) / "sst2"
    train, test = (_read(root / name, length, words) for name in ("train.tsv", "dev.tsv"))
    return DataSet("sst2", *train, *test)


def numbers(sentence: str, length: int, words: int) -> list[int]:
    """Give the first ``length`` words of ``sentence`` as numbers from 1 to below ``words``, then blanks.

    >>> numbers("a good film", 5, 100)
    [46, 96, 96, 0, 0]
    """
    # Not Python's own hash, which is another one in every process.
    found = [1 + zlib.crc32(word.encode()) % (words - 1) for word in sentence.split()[:length]]
    return found + [BLANK] * (length - len(found))


def _read(path: Path, length: int, words: int) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"{path.name} of SST-2 is not in {os.fspath(path.parent)!r}, and is not downloaded. It is one of the tasks "
            "of GLUE (gluebenchmark.com): put its files there, or give the folder that holds sst2 with --data-dir."
        )
    inputs, target = [], []
    for place, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], start=2):
        sentence, _, label = line.partition("\t")
        if label not in ("0", "1") or not sentence.strip():
            raise ValueError(f"line {place} of {os.fspath(path)!r} is no sentence with a label 0 or 1: {line!r}.")
        inputs.append(numbers(sentence, length, words))
        target.append(int(label))
    return torch.tensor(inputs), torch.tensor(target)
