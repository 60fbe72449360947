"""The law of the row optimizers: one independent ``torch.optim`` namesake per row."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import rwfx.optim

SHAPES = {"linear": (5, 3), "conv": (5, 2, 3, 3), "bias": (5,)}
# As float32 the namesake would correct the bias in float32.
EXACT = torch.tensor([0.125], dtype=torch.float64)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD-decay": ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    "SGD-momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "SGD-dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    "SGD-nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD-maximize": ("SGD", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "maximize": True}),
    "SGD-tensor-lr": ("SGD", {"lr": EXACT, "momentum": 0.5}),
    "Adam": ("Adam", {"lr": 0.1}),
    "Adam-decay": ("Adam", {"lr": 0.1, "weight_decay": 0.1}),
    "Adam-decoupled": ("Adam", {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "Adam-amsgrad": ("Adam", {"lr": 0.1, "amsgrad": True, "betas": (0.5, 0.6)}),
    "Adam-maximize": ("Adam", {"lr": 0.1, "maximize": True, "weight_decay": 0.1}),
    "Adam-eps": ("Adam", {"lr": 0.1, "eps": 0.3}),
    "Adam-no-memory": ("Adam", {"lr": 0.1, "betas": (0.0, 0.0)}),
    "Adam-tensor-lr": ("Adam", {"lr": EXACT}),
    "Adam-tensor-betas": ("Adam", {"lr": 0.1, "betas": (EXACT * 4, EXACT * 6)}),
    "AdamW": ("AdamW", {"lr": 0.1}),
    "AdamW-amsgrad": ("AdamW", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.5, "maximize": True}),
    "AdamW-tensor-lr": ("AdamW", {"lr": EXACT.reshape(()), "weight_decay": 0.5}),
}
TOLERANCE: dict[torch.dtype, Any] = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
}
TOLERANCE[torch.complex128] = TOLERANCE[torch.float64]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)


class PerRow:
    """The oracle. Each row is a parameter with an optimizer of its own, and has a gradient only when it is drawn."""

    def __init__(self, name: str, w: Tensor, **options: Any) -> None:
        self.rows = [torch.nn.Parameter(row.clone()) for row in w.detach()]
        self.optimizers = [getattr(torch.optim, name)([row], **options) for row in self.rows]

    def step(self, rows: list[int], dw: Tensor) -> None:
        for i, (row, optimizer) in enumerate(zip(self.rows, self.optimizers, strict=True)):
            row.grad = dw[i].clone() if i in rows else None
            optimizer.step()

    def w(self) -> Tensor:
        return torch.stack([row.detach() for row in self.rows])


def row_gradient(rows: list[int], dw: Tensor) -> Tensor:
    """``dw[rows]`` as a row gradient; coalesced, when ``rows`` are sorted, as a row-sparse backward gives it."""
    index = torch.tensor(rows, dtype=torch.int64, device=dw.device)
    ordered = rows == sorted(set(rows))
    return torch.sparse_coo_tensor(
        index[None], dw[index], dw.shape, check_invariants=True, is_coalesced=ordered or None
    )


def run(name: str, options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, history: list[Any]) -> None:
    """Step through ``history`` and compare after each step. An entry is a row set, or "dense"."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    w = torch.nn.Parameter(draw())
    oracle = PerRow(name, w, **options)
    optimizer = getattr(rwfx.optim, name)([w], **options)
    for rows in history:
        dw = draw()
        if rows == "dense":
            w.grad, rows = dw, list(range(len(w)))
        else:
            w.grad = row_gradient(rows, dw)
        optimizer.step()
        oracle.step(rows, dw)
        assert_close(w.detach(), oracle.w(), **TOLERANCE[dtype])


# Row 4 waits until the others are old; row 3 is drawn once.
SETS = [[0, 1], [0], [], [0, 1, 2], [2], [0, 3], [1, 2], [0, 4], [0, 1, 2, 3, 4], [4, 0], [1, 4], [0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@every_variant
def test_row_gradients_step_as_one_independent_optimizer_per_row(name, options, shape, dtype):
    run(name, options, shape, dtype, SETS)


@pytest.mark.parametrize(
    "history",
    [
        ["dense", "dense", [1], [0, 2], "dense", [1, 4]],
        [[1], [0, 2], "dense", [1, 4], "dense", []],
        [[], "dense", [0], [3]],
    ],
    ids=["dense-first", "rows-first", "empty-first"],
)
@every_variant
def test_mixed_histories_step_as_one_independent_optimizer_per_row(name, options, history):
    run(name, options, SHAPES["linear"], torch.float64, history)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@every_variant
def test_with_every_row_kept_it_is_its_namesake(name, options, shape, dtype):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(shape, dtype=dtype))
    dense = torch.nn.Parameter(w.detach().clone())
    optimizer = getattr(rwfx.optim, name)([w], **options)
    namesake = getattr(torch.optim, name)([dense], **options)
    for _ in range(20):
        dense.grad = torch.randn(shape, dtype=dtype)
        w.grad = row_gradient(list(range(len(w))), dense.grad)
        optimizer.step()
        namesake.step()
    assert_close(w, dense, **TOLERANCE[dtype])


@settings(max_examples=60, deadline=None)
@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    shape=st.sampled_from(sorted(SHAPES)),
    history=st.lists(
        st.one_of(
            st.just("dense"), st.permutations(range(5)).flatmap(lambda p: st.integers(0, 5).map(lambda n: p[:n]))
        ),
        max_size=8,
    ),
)
def test_any_history_steps_as_one_independent_optimizer_per_row(variant, shape, history):
    run(*VARIANTS[variant], SHAPES[shape], torch.float64, history)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_complex_weights_step_as_one_independent_optimizer_per_row(name):
    run(name, {"lr": 0.1, "weight_decay": 0.1}, SHAPES["linear"], torch.complex128, SETS)


@pytest.mark.parametrize("variant", ["SGD-dampening", "Adam-amsgrad", "AdamW"])
def test_weights_step_alike_however_they_lie_in_memory(variant):
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(5, 4, 2, 2))
    last = torch.nn.Parameter(w.detach().clone(memory_format=torch.channels_last))
    strided = torch.nn.Parameter(w.detach().clone().transpose(0, 3).contiguous().transpose(0, 3))
    wide = torch.nn.Parameter(torch.randn(5, 16))
    turned = torch.nn.Parameter(wide.detach().clone().t().contiguous().t())
    half = torch.nn.Parameter(torch.randn(5, 16).bfloat16())
    inside = torch.nn.Parameter(F.pad(half.detach().flatten(), (1, 0))[1:].view(5, 16))
    for weights in ([w, last, strided], [wide, turned], [half, inside]):
        optimizer = getattr(rwfx.optim, name)(weights, **options)
        for rows in SETS:
            dw = torch.randn(weights[0].shape).to(weights[0].dtype)
            for weight in weights:
                weight.grad = row_gradient(rows, dw)
            optimizer.step()
        for weight in weights[1:]:
            assert_close(weight.detach(), weights[0].detach())


@pytest.mark.parametrize("batch", [1, 20, 2**16], ids=["alone", "some", "all"])
@every_variant
def test_parameters_step_together_as_each_alone(name, options, batch, monkeypatch):
    monkeypatch.setattr("rwfx.optim.rows.BATCH", batch)
    torch.manual_seed(0)
    shapes = [(5, 3), (5,), (7, 4), (5, 2, 3, 3), (6,), (5, 3)]
    start = [torch.randn(s, dtype=torch.float64 if i == 2 else torch.float32) for i, s in enumerate(shapes)]
    together, alone = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    make = getattr(rwfx.optim, name)
    # The last parameter is in a group of its own, with another weight decay.
    optimizer = make([{"params": together[:-1]}, {"params": together[-1:], "weight_decay": 0.3}], **options)
    each = [make([w], **options | ({"weight_decay": 0.3} if w is alone[-1] else {})) for w in alone]
    for step, rows in enumerate(SETS):
        for position, (a, b) in enumerate(zip(together, alone, strict=True)):
            drawn = SETS[(step + position) % len(SETS)] if position else rows
            a.grad = row_gradient(drawn, torch.randn_like(a))
            b.grad = a.grad.clone()
        for x in (optimizer, *each):
            x.step()
        for a, b in zip(together, alone, strict=True):
            assert_close(a.detach(), b.detach(), **TOLERANCE[a.dtype])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "tensor" not in v])
def test_undrawn_rows_and_their_state_are_frozen_and_the_gradient_is_left_alone(variant):
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = getattr(rwfx.optim, name)([w], **options)
    w.grad = torch.randn(5, 3)
    optimizer.step()
    w.grad = row_gradient([0, 1], torch.randn(5, 3))
    optimizer.step()
    before = {"w": w.detach().clone(), **{k: v.clone() for k, v in optimizer.state[w].items()}}
    w.grad = gradient = row_gradient([1, 3], torch.randn(5, 3))
    values = gradient.values().clone()
    optimizer.step()
    after = {"w": w.detach(), **optimizer.state[w]}
    assert before.keys() == after.keys()
    for key, was in before.items():
        assert torch.equal(after[key][[0, 2, 4]], was[[0, 2, 4]]), key
        # The largest v so far may stay.
        assert key.startswith("max") or not torch.equal(after[key][[1, 3]], was[[1, 3]]), key
    assert w.grad is gradient
    assert torch.equal(gradient.values(), values)


narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
narrow_variants = pytest.mark.parametrize(
    "variant", ["SGD-decay", "SGD-nesterov", "Adam", "Adam-decay", "Adam-amsgrad", "AdamW"]
)


def narrow_options(variant: str) -> tuple[str, dict[str, Any]]:
    name, options = VARIANTS[variant]
    # A small g**2 is zero in float16, for the namesake too, and the default eps then lets it step to infinity.
    return name, options | {"lr": 0.01} | ({} if name == "SGD" else {"eps": 1e-3})


@narrow
@narrow_variants
def test_from_equal_states_the_error_of_a_narrow_step_is_no_larger_than_the_namesakes(variant, dtype):
    name, options = narrow_options(variant)
    torch.manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(16, 64).to(dtype))
    namesake = getattr(torch.optim, name)([theirs], **options)
    for _ in range(5):
        theirs.grad = torch.randn(16, 64).to(dtype)
        namesake.step()
    ours, exact = (torch.nn.Parameter(theirs.detach().to(x, copy=True)) for x in (dtype, torch.float64))
    optimizer = getattr(rwfx.optim, name)([ours], **options)
    reference = getattr(torch.optim, name)([exact], **options)
    optimizer.load_state_dict(copy.deepcopy(namesake.state_dict()))
    reference.load_state_dict(copy.deepcopy(namesake.state_dict()))
    rows = [1, 4, 5, 9, 14]
    theirs.grad = torch.randn(16, 64).to(dtype)
    ours.grad, exact.grad = row_gradient(rows, theirs.grad), theirs.grad.double()
    for each in (namesake, optimizer, reference):
        each.step()
    error, their_error = (float((x.double() - exact).detach()[rows].norm()) for x in (ours, theirs))
    assert 0 < error <= their_error


@narrow
@narrow_variants
def test_over_twenty_steps_the_error_of_a_narrow_dtype_is_that_of_the_namesake(variant, dtype):
    name, options = narrow_options(variant)
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(16, 64, generator=generator).to(dtype))
    exact = PerRow(name, w.detach().double(), **options)
    namesake = PerRow(name, w, **options)
    optimizer = getattr(rwfx.optim, name)([w], **options)
    for _ in range(20):
        rows = torch.randperm(16, generator=generator)[:8].sort().values.tolist()
        dw = torch.randn(16, 64, generator=generator).to(dtype)
        w.grad = row_gradient(rows, dw)
        optimizer.step()
        namesake.step(rows, dw)
        exact.step(rows, dw.double())
    error, their_error = (float((x.double() - exact.w()).norm()) for x in (w.detach(), namesake.w()))
    # Both round w each time, which is most of it, and by chance either may come out a little ahead.
    assert 0 < error <= 1.02 * their_error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
def test_a_cuda_weight_steps_as_a_cpu_weight(name, fused):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(5, 4))
    there = torch.nn.Parameter(w.detach().cuda())
    options = {"weight_decay": 0.1, **({"momentum": 0.9, "dampening": 0.1} if name == "SGD" else {})}
    here = getattr(rwfx.optim, name)([w], lr=0.1, **options)
    on_cuda = getattr(rwfx.optim, name)([there], lr=torch.tensor(0.1, device="cuda"), fused=fused, **options)
    for rows in ["dense", *SETS, "dense", [1, 2]]:
        dw = torch.randn(5, 4)
        w.grad, there.grad = (d if rows == "dense" else row_gradient(rows, d) for d in (dw, dw.cuda()))
        here.step()
        on_cuda.step()
        assert_close(there.detach().cpu(), w.detach())
