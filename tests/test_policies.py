import copy
import pickle
from functools import partial
from itertools import pairwise

import pytest
import torch
from oracles import masked_backward, masked_gradients, to_dense
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close
from zoo import ZOO, Heads, Modules, Residual, Single, Twice, loss_of, make

import rwfx
from rwfx import AdaptiveWalk, LearnedWalk, Magnitude, RandomWalk, TopK, Uniform, schedules

POLICIES = {
    "walk": RandomWalk(3),
    "walk-from-gradient": RandomWalk(3, start="gradient"),
    "walk-scheduled": RandomWalk(density=schedules.DenseFirst(2, 0.3)),
    "adaptive": AdaptiveWalk(3),
    "adaptive-density": AdaptiveWalk(density=0.3),
    "learned": LearnedWalk(3),
    "learned-density": LearnedWalk(density=0.3),
    "top-k": TopK(0.3),
    "top-k-scheduled": TopK(schedules.Linear(1.0, 0.2, over=3)),
    "uniform": Uniform(0.3),
    "uniform-unbiased": Uniform(0.3, unbiased=True),
    "uniform-scheduled": Uniform(schedules.DenseEvery(2, 0.3), unbiased=True),
    "magnitude": Magnitude(0.3),
    "magnitude-unbiased": Magnitude(0.3, refresh=2, unbiased=True),
    "magnitude-scheduled": Magnitude(schedules.Steps(0.5, {2: 0.2})),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def transformed(model, policy, **options):
    return rwfx.transform(model, rows=policy, seed=1, **options)


def run(module, inputs):
    args, kwargs = inputs
    torch.manual_seed(7)
    return module(*args, **kwargs)


def loss_at(inputs, module):
    return loss_of(run(module, inputs))


def listen(sparse):
    """The scales of each draw by weight, as the sampler gives them."""
    scales = {}
    sampler = sparse.row_sampler

    def keep(_, __, drawn):
        scales.update(zip(sampler.kept, drawn[len(sampler.kept) :], strict=False))

    sampler.register_forward_hook(keep)
    return scales


def fits(policy, kind):
    """Twice is no place for what no gradient may pass twice, Single, an output weight, none for a density."""
    return not (getattr(policy, "unbiased", False) and kind is Twice) and not (policy.density and kind is Single)


@every_policy
@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_gradients_are_those_of_the_dense_model_masked_to_the_rows(kind, policy):
    if not fits(policy, kind):
        pytest.skip("refused, as another test says")
    for mode, grad in (("sparse", "dense"), ("sparse", "rows"), ("masked", "rows")):
        if mode == "masked" and isinstance(policy, TopK):
            continue
        model = make(kind)
        sparse = transformed(model, policy, mode=mode, dx="rows", grad=grad)
        scales, inputs = listen(sparse), model.inputs()
        for _ in range(3):
            model.zero_grad()
            loss_of(run(sparse, inputs)).backward()
            ours = {name: to_dense(p.grad) for name, p in model.named_parameters()}
            oracle = masked_gradients(model, partial(loss_at, inputs), sparse.rows, "rows", scales)
            for name in oracle:
                assert_close(ours[name], oracle[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_with_dx_full_the_weights_gradient_alone_is_scaled(mode):
    model = make(Modules)
    sparse = transformed(model, Uniform(0.3, unbiased=True), mode=mode, dx="full")
    scales, inputs = listen(sparse), model.inputs()
    loss_of(run(sparse, inputs)).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    oracle = masked_gradients(model, lambda m: loss_of(run(m, inputs)), sparse.rows, "full")
    for name, rows in sparse.rows.items():
        assert_close(ours[name][rows], oracle[name][rows] * scales[name][:, None], rtol=1e-6, atol=1e-9)


INDUCTOR = ["adaptive-density", "learned", "top-k", "top-k-scheduled", "uniform-scheduled", "magnitude-unbiased"]
COMPILED = [(name, "aot_eager", "rows") for name in POLICIES]
COMPILED += [(name, "inductor", grad) for name in INDUCTOR for grad in ("dense", "rows")]


@pytest.mark.parametrize(("name", "backend", "grad"), COMPILED, ids=map("-".join, COMPILED))
def test_every_policy_is_one_graph_that_is_compiled_once(name, backend, grad):
    model, policy = make(Residual), POLICIES[name]
    sparse = transformed(model, policy, grad=grad)
    eager = copy.deepcopy(sparse)
    counters.clear()
    args, _ = model.inputs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(sparse, backend=backend, fullgraph=True)
        for _ in range(5):
            for module in (compiled, eager):
                module.zero_grad()
                loss_of(module(*args)).backward()
            assert_close(sparse.rows, eager.rows)
            assert_close(sparse.sampler_state(), eager.sampler_state())
            for ours, theirs in zip(sparse.parameters(), eager.parameters(), strict=True):
                assert ours.grad.layout == theirs.grad.layout
                assert_close(to_dense(ours.grad), to_dense(theirs.grad), rtol=0, atol=1e-10)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@every_policy
def test_a_resumed_run_draws_the_rows_that_the_run_would_have_drawn(policy):
    model = make(Residual)
    sparse = transformed(model, policy, grad="rows")

    def steps(sparse, count):
        optimizer = rwfx.optim.SGD(sparse.parameters(), lr=0.01)
        found = []
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(sparse(torch.linspace(-1, 1, 60, dtype=torch.float64).view(5, 12))).backward()
            optimizer.step()
            found.append({name: rows.clone() for name, rows in sparse.rows.items()})
        return found

    steps(sparse, 3)
    again = transformed(copy.deepcopy(model), policy, grad="rows")
    again.load_sampler_state(pickle.loads(pickle.dumps(sparse.sampler_state())))
    copied, pickled = copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))
    expected = steps(sparse, 4)
    for other in (again, copied, pickled):
        assert_close(steps(other, 4), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_policy
def test_a_model_of_another_type_trains(policy, dtype):
    sparse = transformed(make(Residual), policy, grad="rows").to(dtype)
    for _ in range(3):
        sparse(torch.randn(5, 12, dtype=dtype)).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sparse.float()(torch.randn(5, 12)).float().sum().backward()
    assert all(1 <= len(rows) < len(sparse.get_parameter(name)) for name, rows in sparse.rows.items())


def test_the_state_of_another_policy_is_refused():
    adaptive, plain = (transformed(make(Residual), policy) for policy in (AdaptiveWalk(3), RandomWalk(3)))
    with pytest.raises(ValueError, match="another row policy"):
        adaptive.load_sampler_state(plain.sampler_state())


@pytest.mark.parametrize("kind", [Modules, Residual, Heads], ids=lambda kind: kind.__name__)
def test_top_k_chooses_the_rows_of_the_largest_gradient_that_arrives(kind):
    model = make(kind)
    sparse = transformed(model, TopK(0.3))
    inputs = model.inputs()
    loss_of(run(sparse, inputs)).backward()
    _, arrived = masked_backward(model, lambda m: loss_of(run(m, inputs)), sparse.rows)
    for name, rows in sparse.rows.items():
        ((g,),) = (arrived[name],)
        expected = g.abs().sum(0).topk(len(rows)).indices.sort().values
        assert_close(rows, expected)


def test_top_k_leaves_a_weight_that_is_used_twice_dense():
    report = transformed(make(Twice), TopK(0.3)).report
    assert "TopK would choose other rows in each" in report.dense["shared.weight"]


def mlp(*widths):
    torch.manual_seed(3)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double()


def magnitudes(model, x, loss, rows):
    _, arrived = masked_backward(model, lambda m: loss(m(x)), rows)
    return {name: torch.cat(g).abs().sum(0) for name, g in arrived.items()}


@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_an_adaptive_walk_remembers_the_running_mean_of_every_rows_gradient(grad):
    model = mlp(6, 8, 7, 3)
    policy = AdaptiveWalk(4, memory=0.7)
    sparse = transformed(model, policy, grad=grad)
    expected = torch.zeros(8 + 7 + 3, dtype=torch.float64)
    for step in range(5):
        x = torch.randn(4, 6, dtype=torch.float64)
        loss_of(sparse(x)).backward()
        remembered = sparse.sampler_state()["preference.value"]
        assert_close(remembered.double(), expected, rtol=1e-5, atol=1e-6, msg=lambda m, s=step: f"step {s}: {m}")
        expected = 0.7 * expected + 0.3 * torch.cat(list(magnitudes(model, x, loss_of, sparse.rows).values()))


def test_an_adaptive_walk_prefers_the_rows_with_the_larger_gradient():
    model = mlp(6, 40, 3)
    with torch.no_grad():
        model[2].weight.abs_().clamp_(0.5, 0.6)
        model[0].bias[:20] = -50.0  # dead: no gradient ever
    visits = {}
    for policy in (RandomWalk(6), AdaptiveWalk(6)):
        sparse = transformed(copy.deepcopy(model), policy)
        counts = torch.zeros(40)
        for _ in range(60):
            sparse(torch.randn(8, 6, dtype=torch.float64)).square().sum().backward()
            counts[sparse.rows["0.weight"]] += 1
        visits[type(policy)] = float(counts[:20].sum() / counts.sum())
    assert 0.4 < visits[RandomWalk] < 0.6
    assert visits[AdaptiveWalk] < 0.15


def test_a_learned_walk_follows_its_rule():
    model = mlp(6, 8, 7, 3)
    policy = LearnedWalk(4, rate=0.4, forget=0.1, optimism=1.5)
    sparse = transformed(model, policy, grad="rows")
    names, sizes = list(sparse.row_sampler.kept), [8, 7, 3]
    q = [torch.full((n,), 1.5, dtype=torch.float64) for n in sizes]
    before = None
    for _ in range(6):
        x = torch.randn(4, 6, dtype=torch.float64)
        loss_of(sparse(x)).backward()
        for k, name in enumerate(names):
            if before is not None:
                rows, seen = before[0][name], before[1][name]
                others = torch.ones(sizes[k], dtype=torch.bool).index_fill(0, rows, False)
                q[k][rows] += 0.4 * (seen[rows] / seen[rows].mean() - q[k][rows])
                q[k][others] += 0.1 * (1.5 - q[k][others])
            else:
                assert (q[k] == 1.5).all()
        assert_close(sparse.sampler_state()["preference.value"].double(), torch.cat(q), rtol=1e-5, atol=1e-6)
        before = sparse.rows, magnitudes(model, x, loss_of, sparse.rows)


UNBIASED = {
    "walk": RandomWalk(4, unbiased=True),
    "walk-epsilon": RandomWalk(3, epsilon=0.3, temperature=2.0, unbiased=True),
    "adaptive": AdaptiveWalk(4, unbiased=True),
    "learned": LearnedWalk(4, unbiased=True),
    "uniform": Uniform({"*": 0.4}, unbiased=True),
    "magnitude": Magnitude({"*": 0.4}, unbiased=True),
}


@pytest.mark.parametrize("policy", UNBIASED.values(), ids=UNBIASED)
@pytest.mark.usefixtures("one_thread")
def test_the_expected_gradient_is_the_dense_one(policy):
    """Per weight, the mean over many draws is within its standard error of the dense gradient."""
    model, draws = mlp(5, 7, 6, 3), 4000
    x, target = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def gradient(module):
        module.zero_grad()
        (module(x) - target).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    dense = gradient(model)
    sparse = transformed(model, policy)
    if isinstance(policy, AdaptiveWalk | LearnedWalk):
        for _ in range(5):
            gradient(sparse)  # a memory that prefers some rows
    sums = [torch.zeros_like(g) for g in dense]
    squares = [torch.zeros_like(g) for g in dense]
    for _ in range(draws):
        for total, square, g in zip(sums, squares, gradient(sparse), strict=True):
            total += g
            square += g * g
    for expected, total, square in zip(dense, sums, squares, strict=True):
        mean = total / draws
        error = ((square / draws - mean * mean).clamp(min=0) / draws).sqrt()
        # The squared distance is on average the sum of the squared errors.
        assert ((mean - expected) ** 2).sum() < 4 * (error**2).sum() + 1e-12
        assert ((mean - expected).abs() < 5 * error + 1e-9).all()


def test_without_weighing_the_expected_gradient_is_another():
    model = mlp(5, 7, 6, 3)
    x = torch.randn(4, 5, dtype=torch.float64)
    loss_of(model(x)).backward()
    dense = model[0].weight.grad.clone()
    sparse = transformed(model, Uniform(0.4))
    mean = torch.zeros_like(dense)
    for _ in range(200):
        model.zero_grad()
        loss_of(sparse(x)).backward()
        mean += model[0].weight.grad / 200
    assert (mean - dense).norm() > 0.3 * dense.norm()


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        (RandomWalk(3, unbiased=True), "tree"),
        (Uniform(0.3, unbiased=True), "used 2 times|used 3 times"),
        (Magnitude(0.3, unbiased=True), "used 2 times|used 3 times"),
    ],
    ids=["walk", "uniform", "magnitude"],
)
def test_what_cannot_be_unbiased_is_refused(policy, match):
    with pytest.raises(ValueError, match=match):
        transformed(make(Twice), policy)


def test_walks_with_residual_additions_cannot_be_unbiased_but_uniform_rows_can():
    with pytest.raises(ValueError, match="tree"):
        transformed(make(Residual), RandomWalk(3, unbiased=True))
    transformed(make(Residual), Uniform(0.3, unbiased=True))


def head_counts(sparse, head, forwards=300):
    counts = torch.zeros(len(sparse.get_parameter(head)))
    for _ in range(forwards):
        sparse(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
        counts[sparse.rows[head]] += 1
    return counts


def test_walks_start_at_the_labels():
    sparse = transformed(mlp(6, 8, 5), RandomWalk(2, start="labels", min_rows=0))
    with pytest.raises(RuntimeError, match="start_from"):
        sparse(torch.randn(2, 6, dtype=torch.float64))
    sparse.start_from(torch.tensor([[1, 1], [4, 1]]))
    counts = head_counts(sparse, "2.weight")
    assert counts[[0, 2, 3]].sum() == 0
    assert counts[1] > counts[4] > 0


def test_new_labels_are_no_new_compilation():
    sparse = transformed(mlp(6, 8, 5), RandomWalk(2, start="labels", min_rows=0))
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
        for labels in ([1], [3, 3], [0, 0, 0]):
            sparse.start_from(torch.tensor(labels))
            compiled(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
            assert sparse.rows["2.weight"].tolist() == labels[:1]
    assert counters["stats"]["unique_graphs"] == 1


def test_the_trainer_starts_walks_at_the_targets_of_its_batches():
    model = mlp(6, 8, 5).float()
    walk = RandomWalk(3, start="labels", min_rows=0)
    trainer = rwfx.RandomWalkTrainer(model, rows=walk, break_even=False, progress=False)
    for target in (2, 4):
        trainer.fit([(torch.randn(7, 6), torch.full((7,), target))])
        assert trainer.network.rows["2.weight"].tolist() == [target]


@pytest.mark.parametrize("labels", [torch.tensor([5]), torch.tensor([-1]), torch.tensor([1.0]), torch.tensor([True])])
def test_labels_outside_the_output_weight_are_refused_and_nothing_changes(labels):
    sparse = transformed(mlp(6, 8, 5), RandomWalk(2, start="labels"))
    sparse.start_from(torch.tensor([2]))
    with pytest.raises(ValueError, match="labels"):
        sparse.start_from(labels)
    assert head_counts(sparse, "2.weight", 5).nonzero().flatten().tolist() == [2]


def test_labels_need_a_policy_that_starts_there():
    for policy in (RandomWalk(3), TopK(0.3)):
        with pytest.raises(ValueError, match="start_from is for"):
            transformed(mlp(6, 8, 5), policy).start_from(torch.tensor([1]))
    with pytest.raises(ValueError, match="one output weight"):
        transformed(make(Heads), RandomWalk(3, start="labels"))


def test_walks_start_by_the_weights_given():
    sparse = transformed(mlp(6, 8, 5), RandomWalk(2, start=[0, 3.0, 0, 1.0, 0], min_rows=0))
    counts = head_counts(sparse, "2.weight")
    assert counts[[0, 2, 4]].sum() == 0
    assert counts[1] > counts[3] > 0
    by_name = transformed(make(Heads), RandomWalk(4, start={"class_head.weight": torch.tensor([0, 0, 1.0])}))
    run(by_name, make(Heads).inputs())
    assert by_name.rows["class_head.weight"].tolist() == [2]


@pytest.mark.parametrize(
    "start",
    [[1.0, 1.0], [0.0] * 5, [-1.0, 1, 1, 1, 1], [float("nan"), 1, 1, 1, 1], {"3.weight": [1.0] * 5}, "label"],
    ids=["too-few", "zero", "negative", "nan", "no-such-head", "no-such-word"],
)
def test_bad_starts_are_refused(start):
    with pytest.raises(ValueError, match="start"):
        transformed(mlp(6, 8, 5), RandomWalk(2, start=start))


def test_walks_start_where_the_last_gradient_was():
    sparse = transformed(mlp(6, 8, 5), RandomWalk(3, start="gradient", min_rows=0))
    x = torch.randn(2, 6, dtype=torch.float64)
    for _ in range(20):
        sparse(x)[:, [1, 3]].sum().backward()
    seen = set()
    for _ in range(20):
        sparse(x)[:, [1, 3]].sum().backward()
        seen |= set(sparse.rows["2.weight"].tolist())
    assert seen == {1, 3}


def test_densities_are_given_by_name_and_what_is_not_named_stays_dense():
    model = mlp(6, 10, 10, 5)
    sparse = transformed(model, Uniform({"0": 0.2, "*.weight": 0.5}), exclude="4")
    sparse(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
    assert {name: len(rows) for name, rows in sparse.rows.items()} == {"0.weight": 2, "2.weight": 5}
    partly = transformed(mlp(6, 10, 10, 5), TopK({"2.weight": 0.5}))
    assert partly.report.dense == {name: "density= does not name it" for name in ("0.weight", "4.weight")}
    with pytest.raises(ValueError, match="density names 'head'"):
        transformed(mlp(6, 8, 5), TopK({"head": 0.5}))


@pytest.mark.parametrize(
    "policy",
    [
        TopK,
        Uniform,
        Magnitude,
        lambda density: RandomWalk(density=density),
        lambda density: AdaptiveWalk(density=density),
    ],
    ids=["top-k", "uniform", "magnitude", "walk", "adaptive"],
)
def test_a_scheduled_density_is_met_at_every_step_and_a_dense_step_is_dense(policy):
    density = schedules.DenseFirst(2, schedules.Linear(0.5, 0.1, over=4))
    model = mlp(6, 20, 5)
    sparse = transformed(model, policy(density), grad="rows")
    x = torch.randn(4, 6, dtype=torch.float64)
    for step in range(8):
        model.zero_grad()
        loss_of(sparse(x)).backward()
        assert len(sparse.rows["0.weight"]) == -(-round(float(density(step)) * 2000) // 100), step
        if step < 2:
            ours = [to_dense(p.grad).clone() for p in model.parameters()]
            model.zero_grad()
            loss_of(model(x)).backward()
            assert_close(ours, [p.grad for p in model.parameters()], rtol=0, atol=1e-12)


def test_the_probabilities_of_magnitude_are_those_of_its_equation():
    model = mlp(6, 12, 3)
    sparse = transformed(model, Magnitude(0.4, power=2.0, unbiased=True))
    scales = listen(sparse)
    norms = model[0].weight.detach().norm(dim=1)
    counts, told = torch.zeros(12), torch.zeros(12)
    draws = 3000
    for _ in range(draws):
        sparse(torch.randn(1, 6, dtype=torch.float64)).sum().backward()
        rows = sparse.rows["0.weight"]
        assert len(rows) == 5
        counts[rows] += 1
        told[rows] = 1 / scales["0.weight"]
    c = 5 / norms.square().sum()
    if (c * norms.square()).max() <= 1:
        assert_close(told.double(), c * norms.square(), rtol=1e-4, atol=1e-5)
    assert told.sum() == pytest.approx(5, rel=1e-4)
    assert ((counts / draws - told).abs() < 5 * (told * (1 - told) / draws).sqrt() + 1e-3).all()


BAD = [
    (lambda: TopK(0), ValueError, "density must be a number above 0 and at most 1, got 0"),
    (lambda: TopK(-0.1), ValueError, "density must be a number above 0 and at most 1"),
    (lambda: Uniform(1.5), ValueError, "density must be a number above 0 and at most 1"),
    (lambda: Uniform("cosine"), TypeError, "or a schedule"),
    (lambda: Uniform(None), TypeError, "or a schedule"),
    (lambda: Uniform({}), ValueError, "empty"),
    (lambda: Uniform({3: 0.1}), TypeError, "names of weights"),
    (lambda: TopK(lambda step: 2 * step), ValueError, "at step 0 is 0"),
    (lambda: TopK(lambda step: 0.1 if step > 3 else None), TypeError, "gives no density"),
    (lambda: schedules.Linear(0.5, 0, over=10), ValueError, "end"),
    (lambda: schedules.Cosine(0.5, 0.1, over=0), ValueError, "over"),
    (lambda: schedules.DenseEvery(1, 0.1), ValueError, "steps"),
    (lambda: RandomWalk(0), ValueError, "num_paths"),
    (lambda: RandomWalk(3, temperature=0), ValueError, "temperature must be a number above 0, got 0"),
    (lambda: RandomWalk(3, temperature=float("nan")), ValueError, "temperature"),
    (lambda: RandomWalk(3, temperature=float("inf")), ValueError, "temperature"),
    (lambda: RandomWalk(3, epsilon=1.5), ValueError, "epsilon must be a number from 0 to 1, got 1.5"),
    (lambda: RandomWalk(3, epsilon=None), TypeError, "epsilon"),
    (lambda: RandomWalk(3, min_rows=-1), ValueError, "min_rows"),
    (lambda: RandomWalk(density=0.1, unbiased=True), ValueError, "unbiased"),
    (lambda: RandomWalk(start="label"), ValueError, "start must be one of"),
    (lambda: AdaptiveWalk(memory=1), ValueError, "memory must be below 1"),
    (lambda: AdaptiveWalk(power=-1), ValueError, "power"),
    (lambda: LearnedWalk(rate=2), ValueError, "rate"),
    (lambda: Magnitude(0.1, refresh=0), ValueError, "refresh"),
    (lambda: rwfx.transform(mlp(4, 5, 3), rows="topk"), TypeError, "rows must be a row policy"),
    (lambda: rwfx.transform(mlp(4, 5, 3), rows=TopK), TypeError, "rows must be a row policy"),
    (lambda: rwfx.transform(mlp(4, 5, 3), 50, rows=TopK(0.1)), ValueError, "give it to the policy"),
    (lambda: rwfx.transform(mlp(4, 5, 3), density=0.1, rows=TopK(0.1)), ValueError, "give it to the policy"),
    (lambda: rwfx.transform(mlp(4, 5, 3), rows=TopK(0.1), mode="masked"), ValueError, 'TopK with mode="masked"'),
    (lambda: rwfx.transform(mlp(4, 5, 3), rows=TopK(0.1), resample_every=2), ValueError, "resample_every must be 1"),
    (
        lambda: rwfx.transform(mlp(4, 5, 3), rows=RandomWalk(3, unbiased=True), resample_every=2),
        ValueError,
        "fresh draw",
    ),
]


@pytest.mark.parametrize(("make", "error", "match"), BAD, ids=[str(k) for k in range(len(BAD))])
def test_bad_input_is_refused_with_what_was_met(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_the_report_says_how_rows_are_chosen_and_where():
    before, within = (str(transformed(mlp(4, 5, 3), policy).report) for policy in (AdaptiveWalk(3), TopK(0.5)))
    assert "rows: AdaptiveWalk(num_paths=3" in before
    assert "before the forward pass" in before
    assert "rows: TopK(density=0.5), chosen in the backward pass" in within


# --- What a policy remembers


@pytest.mark.parametrize("policy", [AdaptiveWalk(4), LearnedWalk(4)], ids=["adaptive", "learned"])
def test_a_backward_pass_that_overflowed_is_not_remembered(policy):
    model = mlp(6, 8, 7, 3)
    sparse = transformed(model, policy)
    for loss_scale in (1.0, float("inf"), float("nan"), 1.0):
        (sparse(torch.randn(4, 6, dtype=torch.float64)).square().sum() * loss_scale).backward()
    sparse(torch.randn(4, 6, dtype=torch.float64))
    assert sparse.sampler_state()["preference.value"].isfinite().all()


@pytest.mark.parametrize("policy", [AdaptiveWalk(4), LearnedWalk(4)], ids=["adaptive", "learned"])
def test_a_forward_without_a_backward_teaches_nothing(policy):
    sparse = transformed(mlp(6, 8, 7, 3), policy)
    x = torch.randn(4, 6, dtype=torch.float64)
    sparse(x).square().sum().backward()
    sparse(x)
    learned = sparse.sampler_state()["preference.value"]
    for _ in range(5):
        sparse(x)
    assert_close(sparse.sampler_state()["preference.value"], learned, rtol=0, atol=0)
    sparse(x).square().sum().backward()
    sparse(x)
    assert not torch.equal(sparse.sampler_state()["preference.value"], learned)


def test_half_a_models_precision_is_not_half_the_samplers():
    start = torch.tensor([1e5, 1e-9, 3, 2, 1])
    sparse = transformed(mlp(6, 8, 5), AdaptiveWalk(2, start=start)).half().double()
    assert_close(sparse.row_sampler._start_weights.tensors()[0], start, rtol=0, atol=0)


OTHERS = {
    "power": (Magnitude(0.1, power=3.0), Magnitude(0.9, power=3.0)),
    "density": (Uniform(0.5), Uniform(0.1)),
    "kind": (TopK(0.1), Uniform(0.1)),
    "paths": (RandomWalk(50), RandomWalk(5)),
    "function": (Uniform(lambda step: 0.1 + 0 * step), Uniform(lambda step: 0.5 + 0 * step)),
    "start": (RandomWalk(3, start=torch.ones(4)), RandomWalk(3, start=torch.tensor([1.0, 1, 1, 2]))),
}


@pytest.mark.parametrize(("one", "other"), OTHERS.values(), ids=OTHERS)
def test_the_sampler_state_of_another_policy_is_refused_and_nothing_changes(one, other):
    saved = transformed(make(Residual), one).sampler_state()
    sparse = transformed(make(Residual), other)
    before = sparse.sampler_state()
    with pytest.raises(ValueError, match="another row policy"):
        sparse.load_sampler_state(saved)
    assert_close(sparse.sampler_state(), before)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_large_power_keeps_the_rows_with_the_largest_norms(scale):
    model = mlp(6, 40, 5)
    with torch.no_grad():
        model[0].weight.copy_(scale * torch.linspace(1, 3, 40)[:, None].expand(40, 6))
    sparse = transformed(model, Magnitude(0.1, power=200.0))
    for _ in range(5):
        sparse(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
        assert sparse.rows["0.weight"].tolist() == [36, 37, 38, 39]


def test_norms_are_refreshed_at_the_first_draw_after_so_many_steps():
    sparse = transformed(mlp(6, 20, 5), Magnitude(0.3, refresh=20), resample_every=7)
    seen = []
    for _ in range(64):
        sparse(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
        seen.append(sparse.sampler_state()["order"])
    changed = [step for step in range(1, 64) if not torch.equal(seen[step], seen[step - 1])]
    assert changed == [21, 42, 63]


@pytest.mark.parametrize("power", [4.0, 16.0, 100.0])
def test_a_sharp_adaptive_walk_goes_where_all_the_gradient_is(power):
    model = mlp(6, 2048, 3)
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].weight[:, 7] = 1.0
        model[0].bias[7] = 9.0  # it is not dead
    sparse = transformed(model, AdaptiveWalk(5, power=power, min_rows=0))
    for _ in range(3):
        sparse(torch.ones(2, 6, dtype=torch.float64)).square().sum().backward()
    with torch.no_grad():
        model[2].weight.fill_(1.0)
    sparse(torch.ones(2, 6, dtype=torch.float64))
    assert sparse.rows["0.weight"].tolist() == [7]


def test_a_density_of_a_function_in_float32_keeps_no_row_too_many():
    sparse = transformed(mlp(6, 100, 5), Uniform(lambda t: torch.where(torch.as_tensor(t) < 3, 1.0, 0.1)))
    for step in range(5):
        sparse(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
        assert len(sparse.rows["0.weight"]) == (100 if step < 3 else 10)


def test_a_schedule_that_is_dense_now_and_then_is_weighed_by_its_other_steps():
    densities = schedules.DenseEvery(10, schedules.Linear(0.9, 0.05, over=1000))
    expected = transformed(mlp(6, 100, 5), Uniform(densities)).row_sampler.expected_rows()
    assert expected == {"0.weight": 5.0}


@pytest.mark.parametrize("start", ["labels", "gradient", [1.0, 0, 0, 1, 1]], ids=str)
def test_unbiased_walks_that_could_not_start_at_every_row_are_refused(start):
    with pytest.raises(ValueError, match="never have a gradient"):
        transformed(mlp(6, 8, 5), RandomWalk(3, start=start, unbiased=True))


def test_the_report_waits_for_the_rows_of_top_k():
    sparse = transformed(mlp(6, 8, 5), TopK(0.5))
    y = sparse(torch.randn(2, 6, dtype=torch.float64))
    assert "rows as expected" in str(sparse.report)
    y.sum().backward()
    assert "50.0%" in str(sparse.report)
    assert "rows as expected" not in str(sparse.report)
