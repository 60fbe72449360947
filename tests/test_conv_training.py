"""Networks of convolutions, transformed: their gradients are the masked ones, by rows, policies and examples."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import to_dense
from torch import nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import rwfx

EXACT = {"rtol": 0, "atol": 1e-10}
CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


class Residual(nn.Module):
    """A stem, two residual blocks with batch norm, the second strided with a pointwise shortcut, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.a1, self.a2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.b1, self.b2 = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norm2, self.shortcut = nn.BatchNorm2d(12), nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.a2(self.a1(x).relu())).relu()
        x = (self.shortcut(x) + self.norm2(self.b2(self.b1(x).relu()))).relu()
        return self.head(x.mean((2, 3)))


def mobile():
    """Depthwise and grouped convolutions, padding that is no zeros, a transposed one."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=8),
        nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 12, 1, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 2, stride=2, groups=3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 5),
    )  # fmt: skip


def signal():
    return nn.Sequential(
        nn.Conv1d(3, 8, 4, padding="same"), nn.GELU(), nn.Conv1d(8, 8, 3, dilation=2), nn.Flatten(), nn.Linear(320, 5)
    )


MODELS = {"residual": (Residual, (6, 3, 8, 8)), "mobile": (mobile, (6, 3, 8, 8)), "signal": (signal, (6, 3, 44))}
MODEL = pytest.mark.parametrize("name", MODELS)


def made(name):
    torch.manual_seed(0)
    kind, shape = MODELS[name]
    return kind().double(), torch.randn(shape, dtype=torch.float64), torch.randint(5, shape[:1])


class Masked(TorchFunctionMode):
    """Zeroes the gradient of the output of every call on a weight outside its rows and outside the examples."""

    def __init__(self, rows, examples):
        super().__init__()
        self.rows, self.examples = rows, examples

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        if func not in CONVOLUTIONS | {F.linear}:
            return y
        mask = torch.ones_like(y)
        if id(args[1]) in self.rows:
            others = torch.ones(y.shape[1], dtype=torch.bool).index_fill(0, self.rows[id(args[1])], False)
            mask[:, others] = 0
        if self.examples is not None:
            mask *= torch.zeros(len(y)).index_fill(0, self.examples, 1).view(-1, *[1] * (y.dim() - 1))
        y.register_hook(lambda g: g * mask)
        return y


def expected(model, x, y, rows, examples=None):
    parameters = dict(model.named_parameters())
    with Masked({id(parameters[name]): of for name, of in rows.items()}, examples):
        loss = F.cross_entropy(model(x), y)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def check(model, sparse, x, y, run=None, examples=None):
    state = copy.deepcopy(model.state_dict())
    model.zero_grad()
    output = (sparse if run is None else run)(x)
    F.cross_entropy(output, y).backward()
    ours = {name: to_dense(p.grad) for name, p in sparse.named_parameters()}
    model.load_state_dict(state)  # the running statistics of batch norms
    assert run is not None or torch.equal(model(x), output)
    for name, theirs in expected(model, x, y, sparse.rows, examples).items():
        assert_close(ours[name], theirs, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


POLICIES = {
    "walks": rwfx.RandomWalk(3),
    "uniform": rwfx.Uniform(0.3),
    "topk": rwfx.TopK(0.3),
    "adaptive": rwfx.AdaptiveWalk(3),
    "learned": rwfx.LearnedWalk(3),
}


@pytest.mark.parametrize("policy", POLICIES)
@MODEL
def test_gradients_are_those_of_masked_backpropagation(name, policy):
    model, x, y = made(name)
    sparse = rwfx.transform(model, rows=POLICIES[policy], break_even=False, seed=0, example_inputs=(x,))
    convolutions = [n for n, p in model.named_parameters() if p.dim() > 2]
    assert set(convolutions) <= set(sparse.report.sparse)
    for _ in range(3):
        check(model, sparse, x, y)


@MODEL
def test_row_gradients_are_those_of_masked_backpropagation(name):
    model, x, y = made(name)
    sparse = rwfx.transform(model, rows=rwfx.Magnitude(0.4), grad="rows", break_even=False, seed=0, example_inputs=(x,))
    check(model, sparse, x, y)
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 2}
    for n, p in weights.items():
        assert p.grad.is_sparse == (n not in sparse.report.dense)
    assert [sparse.report.dense[n][:43] for n in weights if n in sparse.report.dense] == [
        "the rows of a transposed convolution are not"[:43]
    ] * (name == "mobile")


@pytest.mark.parametrize("rows", [None, rwfx.Uniform(0.4), rwfx.TopK(0.4)], ids=str)
@MODEL
def test_rows_and_examples_go_together(name, rows):
    model, x, y = made(name)
    for norm in model.modules():  # across examples: in training its gradient is not that of the kept ones alone
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    sparse = rwfx.transform(model, rows=rows, examples=0.5, break_even=False, seed=0, example_inputs=(x,))
    calls = [node for node in sparse.graph.nodes if "examples" in node.kwargs]
    assert len(calls) == sum(p.dim() > 1 for p in model.parameters())
    output = model(x)
    g = torch.autograd.grad(F.cross_entropy(output, y), output)[0]
    check(model, sparse, x, y, examples=g.norm(dim=1).topk(3).indices.sort().values)


@MODEL
def test_masking_gives_the_same_as_leaving_out(name):
    model, x, y = made(name)
    options = {"rows": rwfx.Uniform(0.4), "dx": "rows", "break_even": False, "seed": 3, "example_inputs": (x,)}
    found = []
    for mode in ("sparse", "masked"):
        sparse = rwfx.transform(copy.deepcopy(model), mode=mode, **options)
        F.cross_entropy(sparse(x), y).backward()
        found.append([p.grad for p in sparse.parameters()])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, **EXACT)


@pytest.mark.parametrize(("name", "grad"), [("residual", "rows"), ("mobile", "dense")])
def test_compiled_in_one_graph_whatever_the_rows(name, grad):
    model, x, y = made(name)
    sparse = rwfx.transform(model, num_paths=3, grad=grad, break_even=False, seed=0, example_inputs=(x,))
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(sparse, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            check(model, sparse, x, y, run)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_a_row_optimizer_with_every_row_trains_as_its_namesake(optimizer):
    models, x, y = [made("residual")[0] for _ in range(2)], *made("residual")[1:]
    sparse = rwfx.transform(models[0], rows=rwfx.Uniform(1.0), grad="rows", break_even=False, example_inputs=(x,))
    options = {"lr": 0.01} | ({"momentum": 0.9} if optimizer == "SGD" else {})
    ours = getattr(rwfx.optim, optimizer)(sparse.parameters(), **options)
    theirs = getattr(torch.optim, optimizer)(models[1].parameters(), **options)
    for _ in range(3):
        for model, step in ((sparse, ours), (models[1], theirs)):
            step.zero_grad()
            F.cross_entropy(model(x), y).backward()
            step.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(a, b, **EXACT)


def test_the_report_counts_a_convolution_at_every_place_of_its_output():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(64, 2)
    )
    x = torch.randn(5, 3, 7, 7)  # 3 x 3 places, then 4 x 4
    dense = (2 * 27 * 8 * 9, 2 * 8 * 4 * 4 * 9, 2 * 64 * 2)
    sparse = rwfx.transform(model, rows=rwfx.Uniform(0.25), break_even=False, example_inputs=(x,))
    assert sparse.report.flops(5).forward == 5 * sum(dense)
    assert sparse.report.flops(5).dense_backward == 5 * (dense[0] + 2 * dense[1] + 2 * dense[2])
    sparse(x)
    kept = (dense[0] / 4, dense[1] / 4, dense[2])
    assert sparse.report.flops(5).backward == 5 * (kept[0] + 2 * kept[1] + 2 * kept[2])
    unknown = rwfx.transform(copy.deepcopy(model), rows=rwfx.Uniform(0.25))
    assert unknown.report.sparse == sparse.report.sparse
    assert unknown.report.flops().forward == 2 * (27 * 8 + 8 * 4 * 4 + 64 * 2)
    assert "example_inputs would tell" in str(unknown.report)
    assert "example_inputs would tell" not in str(sparse.report)


def test_a_convolution_is_row_sparse_where_that_is_predicted_to_pay():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.Conv2d(4, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1),
        nn.Conv2d(128, 128, 3, groups=128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    x = torch.randn(16, 4, 16, 16)
    report = rwfx.transform(model, rows=rwfx.Uniform(0.1), break_even=rwfx.CostModel(), example_inputs=(x,)).report
    assert report.sparse == ("1.weight", "3.weight")
    assert "it would not pay" in report.dense["4.weight"]
