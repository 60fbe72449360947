"""Labels: where each number of an activation comes from, found by running a model's graph on row numbers.

In: a normalized ``GraphModule``. Out: a ``Trail``: the stations of its weight graph and the ids in its output.

Instead of numbers, the graph is run on *labels*: the value of a tensor is a tensor of the same shape that
says, for every element, the global id of the row that produced it (-1: none, it comes from an input or
a constant). A weighted call gives fresh ids, one per row; structural operations (reshape, concatenate,
slice, ...) are executed on the ids, so no rule has to know which dimension holds the features; elementwise
operations leave the ids where they are; where several ids meet (an addition, a pool) a *junction* gives the
place an id of its own that leads to all of them. ``rwfx.label_rules`` lists the operations.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from rwfx.label_rules import RULES, Everywhere, Labels, UnknownShape, bare_name, operands_of, operation_of
from rwfx.passes.normalize import weight_of

# The leading dimensions of the first weighted call, where no example says: a batch, of sequences, of grids.
LEADS = ((2,), (2, 3), (2, 3, 5))


@dataclass(frozen=True)
class WeightUse:
    """One linear call on a weight; its row ``i`` has the global id ``base + i``."""

    name: str  # the weight's; the second call on the same weight is "fc.weight#2"
    weight: str  # the parameter, by the first of its names
    node: str  # the call in the graph
    base: int
    rows: int
    feature_map: Tensor  # (features,) int64: the id that feeds each input feature, -1 for none

    @property
    def size(self) -> int:
        """The number of its ids."""
        return self.rows


@dataclass(frozen=True)
class Junction:
    """Places that several rows lead to; place ``i`` has the id ``base + i`` and leads to ``members[i]``.

    ``ways[i]`` is the running sum, over the members, of the rows behind each: a draw in proportion to it is
    uniform over the rows that were added, however the additions were nested.
    """

    node: str  # the call that added or pooled them
    base: int
    members: Tensor  # (size, M) int64 ids; a place with fewer repeats its last one, with no weight
    ways: Tensor  # (size, M) float64, never falling along M

    @property
    def size(self) -> int:
        """The number of its ids."""
        return len(self.members)


@dataclass(frozen=True)
class Trail:
    """What a run on labels showed."""

    stations: tuple[WeightUse | Junction, ...]  # in execution order, ids rising
    output_ids: Tensor  # (n,) int64, distinct
    notes: tuple[str, ...]  # where an operation without a rule was met


def follow_rows(gm: GraphModule, names: Mapping[int, str], shapes: Mapping[str, torch.Size] | None = None) -> Trail:
    """Run ``gm`` on labels.

    Args:
        gm: a normalized graph module.    names: the name of each parameter, by ``id``.
        shapes: the shape of each node's value. Without them the leading dimensions of the first weighted
            call are guessed (``LEADS``); a guess holds when every later weighted call finds as many
            features as its weight has.

    Raises:
        ValueError: no guess holds (the remedy is to give example inputs), or the shapes contradict the graph.
    """
    failures, trails = [], []
    for lead in LEADS if shapes is None else LEADS[:1]:
        try:
            trails.append(_run(gm, names, shapes, lead))
        except UnknownShape as error:
            failures.append(f"with {len(lead) + 1} dimensions, {error}" if shapes is None else str(error))
    if trails and all(_agree(trails[0], trail) for trail in trails[1:]):
        return trails[0]
    if trails:
        failures = ["inputs with more and with fewer dimensions fit, and differ in what reaches what"]
    without = "" if shapes is not None else "without the shapes of the inputs "
    raise ValueError(
        f"cannot tell which row feeds which input feature {without}({'; '.join(failures)})."
        + (" Give example_inputs." if shapes is None else "")
    )


def leaves(stations: Sequence[WeightUse | Junction], ids: Tensor) -> Tensor:
    """The ids of weight rows that ``ids`` lead to across junctions; distinct, sorted."""
    flags = torch.zeros(stations[-1].base + stations[-1].size if stations else 0, dtype=torch.bool)
    flags[ids[ids >= 0]] = True
    for s in reversed(stations):
        if isinstance(s, Junction):
            here = flags[s.base : s.base + s.size]
            flags[s.members[here]] = True
            here.zero_()
    return flags.nonzero().squeeze(1)


def _agree(a: Trail, b: Trail) -> bool:
    """Whether two guesses of the shapes come to the same weight graph."""
    uses = [[s for s in trail.stations if isinstance(s, WeightUse)] for trail in (a, b)]
    return all(
        x.base == y.base and torch.equal(x.feature_map, y.feature_map) for x, y in zip(*uses, strict=True)
    ) and torch.equal(leaves(a.stations, a.output_ids), leaves(b.stations, b.output_ids))


def _run(
    gm: GraphModule, names: Mapping[int, str], shapes: Mapping[str, torch.Size] | None, lead: tuple[int, ...]
) -> Trail:
    widths: dict[str, int] = {}
    while True:
        run = _LabelRun(gm, names, shapes, lead, widths)
        try:
            output = run.run()
        except _Width as found:
            widths[found.node] = found.width
            continue
        ids = torch.cat([torch.empty(0).long(), *[run.ids_of(x) for x in operands_of(output)]]).unique()
        return _pruned(Trail(tuple(run.stations), ids, tuple(run.notes)))


def _pruned(trail: Trail) -> Trail:
    """Without the junctions that nothing reads, and the ids numbered anew."""
    size = sum(s.size for s in trail.stations)
    read = torch.zeros(size, dtype=torch.bool)
    read[trail.output_ids] = True
    kept = []
    for s in reversed(trail.stations):
        if isinstance(s, Junction) and not read[s.base : s.base + s.size].any():
            continue
        sources = s.members if isinstance(s, Junction) else s.feature_map
        read[sources[sources >= 0]] = True
        kept.append(s)
    renumbered = torch.full((size + 1,), -1)  # the last one is for -1
    base = 0
    stations = []
    for s in reversed(kept):
        renumbered[s.base : s.base + s.size] = torch.arange(base, base + s.size)
        if isinstance(s, Junction):
            stations.append(replace(s, base=base, members=renumbered[s.members]))
        else:
            stations.append(replace(s, base=base, feature_map=renumbered[s.feature_map]))
        base += s.size
    return Trail(tuple(stations), renumbered[trail.output_ids], trail.notes)


class _Width(Exception):
    """A tensor of unknown width that is concatenated to known features must be this wide."""

    def __init__(self, node: str, width: int) -> None:
        self.node, self.width = node, width


class _LabelRun(fx.Interpreter):
    def __init__(
        self,
        gm: GraphModule,
        names: Mapping[int, str],
        shapes: Mapping[str, torch.Size] | None,
        lead: tuple[int, ...],
        widths: dict[str, int],
    ) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.gm = gm
        self.names, self.shapes, self.lead, self.widths = names, shapes or {}, lead, widths
        self.stations: list[WeightUse | Junction] = []
        self.notes: list[str] = []
        self.marks: list[str] = []  # nodes of unknown width that were concatenated
        self.ways = torch.empty(0, dtype=torch.float64)  # the rows behind each id

    def run_node(self, n: Node) -> Any:
        self.node = n
        value = super().run_node(n)
        if isinstance(value, Everywhere) and n.name in self.shapes:
            return Labels(torch.full(self.shapes[n.name], value.id))
        return value

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return Everywhere(-1)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        tensor = self.fetch_attr(target)
        constant = _constant(tensor)
        return Labels(torch.tensor(-1).expand(tensor.shape)) if isinstance(constant, Everywhere) else constant

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        return self.apply(operation_of(module), module, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.apply(target, getattr(torch.Tensor, target, None), args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        weight = weight_of(self.gm, self.node)
        if weight is not None and target is F.linear:
            return self.weighted(args[0], weight)
        return self.apply(getattr(target, "__name__", str(target)), target, args, kwargs)

    def apply(self, operation: str, function: Callable[..., Any] | None, args: Any, kwargs: Any) -> Any:
        """Follow the rule of an operation, found by its name."""
        operands = operands_of(args, kwargs)
        rule = RULES.get(bare_name(operation))
        try:
            if not operands:
                return tree_map(_constant, function(*args, **kwargs)) if function else Everywhere(-1)
            if rule:
                return rule(self, function, args, kwargs)
        except (_Width, UnknownShape):
            raise
        except Exception as error:
            # Without example inputs it is the guess of shapes that is wrong; with them, the rule does not fit.
            if not self.shapes:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise UnknownShape(f"{self.node.name} fails ({reason[0]})") from error
        return self.anything(operation, operands) if operands else Everywhere(-1)

    def anything(self, operation: str, operands: list[Labels | Everywhere]) -> Labels | Everywhere:
        """An operation without a rule: every row that goes in may come out everywhere."""
        spread = self.any_of(operands)
        if spread >= 0:
            self.notes.append(f"{self.node.name}: {operation} has no label rule; walks cross it to any row before it")
        return Everywhere(spread)

    def any_of(self, operands: list[Labels | Everywhere]) -> int:
        """One id that leads to every id in the operands."""
        ids = torch.cat([self.ids_of(x) for x in operands]).unique()
        return int(self.gather(ids[None])) if len(ids) else -1

    def ids_of(self, x: Labels | Everywhere) -> Tensor:
        """The distinct ids of an operand, without -1."""
        ids = x.ids.unique() if isinstance(x, Labels) else torch.tensor([x.id])
        return ids[ids >= 0]

    def weighted(self, x: Labels | Everywhere, weight: Tensor) -> Labels:
        """A linear call: the ids of its input are its feature map, its output has ids of its own."""
        rows, features = weight.shape
        lead = self.shapes[self.node.name][:-1] if self.shapes else self.lead
        if isinstance(x, Everywhere):
            feature_map = torch.full((features,), x.id)
            self.widths[self.node.all_input_nodes[0].name] = features
        else:
            self.check_width(x.ids, features)
            feature_map = self.gather(x.ids.reshape(-1, features).t()).clamp(min=-1)
            lead = x.ids.shape[:-1]
        base = len(self.ways)
        name = self.names[id(weight)]
        calls = 1 + sum(isinstance(s, WeightUse) and s.weight == name for s in self.stations)
        call = name if calls == 1 else f"{name}#{calls}"
        self.stations.append(WeightUse(call, name, self.node.name, base, rows, feature_map))
        self.ways = torch.cat([self.ways, torch.ones(rows, dtype=torch.float64)])
        return Labels(torch.arange(base, base + rows).expand(*lead, rows))

    def widen(self, x: Everywhere, name: str, shape: torch.Size, dim: int) -> Labels:
        """Give a tensor of unknown shape that of its neighbours in a concatenation, but for its width."""
        if name not in self.widths:
            if x.id >= 0:
                raise UnknownShape(f"{self.node.name} needs the shape of {name}")
            # A mark in place of "no row", one wide: the next weighted call counts the marks and finds the width.
            self.marks += [] if name in self.marks else [name]
            x = Everywhere(-2 - self.marks.index(name))
        wide = list(shape)
        wide[dim] = self.widths.get(name, 1)
        return Labels(torch.full(wide, x.id))

    def check_width(self, ids: Tensor, needed: int) -> None:
        """Refuse a wrong guess of shapes; find the width of what was concatenated with unknown width."""
        missing = needed - ids.shape[-1]
        if missing == 0:
            return
        marks, counts = ids.reshape(-1, ids.shape[-1])[0].unique(return_counts=True)
        unknown = marks < -1
        if unknown.sum() == 1 and missing % int(counts[unknown]) == 0:
            width = 1 + missing // int(counts[unknown])
            if width >= 0:
                raise _Width(self.marks[-2 - int(marks[unknown])], width)
        raise UnknownShape(f"{self.node.name} takes {needed} features and was given {ids.shape[-1]}")

    def meet(self, ids: list[Tensor]) -> Tensor:
        """The ids where tensors of one shape are added."""
        return self.gather(torch.stack([i.reshape(-1) for i in ids], 1)).reshape(ids[0].shape)

    def gather(self, ids_NM: Tensor) -> Tensor:
        """One id for each place ``(N,)`` that the ids ``(N, M)`` lead to: theirs, or that of a new junction."""
        ids_N = ids_NM.amax(1)
        several_N = ((ids_NM != ids_N[:, None]) & (ids_NM >= 0)).any(1)
        if not bool(several_N.any()):
            return ids_N
        # Repeats and "no row" become one more of the largest id, so that equal sets look equal.
        sorted_SM = ids_NM[several_N].sort(1).values
        idle_SM = (sorted_SM < 0) | _repeats(sorted_SM)
        canonical_SM = torch.where(idle_SM, sorted_SM[:, -1:], sorted_SM).sort(1).values
        members_JM, place_S = canonical_SM.unique(dim=0, return_inverse=True)
        most = int((~_repeats(members_JM)).sum(1).max())
        members_JM = members_JM[:, :most] if most < members_JM.shape[1] else members_JM
        ways_JM = self.ways[members_JM].masked_fill(_repeats(members_JM), 0).cumsum(1)
        base = len(self.ways)
        self.stations.append(Junction(self.node.name, base, members_JM, ways_JM))
        self.ways = torch.cat([self.ways, ways_JM[:, -1]])
        return ids_N.masked_scatter(several_N, base + place_S)


def _repeats(sorted_NM: Tensor) -> Tensor:
    """Where an entry equals its left neighbour."""
    repeats = torch.zeros_like(sorted_NM, dtype=torch.bool)
    repeats[:, 1:] = sorted_NM[:, 1:] == sorted_NM[:, :-1]
    return repeats


def _constant(value: Any) -> Any:
    """A value that no row has part in: whole numbers stay (they may be indices), floats are "no row"."""
    if isinstance(value, Tensor):
        return Everywhere(-1) if value.is_floating_point() or value.is_complex() else value.clone()
    return value
