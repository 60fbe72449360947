"""``torch.compile(model, backend=rwfx.backend(...))``, and graphs that break."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import masked_gradients, to_dense
from torch import nn
from torch.testing import assert_close

import rwfx


class Broken(nn.Module):
    """Two graphs: the second has a transposed product, a reshape by the batch, and a weight without a module."""

    def __init__(self, breaks=True):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.last, self.w = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 4))
        self.breaks = breaks

    def forward(self, x):
        h = F.relu(self.first(x))
        for block in self.blocks:
            h = h + block(h)
        if self.breaks:
            torch._dynamo.graph_break()
        return (self.last(h) @ self.w.t()).view(x.size(0), 2, 2)


def batch(n):
    return torch.randn(n, 6, dtype=torch.float64)


def compiled(model, **options):
    backend = rwfx.backend(**{"num_paths": 3, "inner": "eager", "seed": 1, **options})
    return torch.compile(model, backend=backend), backend


def rows_of(backend, graphs):
    return {name: rows for graph in backend.graphs[-graphs:] for name, rows in graph.rows.items()}


CASES = {
    "one graph": (False, {}),
    "two graphs": (True, {}),
    "row gradients": (True, {"grad": "rows", "inner": "aot_eager"}),
    "masked": (False, {"mode": "masked", "dx": "rows"}),
    "full dx": (False, {"dx": "full"}),
}


@pytest.mark.parametrize(("breaks", "options"), CASES.values(), ids=CASES)
def test_the_gradients_are_the_dense_ones_with_masks_at_every_size(breaks, options):
    model = Broken(breaks).double()
    step, backend = compiled(model, **options)
    for n in (3, 5, 7):
        x = batch(n)
        model.zero_grad()
        step(x).square().sum().backward()
        found = {name: to_dense(p.grad).clone() for name, p in model.named_parameters()}
        rows = rows_of(backend, 1 + breaks)
        assert rows.keys() == {name for name, p in model.named_parameters() if p.dim() > 1}
        dx = options.get("dx", "rows")
        expected = masked_gradients(model, lambda m: m(x).square().sum(), rows, dx)  # noqa: B023
        assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # One for the first size, one for any other.
    assert len(backend.graphs) == len(backend.reports) == 2 * (1 + breaks)
    assert [report.route for report in backend.reports] == ["torch.compile"] * len(backend.reports)


def test_one_graph_that_is_run_for_two_modules_gives_each_its_own_gradients():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            torch._dynamo.graph_break()
            return torch.tanh(self.fc(x))

    blocks = [Block().double() for _ in range(3)]
    backend = rwfx.backend(num_paths=2, inner="eager", seed=1)
    steps = [torch.compile(block, backend=backend) for block in blocks]
    x = batch(4)
    for step, block in zip(steps, blocks, strict=True):
        step(x).square().sum().backward()
        found, rows = block.fc.weight.grad.clone(), rows_of(backend, 1)
        expected = masked_gradients(block, lambda m: m(x).square().sum(), rows, "rows")
        assert_close(found, expected["fc.weight"])
    assert len(backend.graphs) == 1


def test_without_gradients_or_weights_a_graph_is_compiled_as_it_is():
    handed = []

    def inner(gm, example_inputs):
        handed.append(gm)
        return gm

    model = Broken(breaks=False).double()
    step, backend = compiled(model, inner=inner)
    with torch.no_grad():
        assert_close(step(batch(3)).shape, torch.Size([3, 2, 2]))
    torch.compile(torch.sin, backend=backend)(batch(3))
    assert (len(handed), backend.graphs) == (2, [])
    step(batch(3)).sum().backward()
    assert (len(handed), len(backend.graphs)) == (3, 1)
    assert any(node.target is torch.ops.rwfx.row_linear.default for node in handed[-1].graph.nodes)


def test_rows_are_drawn_anew_at_every_forward_without_a_recompilation():
    torch._dynamo.reset()
    model = Broken().double()
    step, backend = compiled(model, inner="aot_eager")
    step(batch(4))
    seen = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(6):
            step(batch(4)).sum().backward()
            seen.append(str(rows_of(backend, 2)))
    assert len(set(seen)) > 1


def test_equal_seeds_draw_equal_rows():
    rows = []
    for _ in range(2):
        torch._dynamo.reset()
        torch.manual_seed(5)
        step, backend = compiled(Broken().double())
        step(batch(4))
        rows.append(rows_of(backend, 2))
    assert_close(*rows)


def test_a_graph_whose_weights_all_stay_dense_is_compiled_as_it_is_with_a_warning():
    model = nn.Sequential(nn.Embedding(5, 4), nn.ReLU())
    step, backend = compiled(model)
    with pytest.warns(UserWarning, match="a graph with weights is compiled as it is: the model has no weight with"):
        step(torch.tensor([1, 2])).sum().backward()
    assert backend.graphs == []


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_paths": 0}, ValueError, "num_paths must be"),
        ({"mode": "dense"}, ValueError, "mode must be one of"),
        ({"inner": "gcc"}, ValueError, r"inner must be a backend of torch.compile \(.*inductor.*\), got 'gcc'"),
        ({"density": {"fc": 0.1}}, ValueError, "a density by name is for rwfx.transform"),
        ({"rows": "walk"}, TypeError, "rows must be a row policy"),
        ({"seed": -1}, ValueError, "seed"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        rwfx.backend(**options)


@pytest.mark.slow
def test_inductor_compiles_what_comes_out():
    model = Broken().double()
    step, backend = compiled(model, inner="inductor", grad="rows")
    x = batch(5)
    step(x).square().sum().backward()
    found = {name: to_dense(p.grad).clone() for name, p in model.named_parameters()}
    expected = masked_gradients(model, lambda m: m(x).square().sum(), rows_of(backend, 2), "rows")
    assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("include", "sparse"), [("all", []), (("all", "head"), [("a.weight",), ("b.weight",)])])
def test_what_gives_the_outputs_of_a_graph_has_a_density_where_it_is_asked_for(include, sparse):
    class TwoGraphs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = self.a(x).relu()
            torch._dynamo.graph_break()
            return self.b(h)

    backend = rwfx.backend(density=0.5, include=include, inner="eager")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        torch.compile(TwoGraphs(), backend=backend)(torch.randn(3, 6)).sum().backward()
    assert [report.sparse for report in backend.reports] == sparse
    with pytest.raises(ValueError, match="include takes"):
        rwfx.backend(include="a.weight")
