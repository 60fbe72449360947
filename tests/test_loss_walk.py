"""Walks that start at pairs of an example and an output unit: ``RandomWalk(start="loss")`` with ``examples=``."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import rwfx
from rwfx.ops.loss_walk import walk_from_loss
from rwfx.passes.sample_rows import SAMPLER

EXACT = {"rtol": 0, "atol": 1e-12}
WALK = rwfx.RandomWalk(density=0.5, start="loss")


def model_of(*widths):
    torch.manual_seed(0)
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def batch_of(model, size=20):
    torch.manual_seed(1)
    return torch.randn(size, model[0].in_features, dtype=torch.float64), torch.randint(model[-1].out_features, (size,))


def gradient_at_output(model, x, y):
    output = model(x).detach().requires_grad_()
    F.cross_entropy(output, y).backward()
    return output.grad


def oracle(model, x, y, examples, rows):
    """Gradients with the output gradient of every linear call zeroed outside the examples and the call's rows."""
    model.zero_grad()
    taking_part = torch.zeros(len(x), 1, dtype=x.dtype).index_fill(0, examples, 1.0)
    h = x
    for k, layer in enumerate(model):
        h = layer(h)
        if isinstance(layer, nn.Linear):
            kept = rows.get(f"{k}.weight", torch.arange(layer.out_features))
            mask = taking_part * torch.zeros(layer.out_features, dtype=x.dtype).index_fill(0, kept, 1.0)
            h.register_hook(lambda g, mask=mask: g * mask)
    F.cross_entropy(h, y).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def expected_draw(sparse, model, x, y, step):
    """What the walks of a step draw: the examples and the rows of each weight."""
    sampler = sparse.get_submodule(SAMPLER)
    kept, head, layout, *rule = sampler.walk_arguments()
    weights = [sparse.get_parameter(name) for name in sampler.crossed]
    state = torch.tensor([int(sampler.draws[0]), step])
    count = -(-3 * len(x) // 10)
    g = gradient_at_output(model, x, y)
    tables = sampler._tables.tensors()
    examples, *rows = walk_from_loss(g, count, sampler.exactly, weights, kept, tables, head, layout, state, *rule)
    return examples, dict(zip(sampler.kept, rows, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_gradients_are_those_of_the_examples_and_rows_of_one_draw(grad, compiled):
    model = model_of(12, 16, 14, 5)
    x, y = batch_of(model)
    sparse = rwfx.transform(model, rows=WALK, examples=0.3, grad=grad, break_even=False, seed=1)
    run = torch.compile(sparse, fullgraph=True) if compiled else sparse
    for step in range(3):
        examples, rows = expected_draw(sparse, model, x, y, step)
        expected = oracle(model, x, y, examples, rows)
        F.cross_entropy(run(x), y).backward()
        for name, drawn in rows.items():
            assert torch.equal(sparse.rows[name], drawn), name
        for p, e in zip(model.parameters(), expected, strict=True):
            assert_close(p.grad.to_dense() if p.grad.is_sparse else p.grad, e, **EXACT)
        model.zero_grad()
    assert sparse.examples == (6, 20)


def test_the_first_pair_of_a_walk_follows_the_gradient():
    g = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    sampler = rwfx.transform(
        model_of(4, 3), rows=rwfx.RandomWalk(density={"*": 0.1}, start="loss"), examples=1, break_even=False
    ).get_submodule(SAMPLER)
    weights, tables = [torch.ones(3, 4)], sampler._tables.tensors()
    kept, head, layout, _, temperature, epsilon = sampler.walk_arguments()
    counts = torch.zeros(4, 3)
    draws = 4000
    for step in range(draws):
        state = torch.tensor([7, step])
        (example,), (unit,) = walk_from_loss(
            g, 1, [1], weights, kept, tables, head, layout, state, 1, temperature, epsilon
        )
        counts[example, unit] += 1
    expected = g / g.sum()
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 4 * error).all()


def test_an_example_whose_gradient_is_not_finite_is_kept():
    sparse = rwfx.transform(model_of(6, 8, 3), rows=WALK, examples=1, break_even=False)
    x, y = batch_of(model_of(6, 8, 3))
    loss = F.cross_entropy(sparse(x), y, reduction="none")
    (loss * torch.ones(20, dtype=x.dtype).index_fill(0, torch.tensor([13]), torch.nan)).sum().backward()
    assert sparse.get_parameter("2.bias").grad.isnan().any()


def test_a_resumed_run_draws_on():
    model = model_of(12, 16, 14, 5)
    x, y = batch_of(model)
    first, second = (rwfx.transform(model, rows=WALK, examples=0.3, break_even=False, seed=s) for s in (1, 2))
    F.cross_entropy(first(x), y).backward()
    second.load_sampler_state(first.sampler_state())
    assert all(torch.equal(second.rows[name], rows) for name, rows in first.rows.items())
    for sparse in (first, second):
        F.cross_entropy(sparse(x), y).backward()
    assert all(torch.equal(second.rows[name], rows) for name, rows in first.rows.items())


def test_without_gradients_nothing_is_drawn_and_eval_is_dense():
    model = model_of(12, 16, 14, 5)
    x, _ = batch_of(model)
    sparse = rwfx.transform(model, rows=WALK, examples=0.3, break_even=False)
    with torch.no_grad():
        assert torch.equal(sparse(x), model(x))
    assert not any(len(rows) for rows in sparse.rows.values())
    assert torch.equal(sparse.eval()(x), model(x))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x):
        h = self.stem(x).relu()
        return self.a(h), self.b(h)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (model_of(6, 8, 3), {"rows": WALK}, r'start="loss" draws examples and rows together'),
        (model_of(6, 8, 3), {"rows": WALK, "examples": rwfx.SampledExamples(0.3)}, r"examples= a fraction or a number"),
        (model_of(6, 8, 3), {"rows": rwfx.AdaptiveWalk(density=0.5, start="loss"), "examples": 0.3}, "for RandomWalk"),
        (model_of(6, 8, 3), {"rows": rwfx.RandomWalk(20, start="loss"), "examples": 0.3}, "needs a density"),
        (model_of(6, 8, 3), {"rows": WALK, "examples": 0.3, "resample_every": 2}, "resample_every"),
        (Two(), {"rows": WALK, "examples": 0.3}, "needs one output weight"),
        (nn.Sequential(*model_of(6, 8, 3), nn.Tanh()), {"rows": WALK, "examples": 0.3}, "output is that of a linear"),
    ],
    ids=["no examples", "drawn", "adaptive", "no density", "resample", "two heads", "behind the head"],
)
def test_what_it_cannot_do_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        rwfx.transform(model, break_even=False, **options)
