"""Weights that are computed from parameters: a model has the gradients of plain autograd with masks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import rwfx
from rwfx.capture import capture
from rwfx.computed_weights import computed_from
from rwfx.passes.normalize import normalize

pytestmark = pytest.mark.usefixtures("one_thread")

X = (6, 5, 8)


class Masked(nn.Module):
    """A mask that no parameter is, by which a weight is taken times, as pruning does it."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("mask", torch.rand(shape).gt(0.4).float())

    def forward(self, w):
        return w * self.mask


class Net(nn.Module):
    """A weight for every way of computing one; ``at`` is called on the output of each, by its parameter's name."""

    def __init__(self):
        super().__init__()
        self.norm = parametrizations.weight_norm(nn.Linear(8, 9))
        self.spectral = parametrizations.spectral_norm(nn.Linear(9, 10))
        self.pruned = nn.Linear(10, 7)
        parametrize.register_parametrization(self.pruned, "weight", Masked((7, 10)))
        self.near = parametrizations.weight_norm(nn.Conv1d(7, 6, 3, padding=1))
        self.standard, self.gain = nn.Parameter(torch.randn(8, 3, 3)), nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.scaled, self.head = nn.Parameter(torch.randn(6, 8)), nn.Linear(6, 4)
        self.at = lambda name, y, dim=-1: y

    def forward(self, x):
        x = x * 1 if x.shape[0] > 2 else x  # so that torch.export has to take it
        h = self.at("norm.parametrizations.weight.original1", self.norm(x)).relu()
        h = self.at("spectral.parametrizations.weight.original", self.spectral(h)).tanh()
        h = self.at("pruned.parametrizations.weight.original", self.pruned(h)).relu()
        h = self.at("near.parametrizations.weight.original1", self.near(h.mT), 1).relu()
        w = F.batch_norm(self.standard.view(1, 8, -1), None, None, self.gain.view(-1), training=True)
        h = self.at("standard", F.conv1d(h, w.view_as(self.standard), padding=1, groups=2), 1).relu()
        h = self.at("scaled", h.mT @ (self.scaled * 0.3 + 1e-3).t()).tanh()
        return self.at("head.weight", self.head(h))


COMPUTED = {
    "norm.parametrizations.weight.original1",
    "spectral.parametrizations.weight.original",
    "pruned.parametrizations.weight.original",
    "near.parametrizations.weight.original1",
    "standard",
    "scaled",
}


def loss_of(y):
    return (y * torch.linspace(1, 2, y.shape[-1], dtype=y.dtype)).square().sum()


def expected(model, x, rows):
    """The gradients by plain autograd, where only ``rows`` of every output have one."""
    model = copy.deepcopy(model)

    def masked(name, y, dim=-1):
        mask = torch.zeros(y.shape[dim], dtype=y.dtype).index_fill(0, rows[name], 1)
        mask = mask.view(-1, *[1] * (y.dim() - 1 - dim % y.dim()))
        return y * mask + (y * (1 - mask)).detach()

    model.at = masked
    loss_of(model(x)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


POLICIES = {
    "walks": {"num_paths": 4},
    "uniform": {"rows": rwfx.Uniform({"*": 0.4})},
    "topk": {"rows": rwfx.TopK({"*": 0.4})},
    "masked": {"num_paths": 4, "mode": "masked", "dx": "rows"},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_reach_the_parameters_through_the_rows_of_what_is_computed(policy):
    torch.manual_seed(3)
    model, x = Net().double(), torch.randn(X, dtype=torch.float64)
    sparse = rwfx.transform(model, seed=2, break_even=False, example_inputs=x, **POLICIES[policy])
    assert set(sparse.report.sparse) == {*COMPUTED, "head.weight"}
    before = copy.deepcopy(model)  # spectral norm keeps vectors that every forward changes
    y = sparse(x)
    assert_close(y, copy.deepcopy(before)(x), rtol=0, atol=0)
    loss_of(y).backward()
    assert any(0 < len(rows) < len(model.get_parameter(name)) for name, rows in sparse.rows.items())
    theirs = expected(before, x, sparse.rows)
    for name, p in model.named_parameters():
        assert_close(p.grad, theirs[name], rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_a_weight_that_is_computed_is_walked_by_the_numbers_of_its_parameter():
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 30))
    normed = copy.deepcopy(plain)
    for layer in normed[::2]:
        parametrizations.weight_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(torch.rand(len(layer.weight), 1) + 0.5)
    drawn = []
    for model in (plain, normed):
        sparse = rwfx.transform(model, 5, seed=4, break_even=False, example_inputs=torch.randn(3, 8))
        sparse(torch.randn(3, 8)).sum().backward()
        drawn.append(list(sparse.rows.values()))
    for a, b in zip(*drawn, strict=True):
        assert torch.equal(a, b)


def test_a_weight_that_is_computed_has_no_row_gradient_and_the_report_says_so():
    x = torch.randn(X, dtype=torch.float64)
    sparse = rwfx.transform(Net().double(), 4, grad="rows", break_even=False, example_inputs=x)
    assert sparse.report.sparse == ("head.weight",)
    assert all('grad="dense"' in sparse.report.dense[name] for name in COMPUTED)


def test_examples_are_left_out_of_the_calls_on_a_weight_that_is_computed():
    torch.manual_seed(3)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 9)), nn.ReLU(), nn.Linear(9, 4)).double()
    x = torch.randn(6, 8, dtype=torch.float64)
    sparse = rwfx.transform(model, examples=0.5, seed=2, break_even=False, example_inputs=x)
    loss_of(sparse(x)).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    y = model(x)
    (size,) = torch.autograd.grad(loss_of(y), y, retain_graph=True)
    kept = size.square().sum(1).topk(3).indices
    loss_of(y[kept]).backward()
    assert_close(ours, {name: p.grad for name, p in model.named_parameters()}, rtol=0, atol=1e-11)


def test_it_compiles_as_one_graph_which_holds_for_other_rows():
    model, x = Net().double(), torch.randn(X, dtype=torch.float64)
    sparse = rwfx.transform(model, 4, break_even=False, example_inputs=x)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        loss_of(compiled(x)).backward()
    assert counters["stats"]["unique_graphs"] == 1


def net_with(weight):
    """A network of one linear call on what ``weight(net, x)`` gives, of a square parameter and others."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.q = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
            self.s, self.make = nn.Parameter(torch.randn(4, 1)), nn.Linear(4, 4)
            self.register_buffer("fixed", torch.randn(4, 4))

        def forward(self, x):
            return F.linear(x, weight(self, x))

    return One()


WEIGHTS = {
    "scaled": (lambda net, x: net.p * 2, True),
    "normalised": (lambda net, x: net.s * F.normalize(net.p, dim=1), True),
    "with a buffer": (lambda net, x: torch.where(net.fixed > 0, net.p, net.fixed), True),
    "reshaped and back": (lambda net, x: (net.p.reshape(2, 8) - net.p.mean()).view(4, 4), True),
    "over its norm": (lambda net, x: net.p / torch.mv(net.p.t(), net.s[:, 0]).norm(), True),
    "of its mean alone": (lambda net, x: net.fixed * net.p.mean(), False),
    "transposed": (lambda net, x: (net.p * 2).t(), False),
    "flipped": (lambda net, x: net.p.flip(0), False),
    "in another order": (lambda net, x: (net.p * 2)[[1, 0, 3, 2]], False),
    "of two": (lambda net, x: net.p + net.q, False),
    "of the inputs": (lambda net, x: net.p * x.mean(), False),
    "of a linear call": (lambda net, x: net.make(net.p), False),
    "of a buffer": (lambda net, x: net.fixed * net.s, False),
    "without a gradient": (lambda net, x: net.p.detach() * 2, False),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_is_computed_from_the_one_parameter_whose_numbers_stay_in_their_places(kind):
    weight, is_one = WEIGHTS[kind]
    captured = capture(net_with(weight))
    gm = normalize(torch.fx.GraphModule(captured.host, captured.train))
    call = next(node for node in reversed(gm.graph.nodes) if node.target is F.linear)
    assert computed_from(gm, call.args[1]) is (captured.host.p if is_one else None)
