"""The library on a CUDA device, against itself on a CPU in float64.

Draws are functions of a seed and a step alone (``rwfx.ops.walk``), so both devices are to keep the same rows, examples
and connections: only sums may differ, by their order. Nothing here needs a C++ compiler but what is compiled.
"""

import copy
import shutil
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from oracles import to_dense
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map_only

import rwfx
from rwfx import ops
from rwfx.nonzeros import draw_keys
from rwfx.ops.examples import pick_examples
from rwfx.ops.grouped_mm import grouped_mm
from rwfx.ops.probe import RULES
from rwfx.probe import Probe
from rwfx.sparse_weight import SparseWeight

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
has_compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="Triton needs a C compiler")


@pytest.fixture(autouse=True)
def comparable(monkeypatch):
    """No kernels are compiled for the CPU, and convolutions on the device are of float32 where they say so."""
    monkeypatch.setenv("RWFX_NATIVE", "0")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def assert_same(ours, theirs, tolerance=1e-11):
    """Equal whole numbers, and floating ones within ``tolerance``, or what the type allows."""
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        if not isinstance(a, Tensor):
            assert a == b
            continue
        a, b = to_dense(a).cpu(), to_dense(b).cpu()
        narrow = {torch.float32: 1e-5, torch.bfloat16: 2e-2}.get(a.dtype, 0)
        near = max(tolerance, narrow) if a.is_floating_point() else 0
        assert_close(a.double(), b.double(), rtol=near, atol=near)


# --- Operators: values, gradients, and what is written into an argument -----------------------------------------------


def numbers(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def whole(*of):
    return torch.tensor(of)


def outcome(call, arguments, device, dtype=torch.float64):
    """All outputs, the gradients of all arguments, and these as the call left them."""

    def moved(t):
        there = t.detach().clone().to(device, dtype if t.dtype == torch.float64 else t.dtype)
        return there.requires_grad_(t.requires_grad)

    given = tree_map_only(Tensor, moved, arguments)
    given_tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    outputs = [t for t in tree_leaves(call(*given)) if isinstance(t, Tensor)]
    trained = [t for t in outputs if t.requires_grad]
    if trained:
        at = [torch.arange(t.numel(), dtype=torch.float64).cos().view(t.shape).to(t) for t in trained]
        torch.autograd.backward(trained, at)
    return outputs, [t.grad for t in given_tensors if t.grad is not None], [t.detach() for t in given_tensors]


ROWS = whole(1, 3, 4)
X, W, B = (2, 5, 7), (6, 7), (6,)
LINEAR = {
    "plain": lambda x, w, b, rows: ops.row_linear(x, w, b, rows),
    "masked": lambda x, w, b, rows: ops.masked_linear(x, w, b, rows),
    "rows": lambda x, w, b, rows: ops.row_linear(x, w, b, rows, grad="rows"),
    "masked-rows": lambda x, w, b, rows: ops.masked_linear(x, w, b, rows, dx="full", grad="rows"),
    "full": lambda x, w, b, rows: ops.row_linear(x, w, b, rows, dx="full"),
    "activation": lambda x, w, b, rows: ops.row_linear(x, w, b, rows, columns=rows + 1, activation="gelu"),
    "transpose": lambda x, w, b, rows: ops.row_linear(x, w.t().contiguous().t(), b, rows),
    "examples": lambda x, w, b, rows: ops.row_linear(x, w, b, rows, examples=rows[:1], num_examples=2),
    "kept": lambda x, w, b, rows: ops.row_linear(
        x, w, b, rows, kept_weight=ops.keep_rows(w, rows), kept_bias=ops.keep_rows(b, rows)
    ),
    "parts": lambda x, w, b, rows: ops.keep_parts(w, [rows[:1], rows[:2]], [0, 2]),
    "pack": lambda x, w, b, rows: [ops.pack_rows(x.detach()[0, :3], rows, 9), ops.take_rows(w.detach(), rows)],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_linear(name, dtype):
    given = numbers(*X), numbers(*W), numbers(*B), ROWS
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    assert_same(outcome(LINEAR[name], given, DEVICE, dtype), outcome(LINEAR[name], given, "cpu"), tolerance)


CONVOLUTIONS = {  # x, weight, rows, stride, padding, dilation, groups, transposed, output padding
    "plain": ((2, 3, 8, 8), (6, 3, 3, 3), ROWS, [1, 1], [1, 1], [1, 1], 1, False, [0, 0]),
    "all-rows": ((2, 3, 8, 8), (4, 3, 3, 3), whole(0, 1, 2, 3), [2, 1], [1, 1], [1, 1], 1, False, [0, 0]),
    "no-rows": ((2, 3, 8, 8), (4, 3, 3, 3), ROWS[:0], [2, 1], [1, 1], [1, 1], 1, False, [0, 0]),
    "groups": ((2, 4, 9, 9), (8, 2, 3, 3), ROWS, [2, 2], [0, 1], [2, 1], 2, False, [0, 0]),
    "depthwise": ((2, 6, 8, 8), (6, 1, 3, 3), ROWS, [1, 1], [1, 1], [1, 1], 6, False, [0, 0]),
    "transposed": ((2, 3, 5, 5), (3, 6, 3, 3), ROWS, [2, 2], [1, 1], [1, 1], 1, True, [1, 1]),
    "one": ((2, 3, 20), (6, 3, 5), ROWS, [2], [2], [1], 1, False, [0]),
    "unbatched": ((3, 8, 8), (6, 3, 3, 3), ROWS, [1, 1], [1, 1], [1, 1], 1, False, [0, 0]),
    "three": ((1, 2, 5, 5, 5), (6, 2, 2, 2, 2), ROWS, [1] * 3, [0] * 3, [1] * 3, 1, False, [0] * 3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("conv", [ops.row_conv, ops.masked_conv], ids=["row", "masked"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, conv, dtype):
    x, weight, rows, *options, transposed, space = CONVOLUTIONS[name]
    num_rows = weight[1] if transposed else weight[0]
    given = numbers(*x), numbers(*weight), numbers(num_rows), rows
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    for grad in ("dense",) if transposed else ("dense", "rows"):

        def call(x, w, b, rows, grad=grad):
            return conv(x, w, b, rows, *options, transposed, space, grad=grad)

        assert_same(outcome(call, given, DEVICE, dtype), outcome(call, given, "cpu"), tolerance)


def conv(x, w, b, rows, **options):
    return ops.row_conv(x, w, b, rows, [1, 1], [1, 1], [1, 1], **options)


def test_convolutions_with_channels_last_and_of_some_examples():
    given = numbers(4, 3, 6, 6), numbers(6, 3, 3, 3), numbers(6), ROWS, whole(0, 2)

    def call(x, w, b, rows, examples):
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        return conv(x, w, b, rows), conv(x, w, b, rows, examples=examples, num_examples=4)

    assert_same(outcome(call, given, DEVICE), outcome(call, given, "cpu"))


@pytest.mark.parametrize("call", [ops.row_grouped_mm, ops.masked_grouped_mm], ids=["row", "masked"])
@pytest.mark.parametrize("by_rows", [False, True])
def test_grouped_products(call, by_rows):
    given = numbers(9, 8), numbers(3, 6, 8) if by_rows else numbers(3, 8, 6), whole(2, 2, 7), ROWS
    for dx in ("rows", "full"):

        def run(x, w, offsets, rows, dx=dx):
            w = w.transpose(1, 2) if by_rows else w
            return call(x, w, offsets, rows, "mm", dx)[:7], grouped_mm(x, w, offsets)[:7]

        assert_same(outcome(run, given, DEVICE), outcome(run, given, "cpu"))


def test_grouped_products_by_the_grouped_kernel():
    x, w, ends = numbers(48, 32), numbers(3, 32, 16), whole(16, 16, 40).int()
    ours = outcome(lambda *given: ops.row_grouped_mm(*given, ROWS.to(DEVICE), "grouped_mm")[:40], (x, w, ends), DEVICE,
                   torch.bfloat16)  # fmt: skip
    assert_same(ours, outcome(lambda *given: ops.row_grouped_mm(*given, ROWS, "mm")[:40], (x, w, ends), "cpu"), 1e-1)


def test_what_a_backward_pass_sees_and_chooses():
    given = numbers(5, 7), numbers(*W), numbers(*B), ROWS, torch.zeros(6), torch.zeros(7, dtype=torch.int64)
    image = numbers(2, 3, 4, 4), numbers(6, 3, 3, 3), numbers(6), *given[3:]

    def seen_of(call, seen_all):
        return lambda x, w, b, rows, seen, chosen: call(x, w, b, rows, scale=rows + 0.5, seen=seen, seen_all=seen_all)

    def chosen_of(call):
        return lambda x, w, b, rows, seen, chosen: call(x, w, b, rows, seen=seen, chosen=chosen)

    for call, of in ((ops.row_linear, given), (conv, image)):
        for run in (seen_of(call, True), seen_of(call, False), chosen_of(call)):
            assert_same(outcome(run, of, DEVICE), outcome(run, of, "cpu"))


def test_observing_recording_and_the_largest():
    def run(seen, chosen, g, rows):
        ops.observe_(seen, g, rows)
        ops.record_(chosen, rows)
        return ops.top_rows(g, 3), ops.top_rows(torch.zeros_like(g), 2)

    given = torch.ones(6), torch.ones(7, dtype=torch.int64), numbers(4, 6, grad=False), ROWS
    assert_same(outcome(run, given, DEVICE), outcome(run, given, "cpu"))


@pytest.mark.parametrize("rule", [(True, 0.3, 0.01, 2.0, 0.05, 4.0), (False, 0.1, 0.0, 0.0, 0.1, 4.0)], ids=str)
def test_remembering(rule):
    last = torch.cat([whole(0, 2, 5, 0, 3, 4, 5, 8), torch.zeros(4, dtype=torch.int64)])  # two of 4 rows, three of 5
    use, row = whole(0, 0, 0, 0, 1, 1, 1, 1, 1), torch.arange(9)

    def run(a, b, taken, value, last, use, row, sizes):
        return ops.remember([a, b], taken, value, sizes, use, row, last, 9, *rule)

    given = *(torch.rand(n) for n in (4, 5, 9, 9)), last, use, row, whole(4, 5)
    assert_same(outcome(run, given, DEVICE), outcome(run, given, "cpu"))


@pytest.mark.parametrize("count", [1, 4, 12])
def test_draws_by_norm(count):
    sizes = 12, 20

    def run(a, b, chances, order, last):
        state, found = whole(7, 0).to(a.device), []
        for _ in range(3):
            drawn = ops.draw_by_norm(
                [a, b], chances, order, state, last, 2.0, 2, [count, count + 3], None, 1, unbiased=True
            )
            chances, order, last = drawn[-3:]
            state = state + whole(0, 1).to(a.device)
            found.append(drawn)
        return found

    last = torch.zeros(3 + sum(sizes), dtype=torch.int64)
    weights = [numbers(n, 3, grad=False) for n in sizes]
    given = *weights, torch.zeros(32, dtype=torch.float64), torch.zeros(32, dtype=torch.int64), last
    assert_same(outcome(run, given, DEVICE), outcome(run, given, "cpu"))


CHOICES = {
    "top": {},
    "drawn": {"state": whole(3, 1), "floor": 0.1, "unbiased": True},
    "needed": {"needed": torch.ones(1), "share": 0.8, "memory": 0.5},
}


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
def test_the_choice_of_examples(options):
    def run(x, y, kept, given):
        return pick_examples([x * 1, y * 1], kept, 9, **given)

    given = numbers(9, 4), numbers(9, 5, 3), torch.full((4,), -1), options
    assert_same(outcome(run, given, DEVICE), outcome(run, given, "cpu"), 1e-6)


@pytest.mark.parametrize("fractions", [[], [0.2, 0.4, 1.0]], ids=str)
def test_blank_lists(fractions):
    def run(needed, last):
        rows = torch.ops.rwfx.blank_rows(last, whole(5, 2, 3), [4, 4])
        return torch.ops.rwfx.blank_examples(needed, 10, 3, fractions), rows

    assert_same(outcome(run, (torch.tensor([0.3]), ROWS), DEVICE), outcome(run, (torch.tensor([0.3]), ROWS), "cpu"))


def sparse_weight(*shape, by="nonzeros"):
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    keys = draw_keys(rows, columns, rows * columns // 4, torch.Generator().manual_seed(0))
    return SparseWeight(shape, keys, torch.randn(len(keys), dtype=torch.float64), by=by)


SPARSE = {
    "linear": ((4, 3, 12), (10, 12), []),
    "conv": ((2, 4, 7, 7), (6, 2, 3, 3), [[2, 1], [1, 0], [1, 2], 2]),
    "one": ((2, 4, 9), (6, 4, 3), [2, 1]),
}


def sparse_call(name, by, dtype=torch.float64, device="cpu", autocast=False):
    shape, weight_shape, options = SPARSE[name]
    torch.manual_seed(1)
    weight, x, bias = sparse_weight(*weight_shape, by=by), numbers(*shape), numbers(weight_shape[0])
    weight = weight.to(device, dtype)
    weight.by = by

    def run(x, bias, values):
        weight.values = nn.Parameter(values.detach())
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = weight(x, bias, *options)
            (dv,) = torch.autograd.grad(y.double().square().sum(), weight.values, retain_graph=True)
        return y, dv

    return outcome(run, (x, bias, weight.values.detach().double()), device, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by", ["nonzeros", "dense"])
@pytest.mark.parametrize("name", SPARSE)
def test_products_with_non_zeros(name, by, dtype):
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    assert_same(sparse_call(name, by, dtype, DEVICE), sparse_call(name, by), tolerance)


@pytest.mark.parametrize("rule", [*RULES, "momentum"])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_probes(name, rule):
    def found(device):
        torch.manual_seed(1)
        shape, weight_shape, options = SPARSE[name]
        weight = sparse_weight(*weight_shape, by="dense" if name == "conv" else "nonzeros").to(device)
        places = weight.rows * weight.columns
        weight.probe = probe = Probe(rule)
        probe.fit(weight, places, places)
        if rule == "given":
            probe.keys[:3] = whole(2, 5, 17)
        xs = [numbers(*shape), numbers(*shape)]
        probe.look(True, key=12345, draws=40, given=3)
        for x in xs:
            weight(x.detach().to(device), None, *options).cos().sum().backward()
        return (probe.grads if rule == "momentum" else probe.candidates()), weight.values.grad

    assert_same(found(DEVICE), found("cpu"))


def test_autocast_computes_in_its_type():
    def products(x, w, b, rows, image, kernel):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.float32):
            y, z = ops.row_linear(x, w, b, rows, grad="rows"), conv(image, kernel, b, rows)
        assert y.dtype == z.dtype == (torch.bfloat16 if x.dtype == torch.float32 else torch.float64)
        return y, z

    given = numbers(*X), numbers(*W), numbers(*B), ROWS, numbers(2, 3, 5, 5), numbers(6, 3, 3, 3)
    outputs, grads, _ = outcome(products, given, DEVICE, torch.float32)
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert_same((outputs, grads), outcome(products, given, "cpu")[:2], 0.2)
    outputs, grads, _ = sparse_call("linear", "nonzeros", torch.float32, DEVICE, autocast=True)
    assert outputs[0].dtype == torch.bfloat16
    assert outputs[1].dtype == torch.float32


# --- Transformed models ----------------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 5))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, stride=2, groups=12), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.layer(x)).mean(1)


MODELS = {"mlp": (mlp, (8, 12)), "cnn": (cnn, (8, 3, 8, 8)), "encoder": (Encoder, (8, 6, 16))}


def batch(name, step, device, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(MODELS[name][1], generator=generator, dtype=torch.float64)
    return x.to(device, dtype), torch.randint(5, (8,), generator=generator).to(device)


def made(name, device, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = MODELS[name][0]().to(device, dtype)
    inputs = (batch(name, 0, device, dtype)[0],) if name == "encoder" else None
    return model, rwfx.transform(model, seed=1, example_inputs=inputs, **options)


def backward(model, name, step, device, dtype=torch.float64):
    x, y = batch(name, step, device, dtype)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def trained(name, device, optimizer=None, steps=3, **options):
    """Rows, gradients and loss of each step, and the model and the sampler afterwards."""
    model, sparse = made(name, device, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if optimizer is None else optimizer(model.parameters())
    found = []
    for step in range(steps):
        loss = backward(sparse, name, step, device)
        found.append((sparse.rows, [to_dense(p.grad).clone() for p in model.parameters()], loss, sparse.examples))
        optimizer.step()
        optimizer.zero_grad()
    return found, model.state_dict(), sparse.sampler_state()


OPTIONS = {
    "paths": {"num_paths": 5},
    "density": {"density": 0.3},
    "full": {"num_paths": 5, "dx": "full"},
    "examples": {"density": 0.3, "examples": 0.5},
    "topk": {"rows": rwfx.TopK(0.3)},
}
OPTIONS_OF_MLP = OPTIONS | {
    "masked": {"num_paths": 5, "mode": "masked"},
    "resampled": {"density": 0.3, "resample_every": 2},
    "scheduled": {"density": rwfx.schedules.DenseFirst(1, rwfx.schedules.Linear(0.5, 0.2, 3))},
    "unbiased": {"rows": rwfx.RandomWalk(5, unbiased=True)},
    "uniform": {"rows": rwfx.Uniform(0.3)},
    "magnitude": {"rows": rwfx.Magnitude(0.3, refresh=2)},
    "adaptive": {"rows": rwfx.AdaptiveWalk(density=0.3)},
    "learned": {"rows": rwfx.LearnedWalk(5)},
    "warm": {"rows": rwfx.RandomWalk(5, temperature=2.0, epsilon=0.3)},
    "from-loss": {"rows": rwfx.RandomWalk(density=0.3, start="loss"), "examples": 0.5},
    "sampled": {"num_paths": 5, "examples": rwfx.SampledExamples(0.4)},
    "adaptive-examples": {"examples": rwfx.AdaptiveExamples(0.8)},
}
CASES = [("mlp", name) for name in OPTIONS_OF_MLP] + [
    (m, name) for m in ("cnn", "encoder") for name in OPTIONS if name != "full"
]


@pytest.mark.parametrize(("model", "options"), CASES, ids=map("-".join, CASES))
def test_a_transformed_model_trains_as_on_a_cpu_with_the_same_rows(model, options):
    options = OPTIONS_OF_MLP[options]
    # An inverse probability is of float32.
    tolerance = 1e-5 if "unbiased" in repr(options) else 1e-10
    assert_same(trained(model, DEVICE, **options), trained(model, "cpu", **options), tolerance)


OPTIMIZERS = {
    "sgd": lambda fused, how: lambda p: rwfx.optim.SGD(p, 0.1, momentum=0.9, fused=fused, unvisited=how),
    "adam": lambda fused, how: lambda p: rwfx.optim.Adam(p, 1e-2, amsgrad=True, fused=fused, unvisited=how),
    "adamw": lambda fused, how: lambda p: rwfx.optim.AdamW(p, 1e-2, fused=fused, unvisited=how),
}


@pytest.mark.parametrize("unvisited", ["frozen", "moving", "owed"])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_row_optimizers_step_as_on_a_cpu(optimizer, fused, unvisited):
    optimizer = OPTIMIZERS[optimizer](fused, unvisited)
    options = {"density": 0.3, "grad": "rows", "exclude": "2.weight"}  # which has a dense gradient beside
    assert_same(trained("mlp", DEVICE, optimizer, **options), trained("mlp", "cpu", optimizer, **options), 1e-9)


@pytest.mark.parametrize("name", ["cnn", "encoder"])
def test_row_gradients_of_other_models_train_as_on_a_cpu(name):
    def optimizer(parameters):
        return rwfx.optim.SGD(parameters, 0.1, momentum=0.9)

    options = {"num_paths": 5, "grad": "rows", "examples": 0.5}
    assert_same(trained(name, DEVICE, optimizer, **options), trained(name, "cpu", optimizer, **options), 1e-9)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_leaves_out_a_step_that_overflows(fused):
    model, sparse = made("mlp", DEVICE, torch.float32, density=0.3, grad="rows")
    optimizer = rwfx.optim.AdamW(model.parameters(), 1e-2, fused=fused)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    for factor, moves in ((1.0, True), (torch.inf, False), (1.0, True)):
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = sparse(batch("mlp", 0, DEVICE, torch.float32)[0]).float().square().sum() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) == moves


def test_walks_and_labels():
    def drawn(device):
        torch.manual_seed(0)
        model = mlp().to(device)
        graph = rwfx.weight_graph(model)
        sparse = rwfx.transform(model, rows=rwfx.RandomWalk(density=0.3, start="labels"), seed=1)
        sparse.start_from(whole(0, 0, 3).to(device))
        backward(sparse, "mlp", 0, device, torch.float32)
        return rwfx.random_walks(graph, dict(model.named_parameters()), 2000, epsilon=0.1), sparse.rows

    assert_same(drawn(DEVICE), drawn("cpu"))


def test_a_model_that_is_moved_draws_the_rows_of_one_that_was_made_there():
    for options in (OPTIONS["paths"], OPTIONS["density"], OPTIONS_OF_MLP["adaptive"], OPTIONS["topk"]):
        rows = []
        for first, then in (("cpu", DEVICE), (DEVICE, DEVICE), (DEVICE, "cpu")):
            _, sparse = made("mlp", first, **options)
            sparse.to(then)
            backward(sparse, "mlp", 0, then)
            state = sparse.sampler_state()
            sparse.to(first).load_sampler_state(state)
            rows.append((sparse.rows, state))
        assert_same(rows[0], rows[1])
        assert_same(rows[2], rows[1])


# --- Compiled, in CUDA graphs, and without waiting --------------------------------------------------------------------


@contextmanager
def waiting_refused():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled_and_eager(name, steps, optimizer, options, **how):
    """The losses and the parameters of a compiled and of an eager run."""
    runs = []
    for compiles in (True, False):
        model, sparse = made(name, DEVICE, torch.float32, **options)
        run = torch.compile(sparse, fullgraph=True, **how) if compiles else sparse
        optimize, losses = optimizer(model.parameters()), []
        for step in range(steps):
            losses.append(backward(run, name, step, DEVICE, torch.float32).clone())
            optimize.step()
            optimize.zero_grad()
        runs.append((losses, [p.detach() for p in model.parameters()], sparse.rows))
    return runs


@pytest.mark.slow
@needs_compiler
def test_compiled_as_eager():
    options = {"num_paths": 5, "grad": "rows"}
    assert_same(*compiled_and_eager("mlp", 3, lambda p: rwfx.optim.SGD(p, 0.1), options), tolerance=1e-4)


GRAPHS = {"rows": {"density": 0.3}, "examples": {"density": 0.3, "examples": 0.5}}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("options", GRAPHS.values(), ids=GRAPHS)
def test_in_cuda_graphs_as_eager(options):
    counters.clear()
    runs = compiled_and_eager("mlp", 6, lambda p: torch.optim.SGD(p, 0.1), options, mode="reduce-overhead")
    assert_same(*runs, tolerance=1e-4)
    if "examples" not in options:  # a backward pass that writes the list of the forward pass is no CUDA graph
        assert counters["inductor"]["cudagraph_skips"] == 0


WITHOUT_WAITING = {
    "density": {"density": 0.3},
    "resampled": {"density": 0.3, "resample_every": 2},
    "topk": {"rows": rwfx.TopK(0.3)},
    "uniform": {"rows": rwfx.Uniform(0.3, unbiased=True)},
    "adaptive": {"rows": rwfx.AdaptiveWalk(density=0.3)},
    "learned": {"rows": rwfx.LearnedWalk(density=0.3)},
    "examples": {"density": 0.3, "examples": 0.5},
    "sampled": {"density": 0.3, "examples": rwfx.SampledExamples(0.5, unbiased=True)},
    "from-loss": {"rows": rwfx.RandomWalk(density=0.3, start="loss"), "examples": 0.5},
}
WAITS = [("mlp", name) for name in WITHOUT_WAITING] + [("cnn", "density"), ("cnn", "examples"), ("encoder", "density")]


@pytest.mark.parametrize(("name", "options"), WAITS, ids=map("-".join, WAITS))
def test_with_a_density_a_step_never_waits_for_the_device(name, options):
    model, sparse = made(name, DEVICE, torch.float32, **WITHOUT_WAITING[options])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batches = [batch(name, step, DEVICE, torch.float32) for step in range(3)]
    for step, (x, y) in enumerate(batches):
        with waiting_refused() if step else nullcontext():  # the first one is a warm-up
            F.cross_entropy(sparse(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()


# --- Always sparse ---------------------------------------------------------------------------------------------------


def plain_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Tanh(),
        nn.Conv2d(12, 8, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(72, 5),
    )  # fmt: skip


NETWORKS = {"mlp": mlp, "cnn": plain_cnn}


def sparsified(name, device, **options):
    torch.manual_seed(0)
    return rwfx.sparsify(NETWORKS[name]().double().to(device), seed=1, **{"density": 0.2, **options})


def moved_by(method, name, device, by="auto", **options):
    """The losses, and all states, of a few steps with updates."""
    model = sparsified(name, device, by=by, density=1.0 if method == "gradual" else 0.2)
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    topology = rwfx.Topology(model, optimizer, method, interval=2, end=6, seed=2, **options)
    nnz, losses = model.nnz, []
    for step in range(6):
        losses.append(backward(model, name, step, device))
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
    assert model.nnz == nnz or method == "gradual"
    return losses, model.state_dict(), [(u.pruned, u.grown, u.candidates) for u in topology.history]


METHODS = {
    "gse": {},
    "gse-grabo": {"distribution": "grabo"},
    "gse-graest": {"distribution": "graest"},
    "rigl": {},
    "rigl-global": {"scope": "global"},
    "set": {},
    "set-tails": {"prune": "tails"},
    "snfs": {},
    "topkast": {},
    "gradual": {"density": 0.3},
}


MOVES = [(method, "mlp") for method in METHODS] + [
    (method, "cnn") for method in ("gse-graest", "rigl", "snfs", "topkast")
]


@pytest.mark.parametrize(("method", "name"), MOVES, ids=map("-".join, MOVES))
def test_connections_move_as_on_a_cpu(method, name):
    run = method.split("-")[0], name
    assert_same(moved_by(*run, DEVICE, **METHODS[method]), moved_by(*run, "cpu", **METHODS[method]), 1e-9)


@pytest.mark.parametrize("by", ["nonzeros", "dense"])
def test_both_ways_to_compute_train_alike(by):
    assert_same(moved_by("gse", "mlp", DEVICE, by=by), moved_by("gse", "mlp", "cpu", by=by), 1e-9)


@pytest.mark.parametrize("values", ["drawn", "largest"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_sparsified_model_goes_from_device_to_device(name, values):
    here, there = (sparsified(name, device, values=values).eval() for device in ("cpu", DEVICE))
    expected = here(batch(name, 0, "cpu")[0])

    def outputs(model):
        (device,) = {p.device.type for p in model.parameters()}
        return model(batch(name, 0, device)[0])

    assert_same(there.state_dict(), here.state_dict())
    for model in (there, copy.deepcopy(here).to(DEVICE), copy.deepcopy(there).cpu(), rwfx.densify(there)):
        assert_same(outputs(model), expected, 1e-10)
    other = sparsified(name, DEVICE, density=0.4).eval()
    other.load_state_dict(here.state_dict())
    assert_same(outputs(other), expected, 1e-10)
    back = sparsified(name, "cpu", density=0.4).eval()
    back.load_state_dict(there.state_dict())
    assert_same(outputs(back), expected, 1e-10)


@needs_compiler
def test_a_compiled_sparsified_model_trains_as_it_does_otherwise():
    runs = []
    for compiles in (True, False):
        model = sparsified("mlp", DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        topology = rwfx.Topology(model, optimizer, interval=2, schedule="constant", seed=2)
        run = torch.compile(model, fullgraph=True) if compiles else model
        for step in range(4):
            backward(run, "mlp", step, DEVICE)
            optimizer.step()
            topology.step()
            optimizer.zero_grad()
        runs.append(model.state_dict())
    assert_same(*runs, tolerance=1e-9)


# --- The trainer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rw_sparse", "rw_masked", "full", "always_sparse"])
def test_a_run_that_is_resumed_is_the_run_that_was_not_stopped(mode, tmp_path):
    data = torch.utils.data.TensorDataset(torch.randn(48, 12), torch.randint(5, (48,)))

    def trainer(path):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Dropout(0.2), nn.Linear(40, 5))
        options = {"topology": {"interval": 2, "schedule": "constant"}} if mode == "always_sparse" else {}
        options |= {"checkpoint": path, "checkpoint_every": 2, "epochs": 2, "lr": 1e-2, "progress": False}
        return rwfx.RandomWalkTrainer(model, mode, device=DEVICE, **options)

    def loader():
        return torch.utils.data.DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3))

    whole_run = trainer(tmp_path / "whole")
    whole_run.fit(loader(), loader())
    stopped = trainer(tmp_path / "run").steps(loader())
    for _ in range(7):  # checkpoints are written after 2, 4, 6 and so on
        next(stopped)
    resumed = trainer(tmp_path / "run")
    history = resumed.fit(loader(), loader(), resume=True)
    assert len(history) == len(whole_run.history) == 12
    assert all(p.device.type == DEVICE for p in resumed.network.parameters())
    assert_same(resumed.network.state_dict(), whole_run.network.state_dict())
    assert_same(history.loss, whole_run.history.loss)
