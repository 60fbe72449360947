"""Labels: where each number of an activation comes from, found by running a model's graph on row numbers.

In: a normalized ``GraphModule``. Out: a ``Trail``: the stations of its weight graph and the ids in its output.

Instead of numbers, the graph is run on *labels*: the value of a tensor is a tensor of the same shape that
says, for every element, the global id of the row that produced it (-1: none, it comes from an input or
a constant). A weighted call gives fresh ids, one per row; structural operations (reshape, concatenate,
slice, ...) are executed on the ids, so no rule has to know which dimension holds the features; elementwise
operations leave the ids where they are; where several ids meet (an addition, a pool) a *junction* gives the
place an id of its own that leads to all of them. ``rwfx.label_rules`` lists the operations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from rwfx.junctions import Register
from rwfx.label_rules import RULES, bare_name, operation_of
from rwfx.label_values import Everywhere, Labels, UnknownShape, core, nowhere, operands_of
from rwfx.passes.conv_spellings import TRANSPOSED
from rwfx.passes.normalize import CONVOLUTIONS, weight_of
from rwfx.stations import Junction, Station, WeightUse, leaves
from rwfx.weight_views import weight_view

# Where no example says: the leading dimensions of the first linear call (a batch, of sequences, of grids), and how many
# places a side of the first convolution's input has.
LEADS = ((2,), (2, 3), (2, 3, 5))
SIDES = (224, 64, 32, 28, 16, 128, 96, 8)


@dataclass(frozen=True)
class Trail:
    """What a run on labels showed."""

    stations: tuple[Station, ...]  # in execution order, ids rising
    output_ids: Tensor  # (n,) int64, distinct
    notes: tuple[str, ...]  # where an operation could only be followed roughly


def follow_rows(gm: GraphModule, names: Mapping[int, str], shapes: Mapping[str, torch.Size] | None = None) -> Trail:
    """Run ``gm`` on labels.

    Args:
        gm: a normalized graph module.    names: the name of each parameter, by ``id``.
        shapes: the shape of each node's value. Without them the leading dimensions of the first linear call
            and the size of images are guessed (``LEADS``, ``SIDES``); a guess holds when every later weighted call
            finds as many features as its weight has. Where none holds for a model with convolutions, any row of a
            convolution may feed what is behind it.

    Raises:
        ValueError: no guess holds (the remedy is to give example inputs), or the shapes contradict the graph.
    """
    with torch.random.fork_rng(devices=[]):
        if shapes is not None:
            try:
                return _run(gm, names, _Guess(shapes=shapes))[0]
            except UnknownShape as error:
                raise ValueError(f"cannot tell which row feeds which input feature ({error}).") from error
        convolves = any(node.target in CONVOLUTIONS and weight_of(gm, node) is not None for node in gm.graph.nodes)
        failures: list[str] = []
        for side in (*SIDES, None) if convolves else (None,):
            if trail := _guessed(gm, names, side, failures):
                return trail
    raise ValueError(
        "cannot tell which row feeds which input feature without the shapes of the inputs "
        f"({'; '.join(dict.fromkeys(failures))}). Give example_inputs."
    )


@dataclass(frozen=True)
class _Guess:
    """What is known, or taken to be known, of the shapes."""

    shapes: Mapping[str, torch.Size] | None = None
    lead: tuple[int, ...] = LEADS[0]
    side: int | None = None


def _guessed(gm: GraphModule, names: Mapping[int, str], side: int | None, failures: list[str]) -> Trail | None:
    """What all guesses of the leading dimensions that fit come to."""
    trails = []
    for lead in LEADS:
        try:
            trail, lead_was_guessed = _run(gm, names, _Guess(lead=lead, side=side))
            trails.append(trail)
            if not lead_was_guessed:
                break
        except UnknownShape as error:
            failures.append(f"with {len(lead) + 1} dimensions, {error}")
    if trails and all(_agree(trails[0], trail) for trail in trails[1:]):
        return trails[0]
    if trails:
        failures[:] = ["inputs with more and with fewer dimensions fit, and differ in what reaches what"]
    return None


def _agree(a: Trail, b: Trail) -> bool:
    """Whether two guesses of the shapes come to the same weight graph."""
    uses = [[s for s in trail.stations if isinstance(s, WeightUse)] for trail in (a, b)]
    return all(
        x.base == y.base and torch.equal(x.feature_map, y.feature_map) for x, y in zip(*uses, strict=True)
    ) and torch.equal(leaves(a.stations, a.output_ids), leaves(b.stations, b.output_ids))


def _run(gm: GraphModule, names: Mapping[int, str], guess: _Guess) -> tuple[Trail, bool]:
    widths: dict[str, int] = {}
    while True:
        run = _LabelRun(gm, names, guess, widths)
        try:
            output = run.run()
        except _Width as found:
            widths[found.node] = found.width
            continue
        ids = torch.cat([torch.empty(0).long(), *[run.ids_of(x) for x in operands_of(output)]]).unique()
        trail = Trail(tuple(run.register.stations), ids, tuple(dict.fromkeys(run.register.notes)))
        return _pruned(trail), run.lead_was_guessed


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
    """Runs a graph on labels, and is what the rules of the operations work with."""

    def __init__(self, gm: GraphModule, names: Mapping[int, str], guess: _Guess, widths: dict[str, int]) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.gm, self.names, self.widths = gm, names, widths
        self.shapes, self._lead, self.side = guess.shapes or {}, guess.lead, guess.side
        self.lead_was_guessed = False
        self.register = Register()
        self.meet, self.reduce, self.choose = self.register.meet, self.register.reduce, self.register.choose
        self.share_rows = self.register.share_rows
        self.marks: list[str] = []  # nodes of unknown width that were concatenated
        self.operation = ""  # the bare name of the call

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dimensions that an input is taken to have."""
        self.lead_was_guessed = True
        return self._lead

    def run_node(self, n: Node) -> Any:
        self.node = n
        self.register.node = n.name
        value = super().run_node(n)
        if n.name not in self.shapes:
            return value
        if isinstance(value, Labels) and value.ids.shape != self.shapes[n.name]:
            try:  # a constant that is no operand may have been broadcast
                return Labels(value.ids.expand(self.shapes[n.name]))
            except RuntimeError:
                value = self.anything(self.operation, [value])
        return nowhere(self.shapes[n.name], value.id) if isinstance(value, Everywhere) else value

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return Everywhere(-1)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _constant(self.fetch_attr(target))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        return self.apply(operation_of(module), module, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.apply(target, getattr(torch.Tensor, target, None), args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        weight = weight_of(self.gm, self.node)
        if weight is not None and target is not F.linear:
            return self.convolution(args[0], weight, target, args[3:])
        if weight is not None:
            return self.linear(args[0], weight, slice(None))
        view = weight_view(self.gm, self.node)
        if view is not None and self.register.agrees(self.names[id(view.parameter)], view.transposed):
            x = args[self.node.args.index(view.x)]
            return self.linear(x, view.parameter, slice(view.first, view.first + view.rows), view.transposed)
        return self.apply(_spelled(target), target, args, kwargs)

    def apply(self, spelling: str, function: Callable[..., Any] | None, args: Any, kwargs: Any) -> Any:
        """Follow the rule of an operation, found by its name."""
        operands = operands_of(args, kwargs)
        self.operation = bare_name(spelling)
        rule = RULES.get(self.operation)
        try:
            if not operands:
                return _executed(function, args, kwargs) if function else Everywhere(-1)
            if isinstance(function, type):  # a container of what it is called with
                return args, kwargs
            if rule:
                value = rule(self, function, args, kwargs)
                return _written(args[0], value) if _is_in_place(spelling) else value
        except (_Width, UnknownShape):
            raise
        except Exception as error:
            # Without example inputs it is the guess of shapes that is wrong; with them, the rule does not fit.
            if not self.shapes:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise UnknownShape(f"{self.node.name} fails ({reason[0]})") from error
        return self.anything(self.operation, operands) if operands else Everywhere(-1)

    def anything(self, operation: str, operands: list[Labels | Everywhere]) -> Labels | Everywhere:
        """An operation without a rule: every row that goes in may come out everywhere."""
        spread = self.any_of(operands)
        if spread >= 0:
            self.register.notes.append(
                f"{self.node.name}: {operation} has no label rule; walks cross it to any row before it"
            )
        return Everywhere(spread)

    def any_of(self, operands: list[Labels | Everywhere]) -> int:
        """One id that leads to every id in the operands."""
        return self.register.any_of(torch.cat([self.ids_of(x) for x in operands]))

    def ids_of(self, x: Labels | Everywhere) -> Tensor:
        """The distinct ids of an operand, without -1."""
        ids = core(x.ids).unique() if isinstance(x, Labels) else torch.tensor([x.id])
        return ids[ids >= 0]

    def meet_operands(self, operands: list[Labels | Everywhere]) -> Labels | Everywhere:
        """What is added, broadcast to one shape."""
        if all(isinstance(x, Everywhere) for x in operands):
            return Everywhere(self.any_of(operands))
        shape = torch.broadcast_shapes(*[x.ids.shape for x in operands if isinstance(x, Labels)])
        ids = [
            x.ids.expand(shape) if isinstance(x, Labels) else torch.tensor(x.id).expand(shape)
            for x in operands
            if isinstance(x, Labels) or x.id >= 0
        ]
        return Labels(self.meet(ids))

    def shape_of(self, function: Callable[..., Any], args: Any, kwargs: Any) -> torch.Size:
        """The shape of what an operation gives, or of the first of several."""
        if self.node.name in self.shapes:
            return self.shapes[self.node.name]
        args, kwargs = tree_map(_as_meta, (args, kwargs))
        value = function(*args, **kwargs)
        return (value if isinstance(value, Tensor) else value[0]).shape

    def linear(self, x: Labels | Everywhere, weight: Tensor, part: slice, transposed: bool = False) -> Labels:
        """A linear call: the ids of its input are its feature map, its output has ids of its own.

        ``part``: which of the weight's rows it has; the others come to nothing here.
        """
        rows, features = weight.t().shape if transposed else weight.shape
        if isinstance(x, Everywhere):
            feature_map = torch.full((features,), x.id)
            self.widths[self.node.all_input_nodes[0].name] = features
            lead = self.shapes[self.node.name][:-1] if self.shapes else self.lead
        else:
            self.check_width(x.ids, features)
            feature_map = self.features_of(x.ids, x.ids.dim() - 1)
            lead = x.ids.shape[:-1]
        ids = self.use(weight, rows, feature_map, 1, 1, transposed)[part]
        return Labels(ids.expand(*lead, len(ids)))

    def convolution(
        self, x: Labels | Everywhere, weight: Tensor, target: Callable[..., Any], options: Any
    ) -> Labels | Everywhere:
        """The same of a convolution, whose features and rows are channels."""
        transposed, spatial = target in TRANSPOSED, CONVOLUTIONS[target]
        groups = options[3]
        rows, features = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
        rows, features = (rows * groups, features) if transposed else (rows, features * groups)
        if isinstance(x, Everywhere) and self.side:
            x = nowhere((self._lead[0], features, *[self.side] * spatial), x.id)
        if isinstance(x, Everywhere):
            feature_map = torch.full((features,), x.id)
        else:
            channels = x.ids.dim() - spatial - 1
            if x.ids.shape[channels] != features:
                raise UnknownShape(f"{self.node.name} takes {features} channels and was given {x.ids.shape[channels]}")
            feature_map = self.features_of(x.ids, channels)
        ids = self.use(weight, rows, feature_map, groups, weight.shape[2:].numel(), transposed)
        if isinstance(x, Everywhere):
            self.register.notes.append(f"{self.node.name}: its places are not known without example_inputs")
            return Everywhere(self.register.any_of(ids))
        try:
            shape = self.shape_of(target, (x, weight, None, *options), {})
        except Exception as error:
            raise UnknownShape(f"{self.node.name} fails ({error})") from error
        return Labels(ids.view(-1, *[1] * spatial).expand(shape))

    def use(self, weight: Tensor, rows: int, feature_map: Tensor, *layout: Any) -> Tensor:
        """The ids of the rows of one use of a parameter."""
        return self.register.use(self.names[id(weight)], rows, feature_map, *layout)

    def features_of(self, ids: Tensor, dim: int) -> Tensor:
        """The id of each feature: along ``dim`` of an input's labels, pooled over the others."""
        found = self.reduce(ids, [d for d in range(ids.dim()) if d != dim])
        return found.reshape(-1).clamp(min=-1)

    def widen(self, x: Everywhere, name: str, shape: torch.Size, dim: int) -> Labels:
        """Give a tensor of unknown shape that of its neighbours in a concatenation, but for its width."""
        if name not in self.widths:
            if x.id >= 0:
                raise UnknownShape(f"{self.node.name} needs the shape of {name}")
            # A mark in place of "no row", one wide: the next linear call counts the marks and finds the width.
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


def _constant(value: Any) -> Any:
    """A value that no row has part in: whole numbers stay (they may be indices), floats are "no row"."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point() or value.is_complex() or value.is_meta:
        return nowhere(value.shape)
    return value.detach().cpu().clone()


def _executed(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A call on constants."""
    on_cpu = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs
    return tree_map(_constant, function(*args, **on_cpu))


def _as_meta(value: Any) -> Any:
    if isinstance(value, Labels):
        return torch.empty(value.ids.shape, device="meta")
    return value.to("meta") if isinstance(value, Tensor) else value


def _spelled(target: Any) -> str:
    """The name that a function was called by; of an ATen operator without its overload."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return getattr(target, "__name__", str(target))


def _is_in_place(spelling: str) -> bool:
    if spelling.startswith("_"):
        return False
    augmented = spelling.startswith("i") and spelling not in RULES and spelling[1:] in RULES  # operator.iadd
    return spelling.endswith("_") or spelling == "setitem" or augmented


def _written(x: Any, value: Any) -> Any:
    """What a call in place gives: the tensor it has written to."""
    if not isinstance(x, Labels) or not isinstance(value, (Labels, Everywhere)):
        return value
    x.write(value.ids if isinstance(value, Labels) else torch.tensor(value.id))
    return x
