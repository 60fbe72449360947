import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracles import masked_gradients, to_dense
from torch import nn
from torch.testing import assert_close
from zoo import ZOO, Heads, Modules, Residual, Twice, loss_of, make

import rwfx

COMBINATIONS = list(itertools.product(("sparse", "masked"), ("rows", "full"), ("dense", "rows")))


def by_name(cases):
    return pytest.mark.parametrize("kind", cases, ids=lambda kind: kind.__name__)


def run(module, inputs):
    args, kwargs = inputs
    torch.manual_seed(7)
    return module(*args, **kwargs)


@by_name(ZOO)
@pytest.mark.parametrize(("mode", "dx", "grad"), COMBINATIONS, ids=map("-".join, COMBINATIONS))
def test_gradients_are_those_of_the_dense_model_masked_to_the_rows(kind, mode, dx, grad):
    model = make(kind)
    sparse = rwfx.transform(model, num_paths=3, mode=mode, dx=dx, grad=grad, seed=1)
    inputs = model.inputs()
    for _ in range(3):
        model.zero_grad()
        loss_of(run(sparse, inputs)).backward()
        rows = sparse.rows
        ours = {name: to_dense(p.grad) for name, p in model.named_parameters()}
        for name, set_ in rows.items():
            if ours[name] is not None:
                others = torch.ones(len(ours[name]), dtype=torch.bool).index_fill(0, set_, False)
                assert ours[name][others].count_nonzero() == 0
        oracle = masked_gradients(model, lambda m: loss_of(run(m, inputs)), rows, dx)
        assert ours.keys() == oracle.keys()
        for name in oracle:
            assert_close(ours[name], oracle[name], rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@by_name(ZOO)
def test_some_row_is_left_out_and_some_weight_has_a_row(kind):
    # Without this the test above could pass on full or empty row sets alone.
    model = make(kind)
    sparse = rwfx.transform(model, num_paths=1, seed=1)
    run(sparse, model.inputs())
    assert all(1 <= len(rows) < len(model.get_parameter(name)) for name, rows in sparse.rows.items())


@by_name(ZOO)
@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_forward_is_the_models_own_bit_for_bit(kind, mode):
    model = make(kind).float()
    sparse = rwfx.transform(model, mode=mode)
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.float, model.inputs())
    for train, grad in itertools.product((True, False), (True, False)):
        model.train(train), sparse.train(train)
        with torch.set_grad_enabled(grad):
            ours, theirs = run(sparse, (args, kwargs)), run(model, (args, kwargs))
        assert_close(ours, theirs, rtol=0, atol=0)


@by_name(ZOO)
def test_with_every_row_visited_the_gradients_are_the_dense_ones(kind):
    model = make(kind)
    sparse = rwfx.transform(model, rows=rwfx.RandomWalk(1, min_rows=10_000))
    inputs = model.inputs()
    loss_of(run(sparse, inputs)).backward()
    assert all(len(rows) == len(model.get_parameter(name)) for name, rows in sparse.rows.items())
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    loss_of(run(model, inputs)).backward()
    for name, p in model.named_parameters():
        assert_close(ours[name], p.grad, rtol=0, atol=1e-12)


def test_enough_walks_visit_every_row():
    model = make(Residual)
    sparse = rwfx.transform(model, num_paths=5000, seed=0)
    run(sparse, model.inputs())
    assert all(len(rows) == len(model.get_parameter(name)) for name, rows in sparse.rows.items())


@by_name(ZOO)
def test_parameters_and_state_dict_keys_are_the_models_own(kind):
    model = make(kind)
    sparse = rwfx.transform(model)
    assert list(sparse.state_dict()) == list(model.state_dict())
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (sparse, model))
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in theirs)
    other = make(kind)
    other.load_state_dict(sparse.state_dict())


def test_buffers_stay_shared_when_a_model_is_moved():
    model = make(Modules)
    sparse = rwfx.transform(model)
    sparse.to(torch.float32)
    assert model.net[2].running_mean.dtype == torch.float32
    assert model.net[2].running_mean is sparse.get_buffer("net.2.running_mean")


def test_the_model_is_left_as_it_was():
    model = make(Modules)
    model.net[4].eval()
    before = {path: (module.training, dict(vars(module))) for path, module in model.named_modules()}
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    sparse = rwfx.transform(model, example_inputs=model.inputs()[0])
    sparse.eval()
    assert {path: (module.training, dict(vars(module))) for path, module in model.named_modules()} == before
    assert_close(dict(model.state_dict()), tensors, rtol=0, atol=0)


def test_modes_of_model_and_transformed_model_are_independent():
    model = make(Modules)
    sparse = rwfx.transform(model)
    model.eval()
    assert sparse.training
    assert sparse.get_submodule("net.4").training


@by_name([Modules, Heads, Twice])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original_does(kind, clone):
    model = make(kind)
    sparse = rwfx.transform(model, num_paths=3, grad="rows")
    inputs = model.inputs()
    run(sparse, inputs)
    copied = clone(sparse)
    assert type(copied).__mro__[1] is rwfx.SparseModule
    assert copied.settings == sparse.settings
    for module in (sparse, copied):
        module.zero_grad()
        loss_of(run(module, inputs)).backward()
    assert_close(copied.rows, sparse.rows)
    for a, b in zip(copied.parameters(), sparse.parameters(), strict=True):
        assert a is not b
        assert_close(to_dense(a.grad), to_dense(b.grad), rtol=0, atol=0)
    assert_close(run(copied.eval(), inputs), run(sparse.eval(), inputs), rtol=0, atol=0)


def test_a_long_model_can_be_pickled():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(300)])
    pickle.loads(pickle.dumps(rwfx.transform(model)))


def test_rows_are_drawn_at_every_training_forward_and_at_no_other():
    model = make(Residual)
    sparse = rwfx.transform(model, num_paths=2, seed=0)
    inputs = model.inputs()
    drawn = [copy.deepcopy((run(sparse, inputs), sparse.rows)[1]) for _ in range(4)]
    assert any(not torch.equal(a["stem.weight"], b["stem.weight"]) for a, b in itertools.pairwise(drawn))
    with torch.no_grad():
        run(sparse, inputs)
    run(sparse.eval(), inputs)
    assert_close(sparse.rows, drawn[-1])


def test_evaluation_is_dense_also_in_its_backward():
    model = make(Modules).eval()
    sparse = rwfx.transform(model, num_paths=1)
    inputs = model.inputs()
    loss_of(run(sparse, inputs)).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss_of(run(model, inputs)).backward()
    assert_close(ours, [p.grad for p in model.parameters()], rtol=0, atol=0)


def test_resample_every_keeps_the_rows_for_so_many_steps():
    model = make(Residual)
    sparse = rwfx.transform(model, num_paths=2, seed=0, resample_every=3)
    inputs = model.inputs()
    drawn = [(run(sparse, inputs), sparse.rows)[1] for _ in range(9)]
    for start in (0, 3, 6):
        assert_close(drawn[start], drawn[start + 1])
        assert_close(drawn[start], drawn[start + 2])
    assert any(not torch.equal(drawn[2][name], drawn[3][name]) for name in drawn[0])


def test_equal_seeds_draw_equal_rows_and_leave_the_global_stream_alone():
    model = make(Residual)
    inputs = model.inputs()
    drawn = []
    for disturbance in (0, 5):
        sparse = rwfx.transform(model, num_paths=2, seed=3)
        torch.rand(disturbance)
        state = torch.get_rng_state()
        drawn.append([(sparse(*inputs[0]), sparse.rows)[1] for _ in range(3)])
        assert torch.equal(torch.get_rng_state(), state)
    assert_close(drawn[0], drawn[1])


@pytest.mark.parametrize(
    "policy",
    [
        rwfx.RandomWalk(3),
        rwfx.TopK(0.3),
        rwfx.AdaptiveWalk(3),
        rwfx.Uniform(0.3),
        rwfx.RandomWalk(density=rwfx.schedules.Steps(0.3, {1: 0.5})),
        rwfx.TopK(rwfx.schedules.DenseFirst(1, rwfx.schedules.Linear(0.3, 0.5, 2))),
    ],
    ids=str,
)
def test_the_default_device_is_that_of_the_model_alone(policy):
    def trained(device):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), torch.ones(4, 6)
        with torch.device(device):  # tensors of ours that were made there would have no numbers
            sparse = rwfx.transform(model, rows=policy, examples=0.5, break_even=False, seed=1)
            for _ in range(2):
                sparse(x).square().sum().backward()
            sparse.load_sampler_state(sparse.sampler_state())
        return sparse.rows, {name: p.grad for name, p in model.named_parameters()}

    assert_close(trained("meta"), trained("cpu"), rtol=0, atol=0)


def test_without_a_seed_the_rows_follow_manual_seed():
    model = make(Residual)
    seeds = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seeds.append(rwfx.transform(model).settings["seed"])
    assert seeds[0] == seeds[1] != seeds[2]


def test_sampler_state_resumes_the_draws():
    model = make(Residual)
    inputs = model.inputs()
    sparse = rwfx.transform(model, num_paths=2, seed=0, resample_every=2)
    run(sparse, inputs)
    state = sparse.sampler_state()
    ahead = [(run(sparse, inputs), sparse.rows)[1] for _ in range(4)]
    resumed = rwfx.transform(model, num_paths=2, seed=99, resample_every=2)
    resumed.load_sampler_state(state)
    assert_close([(run(resumed, inputs), resumed.rows)[1] for _ in range(4)], ahead)
    with pytest.raises(ValueError, match="other weights"):
        rwfx.transform(make(Modules), num_paths=2).load_sampler_state(state)


def test_what_is_excluded_stays_dense():
    model = make(Residual)
    inputs = model.inputs()
    for exclude, left in [
        ("head", ["stem.weight", "blocks.0.weight", "blocks.1.weight", "blocks.2.weight"]),
        (["blocks.*"], ["stem.weight", "head.weight"]),
        (("stem.weight", "head.weight", "blocks.1"), ["blocks.0.weight", "blocks.2.weight"]),
    ]:
        sparse = rwfx.transform(model, num_paths=2, exclude=exclude)
        loss_of(run(sparse, inputs)).backward()
        assert list(sparse.rows) == list(sparse.report.sparse) == left
        assert all("exclude=" in why for why in sparse.report.dense.values())


def test_report_counts_the_products_that_were_computed():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    sparse = rwfx.transform(model, num_paths=1, seed=0)
    assert "rows as expected" in str(sparse.report)
    sparse(torch.randn(3, 6))
    assert {name: len(rows) for name, rows in sparse.rows.items()} == {"0.weight": 1, "2.weight": 1}
    flops = sparse.report.flops(batch_size=3)
    assert flops.forward == 2 * 3 * (6 * 5 + 5 * 4)
    # The first layer's input needs no gradient, and of that of the second one column is read.
    assert flops.backward == 2 * 3 * (6 * 1 + 5 * 1 + 1 * 1)
    assert flops.dense_backward == 2 * 3 * (6 * 5 + 2 * 5 * 4)
    assert sparse.report.kept_share == pytest.approx((6 * 1 + 2 * 5 * 1) / (6 * 5 + 2 * 5 * 4))


@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_report_counts_the_bytes_of_the_gradients(grad):
    def bytes_of(gradient):
        parts = [gradient.values(), gradient.indices()] if gradient.is_sparse else [gradient]
        return sum(part.nbytes for part in parts)

    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7)).double()
    sparse = rwfx.transform(model, rows=rwfx.Uniform({"0": 0.4}), grad=grad, break_even=False)
    sparse(torch.randn(3, 4).double()).sum().backward()
    ours, dense = sparse.report.gradient_bytes
    assert ours == sum(
        bytes_of(model[k].weight.grad.coalesce() if k == 0 and grad == "rows" else model[k].weight.grad) for k in (0, 2)
    )
    assert dense == 8 * (4 * 9 + 9 * 7)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_before_the_first_step_the_report_tells_what_is_expected(device):
    with torch.device(device):
        model = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
    sparse = rwfx.transform(model, density=0.5, grad="rows", break_even=False)
    # dW of each, then dx of the second, in the columns that the first reads, and of the head.
    assert sparse.report.flops().backward == 2 * (10 * 4 + 5 * 20 + 5 * 10 + 5 * 10 + 5 * 10)
    assert sparse.report.gradient_bytes[0] == 10 * (4 * 4 + 8) + 5 * (20 * 4 + 8) + 5 * 10 * 4
    walked = rwfx.transform(model, 3, break_even=False).report
    assert all(0 < line.expected <= 3 for line in walked.lines)


def test_a_linear_module_with_hooks_stays_dense_and_is_reported():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3))
    called = []
    model[2].register_forward_hook(lambda *_: called.append(1))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    sparse = rwfx.transform(model)
    sparse(torch.randn(2, 6)).sum().backward()
    assert called == [1]
    assert sparse.report.sparse == ("3.weight",)
    assert {"2.weight", "0.parametrizations.weight.original1"} <= set(sparse.report.dense)


def test_what_has_no_rule_stays_dense_and_walks_go_on_behind_it():
    model = nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(6, 3))
    model[2].register_forward_hook(lambda module, args, output: output)  # so that it is more than a convolution
    sparse = rwfx.transform(model, num_paths=4)
    sparse(torch.randn(2, 6)).sum().backward()
    assert sparse.report.sparse == ("0.weight", "4.weight")
    assert "Conv1d" in sparse.report.dense["2.weight"]
    assert "Conv1d" in str(sparse.report)


def test_a_tied_embedding_stays_right():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.fc(self.embed(ids)).relu())

    model = Tied().double()
    ids = torch.tensor([[1, 2], [3, 1]])
    for grad in ("dense", "rows"):
        sparse = rwfx.transform(model, num_paths=2, grad=grad)
        model.zero_grad()
        loss_of(sparse(ids)).backward()
        ours = {name: to_dense(p.grad) for name, p in model.named_parameters()}
        oracle = masked_gradients(model, lambda m: loss_of(m(ids)), sparse.rows, "rows")
        assert_close(ours, oracle, rtol=0, atol=1e-12)
        assert list(sparse.state_dict()) == list(model.state_dict())


def test_any_training_loop_needs_no_change():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    x, y = torch.randn(256, 20), torch.randint(5, (256,))
    sparse = rwfx.transform(model, num_paths=10)
    optimizer = torch.optim.Adam(sparse.parameters(), lr=1e-2)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(sparse(x), y)
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.6 * first
    assert F.cross_entropy(model(x), y).item() == pytest.approx(F.cross_entropy(sparse(x), y).item())


def test_dense_takes_whole_containers():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    assert rwfx.transform(model, exclude="0").report.sparse == ("1.weight",)


def test_a_shallow_copy_is_a_transformed_model_too():
    sparse = rwfx.transform(make(Residual))
    copied = copy.copy(sparse)
    assert copied.report.sparse == sparse.report.sparse
    assert copied.get_parameter("stem.weight") is sparse.get_parameter("stem.weight")


def test_a_weight_with_another_gradient_stays_dense_where_gradients_are_rows():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.mid, self.other = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.other.bias = self.mid.bias

        def forward(self, x):
            h = self.other(self.mid(self.enc(x)))
            return F.linear(h, self.enc.weight.t())

    model = Autoencoder()
    sparse = rwfx.transform(model, grad="dense")
    assert set(sparse.rows) == {"enc.weight", "enc.weight[:, 0:6]", "mid.weight", "other.weight"}
    with pytest.raises(ValueError, match="uses its weight or bias too"):
        rwfx.transform(model, grad="rows")


def test_the_sampler_state_of_a_model_with_as_many_rows_in_other_weights_is_refused():
    def transformed(first, second):
        model = nn.Sequential(nn.Linear(4, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 3))
        sparse = rwfx.transform(model, num_paths=400, resample_every=4, seed=1)
        sparse(torch.randn(2, 4))
        return sparse

    a, b = transformed(5, 90), transformed(90, 5)
    before = b.sampler_state()
    with pytest.raises(ValueError, match="another model"):
        b.load_sampler_state(a.sampler_state())
    assert all(torch.equal(b.sampler_state()[name], before[name]) for name in before)


def test_the_choice_of_weights_does_not_depend_on_their_values():
    model = nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 10))
    at_first = rwfx.transform(model, 400, break_even=rwfx.CostModel(), seed=0)
    with torch.no_grad():
        for layer in (model[2], model[4]):
            layer.weight[:, 20:] *= 1e-3
    later = rwfx.transform(model, 400, break_even=rwfx.CostModel(), seed=7)
    assert len(at_first.report.sparse) > 0
    assert at_first.report.sparse == later.report.sparse
    later.load_sampler_state(at_first.sampler_state())
