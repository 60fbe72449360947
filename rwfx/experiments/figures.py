"""The figures of the accuracy experiment: means over seeds, with 95 % intervals as bands or bars.

One panel per number of paths, each with FULL in it, so that no panel holds more than four curves. The
compute-matched dense run has its sparse partner's colour, dashed. A dot is where a run ended.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwfx.experiments.extras import require
from rwfx.experiments.summary import by_run, mean, step_times
from rwfx.files import replacing

if TYPE_CHECKING:
    from rwfx.experiments.accuracy import Row

# Okabe and Ito's colours, told apart by colour-blind readers too.
STYLES: dict[str, dict[str, Any]] = {
    "full": {"label": "FULL (dense)", "color": "#000000"},
    "masked": {"label": "masked", "color": "#E69F00"},
    "sparse": {"label": "sparse", "color": "#0072B2"},
    "dense": {"label": "dense, as many FLOPs as sparse", "color": "#0072B2", "linestyle": (0, (4, 2))},
}
AXES = {
    "seconds": "training time, seconds",
    "parameter_updates": "cumulative parameter updates",
    "flops": "cumulative FLOPs",
}
POINTS = 200
"""Points of the grid on which the seeds' curves are averaged."""
COLUMNS = 3
"""Panels side by side."""


def draw_accuracy(rows: Sequence["Row"], against: str, path: Path, title: str) -> None:
    """Draw test accuracy against the column ``against`` (a key of ``AXES``), on a logarithmic axis."""
    runs = by_run(rows)
    paths = [num_paths for kind, num_paths in runs if kind == "sparse"]
    low, high = _accuracy_limits(rows)
    figure, panels = make_panels(len(paths))
    seen: list[float] = []
    for panel, num_paths in zip(panels, paths, strict=True):
        for kind, style in STYLES.items():
            seeds = runs.get((kind, None if kind == "full" else num_paths))
            if seeds:
                cost, accuracy = _draw_curve(panel, [_curve(run, against) for run in seeds.values()], style)
                seen += cost[accuracy > low].tolist()
        panel.set_title(_count(num_paths, "path"), fontsize=11)
        panel.set_xlabel(AXES[against])
        panel.grid(color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
    panels[0].set_ylim(low, high)
    for panel in panels:
        _set_cost_axis(panel, 0.85 * min(seen), 1.3 * max(seen))
    for panel in panels[::COLUMNS]:
        panel.set_ylabel("test accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    finish(figure, path, _title(title, rows), handles, labels)


def draw_step_times(rows: Sequence["Row"], path: Path, title: str) -> None:
    """Draw each contender's median step time as a bar, with how many times FULL's speed it is."""
    runs = by_run(rows)
    paths = [num_paths for kind, num_paths in runs if kind == "sparse"]
    times = {
        key: mean([statistics.median(step_times(run)) for run in seeds.values()])
        for key, seeds in runs.items()
        if key[0] != "dense"  # its step is FULL's
    }
    full = times["full", None]
    figure, (axes,) = make_panels(1, width=max(6.0, 2.4 + 1.9 * len(paths)))
    kinds = [kind for kind in ("masked", "sparse") if (kind, paths[0]) in times]
    bars = [(0.0, "full", full)] + [
        (1 + group + 0.42 * (index - (len(kinds) - 1) / 2), kind, times[kind, num_paths])
        for group, num_paths in enumerate(paths)
        for index, kind in enumerate(kinds)
    ]
    for kind in ("full", *kinds):
        chosen = [(place, time) for place, name, time in bars if name == kind]
        axes.bar(
            [place for place, _ in chosen],
            [time.value for _, time in chosen],
            width=0.4,
            yerr=[time.half_width or 0.0 for _, time in chosen] if chosen[0][1].half_width else None,
            capsize=3,
            error_kw={"elinewidth": 1, "capthick": 1},
            color=STYLES[kind]["color"] if kind != "full" else "0.35",
            label=STYLES[kind]["label"],
        )
    for place, kind, time in bars:
        top = time.value + (time.half_width or 0.0)
        speed = "" if kind == "full" else f"\n{full.value / time.value:.2f}$\\times$"
        axes.annotate(
            f"{time.value:.2f}{speed}",
            (place, top),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.axhline(full.value, color="0.35", linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
    axes.set_xticks(range(len(paths) + 1), ["dense", *(_count(number, "path") for number in paths)])
    axes.set_ylabel("median step, milliseconds")
    axes.set_ylim(0, 1.22 * max(time.value + (time.half_width or 0.0) for _, _, time in bars))
    axes.tick_params(axis="x", length=0)
    handles, labels = axes.get_legend_handles_labels()
    lines = _title(title, rows)
    finish(
        figure,
        path,
        (*lines, "\nabove the bars: milliseconds, and the speed where FULL's is 1"),
        handles,
        labels,
    )


def make_panels(count: int, width: float | None = None, shared: bool = True) -> tuple[Any, list[Any]]:
    """Make ``count`` panels, ``COLUMNS`` to a row, with common axes unless not ``shared``."""
    require("matplotlib")
    figure_module = require("matplotlib.figure")
    columns = min(count, COLUMNS)
    lines = math.ceil(count / columns)
    size = (width or max(6.0, 1.0 + 3.8 * columns), 1.3 + 3.2 * lines)
    figure = figure_module.Figure(figsize=size, layout="constrained")  # no pyplot: no global state, no display
    grid = figure.subplots(lines, columns, sharex=shared, sharey=shared, squeeze=False)
    panels = list(grid.flat)
    for spare in panels[count:]:
        spare.remove()
    for panel in panels[:count]:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels[:count]


def _curve(run: Sequence["Row"], against: str) -> tuple[np.ndarray, np.ndarray]:
    """Give the evaluated points of a run: the column ``against``, and the accuracy in per cent."""
    points = [(getattr(row, against), 100 * row.test_accuracy) for row in run if row.test_accuracy is not None]
    x, y = np.array(points, dtype=float).T
    return x, y


def _draw_curve(
    panel: Any, curves: Sequence[tuple[np.ndarray, np.ndarray]], style: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the mean of one contender's curves where all of them are, its interval as a band; give the mean."""
    first = max(x[0] for x, _ in curves)
    last = min(x[-1] for x, _ in curves)
    grid = np.geomspace(first, last, POINTS)
    values = np.array([np.interp(np.log(grid), np.log(x), y) for x, y in curves])
    means = [mean(column) for column in values.T.tolist()]
    middle = np.array([point.value for point in means])
    panel.plot(grid, middle, linewidth=1.6, marker="o", markersize=4.5, markevery=[POINTS - 1], **style)
    if means[0].half_width is not None:
        half = np.array([point.half_width for point in means])
        top = np.minimum(middle + half, 100)
        panel.fill_between(
            grid, middle - half, top, color=style["color"], alpha=0.06 if "linestyle" in style else 0.14, linewidth=0
        )
    return grid, middle


def _accuracy_limits(rows: Sequence["Row"]) -> tuple[float, float]:
    """Leave out the first steps, which would press the rest of the curves together at the top."""
    accuracies = [100 * row.test_accuracy for row in rows if row.test_accuracy is not None]
    low, high = float(np.quantile(accuracies, 0.3)), max(accuracies)
    return low - 0.05 * (high - low), high + 0.04 * (high - low)


def _set_cost_axis(panel: Any, first: float, last: float) -> None:
    """Make the axis of costs logarithmic, with labels such as 0.5, 20M and 1G, as many as have room."""
    ticker = require("matplotlib.ticker")
    panel.set_xscale("log")
    panel.set_xlim(first, last)
    digits = (1.0,) if last > 150 * first else (1.0, 3.0) if last > 20 * first else (1.0, 2.0, 5.0)
    panel.xaxis.set_major_locator(ticker.LogLocator(subs=digits))
    panel.xaxis.set_major_formatter(ticker.EngFormatter(sep="") if last > 1000 else lambda value, _: f"{value:g}")
    panel.xaxis.set_minor_formatter(ticker.NullFormatter())
    panel.tick_params(labelbottom=True)  # also where the panel below is missing


def _title(title: str, rows: Sequence["Row"]) -> tuple[str, str]:
    seeds = len({row.seed for row in rows})
    band = ", mean and 95 % interval" if seeds > 1 else ""
    return title, f"{_count(seeds, 'seed')}{band}"


def _count(number: int | None, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def finish(
    figure: Any, path: Path, title: Sequence[str], handles: list[Any], labels: list[str], columns: int | None = None
) -> None:
    """Put the title above and the legend below, in ``columns`` or as the width allows, and write the figure."""
    figure.suptitle("\n".join([title[0], "".join(title[1:])]), fontsize=11)
    columns = columns or (len(labels) if figure.get_figwidth() > 8 else 2)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=160)
