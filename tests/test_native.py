"""The CPU kernels: they compute what the Python implementations compute, and nothing depends on having them."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from zoo import ZOO, Residual, make

import rwfx
import rwfx.optim
from rwfx import native
from rwfx.ops import draw_by_norm as draw_by_norm_in_python
from rwfx.ops import remember as remember_in_python
from rwfx.ops import row_linear
from rwfx.ops import walk as walk_in_python
from rwfx.ops.linear import ACTIVATIONS, _RowLinear
from rwfx.ops.walk import unpack_stations
from rwfx.policies import RandomWalk
from rwfx.walk import WalkSampler

ROOT = Path(__file__).parents[1]


@pytest.fixture
def kernels():
    if not native.ready():
        pytest.skip("there are no CPU kernels here: no C++ compiler, or RWFX_NATIVE=0")


# --- The same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grad", ["dense", "rows"])
@pytest.mark.parametrize("dx", ["rows", "full"])
@pytest.mark.parametrize("direct", [False, True], ids=["alone", "direct"])
@pytest.mark.parametrize("activation", ["", *ACTIVATIONS], ids=lambda name: name or "none")
@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_row_linear_is_the_python_implementation(kernels, stored, activation, direct, dx, grad, dtype):
    x, w, b = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((4, 9, 40), (70, 40), (70,)))
    if stored == "columns":
        w = torch.randn(40, 70, dtype=dtype).t().requires_grad_()
    upstream = torch.randn(4, 9, 70, dtype=dtype)
    for some in ([], [3, 17, 60], list(range(70))):
        for read in (None, [], [0, 39], list(range(40))):
            rows = torch.tensor(some, dtype=torch.int64)
            columns = None if read is None else torch.tensor(read, dtype=torch.int64)
            ours = row_linear(x, w, b, rows, dx, grad, None, None, None, columns, activation, direct)
            theirs = _RowLinear.apply(x, w, b, rows, dx, grad, None, None, None, columns, activation, direct)
            assert "RowLinear" in ours.grad_fn.name()
            assert ours.grad_fn.name() != theirs.grad_fn.name()
            assert torch.equal(ours, theirs)
            ours, theirs = (torch.autograd.grad(y, (x, w, b), upstream) for y in (ours, theirs))
            confined = slice(None) if read is None or dx == "full" else columns
            tolerance = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-12}
            assert_close(ours[0][..., confined], theirs[0][..., confined], **tolerance)
            for a, e in zip(ours[1:], theirs[1:], strict=True):
                assert a.layout == e.layout
                assert a.is_sparse or a.stride() == e.stride()
                assert_close(a.to_dense(), e.to_dense(), **tolerance)


OBSERVING = {
    "scale": {"scale": torch.linspace(0.5, 4, 9)},
    "seen": {"seen": torch.zeros(70)},
    "seen, rows": {"seen": torch.full((70,), -1.0), "seen_all": False},
    "scale and seen": {"scale": torch.linspace(0.5, 4, 9), "seen": torch.zeros(70)},
    "chosen": {"chosen": torch.zeros(71, dtype=torch.int64)},
    "chosen and seen": {"chosen": torch.zeros(71, dtype=torch.int64), "seen": torch.zeros(70)},
    "chosen and seen, rows": {
        "chosen": torch.zeros(71, dtype=torch.int64), "seen": torch.full((70,), -1.0), "seen_all": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OBSERVING.values(), ids=OBSERVING)
@pytest.mark.parametrize("stored", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grad", ["dense", "rows"])
@pytest.mark.parametrize("dx", ["rows", "full"])
def test_row_linear_scales_sees_and_chooses_as_the_python_implementation(kernels, dx, grad, dtype, stored, options):
    x, w, b = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((4, 9, 40), (70, 40), (70,)))
    upstream = torch.randn(4, 9, 70, dtype=dtype)
    if stored == "columns":
        upstream = upstream.movedim(-1, 0).contiguous().movedim(0, -1)
    rows, columns = torch.arange(2, 65, 7), torch.tensor([0, 5, 39])
    runs = []
    for call in (row_linear, _RowLinear.apply):
        own = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        more = [own.get(name, name == "seen_all" or None) for name in ("scale", "seen", "seen_all", "chosen")]
        y = call(x, w, b, rows, dx, grad, None, None, None, columns, "gelu", False, *more)
        runs.append((torch.autograd.grad(y, (x, w, b), upstream), own))
    (ours, observed), (theirs, expected) = runs
    tolerance = {"rtol": 0, "atol": 2e-4 if dtype == torch.float32 else 1e-12}
    for a, e in zip(ours, theirs, strict=True):
        assert a.layout == e.layout
        assert_close(a.to_dense(), e.to_dense(), **tolerance)
    for name in options.keys() - {"seen_all"}:
        assert_close(observed[name], expected[name])
        assert name == "scale" or not torch.equal(observed[name], options[name])


class TwoTrees(nn.Module):
    """Two heads; at the second, walks come to either of two weights or end."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 90), nn.Linear(90, 130), nn.Linear(130, 8)
        self.d, self.e, self.f = nn.Linear(5, 70), nn.Linear(5, 4), nn.Linear(70 + 5 + 4, 9)

    def forward(self, x):
        return self.c(self.b(self.a(x)).flip(1)), self.f(torch.cat([self.e(x), x, self.d(x)], 1).flip(1))


WALKS = [
    {},
    {"num_paths": 1},
    {"num_paths": 300},
    {"temperature": 0.3},
    {"temperature": 4.0, "epsilon": 0.2},
    {"epsilon": 1.0},
    {"min_rows": 4},
    {"density": 0.5},
    {"density": 1.0, "num_paths": 40},
    {"density": 0.3, "num_paths": 60, "resample_every": 2},
    {"resample_every": 3, "min_rows": 3, "temperature": 2.0},
]


def walk_sampler(graph, resample_every=1, kept=None, **options):
    walk, densities = RandomWalk(**options), None
    if walk.density is not None:
        densities = dict.fromkeys(graph.names, walk.density)
    return WalkSampler(graph, kept or list(graph.names), 7, walk, densities, resample_every)


def draw_twice(sampler, weights, step, **new):
    """The row sets of one step, by the kernel and by the Python implementation."""
    options = sampler.policy
    graph = sampler._kept, sampler._tables.tensors(), sampler._heads, sampler._starts.tensors(), sampler._layout
    numbers = options.num_paths, options.temperature, options.epsilon, options.min_rows
    arguments = *graph, torch.tensor([7, step]), sampler.last, *numbers, sampler.exactly, sampler.resample_every
    return torch.ops.rwfx.walk.default(weights, *arguments, **new), walk_in_python(weights, *arguments, **new)


@pytest.mark.parametrize("options", WALKS, ids=str)
@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_walk_draws_the_rows_of_the_python_implementation(kernels, kind, options):
    model = make(kind)
    graph = rwfx.weight_graph(model, model.inputs()[0] if not model.inputs()[1] else None)
    for p in model.parameters():
        if p.dim() == 2:  # rows that are left uniformly, and a feature that no walk draws from the others
            p.data[0] = 0
            p.data[-1, 0] = float("nan")
            p.data[:, 1] = 0
    sampler = walk_sampler(graph, **{"num_paths": 9, **options})
    weights = [model.get_parameter(name) for name in sampler.crossed]
    drawn = []
    for step in range(7):
        ours, theirs = draw_twice(sampler, weights, step)
        assert len(ours) == len(theirs) == len(weights) + 1
        assert all(torch.equal(a, e) for a, e in zip(ours, theirs, strict=True))
        sampler.last.copy_(ours[-1])
        drawn.append(ours[-1])
    for step, (before, after) in enumerate(pairwise(drawn), 1):
        assert step % sampler.resample_every == 0 or torch.equal(before, after)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.complex128], ids=str)
def test_walk_crosses_weights_of_other_dtypes_as_the_python_implementation(kernels, dtype, temperature):
    model = make(Residual)
    graph = rwfx.weight_graph(model)
    sampler = walk_sampler(graph, num_paths=20, temperature=temperature)
    weights = [(50 * model.get_parameter(name)).to(dtype) for name in sampler.crossed]
    for step in range(20):
        ours, theirs = draw_twice(sampler, weights, step)
        assert all(torch.equal(a, e) for a, e in zip(ours, theirs, strict=True))


NEW = {
    "factors": {"factors": True},
    "starts": {"start_weights": True},
    "budget": {"budget": True, "factors": True, "start_weights": True},
    "unbiased": {"unbiased": True},
    "all": {"factors": True, "start_weights": True, "unbiased": True},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 2.5, "epsilon": 0.2}, {"num_paths": 300}], ids=str)
@pytest.mark.parametrize(
    ("kind", "new"),
    # No scales where rows are added: walks have several ways to a row there.
    [*[(TwoTrees, new) for new in NEW], *[(Residual, new) for new in NEW if "unbiased" not in NEW[new]]],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_walk_follows_factors_and_starts_and_gives_scales_as_the_python_implementation(
    kernels, kind, options, dtype, new
):
    model = make(kind) if kind is Residual else kind()
    graph = rwfx.weight_graph(model)
    sampler = walk_sampler(graph, **{"num_paths": 20, **options}, kept=list(graph.names)[:-1])
    weights = [model.get_parameter(name).detach().clone().to(dtype) for name in sampler.crossed]
    for w in weights:
        w[0] = 0
        w[-1, 0] = float("nan")
        w[:, 1] = 0
    stations = unpack_stations(tuple(sampler._layout))
    unbiased = "unbiased" in NEW[new]
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        real = (torch.float32, torch.float64)[step % 2]
        features = [0 if s.weight < 0 else weights[s.weight].shape[1] for s in stations]
        factors = [torch.rand(n, generator=generator, dtype=real) for n in features]
        start_weights = [torch.rand(len(ids), generator=generator, dtype=real) for ids in sampler._starts.tensors()]
        for given in (*factors, *start_weights):
            given[given < 0.2] = 0
        if step == 5:
            factors[-1][0] = start_weights[0][0] = float("inf")
        rows = [int(torch.randint(1, n + 1, (), generator=generator)) for n in sampler.sizes]
        values = {
            "factors": factors,
            "start_weights": start_weights,
            "budget": torch.tensor([step * 10, *rows]),
            "unbiased": True,
        }
        ours, theirs = draw_twice(sampler, weights, step, **{name: values[name] for name in NEW[new]})
        assert len(ours) == len(theirs) == (2 if unbiased else 1) * len(sampler.kept) + 1
        for a, e in zip(ours, theirs, strict=True):
            assert a.dtype == e.dtype
            assert_close(a, e, rtol=1e-6 if a.is_floating_point() else 0, atol=0)
            assert not a.is_floating_point() or a.isfinite().all()


OPTIMIZERS = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD-decay": ("SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    "SGD-momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "SGD-dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "SGD-nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD-maximize": ("SGD", {"lr": 0.1, "momentum": 0.5, "maximize": True}),
    "Adam": ("Adam", {"lr": 0.1}),
    "Adam-decay": ("Adam", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    "Adam-decoupled": ("Adam", {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "Adam-amsgrad": ("Adam", {"lr": 0.1, "amsgrad": True, "betas": (0.5, 0.6)}),
    "Adam-no-memory": ("Adam", {"lr": 0.1, "betas": (0.0, 0.0), "eps": 0.1}),
    "AdamW": ("AdamW", {"lr": 0.1}),
    "AdamW-amsgrad": ("AdamW", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.5, "maximize": True}),
}
every_optimizer = pytest.mark.parametrize(("name", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
# Row sets of a parameter with six rows: of one backward pass, of two that are added up, dense, or none.
HISTORY = [[0, 1], [5, 0, 5, 2], "dense", [3], [], [1, 1, 1], None, "dense", [0, 1, 2, 3, 4, 5], [4, 2]]
SHAPES = [(6, 5), (6,), (6, 2, 3)]
STRETCHES = (6, 200)  # wide enough to be updated in several stretches, of which one is short
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


def gradient(rows, shape, dtype):
    """A dense gradient, a row gradient, or none; with repeated rows it is not coalesced."""
    values = torch.randn(shape, dtype=dtype)
    if rows is None or rows == "dense":
        return None if rows is None else values
    index = torch.tensor(rows, dtype=torch.int64)
    return torch.sparse_coo_tensor(
        index[None], values[index], shape, is_coalesced=rows == sorted(set(rows)) or None, check_invariants=True
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@every_optimizer
def test_a_step_of_the_optimizers_is_the_python_step(kernels, name, options, dtype, monkeypatch):
    # In bfloat16 so many numbers have some whose roundings add up to more than the tolerance.
    shapes = SHAPES if dtype == torch.bfloat16 else [*SHAPES, STRETCHES]
    start = [torch.randn(shape, dtype=dtype) for shape in shapes]
    runs = []
    for with_kernels in (True, False):
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        runs.append((with_kernels, weights, getattr(rwfx.optim, name)(weights, **options)))
    in_python = []  # how many parameters each step left to the Python implementation
    batches = rwfx.optim.rows.batches
    monkeypatch.setattr(rwfx.optim.rows, "batches", lambda left: [in_python.append(len(left)), *batches(left)][1:])
    for step in range(2 * len(HISTORY)):
        gradients = [gradient(HISTORY[(step + k) % len(HISTORY)], s, dtype) for k, s in enumerate(shapes)]
        for with_kernels, weights, optimizer in runs:
            monkeypatch.setattr(native, "ready", lambda answer=with_kernels: answer)
            for w, g in zip(weights, gradients, strict=True):
                w.grad = None if g is None else g.clone()
            optimizer.step()
            assert (in_python.pop() == 0) == with_kernels
        for a, e in zip(runs[0][1], runs[1][1], strict=True):
            assert_close(a.detach(), e.detach(), **TOLERANCE[dtype])
            ours, theirs = (optimizer.state[w] for w, (_, _, optimizer) in zip((a, e), runs, strict=True))
            for key in theirs:
                assert_close(ours[key], theirs[key], **TOLERANCE[dtype])


@pytest.mark.parametrize("switched_on", [True, False], ids=["then-with", "then-without"])
@every_optimizer
def test_a_run_may_change_between_kernels_and_python_at_any_step(kernels, name, options, switched_on, monkeypatch):
    start = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    steady, changing = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    runs = [(weights, getattr(rwfx.optim, name)(weights, **options)) for weights in (steady, changing)]
    for step in range(2 * len(HISTORY)):
        gradients = [gradient(HISTORY[(step + k) % len(HISTORY)], s, torch.float64) for k, s in enumerate(SHAPES)]
        for (weights, optimizer), answer in zip(runs, (True, switched_on == (step % 5 > 1)), strict=True):
            monkeypatch.setattr(native, "ready", lambda answer=answer: answer)
            for w, g in zip(weights, gradients, strict=True):
                w.grad = None if g is None else g.clone()
            optimizer.step()
        for a, e in zip(steady, changing, strict=True):
            assert_close(a.detach(), e.detach(), **TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_optimizer
def test_a_dense_gradient_beside_row_gradients_is_stepped_as_by_the_namesake(
    kernels, name, options, dtype, monkeypatch
):
    """The rows come and go, so that the dense parameter is the kernel's at one step and the namesake's at the next."""
    dense, other = (torch.nn.Parameter(torch.randn(6, 5, dtype=dtype)) for _ in range(2))
    alone = torch.nn.Parameter(dense.detach().clone())
    optimizer, namesake = (
        getattr(module.optim, name)(weights, **options)
        for module, weights in ((rwfx, [dense, other]), (torch, [alone]))
    )
    passes = []
    op = torch.ops.rwfx.sgd_rows_ if name == "SGD" else torch.ops.rwfx.adam_rows_
    one_pass = op.default
    monkeypatch.setattr(op, "default", lambda w, *rest: passes.append(len(w)) or one_pass(w, *rest))
    taken = []
    for rows in [None, [0, 1], [2], "dense", [0], None, None, [4, 4], [], [1, 5], None, [3]]:
        dense.grad = torch.randn(6, 5, dtype=dtype)
        alone.grad = dense.grad.clone()
        other.grad = gradient(rows, (6, 5), dtype)
        passes.clear()
        optimizer.step()
        namesake.step()
        taken.append(passes == [2])
        assert_close(dense.detach(), alone.detach(), **TOLERANCE[dtype])
    assert {*taken} == {True, False}


@pytest.mark.parametrize("with_kernels", [True, False], ids=["kernels", "python"])
@every_optimizer
def test_autograd_notices_that_a_step_has_changed_the_weights(kernels, name, options, with_kernels, monkeypatch):
    monkeypatch.setattr(native, "ready", lambda: with_kernels)
    w, v = (torch.nn.Parameter(torch.randn(6, 5)) for _ in range(2))
    optimizer = getattr(rwfx.optim, name)([w, v], **options)
    losses = [(p * p).sum() for p in (w, v)]
    w.grad, v.grad = torch.randn(6, 5), gradient([1, 4], (6, 5), torch.float32)
    optimizer.step()
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


EXAMPLES = "test_examples.py", "test_example_ops.py", "test_example_training.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "files", [("test_ops.py", "test_columns.py"), ("test_walk.py", "test_transform.py"), EXAMPLES], ids=str
)
def test_without_kernels_the_laws_are_the_same(files):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *[f"tests/{name}" for name in files]]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"RWFX_NATIVE": "0"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " passed" in run.stdout


# --- Having them or not ----------------------------------------------------------------------------------------------

TRAIN = """
import torch, rwfx
from rwfx import native
torch.manual_seed(0)
model = rwfx.transform(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)), 3,
                       grad="rows", break_even=False, seed=0)
optimizer = rwfx.optim.Adam(model.parameters())
before = [p.detach().clone() for p in model.parameters()]
model(torch.ones(2, 8)).square().sum().backward()
optimizer.step()
assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))
print(native.ready())
"""


def run_python(source, **environment):
    """A process of its own, that has read nothing of this one's cache where ``XDG_CACHE_HOME`` says so."""
    without = {name: value for name, value in os.environ.items() if name not in ("CXX", "RWFX_NATIVE")}
    return subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env=without | environment, capture_output=True, text=True, check=False
    )


def program(folder, text):
    """A program to be taken for the compiler."""
    path = folder / "compiler"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def libraries(cache):
    return list(Path(cache).rglob("*.so"))


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("exit 1", "the compiler ended with status 1"),
        ("echo notes >&2; echo 'fatal error: no such header' >&2; exit 1", "fatal error: no such header"),
        (None, "no C++ compiler was found"),
        ("missing", "No such file or directory"),
    ],
    ids=["silent", "error", "none", "not-there"],
)
def test_without_a_compiler_training_works_and_one_warning_tells_the_reason(compiler, reason, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONWARNINGS": "always"}
    if compiler is None:
        environment["PATH"] = str(tmp_path)
    elif compiler == "missing":
        environment["CXX"] = str(tmp_path / "missing")
    else:
        environment["CXX"] = program(tmp_path, compiler)
    run = run_python(TRAIN, **environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "False\n"
    assert run.stderr.count("UserWarning: rwfx runs without its CPU kernels") == 1
    assert reason in run.stderr
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_where_they_are_not_wanted_they_are_left_out_without_a_word(tmp_path):
    run = run_python(TRAIN, RWFX_NATIVE="0", XDG_CACHE_HOME=str(tmp_path), PYTHONWARNINGS="always")
    assert (run.returncode, run.stdout) == (0, "False\n"), run.stderr
    assert "CPU kernels" not in run.stderr
    assert not list(tmp_path.iterdir())


def test_a_build_that_is_cut_short_leaves_no_library(tmp_path):
    # The compiler writes half an object (the file after -o is its last argument) and its caller is killed.
    killer = program(tmp_path, 'for last; do :; done; echo half > "$last"; kill -9 $PPID')
    run = run_python(TRAIN, CXX=killer, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert run.returncode == -9
    left = [path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert set(left) == {".o"}
    assert not libraries(tmp_path)


def test_a_library_that_cannot_be_loaded_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = native._library()
    library.parent.mkdir()
    library.write_bytes(b"half")
    run = run_python(TRAIN, XDG_CACHE_HOME=str(tmp_path), PYTHONWARNINGS="always")
    assert (run.returncode, run.stdout) == (0, "False\n"), run.stderr
    assert run.stderr.count("UserWarning: rwfx runs without its CPU kernels") == 1


def test_another_process_finds_them_and_says_nothing(kernels):
    run = run_python(TRAIN, PYTHONWARNINGS="always")
    assert (run.returncode, run.stdout, run.stderr) == (0, "True\n", "")


@pytest.mark.slow
def test_they_are_built_once_for_all_processes(kernels, tmp_path):
    first, second = (run_python(TRAIN, XDG_CACHE_HOME=str(tmp_path), PYTHONWARNINGS="always") for _ in range(2))
    assert (first.stdout, second.stdout) == ("True\n", "True\n"), first.stderr + second.stderr
    assert f"compiling its CPU kernels, once for this machine, into {tmp_path}" in first.stderr
    assert second.stderr == ""
    assert [path.parent.name for path in libraries(tmp_path)] == ["rwfx"]


@pytest.mark.parametrize("rule", [(True, 0.4, 0.1, 1.5, 0.05, 4.0), (False, 0.3, 0.0, 0.0, 0.1, 2.5)], ids=str)
@pytest.mark.parametrize("drawn", [[], [1, 4, 9], list(range(11))], ids=["none", "some", "all"])
def test_remember_is_the_python_implementation(kernels, rule, drawn):
    sizes, num_rows = torch.tensor([5, 2, 6, 5]), 11  # the last use is of the first one's weight
    row = torch.cat([torch.arange(5), torch.arange(2) + 5, torch.arange(4) + 7, torch.tensor([0, 1]), torch.arange(5)])
    seen = [torch.rand(int(n)) for n in sizes]
    seen[0][2], seen[2][1], seen[2][2] = torch.nan, torch.inf, 0
    seen[1].zero_()
    taken, value = torch.cat(seen).nan_to_num(0.0, 0.0, 0.0), torch.rand(18) * 2
    taken[:5] += 1  # of the first use something new was seen
    taken[8] += 1
    use = torch.arange(4).repeat_interleave(sizes)
    last = torch.cat([torch.tensor([0, len(drawn)]), torch.tensor(drawn), torch.zeros(num_rows - len(drawn))]).long()
    arguments = seen, taken, value, sizes, use, row, last, num_rows, *rule
    ours, theirs = torch.ops.rwfx.remember.default(*arguments), remember_in_python(*arguments)
    for a, e in zip(ours, theirs, strict=True):
        assert_close(a, e, rtol=1e-5, atol=1e-6)
        assert a.isfinite().all()
    unchanged = ours[1][5:7], ours[1][13:]
    assert_close(unchanged, (value[5:7], value[13:]), rtol=0, atol=0)
    torch.library.opcheck(torch.ops.rwfx.remember.default, arguments)


@pytest.mark.parametrize("budget", [False, True], ids=["fixed", "budget"])
@pytest.mark.parametrize("power", [0.0, 1.0, 12.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e30, torch.inf, torch.nan], ids=str)
def test_draw_by_norm_is_the_python_implementation(kernels, scale, power, budget):
    weights = [torch.randn(30, 8).square(), torch.randn(1, 3), torch.randn(12, 2, 2)]
    weights[0][4] *= scale
    counts = [7, 1, 12]
    exactly, given = ([], torch.tensor([0, *counts])) if budget else (counts, None)
    chances, order = torch.zeros(43, dtype=torch.float64), torch.zeros(43, dtype=torch.int64)
    last = torch.zeros(4 + 43, dtype=torch.int64)
    for step in range(9):  # the norms are computed anew at 0, 4 and 8, and every second step draws
        weights = [weight + 0.1 for weight in weights]
        arguments = weights, chances, order, torch.tensor([5, step]), last, power, 4, exactly, given, 2, True
        ours, theirs = torch.ops.rwfx.draw_by_norm.default(*arguments), draw_by_norm_in_python(*arguments)
        for a, e in zip(ours, theirs, strict=True):
            assert_close(a, e, rtol=1e-6, atol=0)
        *_, chances, order, last = ours
    torch.library.opcheck(torch.ops.rwfx.draw_by_norm.default, arguments)
