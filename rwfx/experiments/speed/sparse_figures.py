"""The figures of the part *always-sparse*: steps against density, steps and updates against width, convolutions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwfx.experiments.extras import require
from rwfx.experiments.figures import finish, make_panels
from rwfx.experiments.speed.plan import Size
from rwfx.experiments.speed.turns import Spread

if TYPE_CHECKING:
    from rwfx.experiments.speed.sparse_steps import BytesRow

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "0.55")
MARKERS = "os^DvPX."
SPREAD = "median of the rounds; bars are the least and the greatest"


def draw_steps(
    speeds: Mapping[float, Mapping[str, Spread]], held: "Sequence[BytesRow]", size: Size, path: Path
) -> None:
    """Draw how many times as fast as dense a step is, and what it holds of dense's bytes, against density."""
    figure, (left, right) = make_panels(2, width=10, shared=False)
    figure.set_figheight(4.8)
    densities = sorted(speeds)
    for place, kind in enumerate(("sparse", "masked")):
        label = {"sparse": "non-zeros alone", "masked": "masked dense"}[kind]
        _spreads(left, densities, [speeds[density][kind] for density in densities], label, place)
    left.axhline(1, color="#000000", linewidth=0.9, label="dense")
    left.set_ylabel("dense step / this step")
    parts = {"values": "weights", "gradients": "gradients", "optimizer_state": "optimizer state", "index": "index"}
    below = np.zeros(len(densities))
    places = np.arange(len(densities))
    dense = {density: sum(row.dense for row in held if row.density == density) for density in densities}
    for place, (category, label) in enumerate(parts.items()):
        shares = np.array([
            100 * next(r.sparse for r in held if (r.density, r.category) == (density, category)) / dense[density]
            for density in densities
        ])  # fmt: skip
        right.bar(places, shares, 0.6, below, label=label, color=COLORS[place + 2])
        below += shares
    for place, total in zip(places, below, strict=True):
        right.annotate(f"{total:.1f} %", (place, total), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    right.set_xticks(places, [f"{density:g}" for density in densities])
    right.set_ylabel("bytes, dense's = 100")
    right.set_ylim(0, 1.15 * below.max())
    _log_axes(left, densities, f"density, {size.name}, batch {size.batch_size}")
    right.set_xlabel("density")
    handles, labels = (a + b for a, b in zip(*(of.get_legend_handles_labels() for of in (left, right)), strict=True))
    finish(figure, path, ("A training step and what it holds, beside dense's", SPREAD), handles, labels, columns=4)


def draw_scaling(found: Mapping[str, Mapping[str, Mapping[int, Spread]]], about: str, path: Path) -> None:
    """Draw the milliseconds of a step and of the updates against width, with lines of growth by 2 and by 4.

    Args:
        found: of each panel, by its title.
    """
    figure, panels = make_panels(len(found), width=3 + 5 * len(found))
    figure.set_figheight(5.5)
    labels = {"step": "training step", "gse": "GSE's update", "rigl": "RigL's update"}
    for panel, (title, of_panel) in zip(panels, found.items(), strict=True):
        widths = sorted(of_panel["step"])
        for place, (name, of) in enumerate(of_panel.items()):
            # A difference that is lost in the noise has no logarithm.
            points = {width: spread for width, spread in of.items() if spread.least > 0}
            if points:
                _spreads(panel, [*points], [*points.values()], labels[name], place)
        first = of_panel["step"][widths[0]].median
        for power, style in ((1, (0, (4, 2))), (2, (0, (1, 2)))):
            line = first * (np.array(widths) / widths[0]) ** power
            panel.plot(widths, line, color="0.5", linewidth=1, linestyle=style, label=f"width to the power {power}")
        panel.set_title(title)
        _log_axes(panel, widths, "width of each layer")
    panels[0].set_ylabel("milliseconds")
    entries = {
        name: handle for panel in panels for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    finish(figure, path, (f"Growth with the width, {about}", SPREAD), [*entries.values()], [*entries], columns=3)


def draw_convs(found: Mapping[str, Mapping[float, Spread]], path: Path) -> None:
    """Draw how many times as fast as dense each convolution is, against density."""
    figure, (panel,) = make_panels(1, width=8)
    figure.set_figheight(5.5)
    for place, (layer, of) in enumerate(found.items()):
        _spreads(panel, [*of], [*of.values()], layer, place)
    panel.axhline(1, color="#000000", linewidth=0.9, label="dense")
    panel.set_ylabel("dense step / this step")
    _log_axes(panel, sorted({density for of in found.values() for density in of}), "density")
    handles, labels = panel.get_legend_handles_labels()
    finish(figure, path, ("Steps of convolutions 3 x 3, beside dense's", SPREAD), handles, labels, columns=3)


def _spreads(panel: Any, x: Sequence[float], of: Sequence[Spread], label: str, place: int) -> None:
    middle, low, high = np.array([(one.median, one.least, one.greatest) for one in of]).T
    style = {"capsize": 3, "elinewidth": 1, "linewidth": 1.3, "markersize": 5}
    look = {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}
    panel.errorbar(x, middle, yerr=[middle - low, high - middle], label=label, **style, **look)


def _log_axes(panel: Any, x: Sequence[float], label: str) -> None:
    ticker = require("matplotlib.ticker")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(x, [f"{number:,}" if number > 1 else f"{number:g}" for number in x])
    panel.set_xticks([], minor=True)
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_formatter(ticker.NullFormatter())
    panel.set_xlabel(label)
    panel.grid(color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
