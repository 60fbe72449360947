"""The figure of the sampler's growth: the milliseconds of a draw against paths and against width, with both fits."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rwfx.experiments.extras import require
from rwfx.experiments.figures import STYLES, finish, make_panels

if TYPE_CHECKING:
    from rwfx.experiments.speed.sampler import Fit, Series


def draw_series(found: "Series", fits: "dict[str, Fit]", fixed: dict[str, str], path: Path) -> None:
    """Draw a panel per series, both axes logarithmic: dots are medians, bars the least and the greatest."""
    ticker = require("matplotlib.ticker")
    figure, panels = make_panels(len(found), shared=False)
    for panel, (name, points) in zip(panels, found.items(), strict=True):
        x, line = np.array([*points]), fits[name]
        middle, low, high = np.array([(one.median, one.least, one.greatest) for one in points.values()]).T
        grid = np.geomspace(x.min(), x.max(), 100)
        panel.plot(grid, line.coefficient * grid**line.exponent, color="#000000", linewidth=1, label="power of x")
        linear = line.intercept + line.slope * grid
        shown = linear > 0  # a line can begin below zero, where a logarithmic axis ends
        dashed = {"color": "0.45", "linewidth": 1, "linestyle": (0, (4, 2))}
        panel.plot(grid[shown], linear[shown], label="linear in x", **dashed)
        dots = {"fmt": "o", "markersize": 5, "capsize": 3, "elinewidth": 1, "color": STYLES["sparse"]["color"]}
        panel.errorbar(x, middle, yerr=[middle - low, high - middle], label="measured", **dots)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(x, [f"{number:,}" for number in x])
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_ylim(0.8 * low.min(), 1.25 * high.max())
        panel.set_xlabel(name)
        panel.set_title(f"{fixed[name]}\nexponent {line.exponent:.2f}, linear R² {line.r_squared:.3f}", fontsize=10)
        panel.grid(color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
    panels[0].set_ylabel("one draw, milliseconds")
    handles, labels = panels[0].get_legend_handles_labels()
    title = ("The row sampler by itself", "median of the rounds; bars are the fastest and the slowest")
    finish(figure, path, title, handles, labels)
