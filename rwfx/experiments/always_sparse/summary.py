"""Final runs summarised: the means over the seeds, with 95 % intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rwfx.experiments.always_sparse.entries import Point, Result
from rwfx.experiments.summary import Mean, mean


@dataclass(frozen=True)
class Line:
    """A contender at one density, over all seeds."""

    method: str
    density: float
    lr: float
    seeds: int
    parameters: int
    nnz: int
    bytes: int
    accuracy: Mean
    seconds: Mean
    topology_seconds: Mean
    step_ms: Mean
    flops: float
    published_flops: float


@dataclass(frozen=True)
class CurvePoint:
    """A contender after one of its steps, over all seeds."""

    step: int
    seconds: float
    flops: float
    accuracy: Mean


@dataclass(frozen=True)
class SummaryRow:
    """A line of ``summary.csv``; an interval of a single seed is empty."""

    method: str
    density: float
    lr: float
    seeds: int
    parameters: int
    nnz: int
    bytes: int
    accuracy: float
    accuracy_interval: float | None
    """Half its width."""
    seconds: float
    seconds_interval: float | None
    topology_seconds: float
    step_ms: float
    flops: float
    published_flops: float


def summarise(results: Sequence[Result]) -> list[Line]:
    """Give a line for each contender and density, in the order in which they were run first."""
    groups: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result.method, result.density), []).append(result)
    return [_line(runs) for runs in groups.values()]


def curves(points: Sequence[Point]) -> dict[tuple[str, float], list[CurvePoint]]:
    """Give what each contender had reached after some of its steps, by method and density."""
    groups: dict[tuple[str, float], dict[int, list[Point]]] = {}
    for point in points:
        groups.setdefault((point.method, point.density), {}).setdefault(point.step, []).append(point)
    return {key: [_curve_point(step, of[step]) for step in sorted(of)] for key, of in groups.items()}


def rows(lines: Sequence[Line]) -> list[SummaryRow]:
    """Give the lines of ``summary.csv``."""
    return [
        SummaryRow(
            *(of.method, of.density, of.lr, of.seeds, of.parameters, of.nnz, of.bytes),
            *(of.accuracy.value, of.accuracy.half_width, of.seconds.value, of.seconds.half_width),
            *(of.topology_seconds.value, of.step_ms.value, of.flops, of.published_flops),
        )
        for of in lines
    ]


def _line(runs: Sequence[Result]) -> Line:
    first = runs[0]
    return Line(
        first.method,
        first.density,
        first.lr,
        len(runs),
        round(fmean(of.parameters for of in runs)),
        round(fmean(of.nnz for of in runs)),
        round(fmean(of.bytes for of in runs)),
        mean([of.accuracy for of in runs]),
        mean([of.seconds for of in runs]),
        mean([of.topology_seconds for of in runs]),
        mean([of.step_ms for of in runs]),
        fmean(of.flops for of in runs),
        fmean(of.published_flops for of in runs),
    )


def _curve_point(step: int, points: Sequence[Point]) -> CurvePoint:
    seconds, flops = (fmean(getattr(of, name) for of in points) for name in ("seconds", "flops"))
    return CurvePoint(step, seconds, flops, mean([of.accuracy for of in points]))
