"""Conditions on the shapes of inputs, under which an exported graph is the model.

``torch.export`` writes what the forward pass decided by a shape as expressions in Python, such as
``L['tensors'][0].size()[1] == 3``. They become checks in the graph.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy


def check_sizes(graph: fx.Graph, program: ExportedProgram, inputs: Sequence[fx.Node], names: Sequence[str]) -> None:
    """Append a check of every condition of ``program`` on the sizes of ``inputs``, which are called ``names``."""
    tracer = GraphAppendingTracer(graph)
    sizes = [_Sizes(graph, node, tracer) for node in inputs]
    words = {f"L['tensors'][{k}].size()": f"{name}.shape" for k, name in enumerate(names)}
    for condition in _conditions(program, len(inputs)):
        text = condition
        for source, name in words.items():
            text = text.replace(source, name)
        holds = _value_of(ast.parse(condition, mode="eval").body, {"L": {"tensors": sizes}})
        if isinstance(holds, fx.Proxy):
            message = f"the graph was captured with inputs for which {text}; capture with example_inputs of this shape"
            graph.call_function(torch._assert, (holds.node, message))


def _conditions(program: ExportedProgram, num_inputs: int) -> list[str]:
    """The conditions, each once and in a fixed order."""
    found: list[str] = []
    given = [node for node in program.graph.nodes if node.op == "placeholder"][-num_inputs:] if num_inputs else []
    for guard in program._guards_code:
        tree = ast.parse(guard, mode="eval").body
        both = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
        found += [ast.unparse(part) for part in both if not _is_implied(part, given, program)]
    for k, node in enumerate(given):
        for d, size in enumerate(node.meta["val"].shape):
            source = f"L['tensors'][{k}].size()[{d}]"
            limits = _limits(program).get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if isinstance(size, int):
                found.append(f"{source} == {size}")
            elif limits is not None:
                lower, upper = limits.lower, limits.upper
                found += [f"{source} >= {lower}"] if lower > 0 else []
                found += [f"{source} <= {upper}"] if upper.is_finite and upper < 2**31 else []
    return list(dict.fromkeys(found))


def _is_implied(part: ast.expr, given: Sequence[fx.Node], program: ExportedProgram) -> bool:
    """Whether an inequality holds for all sizes within their limits, which are checked themselves."""
    if not isinstance(part, ast.Compare) or any(isinstance(op, ast.Eq) for op in part.ops):
        return False
    examples = [node.meta["val"] for node in given]
    try:
        holds = _value_of(part, {"L": {"tensors": [_Symbols(example) for example in examples]}})
        limits = bound_sympy(sympy.sympify(holds), program.range_constraints)
    except Exception:  # an expression that sympy cannot follow is checked at each call
        return False
    return limits.is_singleton() and bool(limits.lower)


def _value_of(tree: ast.expr, scope: Mapping[str, Any]) -> Any:
    expression = ast.fix_missing_locations(ast.Expression(_AsArithmetic().visit(tree)))
    return eval(
        compile(expression, "<condition>", "eval"), {"torch": torch, "math": _Math(), "_not": operator.not_, **scope}
    )


def _limits(program: ExportedProgram) -> Mapping[Any, ValueRanges[Any]]:
    return program.range_constraints


class _Symbols:
    """Stands for a tensor in a condition: gives its sizes as symbols."""

    def __init__(self, example: Tensor) -> None:
        self.sizes = [size.node.expr if isinstance(size, torch.SymInt) else size for size in example.shape]

    def size(self) -> list[Any]:
        return self.sizes


class _Sizes:
    """Stands for a tensor in a condition: gives its sizes, each read once."""

    def __init__(self, graph: fx.Graph, node: fx.Node, tracer: GraphAppendingTracer) -> None:
        self.graph, self.node, self.tracer = graph, node, tracer
        self.read: dict[int, fx.Proxy] = {}

    def size(self) -> "_Sizes":
        return self

    def __getitem__(self, dim: int) -> fx.Proxy:
        if dim not in self.read:
            size = self.graph.call_function(torch.ops.aten.sym_size.int, (self.node, dim))
            self.read[dim] = fx.Proxy(size, self.tracer)
        return self.read[dim]


class _Math:
    """The module ``math``, whose functions of a proxy are calls in its graph."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(math, name)

        def traced(*numbers: Any) -> Any:
            proxy = next((x for x in numbers if isinstance(x, fx.Proxy)), None)
            return (
                function(*numbers)
                if proxy is None
                else proxy.tracer.create_proxy("call_function", function, numbers, {})
            )

        return traced


class _AsArithmetic(ast.NodeTransformer):
    """``and``, ``or`` and ``not`` as operations that a proxy has."""

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        operation = ast.BitAnd() if isinstance(node.op, ast.And) else ast.BitOr()
        first, *others = [self.visit(value) for value in node.values]
        for other in others:
            first = ast.BinOp(first, operation, other)
        return first

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        operand = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return ast.Call(ast.Name("_not", ast.Load()), [operand], [])
        return ast.UnaryOp(node.op, operand)
