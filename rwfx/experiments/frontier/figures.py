"""The figures of a task: what contenders reach with each budget, against seconds and against operations."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwfx.experiments.figures import finish, make_panels
from rwfx.experiments.frontier.plan import Plan
from rwfx.experiments.frontier.summary import Line, Summary
from rwfx.experiments.policies.tasks import Metric, Task

# Okabe and Ito's colours, told apart by colour-blind readers too: a colour for a kind, a marker within it.
STYLES: dict[str, dict[str, Any]] = {
    "rows-0.25": {"color": "#009E73", "marker": "^"},
    "rows-0.1": {"color": "#009E73", "marker": "v", "linestyle": "--"},
    "examples-0.3": {"color": "#0072B2", "marker": "o"},
    "examples-0.5": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    "adaptive-0.9": {"color": "#56B4E9", "marker": "D"},
    "uniform-0.3": {"color": "#E69F00", "marker": "X"},
    "both-0.5": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "both-0.3": {"color": "#D55E00", "marker": "o"},
    "both-mixed-0.5": {"color": "#D55E00", "marker": "P", "linestyle": ":"},
    "two-pass-0.3": {"color": "#CC79A7", "marker": "o"},
    "two-pass-0.5": {"color": "#CC79A7", "marker": "s", "linestyle": "--"},
}
BLACK = "#000000"
DENSE: tuple[dict[str, Any], ...] = tuple(
    {"color": color, "marker": ".", "linestyle": style, "markersize": 7, "linewidth": 1.4}
    for color in (BLACK, "0.5")
    for style in ("-", "--", ":", "-.")
)
"""Of dense with each batch size, one after the other."""
AXES = {
    "seconds": "training time, that of dense's best = 1",
    "flops": "FLOPs of products of matrices, those of dense's best = 1 (equal ones side by side)",
}


def draw(plan: Plan, task: Task, summary: Summary) -> None:
    """Draw the figures of ``task`` into ``plan.out``."""
    several = plan.seeds > 1
    said = f"{plan.seeds} seed{'s' * several}" + ", mean and 95 % interval" * several
    title = (task.name, f"{textwrap.fill(task.about, 110)}\n", said)
    for cost in AXES:
        draw_costs(summary, cost, task.metric, plan.out / f"{task.name}_against_{cost}.png", title)


def draw_costs(summary: Summary, cost: str, metric: Metric, path: Path, title: Sequence[str]) -> None:
    """Draw the metric against ``cost``, a key of ``AXES``: a line per contender, and dense's best across."""
    figure, (panel,) = make_panels(1, width=10)
    figure.set_figheight(7.5)
    dense = [line for line in summary.lines if line.contender == "dense"]
    for place, line in enumerate(summary.lines):
        style = STYLES[line.contender] if line.contender != "dense" else DENSE[dense.index(line) % len(DENSE)]
        # Equal budgets are equal operations: side by side, for one interval would hide the others.
        aside = 0.0015 * (place - len(summary.lines) / 2) if cost == "flops" else 0.0
        _draw_line(panel, line, cost, metric, aside, {"markersize": 5.5, "linewidth": 1.3, **style})
    goal = metric.scale * summary.goal.value
    panel.axhline(goal, color=BLACK, linewidth=0.9, label=f"dense's best, {goal:.{2 if metric.scale == 100 else 3}f}")
    _limit(panel, summary, metric)
    panel.set_xlim(0, 1.05 * max(getattr(of, cost).value for line in summary.lines for of in line.points))
    panel.set_xlabel(AXES[cost])
    panel.set_ylabel(f"{metric.name} on test data, {metric.unit}")
    panel.grid(color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    handles, labels = panel.get_legend_handles_labels()
    finish(figure, path, title, handles, labels, columns=4)


def _draw_line(panel: Any, line: Line, cost: str, metric: Metric, aside: float, style: dict[str, Any]) -> None:
    costs = [getattr(point, cost) for point in line.points]
    metrics = [point.metric for point in line.points]
    x, y = (scale * np.array([of.value for of in means]) for scale, means in ((1, costs), (metric.scale, metrics)))
    x_bar, y_bar = (
        scale * np.array([of.half_width or 0.0 for of in means])
        for scale, means in ((1, costs), (metric.scale, metrics))
    )
    label = f"{line.name}, batch {line.batch}" if line.contender != "dense" else line.name
    _, _, bars = panel.errorbar(x + aside, y, y_bar, x_bar, elinewidth=1, label=label, **style)
    for bar in bars:
        bar.set_alpha(0.35)


def _limit(panel: Any, summary: Summary, metric: Metric) -> None:
    """Leave below the picture what is far from everything else: one bad contender would press the others together."""
    values = metric.sign * metric.scale * np.array([of.metric.value for line in summary.lines for of in line.points])
    values = values[np.isfinite(values)]
    low, middle, best = np.quantile(values, [0.0, 0.5, 1.0])
    worst = max(low, best - 4 * (best - middle))
    margin = 0.08 * (best - worst) or 1.0
    panel.set_ylim(*sorted((metric.sign * (worst - margin), metric.sign * (best + margin))))
