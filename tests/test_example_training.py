"""The user's loop with ``transform(examples=...)``: compiled, resumed, accumulated, in mixed precision, on ranks."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracles import gradients_at, kept_gradients, sizes_of_examples, to_dense
from test_examples import Between, batch_for, listen, run
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from zoo import Heads, Modules, Residual, Single, loss_of, make

import rwfx
from rwfx import AdaptiveExamples, LearnedWalk, SampledExamples, TopExamples, TopK

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(model):
    return {name: None if p.grad is None else to_dense(p.grad).clone() for name, p in model.named_parameters()}


def assert_equal(ours, theirs, atol=1e-12):
    for name, expected in theirs.items():
        assert_close(ours[name], expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def top_gradients(model, inputs, count, loss=loss_of, rows=None):
    """The oracle, which chooses the examples itself."""
    num_examples = len(inputs[0][0])
    sizes = sizes_of_examples(gradients_at(run(model, inputs), loss, num_examples))
    kept = sizes.topk(count).indices
    return kept_gradients(model, lambda m: run(m, inputs), loss, kept, num_examples, rows)


def batches(model, *sizes):
    found = []
    for size in sizes:
        (x,), kwargs = batch_for(model, size)
        found.append(((x * (1 + len(found)),), kwargs))
    return found


# --- Compiled --------------------------------------------------------------------------------------------------------

COMPILED = {
    "top, top-k": (Heads, {"examples": 0.4, "rows": TopK(0.5), "grad": "rows"}),
    "sampled, walk": (Residual, {"examples": SampledExamples(0.3, 0.2), "num_paths": 5, "grad": "rows"}),
    "adaptive, learned": (Residual, {"examples": AdaptiveExamples(0.6, 0.2, 0.9, 0.2), "rows": LearnedWalk(5)}),
    "batch norm": (Modules, {"examples": 3, "density": 0.5}),
}


@pytest.mark.parametrize(("kind", "options"), COMPILED.values(), ids=COMPILED)
def test_compiled_it_is_one_graph_with_the_gradients_of_eager(kind, options):
    model = make(kind)
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0  # a compiled one has other masks
    args, kwargs = batch_for(model, 12)
    sparse = rwfx.transform(model, seed=1, example_inputs={"x": args[0], **kwargs}, **options)
    eager = copy.deepcopy(sparse)
    counters.clear()
    counts = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(sparse, backend="inductor", fullgraph=True)
        for step in range(6):
            found = []
            for module, of in ((compiled, sparse), (eager, eager)):
                module.zero_grad()
                # At the end the gradient lies in few examples.
                y = module(*args, **kwargs)
                scale = torch.cat([torch.ones(2), torch.full((10,), 1e-3 if step > 2 else 1.0)]).double()
                leaves = torch.utils._pytree.tree_map(lambda t, s=scale: t * s[:, None] if t.dim() else t, y)
                loss_of(leaves).backward()
                found.append(gradients(of))
            assert_equal(*found)
            assert sparse.examples == eager.examples
            assert_close(sparse.sampler_state(), eager.sampler_state())
            counts.add(sparse.examples[0])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert (len(counts) > 1) == isinstance(options["examples"], AdaptiveExamples)


@pytest.mark.parametrize("examples", [0.4, 3, AdaptiveExamples(0.9, 0.4, 0.4)], ids=["share", "number", "adaptive"])
def test_compiled_the_batch_may_change_its_size(examples):
    model = make(Residual)
    sparse = rwfx.transform(model, examples=examples, seed=1)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True, dynamic=True)
    counters.clear()
    for size in (13, 7, 20, 9, 1, 13):
        inputs, count = batch_for(model, size), min(3, size) if examples == 3 else -(-size * 4 // 10)
        model.zero_grad()
        loss_of(run(compiled, inputs)).backward()
        ours = gradients(model)
        assert_equal(ours, top_gradients(model, inputs, count))
        assert sparse.examples == (count, size)
    assert counters["stats"]["unique_graphs"] == 2  # a size of 1 is always one of its own


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_two_forwards_before_one_backward_draw_as_one_after_the_other(backend):
    model = make(Residual)
    sparse = rwfx.transform(model, examples=SampledExamples(0.4), seed=1)
    parts, (inputs, _) = copy.deepcopy(sparse), batch_for(model, 12)
    compiled = torch.compile(sparse, backend=backend, fullgraph=True)
    for _ in range(2):
        loss_of(parts(*inputs)).backward()
    (loss_of(compiled(*inputs)) + loss_of(compiled(*inputs))).backward()
    assert_equal(gradients(sparse), gradients(parts))


def test_compiled_two_forwards_before_one_backward_keep_their_own_examples():
    model = make(Residual)
    sparse = rwfx.transform(model, examples=0.4, seed=1)
    for module in (sparse, torch.compile(sparse, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        first, second = batches(model, 12, 12)
        (loss_of(run(module, first)) + 2 * loss_of(run(module, second))).backward()
        ours = gradients(model)
        parts = top_gradients(model, first, 5), top_gradients(model, second, 5, lambda y: 2 * loss_of(y))
        assert_equal(ours, {name: sum(part[name] for part in parts) for name in ours})


# --- How many ---------------------------------------------------------------------------------------------------------


def test_an_adaptive_number_falls_where_few_examples_have_a_gradient_and_stays_where_all_have():
    model = make(Single)
    for weights, expected in ((torch.ones(20), 16), (torch.tensor([1.0] + [1e-4] * 19), 2)):
        sparse = rwfx.transform(model, examples=AdaptiveExamples(0.9, 0.1, 0.8, 0.5))
        kept = []
        for _ in range(12):
            (sparse(torch.ones(20, 12).double()) * weights[:, None]).sum().backward()
            kept.append(sparse.examples[0])
        assert kept[0] == 16
        assert kept[-1] == expected
        assert kept == sorted(kept, reverse=True)
        assert {*kept} <= {-(-round(f * 20, 9) // 1) for f in AdaptiveExamples(0.9, 0.1, 0.8).fractions}


POLICIES = {
    "top": TopExamples(0.3),
    "sampled": SampledExamples(0.3, 0.2),
    "adaptive": AdaptiveExamples(0.7, 0.1, 0.9, 0.5),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_resumed_run_keeps_the_examples_that_the_run_would_have_kept(policy):
    model = make(Residual)

    def steps(sparse, count):
        heard, found = listen(sparse), []
        optimizer = rwfx.optim.SGD(sparse.parameters(), lr=0.05)
        for step in range(count):
            optimizer.zero_grad()
            loss_of(sparse(torch.linspace(-1, 1, 240, dtype=torch.float64).view(20, 12) * (step + 1))).backward()
            optimizer.step()
            found.append(heard["kept"][-1].tolist())
        return found

    def make_again():
        return rwfx.transform(copy.deepcopy(model), num_paths=5, examples=policy, grad="rows", seed=1)

    sparse = make_again()
    steps(sparse, 3)
    for module in (sparse.row_sampler, sparse.example_sampler):  # those of the test cannot be pickled
        module._forward_hooks.clear()
    again = make_again()
    again.load_state_dict(sparse.state_dict())
    again.load_sampler_state(pickle.loads(pickle.dumps(sparse.sampler_state())))
    copied, pickled = copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))
    expected = steps(sparse, 4)
    for other in (again, copied, pickled):
        assert steps(other, 4) == expected
    assert sparse.state_dict().keys() == model.state_dict().keys()


def test_states_of_a_model_that_keeps_all_examples_are_refused_and_nothing_is_changed():
    some, all_ = (rwfx.transform(make(Residual), 3, seed=1, **options) for options in ({"examples": 0.3}, {}))
    assert all_.examples is None
    for sparse, other, message in ((some, all_, "keeps all examples"), (all_, some, "leaves out examples")):
        before = copy.deepcopy(sparse.sampler_state())
        other(torch.randn(5, 12).double()).sum().backward()
        with pytest.raises(ValueError, match=message):
            sparse.load_sampler_state(other.sampler_state())
        assert_close(sparse.sampler_state(), before)
    before = copy.deepcopy(some.sampler_state())
    wrong = {**before, "examples.needed": torch.ones(2)}
    with pytest.raises(ValueError, match=r"examples\.needed.*\(2,\).*\(1,\)"):
        some.load_sampler_state(wrong)
    assert_close(some.sampler_state(), before)


def test_an_unbiased_sample_has_the_dense_gradient_on_average():
    model, steps = make(Residual), 500
    inputs = batch_for(model, 10)
    loss_of(run(model, inputs)).backward()
    dense = gradients(model)
    sparse = rwfx.transform(model, examples=SampledExamples(0.4, 0.3, unbiased=True), seed=1)
    drawn = {name: [] for name in dense}
    for _ in range(steps):
        model.zero_grad()
        loss_of(run(sparse, inputs)).backward()
        for name, g in gradients(model).items():
            drawn[name].append(g)
    for name, expected in dense.items():
        values = torch.stack(drawn[name])
        error = values.std(0) / steps**0.5
        assert ((values.mean(0) - expected).abs() <= 5 * error + 1e-6 * expected.abs().max()).all(), name
        assert error.max() > 0


# --- The loop --------------------------------------------------------------------------------------------------------


def test_the_batch_may_change_its_size_and_gradients_accumulate():
    model = make(Modules)
    model.net[4].p = 0.0
    sparse = rwfx.transform(model, examples=0.3, seed=1)
    total = None
    for inputs in batches(model, 12, 12, 5):
        kept = model.zero_grad() if total is None else gradients(model)
        before = copy.deepcopy([*model.buffers()])
        expected = top_gradients(model, inputs, -(-len(inputs[0][0]) * 3 // 10))
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
        for name, p in model.named_parameters():
            p.grad = None if kept is None else kept[name]
        loss_of(run(sparse, inputs)).backward()
        total = expected if total is None else {name: total[name] + expected[name] for name in total}
        assert_equal(gradients(model), total)


def test_a_batch_of_one_example_keeps_it():
    model = make(Residual)
    sparse, inputs = rwfx.transform(model, examples=0.3, seed=1), batch_for(model, 1)
    loss_of(run(sparse, inputs)).backward()
    ours = gradients(model)
    model.zero_grad()
    loss_of(run(model, inputs)).backward()
    assert_equal(ours, gradients(model))


@pytest.mark.parametrize("examples", [0.4, SampledExamples(0.4)], ids=["top", "sampled"])
def test_backward_twice_gives_the_gradient_twice(examples):
    model = make(Residual)
    sparse, inputs = rwfx.transform(model, examples=examples, num_paths=4, seed=1), batch_for(model)
    loss = loss_of(run(sparse, inputs))
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert_equal(gradients(model), {name: 2 * g for name, g in once.items()})


def test_two_losses_of_one_forward_choose_each_its_own_examples():
    model = make(Residual)
    sparse, inputs = rwfx.transform(model, examples=0.3, seed=1), batch_for(model)
    losses = loss_of, lambda y: y[5:].square().sum()
    y = run(sparse, inputs)
    losses[0](y).backward(retain_graph=True)
    losses[1](y).backward()
    ours = gradients(model)
    parts = [top_gradients(model, inputs, 4, loss) for loss in losses]
    assert_equal(ours, {name: parts[0][name] + parts[1][name] for name in ours})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("examples", [0.4, SampledExamples(0.4)], ids=["top", "sampled"])
def test_checkpointing_changes_no_gradient(examples, reentrant):
    model = make(Residual)
    sparse = rwfx.transform(model, examples=examples, seed=1)
    copied, (inputs, _) = copy.deepcopy(sparse), batch_for(model)
    loss_of(sparse(*inputs)).backward()
    x = inputs[0].requires_grad_(reentrant)
    loss_of(checkpoint(copied, x, use_reentrant=reentrant)).backward()
    assert_equal(gradients(copied), gradients(sparse))


def test_a_loss_may_read_one_of_several_outputs():
    model = make(Heads)
    inputs = batch_for(model)
    told = {"x": inputs[0][0], **inputs[1]}
    sparse = rwfx.transform(model, examples=0.3, seed=1, example_inputs=told)
    for loss in (lambda y: loss_of(y["class"]), lambda y: loss_of(y["box"][0]), lambda y: loss_of(y["box"])):
        model.zero_grad()
        loss(run(sparse, inputs)).backward()
        ours = gradients(model)
        outputs = run(model, inputs)
        leaves = [t for t in torch.utils._pytree.tree_leaves(outputs) if t.dim()]
        given = torch.autograd.grad(loss(outputs), leaves, allow_unused=True)
        kept = sizes_of_examples([g for g in given if g is not None]).topk(4).indices
        theirs = kept_gradients(model, lambda m, loss=loss: run(m, inputs), loss, kept, 13)
        for name, g in ours.items():  # of a head that is not read it is None or zeros
            given = [t for t in (g, theirs[name]) if t is not None]
            assert_close(*given, rtol=0, atol=1e-12) if len(given) == 2 else [assert_close(t, 0 * t) for t in given]
    with pytest.raises(RuntimeError, match="the loss has none there"):
        run(sparse, inputs)["box"][1].backward()


def test_evaluation_and_no_grad_are_the_dense_model_and_draw_nothing():
    model = make(Modules)
    sparse, inputs = rwfx.transform(model, examples=SampledExamples(0.3), num_paths=3, seed=1), batch_for(model)
    before = copy.deepcopy(sparse.sampler_state())
    with torch.no_grad():
        assert torch.equal(run(sparse, inputs), run(model, inputs))
    sparse.eval(), model.eval()
    assert torch.equal(run(sparse, inputs), run(model, inputs))
    loss_of(run(sparse, inputs)).backward()
    ours = gradients(model)
    model.zero_grad()
    loss_of(run(model, inputs)).backward()
    assert_equal(ours, gradients(model))
    assert_close(sparse.sampler_state(), before)


def test_autocast_is_near_the_oracle():
    model = make(Residual).float()
    sparse = rwfx.transform(model, examples=0.4, num_paths=4, seed=1)
    heard, x = listen(sparse), torch.randn(13, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.bfloat16
    loss_of(y.float()).backward()
    exact, ours = copy.deepcopy(model).double(), gradients(model)
    told = loss_of, heard["kept"][-1], 13, sparse.rows
    theirs = kept_gradients(exact, lambda m: m(x.double()), *told)
    for name, g in theirs.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - g).norm() <= 0.1 * g.norm() + 1e-6, name


def test_a_step_with_an_infinite_gradient_is_skipped_by_the_scaler():
    model = make(Residual).float()
    for policy in POLICIES.values():
        sparse = rwfx.transform(model, examples=policy, seed=1)
        optimizer, scaler = torch.optim.SGD(sparse.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
        before, needed = copy.deepcopy(model.state_dict()), sparse.sampler_state()["examples.needed"]
        for bad in (torch.inf, torch.nan):
            optimizer.zero_grad()
            factor = torch.ones(13, 1).index_fill(0, torch.tensor([8]), bad)
            scaler.scale((sparse(torch.randn(13, 12)) * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert_close(model.state_dict(), before)
            assert_close(sparse.sampler_state()["examples.needed"], needed)
        assert scaler.get_scale() == 2.0
        optimizer.zero_grad()
        scaler.scale(sparse(torch.randn(13, 12)).sum()).backward()
        scaler.step(optimizer)
        assert not torch.equal(model.stem.weight, before["stem.weight"])
        model.load_state_dict(before)


@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_clipping_weight_decay_and_the_row_optimizers_see_the_gradient_of_the_oracle(grad):
    model = make(Residual)
    reference = copy.deepcopy(model)
    sparse = rwfx.transform(model, examples=0.4, density=0.5, grad=grad, seed=1)
    optimizer = rwfx.optim.SGD(sparse.parameters(), 0.05, weight_decay=0.1)
    namesake, heard = torch.optim.SGD(reference.parameters(), 0.05), listen(sparse)
    for inputs in batches(model, 13, 13, 6):
        optimizer.zero_grad()
        loss_of(run(sparse, inputs)).backward()
        told = loss_of, heard["kept"][-1], len(inputs[0][0]), sparse.rows
        theirs = kept_gradients(reference, lambda m, inputs=inputs: run(m, inputs), *told)
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1e9)
        assert norm == 0
        norm = torch.stack([g.norm() for g in theirs.values()]).norm()
        if grad == "dense":
            assert_close(torch.nn.utils.clip_grad_norm_(sparse.parameters(), 1.0), norm)
        factor = min(1.0, 1 / (float(norm) + 1e-6)) if grad == "dense" else 1.0
        for name, p in reference.named_parameters():
            rows = sparse.rows.get(name.replace("bias", "weight"), torch.arange(len(p)))
            rows = rows if grad == "rows" else torch.arange(len(p))
            decay = torch.zeros_like(p).index_copy(0, rows, 0.1 * p.detach()[rows])
            p.grad = factor * theirs[name] + decay
        optimizer.step()
        namesake.step()
        assert_close(dict(model.named_parameters()), dict(reference.named_parameters()), rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_finds_nothing_in_what_nothing_reads():
    model = nn.Sequential(nn.Linear(30, 90), nn.ReLU(), nn.Linear(90, 70), nn.ReLU(), nn.Linear(70, 5))
    sparse = rwfx.transform(model, examples=0.2, density=0.2, seed=1)
    for _ in range(10):  # what is not written holds whatever was there before
        torch.full((64, 90), torch.nan)
        with torch.autograd.detect_anomaly(check_nan=True):
            sparse(torch.randn(64, 30)).square().sum().backward()


def test_a_second_derivative_is_refused():
    sparse = rwfx.transform(make(Residual), examples=0.3)
    with pytest.raises(RuntimeError, match="leave create_graph=True out"):
        torch.autograd.grad(loss_of(sparse(torch.randn(6, 12).double())), [*sparse.parameters()], create_graph=True)


# --- Ranks -----------------------------------------------------------------------------------------------------------


def train(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = make(Residual)
    sparse = rwfx.transform(model, examples=SampledExamples(0.4), density=0.5, seed=3)
    heard, wrapped, found = listen(sparse), DistributedDataParallel(sparse), []
    for step in range(3):
        torch.manual_seed(10 * step + rank)
        x = torch.randn(13, 12, dtype=torch.float64)
        model.zero_grad()
        loss_of(wrapped(x)).backward()
        found.append((x, heard["kept"][-1], sparse.rows, gradients(model)))
    torch.save(found, f"{folder}/found{rank}")
    dist.destroy_process_group()


def test_each_rank_keeps_its_own_examples_and_the_mean_of_the_gradients_is_reduced(tmp_path):
    mp.spawn(train, (str(tmp_path),), nprocs=2)
    model = make(Residual)
    ranks = [torch.load(tmp_path / f"found{rank}") for rank in (0, 1)]
    assert any(not torch.equal(first[1], second[1]) for first, second in zip(*ranks, strict=True))
    for both in zip(*ranks, strict=True):
        assert_close(both[0][2], both[1][2])
        parts = [kept_gradients(model, lambda m, x=x: m(x), loss_of, kept, 13, rows) for x, kept, rows, _ in both]
        for *_, ours in both:
            assert_equal(ours, {name: (parts[0][name] + parts[1][name]) / 2 for name in ours})


# --- What is refused -------------------------------------------------------------------------------------------------

WRONG = [
    (0, ValueError, "a whole number at least 1, got 0"),
    (-3, ValueError, "a whole number at least 1, got -3"),
    (0.0, ValueError, "above 0 and at most 1, got 0.0"),
    (-0.1, ValueError, "above 0 and at most 1, got -0.1"),
    (1.5, ValueError, "above 0 and at most 1, got 1.5"),
    (float("nan"), ValueError, "above 0 and at most 1, got nan"),
    (True, TypeError, "a fraction, a number of examples, or an example policy .* got True"),
    ("x", TypeError, "a fraction, a number of examples, or an example policy .* got 'x'"),
    (TopExamples, TypeError, "got <class"),
]


@pytest.mark.parametrize(("examples", "error", "message"), WRONG, ids=[repr(wrong[0]) for wrong in WRONG])
def test_what_is_no_policy_of_examples_is_refused(examples, error, message):
    with pytest.raises(error, match=message):
        rwfx.transform(make(Residual), examples=examples)


def test_policies_refuse_what_they_cannot_do():
    for policy, options, message in (
        (AdaptiveExamples, {"at_least": 0.5, "at_most": 0.3}, "at_least=0.5 is above at_most=0.3"),
        (AdaptiveExamples, {"memory": 1}, "memory must be below 1"),
        (AdaptiveExamples, {"share": 0}, "share must be a number above 0"),
        (SampledExamples, {"floor": 1.1}, "floor must be a number from 0 to 1"),
        (TopExamples, {"fraction": 0}, "fraction must be a whole number at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            policy(**options)
    for policy, options in ((SampledExamples, {"unbiased": 1}), (TopExamples, {"fraction": True})):
        with pytest.raises(TypeError):
            policy(**options)


def test_a_model_that_is_refused_is_left_as_it_was():
    for model, options, message in (
        (Between(lambda m, h: h), {"mode": "masked"}, 'Use mode="sparse"'),
        (Between(lambda m, h: h.flip(0)), {}, "only example_inputs with two examples or more can tell"),
    ):
        before = {*model.__dict__}, copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            rwfx.transform(model, examples=0.5, **options)
        assert before[0] == {*model.__dict__}
        assert_close(model.state_dict(), before[1])
        assert all(p.grad is None for p in model.parameters())


def test_outputs_without_an_example_dimension_are_refused_where_they_are_met():
    class Mean(Between):
        def forward(self, x):
            return super().forward(x).mean()

    sparse = rwfx.transform(Mean(lambda m, h: h.relu()), examples=0.5)
    with pytest.raises(ValueError, match=r"an entry for each of the 8 examples, first dimension.*\(\)"):
        sparse(torch.randn(8, 6))
