"""Pictures of a weight graph: its calls as strips of rows, how often each row was drawn, and walks over it.

In: a ``WeightGraph``, and walks (``rwfx.random_walks``) or the row sets of training steps (``sparse_model.rows``).
Out: a matplotlib ``Axes``, and a file.

    graph = rwfx.weight_graph(model)
    walks = rwfx.random_walks(graph, dict(model.named_parameters()), num_paths=50)
    draw.save(draw.draw_graph(graph, walks=walks).figure, "graph.png")

Data flow from left to right, walks from right to left. matplotlib is imported when something is drawn.
"""

import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwfx.draw_layout import (
    INPUT,
    NAME_SIZE,
    NOTE_SIZE,
    NOTES_HEIGHT,
    SMALL_SIZE,
    Edge,
    Layout,
    Steps,
    Strip,
    bend,
    describe_rows,
    describe_rows_briefly,
    lay_out,
)
from rwfx.files import replacing
from rwfx.weight_graph import WeightGraph

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.path import Path as Curve

COLOURS, BAR = "viridis_r", (1.4, 0.09)
NEVER, BAND, LINE, TEXT, WALK = "#dfe3e6", "#f0f2f4", "#b4bec5", "#263238", "#d1345b"
SIGNS = {"add": "+", "iadd": "+", "sub": "+", "mul": "x", "imul": "x"}  # of junctions; any other is a dot
BEHIND, WALKS, CELLS, ABOVE = 1, 2, 3, 4  # what hides what


def draw_graph(
    graph: WeightGraph,
    *,
    walks: Tensor | None = None,
    visits: Mapping[str, Tensor] | None = None,
    ax: "Axes | None" = None,
    max_rows: int = 64,
    max_walks: int = 50,
    title: str = "",
) -> "Axes":
    """Draw ``graph``: a strip of rows per linear call, the data flowing from left to right.

    A grey band or line is as wide as the features it feeds; a circle is a junction, where rows are added. A graph
    of more than ten calls is drawn in a compact form.

    Args:
        walks: ``(num_paths, len(graph.uses))`` int64 from ``rwfx.random_walks``. The first ``max_walks`` of them are
            drawn as lines, and all colour the rows unless ``visits`` does.
        visits: how often each row was drawn, by call or by weight, from ``count_visits`` or ``count_draws``; a
            weight that is missing is shown as dense. Without walks and visits only the graph is drawn.
        ax: where to draw; by default a new figure of a size that fits. The unit of the axes is an inch.
        max_rows: cells in a strip at most; a strip with more rows shows the mean over several in a cell.

    Raises:
        ValueError: ``walks`` or ``visits`` are not of this graph.
        ImportError: matplotlib is not installed.
    """
    if max_rows < 1 or max_walks < 0:
        raise ValueError(f"max_rows must be at least 1 and max_walks at least 0, got {max_rows} and {max_walks}.")
    legend, verb = "draws per row", "drawn"
    if walks is not None:
        _check_walks(graph, walks)
        if visits is None:
            visits, legend, verb = count_visits(graph, walks), "walks per row", "visited"
    counts = None if visits is None else _by_call(graph, visits)
    layout = lay_out(graph, max_rows)

    left, right, bottom, top = layout.bounds
    legend_room = max(0.0, 6.6 - (right - left)) / 2
    left, right = left - 0.55 - legend_room, right + 0.65 + legend_room
    bottom, top = bottom - 0.5, top + (0.55 if title else 0.2)
    ax = _new_axes(right - left, top - bottom) if ax is None else ax
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    ax.axis("off")
    if title:
        ax.text(left + 0.3, top - 0.2, title, size=12, weight="bold", color=TEXT, va="top")

    for pair, edge in layout.edges.items():
        _draw_edge(ax, layout, pair, edge)
    drawn = ""
    if walks is not None and max_walks:
        _draw_walks(ax, graph, layout, walks[:max_walks].tolist())
        drawn = f"{min(len(walks), max_walks)}{f' of {len(walks)}' if len(walks) > max_walks else ''} walks"
    colours = _draw_cells(ax, layout, counts)
    for place in layout.places.values():
        sign = SIGNS.get(place.node.split("_")[0], ".")
        size = 0.09 if layout.compact else 0.14
        ax.plot(place.x, place.y, "o", ms=72 * size, mfc="white", mec=TEXT, mew=0.8, zorder=ABOVE)
        ax.plot(place.x, place.y, sign, ms=45 * size, color=TEXT, mew=0.8, zorder=ABOVE)
    for station, strip in layout.strips.items():
        share = "" if counts is None or station == INPUT else _share(counts.get(strip.name))
        _label(ax, layout, strip, share, verb)
    _legend(ax, layout, drawn, (left + 0.35, bottom + 0.27))
    if colours is not None:
        _colour_bar(ax, colours, legend, (right - 0.4, bottom + 0.225))
    return ax


def count_visits(graph: WeightGraph, walks: Tensor) -> dict[str, Tensor]:
    """How many walks pass each row: ``{call: (rows,) int64}``; a weight called twice has two entries.

    Raises:
        ValueError: ``walks`` are not of this graph.
    """
    _check_walks(graph, walks)
    columns = zip(graph.uses, walks.cpu().unbind(1), strict=True)
    return {use.name: torch.bincount(rows[rows >= 0], minlength=use.rows) for use, rows in columns}


def count_draws(graph: WeightGraph, row_sets: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """In how many steps each row was drawn: ``{weight: (rows,) int64}``.

    Args:
        row_sets: ``sparse_model.rows`` of each step; a generator that trains and yields them will do.
    """
    draws: dict[str, Tensor] = {}
    for step in row_sets:
        for weight, rows in step.items():
            if weight not in graph.names:
                raise ValueError(f"row set {weight!r} is of no weight of the graph; it has {', '.join(graph.names)}.")
            draws.setdefault(weight, torch.zeros(graph.rows(weight), dtype=torch.int64))[rows.cpu()] += 1
    return draws


def sum_cells(counts: Tensor, per_cell: int) -> Tensor:
    """Sums of ``per_cell`` rows each; the last cell takes what is left."""
    cells = torch.zeros(ceil(len(counts) / per_cell), dtype=counts.dtype)
    return cells.index_add_(0, torch.arange(len(counts)) // per_cell, counts)


def save(figure: "Figure | SubFigure", path: str | os.PathLike[str], *, dpi: int = 160) -> None:
    """Write the figure to ``path``, whole or not at all, in the format of its suffix (``.png``, ``.svg``, ``.pdf``)."""
    with replacing(path) as file:
        figure.figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=dpi)  # type: ignore[union-attr]


def _matplotlib(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "rwfx[draw]"') from error


def _new_axes(width: float, height: float) -> "Axes":
    figure = _matplotlib("figure").Figure(figsize=(width, height), facecolor="white")
    return figure.add_axes((0, 0, 1, 1))


def _check_walks(graph: WeightGraph, walks: Tensor) -> None:
    uses = graph.uses
    if walks.dim() != 2 or walks.shape[1] != len(uses) or walks.dtype != torch.int64:
        raise ValueError(
            f"walks must be int64 of shape (num_paths, {len(uses)}), one column per linear call of the graph, as "
            f"rwfx.random_walks gives them; got {walks.dtype} {tuple(walks.shape)}."
        )
    for use, rows in zip(uses, walks.unbind(1), strict=True):
        strange = rows[(rows < -1) | (rows >= use.rows)]
        if len(strange):
            raise ValueError(
                f"walks pass row {int(strange[0])} of {use.name}, which has {use.rows} rows: they are walks over "
                "another graph."
            )


def _by_call(graph: WeightGraph, visits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``visits``, which may be by weight, by call."""
    counts = {}
    for use in graph.uses:
        given = visits.get(use.name, visits.get(use.weight))
        if given is not None and given.shape != (use.rows,):
            raise ValueError(f"visits of {use.name} must have shape ({use.rows},), got {tuple(given.shape)}.")
        if given is not None:
            counts[use.name] = given.cpu()
    known = {use.name for use in graph.uses} | {use.weight for use in graph.uses}
    if unknown := set(visits) - known:
        raise ValueError(f"visits name {sorted(unknown)}; the calls of the graph are {', '.join(sorted(known))}.")
    return counts


def _draw_edge(ax: "Axes", layout: Layout, pair: tuple[int, int], edge: Edge) -> None:
    """The grey band or line behind the walks."""
    patch = _matplotlib("patches").PathPatch
    producer, consumer = (layout.strips.get(station) for station in pair)
    if edge.over is None and producer and consumer:
        upper = bend((producer.right, producer.y), (consumer.x, edge.span[0]))
        (_, corner), *lower = bend((consumer.x, edge.span[1]), (producer.right, producer.bottom))
        ax.add_patch(patch(_curve([*upper, ("L", corner), *lower]), fc=BAND, ec="none", zorder=BEHIND - 0.5))
        return
    share = edge.features / max(e.features for e in layout.edges.values())
    width = (0.6 + 2.2 * share) * (0.7 if layout.compact else 1)
    ax.add_patch(patch(_curve(layout.line(pair)), fill=False, ec=LINE, lw=width, zorder=BEHIND, capstyle="butt"))


def _draw_walks(ax: "Axes", graph: WeightGraph, layout: Layout, walks: list[list[int]]) -> None:
    """Each walk as one thin line that follows the edges, from row to row."""
    stations = [number for number in range(len(graph.stations)) if number in layout.strips]
    ways: dict[tuple[int, int], list[int]] = {}
    curves = []
    for number, rows in enumerate(walks):
        passed = [(station, row) for station, row in zip(stations, rows, strict=True) if row >= 0]
        if not passed:
            continue
        shift = number / len(walks) - 0.5
        strip, y = layout.strips[passed[-1][0]], layout.strips[passed[-1][0]].row_y(passed[-1][1])
        steps: Steps = [("M", (strip.right + 0.12, y)), ("L", (strip.right, y))]
        for (producer, from_row), (consumer, to_row) in pairwise(passed):
            if (producer, consumer) not in ways:
                ways[producer, consumer] = layout.way(producer, consumer)
            for pair in pairwise(ways[producer, consumer]):
                ends = from_row if pair[0] == producer else None, to_row if pair[1] == consumer else None
                steps += layout.line(pair, *ends, shift=shift)
        curves.append(_curve(steps))
    alpha, width = min(0.7, max(0.22, 12 / max(len(curves), 1))), 0.6 if layout.compact else 0.8
    collection = _matplotlib("collections").PathCollection
    lines = collection(curves, fc="none", ec=WALK, lw=width, alpha=alpha, zorder=WALKS, gid="walks")
    ax.add_collection(lines, autolim=False)


def _curve(steps: Steps) -> "Curve":
    curve = _matplotlib("path").Path
    codes = {"M": curve.MOVETO, "L": curve.LINETO, "Q": curve.CURVE3, "C": curve.CURVE4}
    return curve([point for _, point in steps], [codes[code] for code, _ in steps])


def _draw_cells(ax: "Axes", layout: Layout, counts: Mapping[str, Tensor] | None) -> Any:
    """The strips, coloured by the mean count of a cell's rows; returns what a colour bar needs, if there are counts."""
    calls = {station: strip for station, strip in layout.strips.items() if station != INPUT}
    means = {
        station: sum_cells(counts[strip.name], strip.per_cell) / sum_cells(torch.ones(strip.rows), strip.per_cell)
        for station, strip in calls.items()
        if counts is not None and strip.name in counts
    }
    drawn = torch.cat([torch.empty(0), *means.values()])
    drawn = drawn[drawn > 0]
    least, most = (float(drawn.min()), float(drawn.max())) if len(drawn) else (1.0, 2.0)
    # A walk is at one row of a narrow layer or of a wide one: counts differ by as much as the widths do.
    norm = _matplotlib("colors").LogNorm(least, max(most, 2 * least))
    # The first tenth of the map is too bright beside a pale row.
    colours = _matplotlib("cm").ScalarMappable(None, COLOURS).get_cmap()([k / 255 for k in range(24, 256)])
    colours = _matplotlib("colors").ListedColormap(colours).with_extremes(bad=NEVER)
    for station, strip in calls.items():
        edges = strip.cell_edges()
        values = means.get(station, torch.zeros(len(edges) - 1))
        shown = values.masked_fill(values == 0, float("nan"))[:, None].numpy()
        lines = 0.4 if strip.height / len(shown) > (0.05 if layout.compact else 0.03) else 0
        mesh = ax.pcolormesh([strip.x, strip.right], edges, shown, cmap=colours, norm=norm, zorder=CELLS)
        mesh.set(edgecolor="white" if lines else "none", linewidth=lines, gid=f"strip {strip.name}")
    if INPUT in layout.strips:
        strip = layout.strips[INPUT]
        box = _matplotlib("patches").Rectangle((strip.x, strip.bottom), strip.width, strip.height)
        box.set(facecolor=NEVER, zorder=CELLS)
        ax.add_patch(box)
    return _matplotlib("cm").ScalarMappable(norm, colours) if means else None


def _share(counts: Tensor | None) -> str:
    """The share of rows visited at least once; a weight without counts has no row sets."""
    return "dense" if counts is None else f"{int((counts > 0).sum()) / len(counts):.0%}"


def _label(ax: "Axes", layout: Layout, strip: Strip, share: str, verb: str) -> None:
    """The name below the strip and what there is to know of its rows; in the compact form on its side."""
    x, y = strip.x + strip.width / 2, strip.bottom - 0.07
    halo = _matplotlib("patheffects").withStroke(linewidth=2, foreground="white", alpha=0.8)
    style: dict[str, Any] = {"color": TEXT, "ha": "center", "va": "top", "size": NOTE_SIZE}
    style.update(path_effects=[halo], zorder=ABOVE)
    if not layout.compact:
        notes = describe_rows(strip) + (f"\n{share} {verb}" if "%" in share else f"\n{share}")
        ax.text(x, y, strip.name, **{**style, "size": NAME_SIZE, "weight": "bold"})
        ax.text(x, y - 0.19, notes.strip(), **style, linespacing=1.35)
        if strip.last:
            style.update(ha="left", va="center", rotation=90)
            ax.text(strip.right + 0.2, strip.middle, "output", **style)
        return
    ax.text(x, y - NOTES_HEIGHT, strip.name, **style, rotation=90)
    ax.text(x, y, describe_rows_briefly(strip, share), **{**style, "size": SMALL_SIZE}, linespacing=1.1)


def _legend(ax: "Axes", layout: Layout, walks: str, corner: tuple[float, float]) -> None:
    line = _matplotlib("lines").Line2D
    entries = [line([], [], color=LINE, lw=2, marker=">", mew=0, label="data forward")]
    if walks:
        entries.append(line([], [], color=WALK, lw=1, marker="<", ms=5, mew=0, label=f"{walks} back"))
    if layout.places:
        entries.append(line([], [], ls="", marker=r"$\oplus$", ms=9, color=TEXT, mew=0, label="junction"))
    ax.legend(
        handles=entries, loc="center left", bbox_to_anchor=corner, bbox_transform=ax.transData, ncols=len(entries),
        frameon=False, borderpad=0, borderaxespad=0, fontsize=NOTE_SIZE, labelcolor=TEXT, columnspacing=1.4,
    )  # fmt: skip


def _colour_bar(ax: "Axes", palette: Any, label: str, corner: tuple[float, float]) -> None:
    """A bar with its label on the left; ``corner`` is its lower right."""
    x, y = corner
    box = ax.inset_axes((x - BAR[0], y, *BAR), transform=ax.transData)
    bar = _matplotlib("colorbar").Colorbar(box, palette, orientation="horizontal")
    steps = [m * 10.0**e for e in range(-4, 9) for m in (1, 2, 5)]
    ticks = [s for s in steps if palette.norm.vmin <= s <= palette.norm.vmax]
    ticks = ticks if len(ticks) > 1 else [palette.norm.vmin, palette.norm.vmax]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    box.tick_params(length=2, labelsize=SMALL_SIZE, color=TEXT, labelcolor=TEXT, pad=1)
    ax.text(x - BAR[0] - 0.1, y + BAR[1] / 2, label, size=NOTE_SIZE, color=TEXT, ha="right", va="center")
