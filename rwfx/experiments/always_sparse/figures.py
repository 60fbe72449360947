"""The figures of a comparison: accuracy against density, against seconds, and against operations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwfx.experiments.always_sparse.plan import DENSE, SMALL, Plan
from rwfx.experiments.always_sparse.summary import CurvePoint, Line
from rwfx.experiments.figures import finish, make_panels

# Okabe and Ito's colours, told apart by colour-blind readers too; a marker for each.
STYLES: Mapping[str, dict[str, Any]] = {
    "gse": {"color": "#D55E00", "marker": "o"},
    "rigl": {"color": "#0072B2", "marker": "s"},
    "set": {"color": "#009E73", "marker": "^"},
    "snfs": {"color": "#56B4E9", "marker": "D"},
    "topkast": {"color": "#CC79A7", "marker": "v"},
    "gradual": {"color": "#E69F00", "marker": "P"},
    "static": {"color": "0.55", "marker": "X"},
    SMALL: {"color": "#000000", "marker": ".", "linestyle": (0, (4, 2))},
    DENSE: {"color": "#000000", "marker": ""},
}
AXES = {"seconds": "training time, seconds", "flops": "FLOPs of linear calls and convolutions, as executed"}

Curves = Mapping[tuple[str, float], Sequence[CurvePoint]]


def draw(plan: Plan, lines: Sequence[Line], found: Curves, title: Sequence[str]) -> None:
    """Draw all figures into ``plan.out``."""
    draw_density(lines, plan.out / "accuracy_against_density.png", title)
    for cost in AXES:
        draw_cost(found, cost, plan.out / f"accuracy_against_{cost}.png", title)


def draw_density(lines: Sequence[Line], path: Path, title: Sequence[str]) -> None:
    """Draw a line for each method, with the intervals as bars, and dense across."""
    figure, (panel,) = make_panels(1, width=8)
    figure.set_figheight(5.5)
    methods = [method for method in STYLES if any(of.method == method for of in lines)]
    densities = sorted({of.density for of in lines if of.method != DENSE})
    for place, method in enumerate(methods):
        own = sorted((of for of in lines if of.method == method), key=lambda of: of.density)
        y, bar = (100 * np.array(of) for of in zip(*((_value(o), _half(o)) for o in own), strict=True))
        if method == DENSE:
            panel.axhline(y[0], linewidth=1, color=STYLES[DENSE]["color"], label=DENSE)
            panel.axhspan(y[0] - bar[0], y[0] + bar[0], color="0.5", alpha=0.15, linewidth=0)
            continue
        # Side by side: at one density an interval would hide the others.
        aside = 1.012 ** (place - len(methods) / 2)
        x = aside * np.array([of.density for of in own])
        style = {"linewidth": 1.3, "markersize": 5.5, "capsize": 2.5, "elinewidth": 1, **STYLES[method]}
        panel.errorbar(x, y, bar, label=method, **style)
    panel.set_xscale("log")
    panel.set_xticks(densities, [f"{of:g}" for of in densities])
    panel.set_xticks([], minor=True)
    _limit(panel, [_value(of) for of in lines])
    panel.set_xlabel("density: share of the weights' places that have a number")
    _finish(figure, [panel], path, title)


def draw_cost(found: Curves, cost: str, path: Path, title: Sequence[str]) -> None:
    """Draw a panel for each density: what a method had reached for which cost, and dense in each of them."""
    densities = sorted({density for method, density in found if method != DENSE}, reverse=True) or [1.0]
    figure, panels = make_panels(len(densities), width=None if len(densities) > 1 else 8)
    for panel, density in zip(panels, densities, strict=True):
        for method in STYLES:
            points = found.get((method, 1.0 if method == DENSE else density))
            if not points:
                continue
            x = np.array([getattr(of, cost) for of in points])
            y = 100 * np.array([_value(of) for of in points])
            panel.plot(x, y, linewidth=1.3, markersize=4, label=method, **STYLES[method])
            # The interval of the end alone: bands of as many methods would hide one another.
            panel.errorbar(
                x[-1], y[-1], 100 * _half(points[-1]), color=STYLES[method]["color"], capsize=2.5, elinewidth=1
            )
        panel.set_xscale("log")
        panel.set_title(f"density {density:g}", fontsize=11)
        panel.set_xlabel(AXES[cost])
    _limit(panels[0], [_value(points[-1]) for points in found.values()])
    _finish(figure, panels, path, title)


def _limit(panel: Any, ends: Sequence[float]) -> None:
    """Show where every run ends: what comes before, and wide intervals, would press the ends together."""
    low, high = 100 * min(ends), 100 * max(ends)
    margin = 0.15 * (high - low) or 1.0
    panel.set_ylim(low - margin, high + margin)


def _finish(figure: Any, panels: Sequence[Any], path: Path, title: Sequence[str]) -> None:
    for panel in panels:
        panel.grid(color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
    panels[0].set_ylabel("test accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    finish(figure, path, title, handles, labels, columns=min(len(labels), 8))


def _value(of: Line | CurvePoint) -> float:
    return of.accuracy.value


def _half(of: Line | CurvePoint) -> float:
    return of.accuracy.half_width or 0.0
