"""Where everything in a picture of a weight graph stands; numbers only, nothing is drawn here.

In: a ``WeightGraph``. Out: a ``Layout``, in inches, x to the right and y upwards.
A *strip* is a linear call, its rows from top to bottom in *cells* of equally many; a *place* is a junction. A call's
*column* is the longest way to it from the input, counted in calls, so that branches stand side by side; a junction
belongs to the gap after the last column that it adds. An edge to the next column is a *band* between two edges of
strips; one that passes columns is a *skip* and runs over them, at ``Edge.over``.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, hypot, sqrt

import networkx as nx

from rwfx.labels import WeightUse
from rwfx.weight_graph import WeightGraph

INPUT = -1  # its number as a station, as in a feature map; it alone is in column 0
COMPACT_ABOVE = 10  # calls
TALLEST = 2.2
# Font size, and inches a letter takes at most, on average: names, and the numbers below them.
NAME_SIZE, NAME_LETTER = 10, 0.092
NOTE_SIZE, NOTE_LETTER = 8.5, 0.07
SMALL_SIZE, SMALL_LETTER = 7, 0.058
NOTES_HEIGHT = 0.42  # of the compact form, above the name

Point = tuple[float, float]
Steps = list[tuple[str, Point]]  # a line as in SVG: M move, L straight, Q and C the points of a Bezier curve


@dataclass(frozen=True)
class Strip:
    """A linear call, or the input, whose rows are its features."""

    name: str
    rows: int
    per_cell: int  # the last cell may have fewer
    column: int
    x: float  # left
    y: float  # top
    width: float
    height: float
    last: bool = False  # whether it feeds the output only

    @property
    def right(self) -> float:
        """The side that feeds the next columns."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Below the last row."""
        return self.y - self.height

    @property
    def middle(self) -> float:
        """Half-way between top and bottom."""
        return self.y - self.height / 2

    def row_y(self, row: float) -> float:
        """The height of a row's middle."""
        return self.y - self.height * (row + 0.5) / self.rows

    def cell_edges(self) -> list[float]:
        """Heights from the top of the first cell to the bottom of the last."""
        ends = [min(k * self.per_cell, self.rows) for k in range(ceil(self.rows / self.per_cell) + 1)]
        return [self.y - self.height * end / self.rows for end in ends]


@dataclass(frozen=True)
class Place:
    """A junction."""

    node: str  # the call that added the rows, such as "add_1"
    column: int
    x: float
    y: float


@dataclass(frozen=True)
class Edge:
    """``features`` of one station are fed by another's rows; they take ``span`` (top, bottom) of its left side."""

    features: int
    span: tuple[float, float]
    over: float | None = None  # the height at which a skip passes, None for a band


@dataclass(frozen=True)
class Layout:
    """A picture's geometry; the keys are numbers of stations, edges are (producer, consumer)."""

    strips: dict[int, Strip]
    places: dict[int, Place]
    edges: dict[tuple[int, int], Edge]
    compact: bool
    gap: float  # from column to column
    spread: float  # how far apart lines on the same way are at most
    bounds: tuple[float, float, float, float]  # left, right, bottom, top of all that is above

    def way(self, producer: int, consumer: int) -> list[int]:
        """The stations from one call to another, across junctions only."""
        across = nx.DiGraph(list(self.edges)).subgraph([producer, consumer, *self.places])
        return nx.shortest_path(across, producer, consumer)

    def line(
        self, pair: tuple[int, int], from_row: int | None = None, to_row: int | None = None, shift: float = 0.0
    ) -> Steps:
        """An edge as a line from row to row, or from middle to middle.

        ``shift``, from -0.5 to 0.5, sets lines that take the same way a little apart.
        """
        edge, shift = self.edges[pair], shift * self.spread
        producer, consumer = (self.strips.get(station) for station in pair)
        if producer:
            start = producer.right, producer.middle if from_row is None else producer.row_y(from_row)
        else:
            start = self.places[pair[0]].x, self.places[pair[0]].y + shift
        if consumer:
            end = consumer.x, sum(edge.span) / 2 if to_row is None else consumer.row_y(to_row)
        else:
            end = self.places[pair[1]].x, self.places[pair[1]].y + shift
        if edge.over is None:
            return bend(start, end)
        # Up in the gap, over the columns that it passes, and down.
        away = 0.16 * self.gap
        up, down, over = start[0] - shift, end[0] + shift, edge.over + shift
        up, down = (up + away if producer else up), (down - away if consumer else down)
        return _rounded([start, (up, start[1]), (up, over), (down, over), (down, end[1]), end])


def lay_out(graph: WeightGraph, max_rows: int) -> Layout:
    """Place the calls and junctions of ``graph``, with at most ``max_rows`` cells to a strip."""
    fed = [_fed_by(graph, station) for station in range(len(graph.stations))]
    columns, levels = _columns(graph, fed)
    compact = len(graph.uses) > COMPACT_ABOVE
    strips = _strips(graph, fed, columns, max_rows, compact)
    gap, indent = _gaps(strips.values(), compact)
    pitch = gap + next(iter(strips.values())).width
    strips = {s: replace(strip, x=strip.column * pitch - indent * (s != INPUT)) for s, strip in strips.items()}
    strips = _stack(strips, fed, compact)
    right = {column: (column + 1) * pitch - gap - indent for column in columns}
    places = _places(graph, fed, columns, levels, strips, right, gap)
    edges, spread = _edges(fed, columns, strips, places)

    top = max([strip.y for strip in strips.values()] + [edge.over for edge in edges.values() if edge.over is not None])
    bounds = (
        min(strip.x for strip in strips.values()),
        max([strip.right for strip in strips.values()] + [place.x for place in places.values()]),
        min(strip.bottom - label_height(strip, compact) for strip in strips.values()),
        top,
    )
    return Layout(strips, places, edges, compact, gap, spread, bounds)


def label_height(strip: Strip, compact: bool) -> float:
    """The room that a strip's label needs below it: three lines, or in the compact form a name on its side."""
    return NOTES_HEIGHT + 0.07 + NOTE_LETTER * len(strip.name) if compact else 0.65


def describe_rows(strip: Strip) -> str:
    """How many rows a strip has, and how many a cell stands for."""
    if strip.column == 0:
        return f"{strip.rows} features" if strip.rows else ""
    return f"{strip.rows} rows" + (f", {strip.per_cell} per cell" if strip.per_cell > 1 else "")


def describe_rows_briefly(strip: Strip, share: str = "") -> str:
    """The same in short lines, with the share of rows visited."""
    if strip.column == 0:
        return f"{strip.rows or ''}"
    lines = [share, f"of {strip.rows}" if "%" in share else f"{strip.rows}"]
    return "\n".join([line for line in lines if line] + ([f"{strip.per_cell}/cell"] if strip.per_cell > 1 else []))


def bend(start: Point, end: Point) -> Steps:
    """A line that leaves and arrives level."""
    middle = (start[0] + end[0]) / 2
    return [("M", start), ("C", (middle, start[1])), ("C", (middle, end[1])), ("C", end)]


def _rounded(points: list[Point], radius: float = 0.12) -> Steps:
    """Straight lines with round corners."""
    steps: Steps = [("M", points[0])]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        into, out = _towards(corner, before, radius), _towards(corner, after, radius)
        steps += [("L", into), ("Q", corner), ("Q", out)]
    return [*steps, ("L", points[-1])]


def _towards(start: Point, end: Point, distance: float) -> Point:
    """The point so far from ``start``, or half-way to ``end``."""
    length = hypot(end[0] - start[0], end[1] - start[1])
    share = min(0.5, distance / length) if length else 0.0
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _fed_by(graph: WeightGraph, station: int) -> dict[int, int]:
    """How many features (of a junction: places) each earlier station feeds."""
    s = graph.stations[station]
    if isinstance(s, WeightUse):
        return dict(Counter(graph.station_of(s.feature_map).tolist()))
    behind = graph.station_of(s.members)
    return {k: int((behind == k).any(1).sum()) for k in behind.unique().tolist()}


def _columns(graph: WeightGraph, fed: list[dict[int, int]]) -> tuple[list[int], list[int]]:
    """Each station's column, and for a junction how many in a row stand before it in its gap, itself included."""
    columns: list[int] = []
    levels: list[int] = []
    for s, sources in zip(graph.stations, fed, strict=True):
        behind = [k for k in sources if k != INPUT]
        last = max([columns[k] for k in behind], default=0)
        call = isinstance(s, WeightUse)
        levels.append(0 if call else 1 + max(levels[k] for k in behind if columns[k] == last))
        columns.append(last + call)
    return columns, levels


def _strips(
    graph: WeightGraph, fed: list[dict[int, int]], columns: list[int], max_rows: int, compact: bool
) -> dict[int, Strip]:
    """The strips by station with their sizes; they are not placed yet."""
    inputs = {sources[INPUT] for sources in fed if INPUT in sources}
    feeding = {k for sources in fed for k in sources}
    most = max([use.rows for use in graph.uses] + list(inputs))

    def strip(name: str, rows: int, column: int, last: bool) -> Strip:
        # Heights go with the square root: 10 rows beside 1000 are still to be seen.
        height = TALLEST * max(0.22, sqrt(rows / most))
        return Strip(name, rows, ceil(rows / max_rows), column, 0, 0, 0.16 if compact else 0.42, height, last)

    strips = {}
    if inputs:
        strips[INPUT] = strip("input", max(inputs), 0, False)
    if len(inputs) > 1:
        strips[INPUT] = replace(strips[INPUT], rows=0)  # inputs, or parts of one, of several widths
    for number, s in enumerate(graph.stations):
        if isinstance(s, WeightUse):
            strips[number] = strip(s.name, s.rows, columns[number], number in graph.heads and number not in feeding)
    return strips


def _gaps(strips: Iterable[Strip], compact: bool) -> tuple[float, float]:
    """The gap between columns, and by how much less it is after the input, where no walks are drawn."""
    calls = [strip for strip in strips if strip.column > 0]
    if compact:
        notes = [line for strip in calls for line in describe_rows_briefly(strip, "100%").split("\n")]
        return max(0.34, SMALL_LETTER * max(map(len, notes)) + 0.04 - calls[0].width), 0.0
    text = max(max(NAME_LETTER * len(strip.name), NOTE_LETTER * len(describe_rows(strip)), 1.0) for strip in calls)
    width, columns = calls[0].width, max(strip.column for strip in calls)
    gap = max(text + 0.15 - width, min(2.6, 10 / columns))
    return gap, min(0.45 * gap, gap + width - (text + 1.1) / 2)


def _stack(strips: dict[int, Strip], fed: list[dict[int, int]], compact: bool) -> dict[int, Strip]:
    """Stack the strips of each column, in the order of what feeds them, around height zero."""
    placed: dict[int, Strip] = {}
    heights: dict[int, float] = {}  # of strips their middle, of junctions the mean of what they add

    def height(sources: Iterable[int]) -> float:
        behind = [heights[k] for k in sources if k >= 0]
        return sum(behind) / len(behind) if behind else 0.0

    for column in sorted({strip.column for strip in strips.values()}):
        members = [s for s, strip in strips.items() if strip.column == column]
        for s in range(max(members)):
            if s not in strips and s not in heights and all(k in heights for k in fed[s]):
                heights[s] = height(fed[s])
        members.sort(key=lambda s: -height(fed[s]) if s >= 0 else 0)
        room = [strips[s].height + label_height(strips[s], compact) + 0.1 for s in members]
        y = (sum(room[:-1]) + strips[members[-1]].height) / 2
        for s, space in zip(members, room, strict=True):
            placed[s] = replace(strips[s], y=y)
            heights[s] = placed[s].middle
            y -= space
    return {s: placed[s] for s in strips}


def _places(
    graph: WeightGraph,
    fed: list[dict[int, int]],
    columns: list[int],
    levels: list[int],
    strips: dict[int, Strip],
    right: dict[int, float],
    gap: float,
) -> dict[int, Place]:
    """The junctions: in the gap after their column, at the mean height of what they add."""
    places: dict[int, Place] = {}
    for number, s in enumerate(graph.stations):
        if number in strips:
            continue
        column, level = columns[number], levels[number]
        in_gap = [k for k in range(len(columns)) if columns[k] == column]
        x = right[column] + gap * level / (max(levels[k] for k in in_gap) + 1)
        heights = [strips[k].middle if k in strips else places[k].y for k in fed[number] if k != INPUT]
        y = sum(heights) / len(heights)
        taken = [p.y for p in places.values() if p.column == column and p.x == x]
        while any(abs(y - other) < 0.2 for other in taken):
            y -= 0.25
        places[number] = Place(s.node, column, x, y)
    return places


def _edges(
    fed: list[dict[int, int]], columns: list[int], strips: dict[int, Strip], places: dict[int, Place]
) -> tuple[dict[tuple[int, int], Edge], float]:
    """The edges, and how far apart lines on one of them may be."""

    def middle(station: int) -> float:
        return strips[station].middle if station in strips else places[station].y

    edges: dict[tuple[int, int], Edge] = {}
    for consumer, sources in enumerate(fed):
        strip = strips.get(consumer)
        before = columns[consumer] - (strip is not None)
        passes = {k: (columns[k] if k >= 0 else 0) < before for k in sources}
        y = strip.y if strip else places[consumer].y
        # From top to bottom as they come in: what runs over the columns first.
        for k in sorted(sources, key=lambda k: (not passes[k], -middle(k))):
            end = y - (strip.height * sources[k] / sum(sources.values()) if strip else 0)
            edges[k, consumer] = Edge(sources[k], (y, end), 0.0 if passes[k] else None)
            y = end

    skips = {pair: _passed(pair, columns, strips) for pair, edge in edges.items() if edge.over is not None}
    # Many skips, each over the shorter ones on the same columns, stand closer.
    step = min(0.1, 3 / max(len(skips), 1))
    placed: list[tuple[int, int, float]] = []
    for pair, (first, last) in sorted(skips.items(), key=lambda item: item[1][1] - item[1][0]):
        over = max(strip.y for strip in strips.values() if first <= strip.column <= last) + 0.16
        over = max([over] + [o + step for a, b, o in placed if a <= last and first <= b])
        placed.append((first, last, over))
        edges[pair] = replace(edges[pair], over=over)
    return edges, 0.8 * step


def _passed(pair: tuple[int, int], columns: list[int], strips: dict[int, Strip]) -> tuple[int, int]:
    """The first and the last column that an edge passes."""
    producer, consumer = pair
    return (columns[producer] if producer >= 0 else 0) + 1, columns[consumer] - (consumer in strips)
