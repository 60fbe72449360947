"""Rows of an accuracy experiment in a table: means over seeds with 95 % intervals.

The interval of a mean over n seeds is Student's: ``t(0.975, n - 1) * s / sqrt(n)``; one seed has none.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rwfx.experiments.extras import require
from rwfx.experiments.tables import markdown

if TYPE_CHECKING:
    from rwfx.experiments.accuracy import Row

LABELS = {"full": "FULL", "masked": "masked", "sparse": "sparse", "dense": "dense, matched to sparse"}


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and half the width of its 95 % interval (``None`` of a single seed)."""

    value: float
    half_width: float | None


@dataclass(frozen=True)
class Line:
    """A contender over all seeds."""

    contender: str
    num_paths: int | None
    final_accuracy: Mean
    best_accuracy: Mean
    seconds: Mean
    step_milliseconds: Mean
    """Of each seed the median over its steps."""
    speed: Mean
    """FULL's step time over the contender's, of the same seed: above 1 is faster than FULL."""
    flops_share: Mean
    """Operations of the whole run over FULL's."""
    updates_share: Mean
    """Parameter updates of the whole run over FULL's."""


def mean(values: Sequence[float]) -> Mean:
    """Give the mean of ``values`` with its interval."""
    if len(values) < 2:
        return Mean(statistics.fmean(values), None)
    quantile = float(require("scipy.stats").t.ppf(0.975, len(values) - 1))
    return Mean(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))


def by_run(rows: Sequence["Row"]) -> dict[tuple[str, int | None], dict[int, list["Row"]]]:
    """Group rows by contender and number of paths, and these by seed; FULL first, then by number of paths."""
    kinds = list(LABELS)

    def run(row: "Row") -> tuple[int, int]:
        return row.num_paths or 0, kinds.index(row.contender)

    def seed(row: "Row") -> int:
        return row.seed

    grouped = {}
    for _, group in groupby(sorted(rows, key=run), run):
        members = sorted(group, key=seed)
        key = members[0].contender, members[0].num_paths
        grouped[key] = {number: list(part) for number, part in groupby(members, seed)}
    return grouped


def step_times(rows: Sequence["Row"]) -> list[float]:
    """Give the milliseconds of each step of one run."""
    return [1000 * (row.seconds - past) for past, row in zip([0.0, *(row.seconds for row in rows)], rows, strict=False)]


def summarise(rows: Sequence["Row"]) -> list[Line]:
    """Give a line per contender."""
    runs = by_run(rows)
    full = runs["full", None]
    full_step = {seed: statistics.median(step_times(run)) for seed, run in full.items()}
    lines = []
    for (contender, num_paths), seeds in runs.items():
        accuracies = [[row.test_accuracy for row in run if row.test_accuracy is not None] for run in seeds.values()]
        steps = {seed: statistics.median(step_times(run)) for seed, run in seeds.items()}
        lines.append(
            Line(
                contender,
                num_paths,
                final_accuracy=mean([values[-1] for values in accuracies]),
                best_accuracy=mean([max(values) for values in accuracies]),
                seconds=mean([run[-1].seconds for run in seeds.values()]),
                step_milliseconds=mean(list(steps.values())),
                speed=mean([full_step[seed] / time for seed, time in steps.items()]),
                flops_share=mean([run[-1].flops / full[seed][-1].flops for seed, run in seeds.items()]),
                updates_share=mean(
                    [run[-1].parameter_updates / full[seed][-1].parameter_updates for seed, run in seeds.items()]
                ),
            )
        )
    return lines


COLUMNS = {
    "final accuracy %": lambda line: _text(line.final_accuracy, 100, 2),
    "best accuracy %": lambda line: _text(line.best_accuracy, 100, 2),
    "training s": lambda line: _text(line.seconds, 1, 2),
    "median step ms": lambda line: _text(line.step_milliseconds, 1, 2),
    "speed, FULL = 1": lambda line: _text(line.speed, 1, 2),
    "FLOPs, FULL = 100": lambda line: _text(line.flops_share, 100, 1),
    "updates, FULL = 100": lambda line: _text(line.updates_share, 100, 1),
}


def table(lines: Sequence[Line]) -> str:
    """Give ``lines`` as a Markdown table with aligned columns, means with 95 % intervals."""
    header = ["run", "paths", *COLUMNS]
    cells = [
        [LABELS[line.contender], str(line.num_paths or ""), *(column(line) for column in COLUMNS.values())]
        for line in lines
    ]
    return markdown(header, cells)


def _text(number: Mean, scale: float, digits: int) -> str:
    text = f"{scale * number.value:.{digits}f}"
    return text if number.half_width is None else f"{text} ± {scale * number.half_width:.{digits}f}"
