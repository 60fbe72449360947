"""A run of a graph on labels: it carries them from call to call, and is what the rules of operations work with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from rwfx.junctions import Register
from rwfx.label_rules import RULES, bare_name, operation_of
from rwfx.label_values import Everywhere, Labels, UnknownShape, core, nowhere, operands_of
from rwfx.passes.conv_spellings import TRANSPOSED
from rwfx.passes.normalize import CONVOLUTIONS
from rwfx.passes.weights import weights_of


@dataclass(frozen=True)
class Guess:
    """What is known, or taken to be known, of the shapes."""

    shapes: Mapping[str, torch.Size] | None = None
    lead: tuple[int, ...] = (2,)
    side: int | None = None


class Width(Exception):
    """A tensor of unknown width that is concatenated to known features must be this wide."""

    def __init__(self, node: str, width: int) -> None:
        self.node, self.width = node, width


class LabelRun(fx.Interpreter):
    """Runs a graph on labels, and is what the rules of the operations work with."""

    def __init__(self, gm: GraphModule, names: Mapping[int, str], guess: Guess, widths: dict[str, int]) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.gm, self.names, self.widths = gm, names, widths
        self.weights = weights_of(gm)
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
        """The value of a node, in its shape where that is known."""
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
        """An input: it comes from no row. A size that ``torch.compile`` leaves open is the example's."""
        size = self.node.meta.get("example_value")
        return size.node.hint if isinstance(size, torch.SymInt) else Everywhere(-1)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter or a buffer."""
        return _constant(self.fetch_attr(target))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A call of a module, by the operation that it performs."""
        module = self.fetch_attr(target)
        return self.apply(operation_of(module), module, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A call of a method."""
        return self.apply(target, getattr(torch.Tensor, target, None), args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A call of a function: on a weight, or by its rule."""
        weight = self.weights.get(self.node)
        if weight is not None and target in CONVOLUTIONS:
            return self.convolution(args[0], weight.name, weight.of(self.gm), target, args[3:])
        if weight is not None:
            return self.linear(args[0], weight.name, weight.of(self.gm).shape)
        return self.apply(spelled(target), target, args, kwargs)

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
        except (Width, UnknownShape):
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

    def linear(self, x: Labels | Everywhere, weight: str, shape: torch.Size) -> Labels:
        """A linear call: the ids of its input are its feature map, its output has ids of its own.

        In a grouped product they are so for every group, of which the weight's last dimension has the number.
        """
        rows, features = shape[:2]
        if isinstance(x, Everywhere):
            feature_map = torch.full((features,), x.id)
            self.widths[self.node.all_input_nodes[0].name] = features
            lead = self.shapes[self.node.name][:-1] if self.shapes else self.lead
        else:
            self.check_width(x.ids, features)
            feature_map = self.features_of(x.ids, x.ids.dim() - 1)
            lead = x.ids.shape[:-1]
        ids = self.register.use(weight, rows, feature_map, kernel=shape[2:].numel())
        return Labels(ids.expand(*lead, len(ids)))

    def convolution(
        self, x: Labels | Everywhere, name: str, weight: Tensor, target: Callable[..., Any], options: Any
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
        ids = self.register.use(name, rows, feature_map, groups, weight.shape[2:].numel(), transposed)
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
        if not ids.numel():
            raise UnknownShape(f"{self.node.name} is given no number at all on example_inputs: give one of each kind")
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
                raise Width(self.marks[-2 - int(marks[unknown])], width)
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


def spelled(target: Any) -> str:
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
