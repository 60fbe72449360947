"""What a training loop relies on: the row optimizers keep every promise of their ``torch.optim`` namesakes."""

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rwfx.optim
from rwfx import native

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD-momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "Adam": ("Adam", {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True}),
    "AdamW": ("AdamW", {"lr": 0.1}),
}
every_case = pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
every_name = pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])


def ours(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    return getattr(rwfx.optim, name)(params, **options)


def theirs(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    return getattr(torch.optim, name)(params, **options)


def row_gradient(rows: list[int], dw: Tensor) -> Tensor:
    index = torch.tensor(rows, dtype=torch.int64)
    return torch.sparse_coo_tensor(index[None], dw[index], dw.shape, is_coalesced=True, check_invariants=True)


class Model(torch.nn.Module):
    """An embedding with row gradients, one with dense gradients: equal losses, equal gradients, other layouts."""

    def __init__(self, sparse: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(6, 3, dtype=dtype, generator=generator))
        self.out = torch.nn.Parameter(torch.randn(2, 3, dtype=dtype, generator=generator))
        self.sparse = sparse

    def forward(self, rows: list[int]) -> Tensor:
        x = F.embedding(torch.tensor(rows), self.table, sparse=self.sparse)
        return (x.tanh() @ self.out.T).square().mean()


ALL = [0, 1, 2, 3, 4, 5]
# Each row is drawn at each step, some twice, so that the dense namesake is the oracle.
BATCHES = [ALL, [5, 4, 3, 2, 1, 0, 0, 3], [*ALL, 2], ALL, [*ALL, *ALL]]


def layout(w: Tensor) -> torch.layout | None:
    """The layout of the gradient."""
    return None if w.grad is None else w.grad.layout


def assert_equal_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert_close(x, y, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def pair(name: str, **options: Any) -> list[tuple[Model, torch.optim.Optimizer]]:
    """Ours with row gradients, and the namesake with dense ones."""
    sparse, dense = Model(sparse=True), Model(sparse=False)
    return [(sparse, ours(name, sparse.parameters(), **options)), (dense, theirs(name, dense.parameters(), **options))]


# --- Arguments -------------------------------------------------------------------------------------------------------


@every_name
def test_arguments_are_those_of_the_namesake_and_the_last_chooses_what_becomes_of_the_other_rows(name):
    of_ours, of_theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]
        for module in (rwfx.optim, torch.optim)
    )
    assert of_ours == [*of_theirs, ("unvisited", inspect.Parameter.KEYWORD_ONLY, "frozen")]


@every_name
def test_it_is_an_instance_of_its_namesake(name):
    assert isinstance(ours(name, [torch.nn.Parameter(torch.zeros(1))]), getattr(torch.optim, name))


@every_name
def test_no_parameters_is_the_error_of_torch(name):
    with pytest.raises(ValueError, match="empty parameter list"):
        ours(name, [])


@every_name
@pytest.mark.parametrize(
    "how", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}, {"maximize": True}], ids=str
)
def test_a_dense_gradient_is_stepped_by_the_namesake_bit_for_bit(name, how):
    a, b = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.zeros(4, 3))
    b.data.copy_(a.data)
    optimizer, namesake = ours(name, [a], **how), theirs(name, [b], **how)
    for _ in range(5):
        a.grad = torch.randn(4, 3)
        b.grad = a.grad.clone()
        optimizer.step()
        namesake.step()
        assert torch.equal(a, b)


def test_differentiable_steps_on_dense_gradients_as_the_namesake():
    lr = torch.tensor(0.5, requires_grad=True)
    start = torch.ones(2, requires_grad=True)
    w = start.clone()
    optimizer = ours("SGD", [w], lr=lr, differentiable=True)
    w.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    w.sum().backward()
    assert lr.grad is not None
    assert lr.grad.item() == -3.0


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@every_name
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=["sparse_dim=2", "torch.sparse_csr"])
def test_another_sparse_layout_is_refused_before_anything_is_changed(name, layout):
    dense, rows = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(4, 3))
    # A dense parameter cannot hold a compressed gradient: one that is compressed itself can.
    value = torch.ones(4, 3) if layout == torch.sparse_coo else torch.ones(4, 3).to_sparse(layout=layout)
    odd, grad = value.clone().requires_grad_(), torch.randn(4, 3).to_sparse(layout=layout)
    says = "sparse_dim=2" if layout == torch.sparse_coo else "torch.sparse_csr"
    optimizer = ours(name, [{"params": [dense]}, {"params": [rows, odd]}])
    dense.grad, rows.grad, odd.grad = torch.randn(4, 3), row_gradient([1], torch.randn(4, 3)), grad
    with pytest.raises(ValueError, match=rf"parameter 1 of group 1, of shape \(4, 3\).*{says}"):
        optimizer.step()
    for w, was in ((dense, torch.ones(4, 3)), (rows, torch.ones(4, 3)), (odd, value)):
        assert torch.equal(w.detach().to_dense(), was.to_dense())
        assert w.grad is not None
    assert not optimizer.state


@every_name
def test_differentiable_with_a_row_gradient_is_refused_before_anything_is_changed(name):
    dense, rows = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    optimizer = ours(name, [dense, rows], differentiable=True)
    dense.grad, rows.grad = torch.randn(4, 3), row_gradient([1], torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"parameter 1 of group 0, of shape \(4, 3\).*differentiable"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(4, 3))
    assert torch.equal(rows, torch.ones(4, 3))


@every_name
def test_a_failing_dense_step_leaves_rows_and_gradients_as_they_were(name, monkeypatch):
    def fail(self, closure=None):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(native, "ready", lambda: False)
    dense, rows = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    optimizer = ours(name, [dense, rows])
    dense.grad, rows.grad = torch.randn(4, 3), row_gradient([1], torch.randn(4, 3))
    gradient = rows.grad
    monkeypatch.setattr(getattr(torch.optim, name), "step", fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        optimizer.step()
    assert rows.grad is gradient
    assert torch.equal(rows, torch.ones(4, 3))


# --- The loop around it ----------------------------------------------------------------------------------------------


@every_case
def test_training_with_row_and_dense_parameters_is_training_with_the_namesake(name, options):
    runs = pair(name, **options)
    for batch in BATCHES:
        for model, optimizer in runs:
            optimizer.zero_grad()
            model(batch).backward()
            optimizer.step()
        assert_equal_weights(runs[0][0], runs[1][0])
        assert layout(runs[0][0].table) == torch.sparse_coo


@every_case
@pytest.mark.parametrize("dense", [False, True], ids=["sparse+sparse", "sparse+dense"])
def test_gradients_accumulate_over_backward_passes(name, options, dense):
    runs = pair(name, **options)
    for _ in range(3):
        for model, optimizer in runs:
            optimizer.zero_grad()
            model([0, 1, 2, 3]).backward()
            model([2, 3, 4, 5, 5]).backward()
            if dense:
                model.table.square().sum().backward()
            optimizer.step()
        assert layout(runs[0][0].table) == (torch.strided if dense else torch.sparse_coo)
        assert_equal_weights(runs[0][0], runs[1][0])


@pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13), reason="clip_grad_norm_ is for dense only"
)
@every_case
def test_clipping_the_gradient_norm_clips_row_gradients(name, options):
    runs = pair(name, **options)
    for batch in BATCHES:
        norms = []
        for model, optimizer in runs:
            optimizer.zero_grad()
            model(batch).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
            optimizer.step()
        assert norms[0] > 0.1
        assert_close(*norms)
        assert_equal_weights(runs[0][0], runs[1][0])


SCHEDULES = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=6, cycle_momentum=True),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.0 if epoch == 1 else 1.0),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("name", "options"), list(CASES.values())[1:], ids=list(CASES)[1:])
def test_schedulers_steer_it_and_do_not_warn(name, options, schedule):
    runs = pair(name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [schedule(optimizer) for _, optimizer in runs]
        for batch in BATCHES:
            for (model, optimizer), scheduler in zip(runs, schedulers, strict=True):
                optimizer.zero_grad()
                model(batch).backward()
                optimizer.step()
                scheduler.step()
            assert_equal_weights(runs[0][0], runs[1][0])


@every_name
def test_groups_have_their_own_settings_and_can_be_added(name):
    runs = []
    for make, sparse in ((ours, True), (theirs, False)):
        model = Model(sparse)
        optimizer = make(name, [{"params": [model.out], "lr": 0.5}], lr=0.01, weight_decay=0.1)
        optimizer.add_param_group({"params": [model.table], "weight_decay": 0.3})
        runs.append((model, optimizer))
    for batch in BATCHES:
        for model, optimizer in runs:
            optimizer.zero_grad()
            model(batch).backward()
            optimizer.step()
        assert_equal_weights(runs[0][0], runs[1][0])


@every_case
def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned(name, options):
    runs = pair(name, **options)
    calls = []
    for model, optimizer in runs:

        def closure(model=model, optimizer=optimizer):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = model(ALL)
            loss.backward()
            return loss.detach()

        with torch.no_grad():
            loss = optimizer.step(closure)
        assert loss == Model(sparse=True)(ALL)
    assert calls == [True, True]
    assert_equal_weights(runs[0][0], runs[1][0])


@every_name
def test_hooks_run_once_a_step_also_after_the_namesake_was_made(name):
    dense, rows = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    theirs(name, [torch.nn.Parameter(torch.zeros(1))])
    optimizer = ours(name, [dense, rows])
    seen: list[str] = []
    everywhere = register_optimizer_step_pre_hook(lambda *_: seen.append("global pre"))
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    try:
        for gradients in ((True, False), (False, True), (True, True)):
            dense.grad = torch.randn(4, 3) if gradients[0] else None
            rows.grad = row_gradient([1], torch.randn(4, 3)) if gradients[1] else None
            optimizer.step()
            assert seen == ["global pre", "pre", "post"]
            seen.clear()
    finally:
        everywhere.remove()


@every_name
def test_the_namesake_keeps_its_own_hooks(name):
    w = torch.nn.Parameter(torch.ones(4, 3))
    ours(name, [w])
    namesake = theirs(name, [w])
    seen: list[str] = []
    namesake.register_step_pre_hook(lambda *_: seen.append("pre"))
    w.grad = torch.ones(4, 3)
    namesake.step()
    assert seen == ["pre"]


@every_name
@pytest.mark.parametrize("fused", [False, True], ids=["loop", "fused"])
@pytest.mark.parametrize("unscale_first", [False, True], ids=["scaled", "unscaled-first"])
def test_a_grad_scaler_scales_back_and_skips_an_infinite_step(name, fused, unscale_first):
    options = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    (scaled, optimizer), (plain, namesake) = (
        (model, make(name, model.parameters(), fused=fused, **options))
        for make, model in ((ours, Model(True, torch.float32)), (theirs, Model(False, torch.float32)))
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, batch in enumerate(BATCHES):
        infinite = step == 2
        optimizer.zero_grad()
        scaler.scale(scaled(batch) * (float("inf") if infinite else 1.0)).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        before = copy.deepcopy([*scaled.parameters(), optimizer.state_dict()["state"]])
        scaler.step(optimizer)
        scaler.update()
        if infinite:
            after = [*scaled.parameters(), optimizer.state_dict()["state"]]
            assert_close(after, before, rtol=0, atol=0)
            assert scaler.get_scale() == 512.0
        else:
            namesake.zero_grad()
            plain(batch).backward()
            namesake.step()
        for x, y in zip(scaled.parameters(), plain.parameters(), strict=True):
            assert_close(x, y, rtol=1e-4, atol=1e-5)


@every_case
@pytest.mark.parametrize("scaler", [None, "cpu"], ids=["plain", "GradScaler"])
def test_an_empty_row_set_changes_nothing(name, options, scaler):
    w = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = ours(name, [w], **options)
    w.grad = row_gradient([], torch.randn(4, 3))
    if scaler is None:
        optimizer.step()
    else:
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
    assert torch.equal(w, torch.ones(4, 3))


@every_case
def test_a_step_leaves_the_grad_mode_as_it_was(name, options):
    model = Model(sparse=True)
    optimizer = ours(name, model.parameters(), **options)
    model(ALL).backward()
    optimizer.step()
    assert torch.is_grad_enabled()
    with torch.no_grad():
        optimizer.step()
        assert not torch.is_grad_enabled()
    assert all(w.requires_grad and w.is_leaf for w in model.parameters())


# --- Saving ----------------------------------------------------------------------------------------------------------


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


STEPS = [[0, 1], "dense", [1, 4], [2], [0, 1, 2, 3, 4, 5], [], [3, 5]]


def advance(w: Tensor, optimizer: torch.optim.Optimizer, steps: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for rows in steps:
        dw = torch.randn(w.shape, generator=generator).to(w.dtype)
        w.grad = dw if rows == "dense" else row_gradient(rows, dw)
        optimizer.step()


@every_case
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@pytest.mark.parametrize("saved", [copy.deepcopy, through_file], ids=["in-memory", "in-a-file"])
def test_a_resumed_run_is_the_run_bit_for_bit(name, options, dtype, fused, saved):
    w = torch.nn.Parameter(torch.randn(6, 3).to(dtype))
    optimizer = ours(name, [w], fused=fused, **options)
    # 257 is the first count that bfloat16 cannot hold.
    advance(w, optimizer, [*STEPS, *[[1]] * 257], seed=1)
    resumed = torch.nn.Parameter(w.detach().clone())
    fresh = ours(name, [resumed], fused=fused, lr=9.0)
    fresh.load_state_dict(saved(optimizer.state_dict()))
    for run in ((w, optimizer), (resumed, fresh)):
        advance(*run, STEPS, seed=2)
    assert torch.equal(w, resumed)
    if name != "SGD" or options.get("momentum"):
        count = fresh.state[resumed]["step"]
        assert count.dtype == torch.float32
        # Row 1: 257 times alone, and 3 dense or drawn with others, twice over; each other row less.
        assert count.tolist()[1] == 257 + 2 * 4
        for key, value in optimizer.state[w].items():
            assert torch.equal(value, fresh.state[resumed][key]), key


@every_case
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_goes_on_alike(name, options, copied):
    w = torch.nn.Parameter(torch.randn(6, 3))
    optimizer = ours(name, [w], **options)
    advance(w, optimizer, STEPS, seed=1)
    other_w, other = copied((w, optimizer))
    assert other.param_groups[0]["params"][0] is other_w
    for run in ((w, optimizer), (other_w, other)):
        advance(*run, STEPS, seed=2)
    assert torch.equal(w, other_w)


@every_case
def test_the_namesakes_checkpoint_can_be_continued_on_rows(name, options):
    runs = pair(name, **options)
    (sparse, optimizer), (dense, namesake) = runs
    for _ in range(3):
        namesake.zero_grad()
        dense(ALL).backward()
        namesake.step()
    sparse.load_state_dict(dense.state_dict())
    optimizer.load_state_dict(copy.deepcopy(namesake.state_dict()))
    for batch in BATCHES:
        for model, each in runs:
            each.zero_grad()
            model(batch).backward()
            each.step()
        assert_equal_weights(sparse, dense)


# --- Cost ------------------------------------------------------------------------------------------------------------


class LargestResult(TorchDispatchMode):
    """The most elements that any operation has put into memory that was not there before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.layout == torch.strided:
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.elements = max(self.elements, storage.nbytes() // x.itemsize)
        return out


@every_case
def test_after_its_first_a_step_makes_nothing_larger_than_the_row_gradient(name, options):
    w = torch.nn.Parameter(torch.randn(64, 32))
    optimizer = ours(name, [w], **options)
    advance(w, optimizer, [[3, 7, 60]], seed=0)
    w.grad = row_gradient([2, 3, 4], torch.randn(64, 32))
    with LargestResult([w.detach(), *optimizer.state.get(w, {}).values()]) as largest:
        optimizer.step()
    # The compiled kernels make nothing at all that a mode could see.
    assert (0 if native.ready() else 1) <= largest.elements <= 3 * 32


@every_name
def test_a_state_of_other_parameters_is_an_error_before_anything_is_changed(name):
    def stepped(parameters):
        optimizer = ours(name, parameters, **({"momentum": 0.9} if name == "SGD" else {}))
        for w in parameters:
            w.grad = row_gradient([1], torch.randn(w.shape))
        optimizer.step()
        return optimizer

    shapes = (6, 5), (6,)
    theirs = stepped([torch.nn.Parameter(torch.ones(shape)) for shape in reversed(shapes)])
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = stepped(parameters)
    optimizer.load_state_dict(theirs.state_dict())
    before = [w.detach().clone() for w in parameters]
    for w in parameters:
        w.grad = row_gradient([2], torch.randn(w.shape))
    with pytest.raises(ValueError, match=r"parameter 0 of group 0, of shape \(6, 5\), has a state .* of shape \(6,\)"):
        optimizer.step()
    assert all(torch.equal(w, b) for w, b in zip(parameters, before, strict=True))


@every_name
def test_a_count_in_the_default_dtype_of_torch_is_gone_on_with(name):
    torch.set_default_dtype(torch.float64)
    try:
        a, b = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(3))
        optimizer = ours(name, [a, b], **({"momentum": 0.9} if name == "SGD" else {}))
        a.grad, b.grad = torch.ones(4, 3), torch.ones(3)
        optimizer.step()
        a.grad = row_gradient([1, 2], torch.ones(4, 3))
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert a[0].eq(a[3]).all()
    assert not a[0].eq(a[1]).any()
