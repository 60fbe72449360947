"""The row sampler by itself: a large draw against reading the weights once, and how its time grows.

In: a ``Plan`` with its ``Draws``. Out: a ``Timing`` per turn, ``sampler.csv`` and ``sampler.png``. Everything takes
turns: the large draw and the read with each other, and so do the draws of a series, in which the number of paths or
the width grows. Through a series' medians go two lines of least squares: log time against log x, whose slope is the
*exponent* (1: as x grows, so does the time), and time against x.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from rwfx.experiments.models import mlp
from rwfx.experiments.speed.contenders import SEED, draw, sparsify
from rwfx.experiments.speed.figure import draw_series
from rwfx.experiments.speed.plan import Draws, Plan
from rwfx.experiments.speed.turns import Call, Spread, ratios, take_turns
from rwfx.experiments.tables import markdown, write_csv

SERIES = {"paths": "num_paths", "width": "width"}
"""Each series, and the column that grows in it."""


@dataclass(frozen=True)
class Timing:
    """The time of one turn, per call."""

    measurement: str
    """``draw`` and ``read``: the large draw and the reading of its weights; or a series."""
    layers: int
    width: int
    num_paths: int | None
    round: int
    milliseconds: float


@dataclass(frozen=True)
class Fit:
    """Lines of least squares: ``log t = exponent log x + c``, and ``t = intercept + slope x``, of which R^2 is."""

    exponent: float
    coefficient: float
    """``t = coefficient x ** exponent`` is the first line."""
    intercept: float
    slope: float
    r_squared: float


LEGENDS = (
    "Median [least - greatest] over the rounds; a read is the sum of every weight.",
    "*ms*: medians over the rounds. *exponent*: of x in time ~ x^exponent, by least squares of log time against log x; "
    "1 is linear, below 1 is less than linear.",
)
"""Below the table of the large draw, and below that of the series."""

Series = dict[str, dict[int, Spread]]
"""Of each series the milliseconds by x."""


def run(plan: Plan, progress: bool) -> str:
    """Measure, write ``sampler.csv`` and ``sampler.png``, and give the tables."""
    draws = plan.draws
    paths, width = _middle(draws.series_paths), _middle(draws.series_widths)
    deep = draws.layers, draws.width, draws.num_paths
    timings = _measure(plan, [("draw", *deep), ("read", *deep)], progress)
    write_csv(plan.out / "sampler.csv", Timing, timings)
    grown = {
        "paths": [(draws.series_layers, width, number) for number in draws.series_paths],
        "width": [(draws.series_layers, number, paths) for number in draws.series_widths],
    }
    for name, cases in grown.items():
        timings += _measure(plan, [(name, *case) for case in cases], progress)
        write_csv(plan.out / "sampler.csv", Timing, timings)
    found = series(timings)
    fits = {name: fit([*points], [spread.median for spread in points.values()]) for name, points in found.items()}
    fixed = {
        "paths": f"{draws.series_layers} layers, {width} wide",
        "width": f"{draws.series_layers} layers, {paths} paths",
    }
    draw_series(found, fits, fixed, plan.out / "sampler.png")
    return report(timings, found, fits, fixed)


def _measure(plan: Plan, cases: Sequence[tuple[str, int, int, int]], progress: bool) -> list[Timing]:
    """Give each case its turns: what to do, the layers, the width and the paths."""
    timings = []
    with tqdm(desc="sampler: building", unit="turn", mininterval=0.5, disable=not progress) as bar:
        networks: dict[tuple[int, int], nn.Module] = {}
        for _, layers, width, _ in cases:
            if (layers, width) not in networks:
                networks[layers, width] = mlp([width] * (layers + 1), SEED).to(plan.device, plan.dtype)
        calls = [_call(plan, what, networks[layers, width], paths) for what, layers, width, paths in cases]
        bar.reset(total=len(calls) * (plan.rounds + 1))
        bar.set_description("sampler: draw and read" if cases[0][0] == "draw" else f"sampler: {cases[0][0]}")
        for number, place, spent in take_turns(calls, plan.rounds, plan.device, bar):
            what, layers, width, paths = cases[place]
            timings.append(Timing(what, layers, width, None if what == "read" else paths, number, spent))
    return timings


def _call(plan: Plan, what: str, network: nn.Module, num_paths: int) -> Call:
    if what == "read":
        weights = [parameter.detach() for parameter in network.parameters() if parameter.dim() == 2]
        return lambda: sum(weight.sum() for weight in weights)
    return draw(sparsify(plan, network, num_paths, break_even=False))


def series(timings: Sequence[Timing]) -> Series:
    """Gather the milliseconds of each series by what grows in it."""
    found: Series = {}
    for name, column in SERIES.items():
        times: dict[int, list[float]] = {}
        for timing in timings:
            if timing.measurement == name:
                times.setdefault(getattr(timing, column), []).append(timing.milliseconds)
        found[name] = {x: Spread.of(values) for x, values in times.items()}
    return found


def fit(x: Sequence[float], milliseconds: Sequence[float]) -> Fit:
    """Lay both lines through the points."""
    t = np.asarray(milliseconds)
    exponent, logarithm = np.polyfit(np.log(x), np.log(t), 1)
    slope, intercept = np.polyfit(x, t, 1)
    missed = ((t - intercept - slope * np.asarray(x)) ** 2).sum()
    r_squared = 1 - missed / ((t - t.mean()) ** 2).sum()
    return Fit(*map(float, (exponent, np.exp(logarithm), intercept, slope, r_squared)))


def report(timings: Sequence[Timing], found: Series, fits: dict[str, Fit], fixed: dict[str, str]) -> str:
    """Give both tables and the figure as Markdown."""
    large = {what: [one for one in timings if one.measurement == what] for what in ("draw", "read")}
    times = {what: [one.milliseconds for one in turns] for what, turns in large.items()}
    first = large["draw"][0]
    header = ["layers", "width", "paths", "one draw, ms", "one read of the weights, ms", "draw / read"]
    spreads = [Spread.of(times["draw"]), Spread.of(times["read"]), Spread.of(ratios(times["draw"], times["read"]))]
    cells = [[str(first.layers), str(first.width), str(first.num_paths), *map(str, spreads)]]
    fit_header = ["time against", "with", "from, to", "ms", "exponent", "linear fit, ms", "R^2 of the linear fit"]
    fit_cells = []
    for name, line in fits.items():
        points = found[name]
        ends = f"{min(points)}, {max(points)}"
        medians = " ".join(f"{spread.median:.2f}" for spread in points.values())
        linear = f"{line.intercept:.3g} + {line.slope:.3g} x"
        numbers = [f"{line.exponent:.2f}", linear, f"{line.r_squared:.3f}"]
        fit_cells.append([name, fixed[name], ends, medians, *numbers])
    tables = markdown(header, cells), markdown(fit_header, fit_cells)
    return "\n\n".join([tables[0], LEGENDS[0], tables[1], LEGENDS[1], "![Time of a draw](sampler.png)"])


def _middle(numbers: Sequence[int]) -> int:
    return int(statistics.median_low(numbers))


def check_draws(draws: Draws) -> None:
    """Refuse a series without two different points, through which no line can be laid.

    Raises:
        ValueError: names the series.
    """
    for name in ("series_paths", "series_widths"):
        numbers = getattr(draws, name)
        if len(set(numbers)) < max(2, len(numbers)):
            raise ValueError(f"{name} must hold at least two different numbers; given {numbers}.")
