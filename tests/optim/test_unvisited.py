"""What becomes of the rows that are not in a row gradient: frozen, moving or owed."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import rwfx.optim
from rwfx import native

SHAPES = {"linear": (5, 3), "conv": (5, 2, 3, 3), "bias": (5,)}
# As float32 the namesake would correct the bias in float32.
EXACT = torch.tensor([0.125], dtype=torch.float64)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD-decay": ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    "SGD-momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "SGD-dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    "SGD-nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD-maximize": ("SGD", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "maximize": True}),
    "SGD-tensor-lr": ("SGD", {"lr": EXACT, "momentum": 0.5}),
    "Adam": ("Adam", {"lr": 0.1}),
    "Adam-decay": ("Adam", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    "Adam-decoupled": ("Adam", {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "Adam-amsgrad": ("Adam", {"lr": 0.1, "amsgrad": True, "betas": (0.5, 0.6)}),
    "Adam-no-memory": ("Adam", {"lr": 0.1, "betas": (0.0, 0.0), "eps": 0.1}),
    "AdamW": ("AdamW", {"lr": 0.1}),
    "AdamW-amsgrad": ("AdamW", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.5, "maximize": True}),
    "AdamW-tensor-lr": ("AdamW", {"lr": EXACT.reshape(()), "weight_decay": 0.5}),
    "AdamW-all-decays": ("AdamW", {"lr": 0.5, "weight_decay": 3.0}),  # a factor below zero
}
TOLERANCE: dict[torch.dtype, Any] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}
CHOICES = ["frozen", "moving", "owed"]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
every_choice = pytest.mark.parametrize("unvisited", CHOICES)
every_name = pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])


@pytest.fixture(params=["kernels", "python"])
def implementation(request, monkeypatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(native, "ready", lambda: False)
    elif not native.ready():
        pytest.skip("no kernels on this machine")
    return request.param


def with_momentum(name: str, **options: Any) -> dict[str, Any]:
    return options | ({"momentum": 0.9} if name == "SGD" else {})


def ours(name: str, w: Any, **options: Any) -> torch.optim.Optimizer:
    return getattr(rwfx.optim, name)(w if isinstance(w, list) else [w], **options)


class Simulation:
    """The oracle: the equations, a number of steps written out as a loop over them, row by row in float64."""

    def __init__(self, name: str, w: Tensor, unvisited: str, options: dict[str, Any]) -> None:
        self.name, self.unvisited = name, unvisited
        self.options = {"weight_decay": 0.01 if name == "AdamW" else 0.0, "eps": 1e-8, "betas": (0.9, 0.999)} | options
        self.decoupled = name == "AdamW" or options.get("decoupled_weight_decay", False)
        self.w = w.detach().double().clone()
        self.m, self.v, self.largest = (torch.zeros_like(self.w) for _ in range(3))
        self.updates = [0] * len(w)  # how often each row was updated
        self.missed: list[list[None]] = [[] for _ in w]  # the steps that each row has not yet paid for
        self.steps = 0

    def step(self, rows: list[int], dw: Tensor, lr: float) -> None:
        self.steps += 1
        for i in range(len(self.w)):
            if i in rows:
                for _ in self.missed[i]:
                    self.decay(i, lr)
                self.missed[i].clear()
                self.update(i, dw[i].double(), lr)
            elif self.unvisited == "moving":
                self.update(i, torch.zeros_like(self.w[i]), lr)
            elif self.unvisited == "owed":
                self.missed[i].append(None)

    def decay(self, i: int, lr: float) -> None:
        beta1, beta2 = self.options["betas"]
        self.m[i] *= self.options.get("momentum", 0.0) if self.name == "SGD" else beta1
        self.v[i] *= beta2
        if self.decoupled:
            self.w[i] *= 1 - lr * self.options["weight_decay"]

    def update(self, i: int, g: Tensor, lr: float) -> None:
        of, w, m, v = self.options, self.w[i], self.m[i], self.v[i]
        first = self.updates[i] == 0
        self.updates[i] += 1
        if of.get("maximize"):
            g = -g
        if self.decoupled:
            w *= 1 - lr * of["weight_decay"]
        else:
            g = g + of["weight_decay"] * w
        if self.name == "SGD":
            momentum, dampening = of.get("momentum", 0.0), of.get("dampening", 0.0)
            m.copy_(g if first or momentum == 0 else momentum * m + (1 - dampening) * g)
            w -= lr * (g + momentum * m if of.get("nesterov") else m)
            return
        beta1, beta2 = of["betas"]
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g**2)
        self.largest[i] = torch.maximum(self.largest[i], v)
        t = self.updates[i] if self.unvisited == "frozen" else self.steps
        v_hat = (self.largest[i] if of.get("amsgrad") else v) / (1 - beta2**t)
        w -= lr * m / (1 - beta1**t) / (v_hat.sqrt() + of["eps"])


def row_gradient(rows: list[int], dw: Tensor) -> Tensor:
    index = torch.tensor(rows, dtype=torch.int64)
    return torch.sparse_coo_tensor(
        index[None], dw[index], dw.shape, is_coalesced=rows == sorted(rows) or None, check_invariants=True
    )


def random_sets(count: int, generator: torch.Generator) -> list[list[int]]:
    """Row sets of five rows; row 4 is in none of the first twenty, and in few after them."""
    sets = []
    for step in range(count):
        size = int(torch.randint(0, 4, (), generator=generator))
        sets.append([i for i in torch.randperm(5, generator=generator).tolist() if i < 4 or step % 9 == 3][:size])
        if step < 20:
            sets[-1] = [i for i in sets[-1] if i != 4]
    return sets


def run(
    name: str,
    options: dict[str, Any],
    unvisited: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    history: list[Any],
    schedule: bool = False,
) -> tuple[Tensor, torch.optim.Optimizer, Simulation]:
    """Step through ``history`` and compare after each step. An entry is a row set, or "dense"."""
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator))
    optimizer = ours(name, w, unvisited=unvisited, **options)
    oracle = Simulation(name, w, unvisited, {k: v for k, v in options.items() if k != "lr"})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.8) if schedule else None
    for rows in history:
        dw = torch.randn(shape, dtype=dtype, generator=generator)
        w.grad = dw if rows == "dense" else row_gradient(rows, dw)
        optimizer.step()
        oracle.step([*range(len(w))] if rows == "dense" else rows, dw, float(optimizer.param_groups[0]["lr"]))
        assert_close(w.detach().double(), oracle.w, **TOLERANCE[dtype])
        if scheduler is not None:
            scheduler.step()
    return w, optimizer, oracle


SETS = random_sets(40, torch.Generator().manual_seed(3))


@every_choice
@every_variant
def test_each_choice_steps_as_its_equations_say_and_pays_by_the_lr_of_the_step(
    implementation, name, options, unvisited
):
    run(name, options, unvisited, SHAPES["linear"], torch.float64, SETS, schedule=True)


@pytest.mark.parametrize("shape", ["conv", "bias"])
@every_choice
@pytest.mark.parametrize("variant", ["SGD-dampening", "Adam-amsgrad", "AdamW"])
def test_each_choice_steps_as_its_equations_say_for_any_shape(implementation, variant, unvisited, shape):
    run(*VARIANTS[variant], unvisited, SHAPES[shape], torch.float64, SETS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_choice
@pytest.mark.parametrize("variant", ["SGD-dampening", "SGD-nesterov", "Adam-amsgrad", "AdamW"])
def test_each_choice_steps_as_its_equations_say_in_narrower_dtypes(implementation, variant, unvisited, dtype):
    name, options = VARIANTS[variant]
    # The square of a small gradient is zero in float16, for torch.optim too, and the default eps divides by nothing.
    options = options | {"lr": 0.01} | ({} if name == "SGD" else {"eps": 0.1})
    run(name, options, unvisited, SHAPES["linear"], dtype, SETS[:20])


@pytest.mark.parametrize(
    "history",
    [
        ["dense", "dense", [1], [0, 2], "dense", [], [1, 4], [4], "dense"],
        [[], [1], [0, 2], "dense", [1, 4], [1], "dense", [], [3]],
    ],
    ids=["dense-first", "rows-first"],
)
@every_choice
@every_variant
def test_a_dense_gradient_visits_every_row(implementation, name, options, unvisited, history):
    run(name, options, unvisited, SHAPES["linear"], torch.float64, history)


@every_choice
@every_name
def test_a_complex_weight_steps_as_two_real_ones(implementation, name, unvisited):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.complex128))
    real = torch.nn.Parameter(torch.view_as_real(w.detach()).clone())
    options = with_momentum(name, lr=0.1, weight_decay=0.1, unvisited=unvisited)
    optimizers = ours(name, w, **options), ours(name, real, **options)
    for rows in SETS:
        dw = torch.randn(5, 3, dtype=torch.complex128)
        w.grad, real.grad = row_gradient(rows, dw), row_gradient(rows, torch.view_as_real(dw))
        for optimizer in optimizers:
            optimizer.step()
        assert_close(torch.view_as_real(w.detach()), real.detach(), rtol=1e-12, atol=1e-12)


# --- The limits: torch.optim -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@every_variant
def test_moving_is_its_namesake_on_the_gradient_filled_with_zeros_bit_for_bit(implementation, name, options, how):
    if how.get("foreach") and isinstance(options["lr"], Tensor) and name != "SGD":
        pytest.skip("torch.optim has none")
    torch.manual_seed(0)
    w, v = (torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64)) for _ in range(2))
    copies = [torch.nn.Parameter(x.detach().clone()) for x in (w, v)]
    optimizer = ours(name, [w, v], unvisited="moving", **options, **how)
    namesake = getattr(torch.optim, name)(copies, **options, **how)
    for step, rows in enumerate(SETS):
        dw = torch.randn(2, 5, 3, dtype=torch.float64)
        w.grad, v.grad = row_gradient(rows, dw[0]), dw[1] if step % 3 else row_gradient([1, 2], dw[1])
        own = w.grad, v.grad
        copies[0].grad, copies[1].grad = (g.to_dense() for g in own)
        optimizer.step()
        namesake.step()
        assert w.grad is own[0]
        assert v.grad is own[1]
        for x, y in zip((w, v), copies, strict=True):
            assert torch.equal(x, y)
            assert optimizer.state[x].keys() == namesake.state[y].keys()
            assert all(torch.equal(of, namesake.state[y][key]) for key, of in optimizer.state[x].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_choice
@every_variant
def test_with_every_row_kept_each_choice_is_its_namesake(implementation, name, options, unvisited, dtype):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(5, 3, dtype=dtype))
    dense = torch.nn.Parameter(w.detach().clone())
    optimizer, namesake = ours(name, w, unvisited=unvisited, **options), getattr(torch.optim, name)([dense], **options)
    for _ in range(20):
        dense.grad = torch.randn(5, 3, dtype=dtype)
        w.grad = row_gradient([*range(5)], dense.grad)
        optimizer.step()
        namesake.step()
    assert_close(w, dense, **TOLERANCE[dtype])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "tensor" not in v and "maximize" not in v])
def test_what_is_owed_is_what_moving_moments_have_lost(implementation, variant):
    """After steps without a gradient and one with it, the moments are those of zeros between; decay apart."""
    name, options = VARIANTS[variant]
    options = options | ({} if name == "AdamW" or "decoupled_weight_decay" in options else {"weight_decay": 0.0})
    if name == "SGD":
        options["dampening"] = 0  # which spares a row's first gradient, or with "moving" the parameter's
    torch.manual_seed(0)
    start, dw = torch.randn(2, 5, 3, dtype=torch.float64)
    states = []
    for unvisited in ("owed", "moving"):
        w = torch.nn.Parameter(start.clone())
        optimizer = ours(name, w, unvisited=unvisited, **options)
        for rows in ([0, 1], [], [2], [], [1], [0, 1, 2]):
            w.grad = row_gradient(rows, dw)
            optimizer.step()
        states.append({key: of[:3] for key, of in optimizer.state[w].items() if "step" not in key})
    assert_close(*states, rtol=1e-12, atol=1e-14)


# --- State -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["SGD-momentum", "SGD-dampening", "Adam", "Adam-amsgrad", "AdamW"])
def test_owed_rows_are_left_alone_and_count_the_step_of_their_last_update(implementation, variant):
    name, options = VARIANTS[variant]
    w = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = ours(name, w, unvisited="owed", **options)
    drawn = [[0, 1], [], [1, 2], [2]]
    for rows in drawn:
        w.grad = row_gradient(rows, torch.randn(5, 3))
        before = {"w": w.detach().clone()} | copy.deepcopy(optimizer.state[w])
        optimizer.step()
        others = [i for i in range(5) if i not in rows]
        for key, of in ({"w": w.detach()} | optimizer.state[w]).items():
            if key != "steps" and key in before:
                assert torch.equal(of[others], before[key][others]), key
    assert optimizer.state[w]["step"].tolist() == [1, 3, 4, 0, 0]
    assert optimizer.state[w]["step"].dtype == torch.float32
    assert optimizer.state[w]["steps"] == 4


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def advance(w: Tensor, optimizer: torch.optim.Optimizer, history: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for rows in history:
        dw = torch.randn(w.shape, generator=generator).to(w.dtype)
        w.grad = dw if rows == "dense" else row_gradient(rows, dw)
        optimizer.step()


@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_choice
@every_name
def test_a_resumed_run_is_the_run_bit_for_bit(implementation, name, unvisited, dtype, fused):
    options = with_momentum(name, weight_decay=0.1, fused=fused)
    w = torch.nn.Parameter(torch.randn(5, 3).to(dtype))
    optimizer = ours(name, w, lr=0.1, unvisited=unvisited, **options)
    # 257 is the first count that bfloat16 cannot hold.
    advance(w, optimizer, [*SETS[:5], "dense", *SETS[5:9], *[[1]] * 257], seed=1)
    resumed = torch.nn.Parameter(w.detach().clone())
    fresh = ours(name, resumed, lr=9.0, unvisited="owed" if unvisited == "frozen" else "frozen")
    fresh.load_state_dict(through_file(optimizer.state_dict()))
    assert fresh.param_groups[0]["unvisited"] == unvisited
    for each in ((w, optimizer), (resumed, fresh)):
        advance(*each, SETS[9:16], seed=2)
    assert torch.equal(w, resumed)
    for key, of in optimizer.state[w].items():
        if isinstance(of, int):
            assert of == fresh.state[resumed][key] == 5 + 1 + 4 + 257 + 7
        else:
            assert torch.equal(of, fresh.state[resumed][key]), key


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@every_choice
@every_name
def test_a_copied_optimizer_goes_on_alike(implementation, name, unvisited, copied):
    w = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = ours(name, w, unvisited=unvisited, **with_momentum(name))
    advance(w, optimizer, SETS[:10], seed=1)
    other_w, other = copied((w, optimizer))
    for each in ((w, optimizer), (other_w, other)):
        advance(*each, SETS[10:20], seed=2)
    assert torch.equal(w, other_w)
    extra = torch.nn.Parameter(torch.randn(2, 2))
    other.add_param_group({"params": [extra]})
    assert other.param_groups[1]["unvisited"] == unvisited


@every_name
def test_a_state_that_says_nothing_of_it_leaves_each_group_its_choice(name):
    def groups():
        return [{"params": [torch.nn.Parameter(torch.ones(2, 3))]} for _ in range(2)]

    first, second = groups()
    optimizer = ours(name, [first, second | {"unvisited": "moving"}], unvisited="owed")
    optimizer.load_state_dict(getattr(torch.optim, name)(groups()).state_dict())
    assert [group["unvisited"] for group in optimizer.param_groups] == ["owed", "moving"]


@every_name
def test_an_optimizer_pickled_before_there_was_a_choice_is_frozen(name):
    optimizer = ours(name, torch.nn.Parameter(torch.ones(2, 3)))
    del optimizer.defaults["unvisited"], optimizer.param_groups[0]["unvisited"]
    other = pickle.loads(pickle.dumps(optimizer))
    other.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 3))]})
    assert [group["unvisited"] for group in other.param_groups] == ["frozen", "frozen"]


@every_choice
@every_name
def test_the_namesakes_state_is_continued_by_any_choice(implementation, name, unvisited):
    """As after dense gradients of its own."""
    options = with_momentum(name, lr=0.1, weight_decay=0.1)
    w = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    continued = torch.nn.Parameter(w.detach().clone())
    optimizer = ours(name, w, unvisited=unvisited, **options)
    namesake = getattr(torch.optim, name)([continued], **options)
    advance(w, optimizer, ["dense"] * 4, seed=1)
    advance(continued, namesake, ["dense"] * 4, seed=1)
    goes_on = ours(name, continued, unvisited=unvisited, **options)
    goes_on.load_state_dict(namesake.state_dict())
    for each in ((w, optimizer), (continued, goes_on)):
        advance(*each, SETS, seed=2)
    assert_close(w, continued, rtol=1e-12, atol=1e-13)


@every_name
def test_groups_choose_for_themselves(implementation, name):
    options = with_momentum(name, lr=0.1, weight_decay=0.1)
    start = torch.randn(5, 3)
    together, alone = ([torch.nn.Parameter(start.clone()) for _ in CHOICES] for _ in range(2))
    groups = [{"params": [w], "unvisited": choice} for w, choice in zip(together, CHOICES, strict=True)]
    optimizer = ours(name, groups[:2], **options)
    optimizer.add_param_group(groups[2])
    each = [ours(name, w, unvisited=choice, **options) for w, choice in zip(alone, CHOICES, strict=True)]
    for rows in SETS:
        dw = torch.randn(5, 3)
        for w in (*together, *alone):
            w.grad = row_gradient(rows, dw)
        for x in (optimizer, *each):
            x.step()
    for a, b in zip(together, alone, strict=True):
        assert_close(a, b)
    assert not any(torch.allclose(together[i], together[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("fused", [False, True], ids=["loop", "fused"])
@every_choice
@every_name
def test_a_grad_scaler_scales_back_and_an_infinite_step_does_not_count(implementation, name, unvisited, fused):
    options = with_momentum(name, lr=0.1, weight_decay=0.1, unvisited=unvisited, fused=fused)
    scaled, plain = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    optimizer, other = ours(name, scaled, **options), ours(name, plain, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes its scale
    for step, rows in enumerate(SETS[:20]):
        dw, infinite = torch.randn(5, 3), step % 5 == 2
        scaled.grad = row_gradient(rows or [0], dw * (float("inf") if infinite else scaler.get_scale()))
        scaler.step(optimizer)
        scaler.update()
        if not infinite:
            plain.grad = row_gradient(rows or [0], dw)
            other.step()
        assert_close(scaled, plain, rtol=1e-4, atol=1e-5)
    assert (
        optimizer.state[scaled].get("steps") == other.state[plain].get("steps") == (16 if unvisited == "owed" else None)
    )


def test_moving_rows_can_be_stepped_differentiably():
    lr = torch.tensor(0.5, requires_grad=True)
    w = torch.ones(3, 2, requires_grad=True).clone()
    optimizer = ours("SGD", w, lr=lr, differentiable=True, unvisited="moving")
    w.grad = row_gradient([2], torch.ones(3, 2))
    optimizer.step()
    w.sum().backward()
    assert lr.grad is not None
    assert lr.grad.item() == -2.0


# --- Refusals --------------------------------------------------------------------------------------------------------

NAMES_ALL = "Choose 'frozen', 'moving' or 'owed'"


@every_name
def test_another_choice_is_refused_when_it_is_made(name):
    w = torch.nn.Parameter(torch.ones(5, 3))
    with pytest.raises(ValueError, match=f"{name} was given unvisited='zero'. {NAMES_ALL}"):
        ours(name, w, unvisited="zero")
    with pytest.raises(ValueError, match=NAMES_ALL):
        ours(name, [{"params": [w], "unvisited": None}])


@every_name
def test_another_choice_of_a_later_group_is_refused_before_anything_is_changed(name):
    w, v = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    optimizer = ours(name, w)
    optimizer.add_param_group({"params": [v], "unvisited": "zero"})
    w.grad = row_gradient([1], torch.ones(5, 3))
    with pytest.raises(ValueError, match=f"group 1 has unvisited='zero'. {NAMES_ALL}"):
        optimizer.step()
    assert torch.equal(w, torch.ones(5, 3))
    assert not optimizer.state


@every_name
def test_another_choice_in_a_state_is_refused_before_anything_is_changed(name):
    w = torch.nn.Parameter(torch.ones(5, 3))
    optimizer = ours(name, w, unvisited="owed", **with_momentum(name))
    advance(w, optimizer, SETS[:3], seed=0)
    before = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(before)
    other["param_groups"][0]["unvisited"], other["param_groups"][0]["lr"] = "zero", 7.0
    with pytest.raises(ValueError, match=f"the state to load has unvisited='zero'. {NAMES_ALL}"):
        optimizer.load_state_dict(other)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert_close(after["state"], before["state"], rtol=0, atol=0)


@pytest.mark.parametrize("then", CHOICES)
@pytest.mark.parametrize("first", CHOICES)
@pytest.mark.parametrize("rows", ["dense", [1, 2]], ids=["dense", "rows"])
@every_name
def test_a_choice_may_be_changed_while_all_rows_have_had_the_same_steps(implementation, name, rows, first, then):
    w, changed = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    options = with_momentum(name, lr=0.1)
    optimizer = ours(name, [{"params": [w], "unvisited": then}, {"params": [changed], "unvisited": first}], **options)
    dw = torch.randn(5, 3)
    for x in (w, changed):
        x.grad = dw.clone() if rows == "dense" else row_gradient(rows, dw)
    optimizer.step()
    optimizer.param_groups[1]["unvisited"] = then
    w.grad, changed.grad = row_gradient([0, 1], dw), row_gradient([0, 1], dw)
    before = w.detach().clone(), changed.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    if first == then or rows == "dense" or first == "moving":
        optimizer.step()
        if rows == "dense":
            assert_close(w, changed)
        return
    says = rf"parameter 0 of group 1, of shape \(5, 3\), has row state of unvisited='{first}', and .* now says '{then}'"
    for grad in (row_gradient([0, 1], dw), dw):
        changed.grad = grad
        with pytest.raises(ValueError, match=says):
            optimizer.step()
    assert torch.equal(w, before[0])
    assert torch.equal(changed, before[1])
    assert_close(optimizer.state_dict()["state"], before[2], rtol=0, atol=0)
    optimizer.state.pop(changed)
    optimizer.step()
    assert not torch.equal(changed, before[1])
