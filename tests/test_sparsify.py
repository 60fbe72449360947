"""Sparsified models: what they store, that they compute the same as the dense model with zeros, and what is refused."""

import copy
import pickle
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import rwfx
from rwfx.nonzeros import draw_keys
from rwfx.sparsity import count_nonzeros

pytestmark = pytest.mark.usefixtures("one_thread")


class Mixed(nn.Module):
    """A convolution, a group convolution, batch norm, linear layers, one called twice, one stored the other way."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding="same", bias=False)
        self.line = nn.Conv1d(8, 8, 5, padding=2, stride=3)
        self.fc = nn.Linear(8 * 12, 20)
        self.twice = nn.Linear(20, 20)
        self.other_way = nn.Parameter(torch.randn(20, 12))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.grouped(self.norm(self.conv(x)).relu())
        x = self.line(x.flatten(2))
        x = self.fc(x.flatten(1)).relu()
        x = self.twice(self.twice(x).tanh())
        return self.head(self.drop(x @ self.other_way))


def batch(dtype=torch.float64):
    return torch.randn(4, 3, 6, 6, dtype=dtype)


@pytest.mark.parametrize("init", ["er", "erk", "uniform"])
def test_outputs_and_gradients_are_those_of_the_dense_model_with_zeros(init):
    sparse = rwfx.sparsify(Mixed().double(), 0.3, init=init)
    dense = rwfx.densify(sparse)
    x = batch()
    for train in (True, False):
        outputs = []
        for model in (sparse, dense):
            model.train(train)
            model.zero_grad()
            torch.manual_seed(1)
            outputs.append(model(x))
            outputs[-1].square().sum().backward()
        assert_close(*outputs, rtol=1e-12, atol=1e-12)
        for name, weight in sparse.sparse_weights.items():
            full = dense.get_parameter(name).grad
            full = full.t() if weight.transposed else full
            assert_close(weight.values.grad, full.flatten(1).t().flatten()[weight.keys()], rtol=1e-11, atol=1e-11)


def test_a_densified_model_loads_into_the_class_it_came_from():
    model = Mixed()
    dense = rwfx.densify(rwfx.sparsify(model, 0.2))
    assert list(dense.state_dict()) == list(model.state_dict())
    model.load_state_dict(dense.state_dict())
    x = batch(torch.float32)
    assert_close(model.eval()(x), dense.eval()(x))


def test_nothing_of_a_dense_weight_is_left():
    sparse = rwfx.sparsify(Mixed(), 0.1)
    stored = {*sparse.state_dict(), *dict(sparse.named_parameters()), *dict(sparse.named_buffers())}
    for name in ("conv.weight", "fc.weight", "twice.weight", "other_way"):
        assert name not in stored
        assert f"{name}.values" in stored
    assert max(t.numel() for t in (*sparse.parameters(), *sparse.buffers())) < 20 * 288


def test_the_model_is_left_as_it_was():
    model = Mixed()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    sparse = rwfx.sparsify(model, 0.1)
    for tensor in sparse.parameters():
        tensor.data.fill_(9)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_the_largest_weights_of_a_model_are_kept_with_its_biases():
    model = Mixed().eval()
    x = batch(torch.float32)
    assert_close(rwfx.sparsify(model, 1.0, values="largest")(x), model(x))
    pruned = rwfx.sparsify(model, 0.25, init="uniform", values="largest")
    weight, full = pruned.sparse_weights["fc.weight"], model.fc.weight
    kept = weight.to_dense()
    assert torch.equal(kept[kept != 0], full[kept != 0])
    assert full[kept == 0].abs().max() <= kept[kept != 0].abs().min()
    assert torch.equal(pruned.fc.bias, model.fc.bias)


def test_drawn_values_have_the_standard_deviation_of_their_rows_fan_in():
    sparse = rwfx.sparsify(nn.Sequential(nn.Linear(3000, 400)), 0.05, seed=1)
    weight = sparse.sparse_weights["0.weight"]
    full = weight.to_dense().detach()
    fan_in = (full != 0).sum(1)
    scaled = full * fan_in.sqrt()[:, None]
    assert scaled.abs().max() <= 3**0.5
    assert abs(float(scaled[full != 0].std()) - 1) < 0.02
    assert abs(float((sparse.get_parameter("0.bias") * fan_in.sqrt()).std()) - 1) < 0.1


@pytest.mark.parametrize("init", ["er", "erk", "uniform"])
@pytest.mark.parametrize("density", [0.001, 0.02, 0.3, 0.9, 1.0])
def test_non_zeros_add_up_exactly_and_none_has_more_than_its_places(density, init):
    shapes = {"conv": (16, 3, 3, 3), "deep": (64, 64, 3, 3), "wide": (512, 1024), "head": (10, 512)}
    counts = count_nonzeros(shapes, density, init)
    assert sum(counts.values()) == round(density * sum(map(prod, shapes.values())))
    assert all(1 <= counts[name] <= prod(shape) for name, shape in shapes.items())


def test_what_a_whole_weight_cannot_take_is_dealt_to_the_others_in_proportion():
    shapes = {"small": (4, 4), "a": (100, 100), "b": (300, 100)}
    counts = count_nonzeros(shapes, 0.5, "er")
    assert counts["small"] == 16
    assert abs(counts["b"] / counts["a"] - 2) < 0.001 or counts["a"] == 10000


def test_every_set_of_places_is_equally_likely():
    drawn = torch.zeros(12)
    generator = torch.Generator().manual_seed(0)
    pairs: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        keys = draw_keys(4, 3, 2, generator)
        drawn[keys] += 1
        pairs[tuple(keys.tolist())] = pairs.get(tuple(keys.tolist()), 0) + 1
    assert len(pairs) == 66
    expected = 6000 / 66
    chi_square = sum((n - expected) ** 2 / expected for n in pairs.values())
    assert chi_square < 110  # 65 degrees of freedom: above it once in 2000 draws


def test_equal_seeds_draw_equal_models():
    a, b, c = (rwfx.sparsify(Mixed(), 0.1, seed=seed) for seed in (3, 3, 4))
    state = b.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in a.state_dict().items() if "fc" in name)
    assert not torch.equal(a.sparse_weights["fc.weight"].keys(), c.sparse_weights["fc.weight"].keys())


@pytest.mark.parametrize("inputs", [None, torch.ones(2, 4)], ids=["traced", "with inputs"])
def test_a_part_that_the_forward_pass_does_not_use_stays_dense(inputs):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    sparse = rwfx.sparsify(model, 0.5, example_inputs=inputs)
    assert set(sparse.sparse_weights) == {"used.weight"}
    assert "no linear call" in next(x for x in sparse.report.lines if x.weight == "unused.weight").dense_because
    dense = rwfx.densify(sparse)
    assert torch.equal(dense.state_dict()["unused.weight"], model.unused.weight)
    Unused().load_state_dict(dense.state_dict())


def test_named_weights_stay_dense():
    sparse = rwfx.sparsify(Mixed(), 0.1, dense=["head", nn.Conv2d, lambda name, module: name == "other_way"])
    assert set(sparse.sparse_weights) == {"line.weight", "fc.weight", "twice.weight"}
    assert sparse.report.lines[-1].dense_because
    with pytest.raises(ValueError, match="'fx', which matches no weight or module"):
        rwfx.sparsify(Mixed(), 0.1, dense="fx")


def test_a_tied_weight_is_one_and_what_something_else_reads_stays_dense():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(30, 16)
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight
            self.head = nn.Linear(16, 30, bias=False)
            self.head.weight = self.table.weight

        def forward(self, words):
            return self.head(self.b(self.a(self.table(words)).relu()))

    sparse = rwfx.sparsify(Tied(), 0.3)
    assert list(sparse.sparse_weights) == ["a.weight"]
    assert sparse.a.weight is sparse.b.weight
    (line,) = (line for line in sparse.report.lines if line.weight == "table.weight")
    assert "reads it too" in line.dense_because
    sparse(torch.arange(5)).sum().backward()
    dense = rwfx.densify(sparse)
    assert dense.a.weight is dense.b.weight
    assert_close(dense(torch.arange(5)), sparse(torch.arange(5)))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_and_files_hold_the_whole_model(how):
    sparse = rwfx.sparsify(Mixed(), 0.2).eval()
    copied = how(sparse)
    x = batch(torch.float32)
    assert torch.equal(copied(x), sparse(x))
    assert type(copied).__mro__[1] is rwfx.SparsifiedModule
    assert str(copied.report) == str(sparse.report)
    with torch.no_grad():
        copied.sparse_weights["fc.weight"].values.zero_()
    assert not torch.equal(copied(x), sparse(x))


def test_a_state_dict_brings_places_and_values():
    x = batch(torch.float32)
    ours, theirs = (rwfx.sparsify(Mixed(), 0.2, seed=seed).eval() for seed in (1, 2))
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], ours.parameters(), strict=True))


def test_non_zeros_of_another_weight_are_refused():
    model = rwfx.sparsify(nn.Sequential(nn.Linear(20, 10)), 0.2)
    before = copy.deepcopy(model.state_dict())
    for shape in ((21, 10), (19, 10), (20, 40), (20, 9)):
        other = rwfx.sparsify(nn.Sequential(nn.Linear(*shape)), 0.2).state_dict() | {"0.bias": before["0.bias"]}
        with pytest.raises(RuntimeError, match=r"'0.weight' has the shape \(10, 20\), and what is loaded has"):
            model.load_state_dict(other)
    with pytest.raises(RuntimeError, match="one int64 number for each value"):
        model.load_state_dict(before | {"0.weight.values": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="its places do not lie in 10 rows"):
        model.load_state_dict(before | {"0.weight.row_indices": before["0.weight.row_indices"] + 5})
    part = {name: tensor for name, tensor in before.items() if "ccol" not in name}
    with pytest.raises(RuntimeError, match="loaded whole or not at all; what is loaded has no ccol_indices"):
        model.load_state_dict(part, strict=False)
    assert model.load_state_dict({"0.bias": before["0.bias"]}, strict=False).missing_keys
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_model_on_the_meta_device_gets_numbers_and_never_a_dense_weight():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(50, 40), nn.LayerNorm(40), nn.Linear(40, 10))
    sparse = rwfx.sparsify(model, 0.1)
    assert not any(t.is_meta for t in (*sparse.parameters(), *sparse.buffers()))
    assert torch.equal(sparse.get_parameter("1.weight"), torch.ones(40))
    sparse(torch.randn(3, 50)).sum().backward()
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device"):
        rwfx.sparsify(model, 0.1, values="largest")


HUGE = """
import torch, rwfx
from torch import nn

def peak():  # of this process: what getrusage gives is inherited from the one that started it
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

small = rwfx.sparsify(nn.Sequential(nn.Linear(64, 64)), 0.5, by="nonzeros")  # what is loaded once
optimizer = torch.optim.Adam(small.parameters())
small(torch.randn(8, 64)).square().mean().backward()
optimizer.step()
before = peak()
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(65536, 65536))
model = rwfx.sparsify(model, 2_000_000 / 65536**2)
optimizer = torch.optim.Adam(model.parameters())
topology = rwfx.Topology(model, optimizer, interval=2, end=10)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(16, 65536)).square().mean().backward()
    optimizer.step()
    topology.step()
assert topology.updates == 1
assert model.nnz == 2_000_000
print((peak() - before) / 1e6)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_a_layer_of_four_billion_places_trains_in_half_a_gigabyte():
    run = subprocess.run(
        [sys.executable, "-c", HUGE], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1]) < 500


def test_it_compiles_as_one_graph_forward_and_backward():
    model = rwfx.sparsify(Mixed(), 0.3)
    compiled = torch.compile(model, fullgraph=True)
    x = batch(torch.float32)
    model.eval()
    assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    assert_close(ours, [p.grad for p in model.parameters()])


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) + self.fc.weight.sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0}, "density must be a number"),
        ({"density": 1.5}, "density must be a number"),
        ({"density": 1e-9}, "each needs one"),
        ({"init": "normal"}, "init must be one of 'er', 'erk', 'uniform', got 'normal'"),
        ({"growth": "grow"}, "growth must be one of 'gse'"),
        ({"values": "small"}, "values must be one of"),
        ({"by": "mask"}, "by must be one of"),
        ({"dense": "*"}, "no weight is left to store as non-zeros"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rwfx.sparsify(Mixed(), **{"density": 0.1, **arguments})


def test_models_that_cannot_be_made_sparse_are_refused():
    with pytest.raises(ValueError, match=r"no weight is left .*fc.weight: sum.* reads it too"):
        rwfx.sparsify(Reads(), 0.1)
    sparse = rwfx.sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5)
    with pytest.raises(ValueError, match="already made sparse"):
        rwfx.sparsify(sparse, 0.1)
    with pytest.raises(TypeError, match=r"must come from rwfx\.sparsify"):
        rwfx.densify(nn.Linear(2, 2))


def test_the_report_names_what_each_weight_became():
    report = rwfx.sparsify(Mixed(), 0.1, dense="head").report
    lines = {line.weight: line for line in report.lines}
    assert lines["head.weight"].dense_because == 'asked for with "dense="'
    assert lines["fc.weight"].nnz == rwfx.sparsify(Mixed(), 0.1, dense="head", seed=0).sparse_weights["fc.weight"].nnz
    assert "non-zeros" in str(report)


def test_a_module_under_two_names_is_one_and_tied_biases_stay_tied():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b = self.a
            self.c.bias = self.a.bias

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()))

    sparse = rwfx.sparsify(Shared(), 0.5)
    assert list(sparse.sparse_weights) == ["a.weight", "c.weight"]
    dense, x = rwfx.densify(sparse), torch.randn(3, 8)
    assert_close(dense(x), sparse(x))
    for model in (sparse, dense):
        assert model.a is model.b
        assert model.a.bias is model.c.bias
    assert list(dense.state_dict()) == list(Shared().state_dict())


def test_what_is_tied_on_the_meta_device_stays_tied():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.fc, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
            self.head.weight = self.table.weight

        def forward(self, words):
            return self.head(self.fc(self.table(words)))

    with torch.device("meta"):
        model = Words()
    sparse = rwfx.sparsify(model, 0.3)
    assert sparse.get_parameter("head.weight") is sparse.get_parameter("table.weight")
    sparse(torch.arange(4)).sum().backward()


def test_products_are_computed_the_faster_way_as_non_zeros_become_few():
    weight = rwfx.SparseWeight((40, 30), torch.arange(1200), torch.randn(1200))
    assert weight.by == "dense"
    weight.move_(torch.arange(0, 1200, 60), torch.ones(20))
    assert weight.by == "nonzeros"


def test_a_conv_in_three_dimensions_stays_dense_and_says_why():
    class Scans(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv3d(2, 4, 3), nn.Linear(32, 5)

        def forward(self, x):
            return self.fc(F.relu(self.conv(x)).flatten(1))

    sparse = rwfx.sparsify(Scans(), 0.5)
    (line,) = (line for line in sparse.report.lines if line.weight == "conv.weight")
    assert "conv3d" in line.dense_because
    sparse(torch.randn(2, 2, 4, 4, 4))


def test_the_example_keeps_its_promise():
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "examples/always_sparse.py"], capture_output=True, text=True, check=False, cwd=root
    )
    assert run.returncode == 0, run.stderr
    assert "22,487 non-zeros" in run.stdout


@pytest.mark.parametrize(("rows", "density"), [(50_000, 0.9), (2**31, 1e-9)], ids=["non-zeros", "rows"])
def test_more_than_int32_can_count_is_refused_before_it_is_drawn(rows, density):
    model = nn.Sequential(nn.Linear(50_000, rows, device="meta"))
    with pytest.raises(ValueError, match=rf"'0.weight' has {rows} rows, 50000 columns and .* at most 2147483647"):
        rwfx.sparsify(model, density)
