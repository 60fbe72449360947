"""Arguments and outputs of an exported model: nested, and of the caller's own types."""

import copy
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import rwfx
from rwfx.capture import capture


@dataclass
class Scored:
    logits: torch.Tensor
    loss: torch.Tensor | None = None
    length: int = 0


class Pair(NamedTuple):
    first: torch.Tensor
    second: dict


OUTPUTS = {
    "tensor": lambda y, n: y,
    "tuple": lambda y, n: (y, [y + 1, None], n),
    "dict": lambda y, n: {"y": y, "more": {"twice": 2 * y, "size": n, "name": "a"}},
    "ordered dict": lambda y, n: OrderedDict(y=y, n=n),
    "named tuple": lambda y, n: Pair(y, {"n": n}),
    "dataclass": lambda y, n: Scored(y, length=n),
    "list of dataclasses": lambda y, n: [Scored(y, y.sum(), n), Scored(y)],
}


class Model(nn.Module):
    def __init__(self, give_out):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.give_out = give_out

    def forward(self, x):
        h = self.a(x).relu()
        if x.shape[0] > 100:  # not to be followed symbolically
            h = h * 2
        return self.give_out(self.b(h), x.shape[0])


def sparse(model, inputs, **options):
    return rwfx.transform(model, num_paths=3, break_even=False, example_inputs=inputs, **options)


@torch.no_grad()
def written(module, x):
    """Every key, number and tensor of an output, and the types around them."""
    return str(module(x))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_have_the_structure_of_the_model_s(kind):
    model = Model(OUTPUTS[kind])
    found = sparse(model, torch.randn(2, 4))
    assert "captured by torch.export" in str(found.report)
    for batch in (1, 5):
        x = torch.randn(batch, 4)
        assert type(found(x)) is type(model(x))
        assert written(found, x) == written(model, x)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_what_is_pickled_copied_or_compiled_gives_the_same(kind):
    model = Model(OUTPUTS[kind])
    x = torch.randn(2, 4)
    found = sparse(model, x)
    found.give_out = None  # a lambda, which no graph reads
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found), compiled):
        for train in (True, False):
            other.train(train)
            assert written(other, x) == written(found.train(train), x)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, batch, *more, weights=None, **options):
        x = batch["x"] if isinstance(batch, dict) else batch.logits
        if x.shape[0] > 100:
            return x
        y = self.b(self.a(x).relu())
        for other in more:
            y = y + other
        for weight in weights or ():
            y = y * weight
        return y + options["shift"] if "shift" in options else y


def some(*sizes):
    return torch.randn(*sizes)


ARGUMENTS = {
    "dict": lambda n: (({"x": some(n, 4), "name": "a"},), {}),
    "dataclass": lambda n: ((Scored(some(n, 4)),), {}),
    "list by keyword": lambda n: (({"x": some(n, 4)},), {"weights": [some(n, 3), some(3)]}),
    "more positional": lambda n: (({"x": some(n, 4)}, some(n, 3), some(3)), {}),
    "more by keyword": lambda n: (({"x": some(n, 4)},), {"shift": some(3)}),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_may_be_nested_and_of_any_kind(kind):
    model = Nested()
    args, kwargs = ARGUMENTS[kind](2)
    found = sparse(model, {"batch": args[0], **kwargs} if kwargs else args)
    for batch in (2, 5):
        args, kwargs = ARGUMENTS[kind](batch)
        assert_close(found(*args, **kwargs), model(*args, **kwargs), rtol=0, atol=0)
        found(*args, **kwargs).sum().backward()


def test_a_constant_inside_of_a_nested_argument_is_checked():
    found = sparse(Nested(), ({"x": some(2, 4), "name": "a"},))
    with pytest.raises(AssertionError, match=r"batch\['name'\] has been specialized"):
        found({"x": some(2, 4), "name": "b"})


class Cache:
    def __iter__(self):
        return iter(())


def test_what_a_graph_cannot_make_or_take_is_named():
    captured = capture(Model(lambda y, n: {"y": y, "cache": Cache()}), some(2, 4))
    assert "gives out an object of type Cache at ['cache']" in captured.notes[-1]
    captured = capture(Nested(), {"batch": {"x": some(2, 4)}, "weights": Cache()})
    assert "argument weights of Nested.forward is of type Cache" in captured.notes[-1]


@pytest.mark.parametrize("kind", OUTPUTS)
def test_examples_are_left_out_behind_any_container(kind):
    found = sparse(Model(OUTPUTS[kind]), some(6, 4), examples=0.5)
    x = some(6, 4).requires_grad_()
    outputs = [leaf for leaf in leaves_of(found(x)) if isinstance(leaf, torch.Tensor) and leaf.dim() == 2]
    sum(y.square().sum() for y in outputs).backward()
    assert found.examples == (3, 6)
    assert int(x.grad.any(1).sum()) == 3


def leaves_of(output):
    if isinstance(output, Scored):
        output = vars(output)
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else None
    return [output] if parts is None else [leaf for part in parts for leaf in leaves_of(part)]
