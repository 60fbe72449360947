"""What a probe finds in the backward pass of a sparse weight's calls: candidates and their gradients."""

import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck
from torch.testing import assert_close

import rwfx
from rwfx.nonzeros import draw_keys
from rwfx.ops.candidates import draw_places, random_signs
from rwfx.ops.probe import EXPLORE, RULES
from rwfx.ops.weighted_call import WeightedCall, flat_options
from rwfx.probe import Probe
from rwfx.sparse_weight import SparseWeight

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "linear": ((7, 5), (3, 5), ()),
    "sequence": ((7, 5), (2, 3, 5), ()),
    "vector": ((7, 5), (5,), ()),
    "conv": ((6, 4, 3, 2), (2, 4, 7, 8), ([2, 1], [1, 0], [1, 2], 1)),
    "grouped": ((6, 2, 3, 3), (2, 4, 5, 5), ([1, 1], [1, 1], [1, 1], 2)),
    "line": ((6, 2, 3), (2, 4, 9), ([2], [1], [2], 2)),
    "single": ((6, 4, 3, 3), (4, 5, 5), ([1, 1], [1, 1], [1, 1], 1)),
}
"""The shape of a weight, of an input, and the options of a convolution."""


def sparse(shape, density=0.3, by="nonzeros"):
    rows, columns = shape[0], math.prod(shape[1:])
    keys = draw_keys(rows, columns, round(density * rows * columns))
    return SparseWeight(shape, keys, torch.randn(len(keys), dtype=torch.float64), by=by)


def probed(weight, rule, draws):
    weight.probe = Probe(rule)
    free = weight.rows * weight.columns - weight.nnz
    weight.probe.fit(weight, max(draws, free), weight.rows * weight.columns if rule == "momentum" else max(draws, free))
    if rule == "given":
        free_keys = [key for key in range(weight.rows * weight.columns) if key not in weight.keys().tolist()]
        weight.probe.keys[: free // 2] = torch.tensor(free_keys[: free // 2])
    weight.probe.look(True, key=11, draws=draws, given=free // 2 if rule == "given" else 0)
    return weight.probe


def gradient(weight, x, factor, options):
    """Of the dense weight, in the order of keys, and the call's own output."""
    W = weight.to_dense().detach().requires_grad_()
    y = {2: F.linear, 3: F.conv1d, 4: F.conv2d}[W.dim()](x, W, None, *options)
    (y * factor).sum().backward()
    return W.grad.flatten(1).t().flatten()


def run(layer, rule, draws=20, times=1, by="nonzeros"):
    shape, of_input, options = LAYERS[layer]
    weight = sparse(shape, by=by)
    probe = probed(weight, rule, draws)
    dense = 0
    for _ in range(times):
        x = torch.randn(of_input, dtype=torch.float64)
        y = weight(x, None, *options)
        factor = torch.randn_like(y)
        (y * factor).sum().backward()
        dense = dense + gradient(weight, x, factor, options)
    return weight, probe, dense


@pytest.mark.parametrize("times", [1, 3], ids=["once", "summed"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_candidates_are_the_dense_gradient_there(layer, rule, times):
    for by in ("nonzeros", "dense"):
        weight, probe, dense = run(layer, rule, times=times, by=by)
        keys, grads = probe.candidates()
        assert len(keys) > 0
        assert bool((keys.diff() > 0).all())
        assert not set(keys.tolist()) & set(weight.keys().tolist())
        assert_close(grads, dense[keys], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [*RULES, "momentum"])
@pytest.mark.parametrize("layer", ["linear", "grouped"])
def test_the_operators_are_what_torch_library_asks_of_them(layer, rule):
    shape, of_input, options = LAYERS[layer]
    weight, x = sparse(shape), torch.randn(of_input, dtype=torch.float64)
    y = weight(x, None, *options).detach().requires_grad_()
    probe = probed(weight, rule, 20)
    flat = flat_options(shape[2:], *options) if options else []
    index = weight.ccol_indices, weight.row_indices, weight.crow_indices
    call = x, weight.values.detach(), *index, flat, "nonzeros", rule, probe.state, probe.keys, probe.grads
    opcheck(torch.ops.rwfx.probe.default, (y, *call))
    opcheck(torch.ops.rwfx.probe_.default, (torch.randn_like(y), *call))


@pytest.mark.parametrize("layer", LAYERS)
def test_what_a_probe_looks_at_changes_no_output_and_no_gradient(layer):
    shape, of_input, options = LAYERS[layer]
    weight = sparse(shape)
    x = torch.randn(of_input, dtype=torch.float64, requires_grad=True)
    found = []
    for rule in (None, "graest"):
        if rule:
            probed(weight, rule, 20)
        y = weight(x, None, *options)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight.values))))
    for plain, with_probe in zip(*found, strict=True):
        assert torch.equal(plain, with_probe)


def test_a_probe_that_is_not_due_writes_nothing():
    weight = sparse((7, 5))
    probe = probed(weight, "uniform", 20)
    probe.look(False)
    weight(torch.randn(3, 5, dtype=torch.float64)).sum().backward()
    assert probe.state.tolist() == [0, 0, 0, 0]
    assert not probe.keys.any()
    assert not probe.grads.any()


@pytest.mark.parametrize("layer", LAYERS)
def test_the_dense_rule_keeps_the_largest_gradients_of_places_that_are_free(layer):
    weight, probe, dense = run(layer, "dense", draws=9)
    free = set(range(len(dense))) - set(weight.keys().tolist())
    largest = sorted(free, key=lambda key: -abs(dense[key]))[:9]
    assert probe.candidates()[0].tolist() == sorted(largest)


@pytest.mark.parametrize("layer", LAYERS)
def test_with_no_number_of_draws_every_free_place_is_a_candidate(layer):
    weight, probe, dense = run(layer, "uniform", draws=0)
    assert sorted([*probe.candidates()[0].tolist(), *weight.keys().tolist()]) == list(range(len(dense)))


def test_the_momentum_is_the_running_mean_of_dense_gradients():
    weight = sparse((7, 5))
    probe = probed(weight, "momentum", 0)
    expected = torch.zeros(35, dtype=torch.float64)
    for _ in range(3):
        probe.look(True)
        x = torch.randn(3, 5, dtype=torch.float64)
        y = weight(x)
        factor = torch.randn_like(y)
        (y * factor).sum().backward()
        expected = 0.9 * expected + 0.1 * gradient(weight, x, factor, ())
    assert_close(probe.grads, expected, rtol=0, atol=1e-12)


# --- The distributions -----------------------------------------------------------------------------------------------


def call_of(layer, batch=None):
    """A call, its dense gradient as a matrix ``(I, O)``, and for each group its rows."""
    shape, of_input, options = LAYERS[layer]
    if batch is not None:
        of_input = (batch, *of_input[1:])
    weight = sparse(shape)
    x = torch.randn(of_input, dtype=torch.float64)
    y = weight(x, None, *options)
    g = torch.randn_like(y)
    index = weight.ccol_indices, weight.row_indices, weight.crow_indices
    flat = flat_options(shape[2:], *options) if options else []
    call = WeightedCall(g, x, weight.values.detach(), *index, flat, "nonzeros")
    return call, gradient(weight, x, g, options).view(weight.columns, weight.rows)


def product(of_inputs, of_rows):
    """``f x q`` without its norm: of input ``a`` and row ``b`` with the inputs of the row's group, ``(I, O)``."""
    return of_inputs.repeat_interleave(len(of_rows) // len(of_inputs), 0).t() * of_rows


@pytest.mark.parametrize("layer", ["linear", "sequence", "conv", "grouped"])
def test_grabo_bounds_the_gradient_and_at_one_entry_is_its_magnitude(layer):
    call, dense = call_of(layer)
    assert bool((product(*EXPLORE["grabo"](call, torch.tensor(1))) >= dense.abs() - 1e-12).all())
    if layer == "linear":
        call, dense = call_of(layer, batch=1)
        assert_close(product(*EXPLORE["grabo"](call, torch.tensor(1))), dense.abs())


SMALL = {"linear": ((3, 4), (3, 4), ()), "conv": ((4, 2, 2, 2), (2, 4, 3, 2), ([1, 1], [0, 0], [1, 1], 2))}


@pytest.mark.parametrize("layer", SMALL)
def test_the_mean_of_graest_over_all_signs_is_the_gradient(layer, monkeypatch):
    monkeypatch.setitem(LAYERS, layer, SMALL[layer])
    call, dense = call_of(layer)
    signs = [torch.tensor(s, dtype=torch.float64) for s in itertools.product([-1, 1], repeat=call.entries)]
    mean = sum(product(*call.sums(sign)) for sign in signs) / len(signs)
    assert_close(mean, dense, rtol=0, atol=1e-12)


def test_graest_takes_the_same_signs_for_inputs_and_rows():
    call, _ = call_of("grouped")
    key = torch.tensor(5)
    sums = call.sums(random_signs(key, call.entries, call.x.device))
    for found, expected in zip(EXPLORE["graest"](call, key), sums, strict=True):
        assert_close(found, expected.abs())


def is_drawn_from(counts, chances):
    """By the chi-square of what can be drawn, at most six standard deviations above its mean."""
    assert not counts[chances == 0].any()
    counts, expected = counts[chances > 0], chances[chances > 0] / chances.sum() * counts.sum()
    degrees = len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum() < degrees + 6 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("weights", ["uniform", "weighted"])
def test_places_are_drawn_with_the_product_of_both_weights(weights, groups):
    rows, columns = 6, 5
    if weights == "uniform":
        of_inputs = of_rows = None
        chances = torch.ones(columns, rows)
    else:
        of_inputs, of_rows = torch.rand(groups, columns), torch.rand(rows)
        of_inputs[0, 0] = of_inputs[-1, 2] = of_inputs[-1, -1] = of_rows[1] = 0
        chances = product(of_inputs, of_rows)
    drawn = draw_places(of_inputs, of_rows, rows, columns, 200_000, torch.tensor(77), torch.device("cpu"))
    assert is_drawn_from(torch.bincount(drawn, minlength=rows * columns), chances.flatten())
    again = draw_places(of_inputs, of_rows, rows, columns, 200_000, torch.tensor(77), torch.device("cpu"))
    other = draw_places(of_inputs, of_rows, rows, columns, 200_000, torch.tensor(78), torch.device("cpu"))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)


@pytest.mark.parametrize("weight", [0.0, math.nan, math.inf])
def test_where_weights_say_nothing_every_place_is_drawn_alike(weight):
    of_inputs, of_rows = torch.full((1, 5), weight), torch.ones(6)
    drawn = draw_places(of_inputs, of_rows, 6, 5, 50_000, torch.tensor(77), torch.device("cpu"))
    assert is_drawn_from(torch.bincount(drawn, minlength=30), torch.ones(30))


@pytest.mark.parametrize("rule", EXPLORE)
def test_a_weight_as_large_as_no_dense_gradient_could_be_is_probed(rule):
    keys = torch.arange(40_000) * 107_000  # a dense gradient of 65536 x 65536 takes 16 GiB
    weight = SparseWeight((65536, 65536), keys, torch.randn(len(keys)))
    weight.probe = Probe(rule)
    weight.probe.fit(weight, weight.nnz, weight.nnz)
    weight.probe.look(True, key=3, draws=weight.nnz)
    weight(torch.randn(2, 65536)).square().sum().backward()
    found, grads = weight.probe.candidates()
    assert len(found) > 30_000
    assert bool(grads.isfinite().all())


@pytest.mark.parametrize("method", ["gse", "rigl", "snfs"])
def test_a_pass_that_overflows_is_not_looked_at(method):
    model = rwfx.sparsify(nn.Sequential(nn.Linear(8, 8)), 0.3, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    topology = rwfx.Topology(model, optimizer, method, interval=1, end=9)
    (weight,) = model.sparse_weights.values()
    before = weight.keys()
    (model(torch.ones(2, 8)).sum() * torch.inf).backward()  # as under a GradScaler, which leaves out this step
    topology.step()
    assert weight.probe.grads.isfinite().all()
    assert topology.updates == 1
    if method != "snfs":  # which has a mean of other steps, here 0
        assert torch.equal(weight.keys(), before)


def test_topkast_has_no_gradient_of_a_pass_whose_gradients_were_cleared():
    def gradient(thrown_away: bool) -> torch.Tensor:
        model = rwfx.sparsify(nn.Sequential(nn.Linear(8, 8)), 0.3, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        rwfx.Topology(model, optimizer, "topkast", interval=100, end=200, seed=0)
        x = torch.arange(16.0).view(2, 8)
        if thrown_away:
            model(3 * x).square().sum().backward()
            optimizer.zero_grad()
        model(x).square().sum().backward()
        return optimizer.param_groups[1]["params"][0].grad

    assert torch.equal(gradient(True), gradient(False))


def test_a_probe_that_is_not_due_keeps_no_input_alive():
    model = rwfx.sparsify(nn.Sequential(nn.Linear(8, 8)), 0.3)
    rwfx.Topology(model, torch.optim.SGD(model.parameters(), 0.1), interval=100, end=200)
    x = torch.ones(2, 8)
    seen = weakref.ref(hidden := x * 2)
    loss = model(hidden).sum()
    loss.backward()
    del hidden
    assert seen() is None
    assert loss.requires_grad
