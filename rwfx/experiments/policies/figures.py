"""The figures of a task: what policies reach against what they cost, along the way, and against what they forget."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwfx.experiments.figures import finish, make_panels
from rwfx.experiments.policies.contenders import DENSE, Contender
from rwfx.experiments.policies.plan import Plan
from rwfx.experiments.policies.runs import Result
from rwfx.experiments.policies.summary import Line, summarise
from rwfx.experiments.policies.tasks import Metric, Task
from rwfx.experiments.summary import Mean, mean

# Okabe and Ito's colours, told apart by colour-blind readers too; a schedule has its policy's, and a hollow marker.
STYLES: dict[str, dict[str, Any]] = {
    "RandomWalk": {"color": "#0072B2", "marker": "o"},
    "AdaptiveWalk": {"color": "#D55E00", "marker": "s"},
    "LearnedWalk": {"color": "#CC79A7", "marker": "D"},
    "TopK": {"color": "#009E73", "marker": "^"},
    "Uniform": {"color": "#E69F00", "marker": "v"},
    "Magnitude": {"color": "#56B4E9", "marker": "P"},
    "DenseFirst+AdaptiveWalk": {
        "color": "#D55E00",
        "marker": "s",
        "markerfacecolor": "white",
        "linestyle": (0, (4, 2)),
    },
    "DenseFirst+TopK": {"color": "#009E73", "marker": "^", "markerfacecolor": "white", "linestyle": (0, (4, 2))},
}
BARS: dict[str, Any] = {"elinewidth": 1, "markersize": 6, "linewidth": 1.2}
BLACK: dict[str, Any] = {"color": "#000000", "marker": ".", "zorder": 3}
SMALLER: dict[str, Any] = {"color": "#000000", "marker": "x", "linestyle": (0, (1, 2)), "zorder": 3}


def draw(plan: Plan, task: Task, results: Sequence[Result]) -> None:
    """Draw the figures of ``task`` into ``plan.out``."""
    lines = summarise(results, task.metric)
    seeds = f"{plan.seeds} seed{'s' if plan.seeds > 1 else ''}"
    title = (
        task.name,
        f"{task.about.partition(', first')[0]}, {seeds}" + ", mean and 95 % interval" * (plan.seeds > 1),
    )
    draw_costs(lines, task.metric, plan.out / f"{task.name}_against_seconds.png", title)
    densities = sorted(plan.densities)
    density = densities[len(densities) // 2]
    at = f", density {density:g}"
    draw_curves(results, density, task.metric, plan.out / f"{task.name}_against_steps.png", (title[0] + at, title[1]))
    if task.earlier is not None:
        draw_forgetting(lines, task.metric, plan.out / f"{task.name}_forgetting.png", title)


def draw_costs(lines: Sequence[Line], metric: Metric, path: Path, title: tuple[str, str]) -> None:
    """Draw the metric at the end against seconds, beside dense runs that ended earlier."""
    _scatter(lines, metric, path, title, lambda line: (line.shares["seconds"], 1.0), "training time, dense = 1")


def draw_forgetting(lines: Sequence[Line], metric: Metric, path: Path, title: tuple[str, str]) -> None:
    """Draw the metric on the new task against what was forgotten of the first."""
    _scatter(lines, metric, path, title, lambda line: (line.forgetting, 100.0), "forgotten of the first task, points")


def draw_curves(results: Sequence[Result], density: float, metric: Metric, path: Path, title: tuple[str, str]) -> None:
    """Draw the metric against the step, for dense and for every policy at one density."""
    figure, panel = _make_panel()
    shown = [DENSE, *[Contender(kind, density) for kind in STYLES]]
    seen = []
    for place, contender in enumerate(shown):
        runs = [result for result in results if result.contender == contender]
        if not runs:
            continue
        style = {**(STYLES[contender.kind] if contender.density else BLACK), "markersize": 3.5, "linewidth": 1.3}
        steps = [point.step for point in runs[0].points]
        means = [mean(values) for values in zip(*([p.metric for p in run.points] for run in runs), strict=True)]
        middle = metric.scale * np.array([of.value for of in means])
        half = metric.scale * np.array([of.half_width or 0.0 for of in means])
        panel.plot(steps, middle, label=contender.kind, **style)
        aside = steps[-1] * (1.01 + 0.008 * place)  # side by side: as bands, nine of them hide one another
        panel.errorbar(aside, middle[-1], half[-1], color=style["color"], elinewidth=1.5)
        seen.append(middle)
    every = metric.sign * np.concatenate(seen)
    _limit(panel, metric, float(np.quantile(every, 0.15)), every.max())  # the beginnings would press the rest together
    panel.set_xlabel("step")
    _finish(figure, panel, metric, path, title)


def _scatter(
    lines: Sequence[Line], metric: Metric, path: Path, title: tuple[str, str], across: Any, label: str
) -> None:
    """Draw a marker with bars for every contender, joined from density to density; ``across`` gives its abscissa."""
    figure, panel = _make_panel()
    groups = {"dense, fewer steps": [line for line in lines if line.contender.on_frontier]}
    groups["dense, smaller batch"] = [line for line in lines if line.contender.batch_share < 1]
    groups |= {kind: [line for line in lines if line.contender.kind == kind] for kind in STYLES}
    styles = {"dense, fewer steps": BLACK, "dense, smaller batch": SMALLER, **STYLES}
    seen = []
    for name, members in groups.items():
        if not members:
            continue
        xs, ys = zip(*((across(line), line.metric) for line in members), strict=True)
        x, x_bar = _numbers([of for of, _ in xs], xs[0][1])
        y, y_bar = _numbers(ys, metric.scale)
        _, _, bars = panel.errorbar(x, y, y_bar, x_bar, label=name, **{**BARS, **styles[name]})
        for bar in bars:
            bar.set_alpha(0.35)
        seen.append(metric.sign * y)
    # A dense run of few steps may be far below everything that is compared.
    worst = min(values.min() for values in seen[1:] or seen)
    _limit(panel, metric, worst, max(values.max() for values in seen))
    panel.set_xlabel(label)
    _finish(figure, panel, metric, path, title)


def _make_panel() -> tuple[Any, Any]:
    """Make a figure with one panel, high enough for ten lines and their legend."""
    figure, (panel,) = make_panels(1, width=7.5)
    figure.set_figheight(6.5)
    return figure, panel


def _numbers(means: Sequence[Mean], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Give the values, and half their intervals; 0 where there is none."""
    return scale * np.array([of.value for of in means]), scale * np.array([of.half_width or 0.0 for of in means])


def _limit(panel: Any, metric: Metric, worst: float, best: float) -> None:
    """Show from ``worst`` to ``best``, numbers of which more is better, with a margin."""
    margin = 0.08 * (best - worst)
    panel.set_ylim(*sorted((metric.sign * (worst - margin), metric.sign * (best + margin))))


def _finish(figure: Any, panel: Any, metric: Metric, path: Path, title: tuple[str, str]) -> None:
    panel.set_ylabel(f"{metric.name}, {metric.unit}")
    panel.grid(color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    handles, labels = panel.get_legend_handles_labels()
    finish(figure, path, title, handles, labels)
