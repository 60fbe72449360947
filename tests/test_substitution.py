"""Models whose forward pass no graph holds: their own code, with row-sparse calls in it."""

import copy
import inspect
import io
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import masked_gradients, to_dense
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import rwfx
from rwfx.capture import CaptureError, exported
from rwfx.substituted import SubstitutedModule


@pytest.fixture(autouse=True)
def without_export(monkeypatch):
    """``torch.export`` takes its time to fail."""

    def fail(model, inputs):
        raise CaptureError("left out")

    monkeypatch.setattr(exported, "capture", fail)


class Branching(nn.Module):
    """Calls ``b`` none, one or two times, by the values of its input; reads ``packed`` without its module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 5)
        self.packed, self.never = nn.Linear(5, 5), nn.Linear(5, 5)
        self.sliced = nn.Linear(5, 10)

    def forward(self, x, scale=1.0):
        h = F.relu(self.a(x)) * scale
        for _ in range(int(x[0, 0] > 0) + int(x[0, 1] > 0)):
            h = h + torch.tanh(self.b(h))
        y = F.linear(F.linear(self.c(h), self.packed.weight), self.sliced.weight[5:])
        return self.never(y) if x.sum() > 1e6 else y


ONCE = torch.tensor([[1.0, -1, 0, 0.5, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]).double()
TWICE, NEVER = ONCE.abs(), ONCE - 2


def transformed(model, x=ONCE, **options):
    return rwfx.transform(model, example_inputs=x, break_even=False, seed=1, **options)


def gradients(module, *args):
    module.zero_grad()
    loss(module(*args)).backward()
    return {name: None if p.grad is None else to_dense(p.grad).clone() for name, p in module.named_parameters()}


def loss(y):
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).square().sum()


@pytest.mark.parametrize("x", [ONCE, TWICE, NEVER], ids=["once", "twice", "never"])
@pytest.mark.parametrize("dx", ["rows", "full"])
@pytest.mark.parametrize("grad", ["dense", "rows"])
@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_however_often_a_weight_is_called_its_gradient_is_the_dense_one_with_masks(x, dx, grad, mode):
    model = Branching().double()
    sparse = transformed(model, num_paths=3, dx=dx, grad=grad, mode=mode)
    found = gradients(sparse, x)
    assert sparse.rows.keys() == {"a.weight", "b.weight", "c.weight"}
    expected = masked_gradients(model, lambda m: loss(m(x)), sparse.rows, dx)
    for name, grad_of in expected.items():
        assert_close(found[name], grad_of, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


POLICIES = {
    "top k": rwfx.TopK(0.5),
    "uniform": rwfx.Uniform(0.5),
    "magnitude": rwfx.Magnitude(0.5),
    "adaptive": rwfx.AdaptiveWalk(3),
    "learned": rwfx.LearnedWalk(3),
    "from the gradient": rwfx.RandomWalk(3, start="gradient"),
    "scheduled": rwfx.Uniform(rwfx.schedules.Linear(1.0, 0.3, over=4)),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_draws_and_sees_what_it_does_in_a_graph(policy):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 5)

        def forward(self, x):
            h = F.relu(self.a(x))
            return self.c(h + torch.tanh(self.b(h)))

    class Python(Graph):
        def forward(self, x):
            return super().forward(x) if x[0, 0] > 0 else x

    torch.manual_seed(0)
    graph = Graph().double()
    python = Python().double()
    python.load_state_dict(graph.state_dict())
    found = [transformed(model, rows=POLICIES[policy]) for model in (graph, python)]
    assert [model.report.route for model in found] == ["symbolic_trace", "substitution"]
    for _ in range(6):
        of_graph, of_python = (gradients(model, ONCE) for model in found)
        assert_close(found[1].rows, found[0].rows, rtol=0, atol=0)
        assert_close(of_python, of_graph)


def test_importance_weights_reach_the_calls():
    model = Branching().double()
    sparse = transformed(model, rows=rwfx.Uniform({"c": 0.4}, unbiased=True))
    plain = gradients(model, ONCE)["c.bias"]
    found = gradients(sparse, ONCE)["c.bias"]
    rows = sparse.rows["c.weight"]
    assert_close(found[rows], plain[rows] * 5 / 2)


def test_the_forward_pass_is_the_model_s_own_in_both_modes():
    model = Branching().double()
    sparse = transformed(model, num_paths=3)
    assert isinstance(sparse, SubstitutedModule)
    assert isinstance(sparse, Branching)
    assert isinstance(sparse.a, nn.Linear)
    assert inspect.signature(sparse.forward) == inspect.signature(model.forward)
    for train in (True, False):
        for x in (ONCE, TWICE, NEVER):
            assert torch.equal(sparse.train(train)(x, scale=0.5), model.train(train)(x, scale=0.5))
    assert list(sparse.state_dict()) == list(model.state_dict())
    assert all(p is q for p, q in zip(sparse.parameters(), model.parameters(), strict=True))
    assert type(model.a) is nn.Linear
    assert type(model) is Branching


def test_in_eval_mode_and_without_gradients_it_is_the_dense_model_and_draws_nothing():
    model = Branching().double()
    sparse = transformed(model, num_paths=1)
    gradients(sparse, ONCE)
    before = sparse.sampler_state()
    assert_close(gradients(sparse.eval(), ONCE), gradients(model.eval(), ONCE), rtol=0, atol=0)
    with torch.no_grad():
        sparse.train()(ONCE)
    assert_close(sparse.sampler_state(), before, rtol=0, atol=0)


def test_what_stays_dense_is_named_with_its_reason():
    dense = transformed(Branching().double(), num_paths=3).report.dense
    assert dense.keys() == {"packed.weight", "sliced.weight[5:10]", "never.weight"}
    line = next(k for k, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "self.packed.weight)" in text)
    assert dense["packed.weight"] == f"it is read outside of its module's forward, at {__file__}:{line}"
    assert dense["sliced.weight[5:10]"] == dense["packed.weight"]
    assert "the forward pass does not read it" in dense["never.weight"]


class Parts(nn.Module):
    """A branch on values, and parts whose calls are of many kinds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6, bias=False)
        self.tied = nn.Linear(4, 6)
        self.tied.weight = self.linear.weight
        self.conv = nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular", groups=2)
        self.even = nn.Conv1d(6, 8, 2, padding="same")
        self.up = nn.ConvTranspose1d(8, 4, 3, stride=2)
        self.computed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.last = nn.Linear(4, 3)
        self.hidden = [nn.Linear(3, 3).double()]  # not a part of the model

    def forward(self, x):
        h = self.linear(x) if x.sum() > 0 else self.tied(x)
        h = self.up(F.relu(self.even(self.conv(h.mT))), output_size=[2 * x.shape[1] + 2])
        h = self.computed(self.drop(self.norm(h)).mT).relu()
        return {"scores": self.hidden[0](self.last(h)), "size": random.random()}


@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_every_kind_of_call_has_the_gradient_of_the_masked_one(grad):
    torch.manual_seed(0)
    model = Parts().double()
    x = torch.rand(2, 5, 4, dtype=torch.float64)
    pair = [
        transformed(model, x, rows=rwfx.Uniform({"*": 0.5}), mode=mode, dx="rows", grad=grad)
        for mode in ("sparse", "masked")
    ]
    dense = {"computed.parametrizations.weight.original1"} | ({"up.weight"} if grad == "rows" else set())
    assert pair[0].report.dense.keys() >= dense
    assert set(pair[0].report.sparse) >= {"linear.weight", "conv.weight", "even.weight", "last.weight"}
    for given in (x, -x):
        found = []
        for sparse in pair:
            torch.manual_seed(1)
            model.zero_grad()
            sparse(given)["scores"].square().sum().backward()
            grads = {name: to_dense(p.grad) for name, p in model.named_parameters()}
            found.append({name: None if grad is None else grad.clone() for name, grad in grads.items()})
        assert_close(pair[0].rows, pair[1].rows)
        assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dx", ["rows", "full"])
def test_linear_layers_that_store_their_weight_the_other_way_round_are_row_sparse(dx):
    transformers = pytest.importorskip("transformers")
    size = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 16}
    drops = {name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    config = transformers.GPT2Config(**size, **drops, bos_token_id=0, eos_token_id=0, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).double().train()
    model.gradient_checkpointing_enable()
    ids = torch.arange(16).view(2, 8)
    inputs = {"input_ids": ids, "labels": ids}
    sparse = transformed(model, inputs, rows=rwfx.Uniform({"transformer.h.*": 0.3}), dx=dx)
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in sparse.report.sparse}
    assert len([layer for layer in layers.values() if type(layer).__name__ == "Conv1D"]) == 8
    assert sparse.report.route == "substitution"
    output = sparse(**inputs)
    assert torch.equal(output.loss, model(**inputs).loss)
    output.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *call, rows=sparse.rows[name]: masked(call[-1], rows))
    model(**inputs).loss.backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters()}
    if dx == "full":  # of rows that are left out the weight alone has no gradient
        last = "transformer.h.1.mlp.c_proj.weight"
        ours, theirs = {last: ours[last]}, {last: theirs[last]}
    assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def masked(y, rows):
    """``y`` with a gradient that is zero outside of ``rows``."""
    y.register_hook(lambda g: torch.zeros_like(g).index_copy(-1, rows, g.index_select(-1, rows)))


def test_a_look_leaves_the_model_its_buffers_and_the_random_streams_as_they_were():
    model = Parts().double()
    state = copy.deepcopy(model.state_dict())
    stream, plain = torch.get_rng_state(), random.getstate()
    transformed(model, torch.rand(2, 5, 4, dtype=torch.float64, generator=torch.Generator()), num_paths=3)
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), stream)
    assert random.getstate() == plain


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_draws_the_same_rows_and_is_independent(how):
    sparse = transformed(Branching().double(), rows=rwfx.LearnedWalk(3), grad="rows")
    gradients(sparse, TWICE)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(sparse, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(sparse) if how == "deepcopy" else pickle.loads(pickle.dumps(sparse))
    assert type(twin) is type(sparse)
    for _ in range(3):
        assert_close(gradients(twin, ONCE), gradients(sparse, ONCE))
        assert_close(twin.rows, sparse.rows)
    assert twin.a.weight is not sparse.a.weight


def test_the_draws_are_resumed_from_their_state():
    sparse = transformed(Branching().double(), rows=rwfx.AdaptiveWalk(3))
    gradients(sparse, ONCE)
    twin = transformed(Branching().double(), rows=rwfx.AdaptiveWalk(3))
    twin.load_state_dict(sparse.state_dict())
    twin.load_sampler_state(sparse.sampler_state())
    assert_close(gradients(twin, ONCE), gradients(sparse, ONCE))


def test_recomputed_activations_see_the_rows_of_their_step():
    class Checkpointed(Branching):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed().double()
    sparse = transformed(model, num_paths=3)
    found = gradients(sparse, ONCE)
    expected = masked_gradients(model, lambda m: loss(m(ONCE)), sparse.rows, "rows")
    for name, grad in expected.items():
        assert_close(found[name], grad, rtol=1e-12, atol=1e-12)


def test_it_compiles_with_breaks_and_gives_the_gradients_that_it_gives_eagerly():
    torch._dynamo.reset()
    model = Branching().double()
    eager, step = transformed(model, num_paths=3), transformed(model, num_paths=3)
    compiled = torch.compile(step, backend="eager")
    for x in (ONCE, TWICE, NEVER):
        expected = gradients(eager, x)
        model.zero_grad()
        loss(compiled(x)).backward()
        assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
        assert_close(step.rows, eager.rows)


def test_what_needs_a_graph_is_refused():
    with pytest.raises(ValueError, match=r"examples= needs a graph of the forward pass.*int\(x\[0, 0\] > 0\)"):
        transformed(Branching().double(), num_paths=3, examples=0.5)
    model = Branching().double()
    model.notes = "of the model"
    with pytest.raises(ValueError, match="an attribute named 'notes'"):
        transformed(model, num_paths=3)
    with pytest.raises(ValueError, match="already transformed"):
        transformed(transformed(Branching().double(), num_paths=3), num_paths=3)


def test_the_trainer_takes_it():
    data = [(ONCE, torch.tensor([0, 1])), (TWICE, torch.tensor([2, 3]))]
    trainer = rwfx.RandomWalkTrainer(
        Branching().double(), num_paths=3, progress=False, example_inputs=ONCE, break_even=False
    )
    assert len(trainer.fit(data)) == 2
    assert trainer.network.report.route == "substitution"


class Middle(nn.Module):
    """Three layers and a branch on values; tests replace how the second layer is called."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 5)

    def middle(self, h):
        return self.b(h)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.c(torch.tanh(self.middle(h))) if x[0, 0] > 0 else h


def rows_of(grad):
    return to_dense(grad).flatten(1).any(1).nonzero().flatten()


@pytest.mark.parametrize("grad", ["dense", "rows"])
@pytest.mark.parametrize("train", [True, False])
def test_a_part_that_is_called_by_itself_after_a_step_is_dense(train, grad):
    model = Middle().double()
    sparse = transformed(model, rows=rwfx.Uniform(0.34), grad=grad)
    gradients(sparse, ONCE)
    h = torch.rand(3, 9).double()
    assert_close(gradients(sparse.train(train).b, h), gradients(model.train(train).b, h), rtol=0, atol=0)
    model.zero_grad()
    loss(sparse.middle(h)).backward()
    assert len(rows_of(model.b.weight.grad)) == 9


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_without_gradients_leaves_what_is_computed_again_its_rows(reentrant):
    class Checkpointed(Middle):
        def middle(self, h):
            return torch.utils.checkpoint.checkpoint(self.b, h, use_reentrant=reentrant)

    model = Checkpointed().double()
    sparse = transformed(model, rows=rwfx.Uniform(0.34))
    y = sparse(ONCE)
    with torch.no_grad():
        sparse.eval()(ONCE)
        sparse.train()(ONCE)
    loss(y).backward()
    assert set(rows_of(model.b.weight.grad).tolist()) <= set(sparse.rows["b.weight"].tolist())


def test_a_forward_that_calls_itself_is_one_step():
    class Recursive(Middle):
        def forward(self, x, depth=0):
            h = torch.tanh(self.b(F.relu(self.a(x)) if depth == 0 else x))
            return self(h, depth + 1) if depth < 2 and h.abs().sum() > 0 else self.c(h)

    model = Recursive().double()
    sparse = transformed(model, rows=rwfx.Uniform(0.34))
    gradients(sparse, ONCE)
    assert sparse.sampler_state()["state"][1] == 1
    for name, rows in sparse.rows.items():
        assert set(rows_of(model.get_parameter(name).grad).tolist()) <= set(rows.tolist())


def test_after_a_forward_that_fails_the_next_one_is_a_step():
    model = Middle().double()
    sparse = transformed(model, rows=rwfx.Uniform(0.34))
    with pytest.raises(RuntimeError, match="shapes"):
        sparse(ONCE[:, :4])
    gradients(sparse, ONCE)
    assert sparse.sampler_state()["state"][1] == 2
    assert set(rows_of(model.b.weight.grad).tolist()) <= set(sparse.rows["b.weight"].tolist())


class Projecting(nn.Linear):
    def project(self, x):
        return F.linear(x, self.weight, self.bias)


OTHER_CALLS = {
    "another method": lambda b, h: b.project(h),
    "the forward of its base": lambda b, h: nn.Linear.forward(b, h),
    "a method of the base": lambda b, h: nn.Conv1d._conv_forward(b, h[..., None], b.weight, b.bias)[..., 0],
    "a hook": lambda b, h: b(h),  # which is put on it below
}


@pytest.mark.parametrize("how", OTHER_CALLS)
def test_a_weight_read_by_another_call_than_its_module_s_forward_is_reported_dense(how):
    class Reading(Middle):
        def middle(self, h):
            return OTHER_CALLS[how](self.b, h)

    model = Reading()
    model.b = nn.Conv1d(9, 9, 1) if how == "a method of the base" else Projecting(9, 9)
    if how == "a hook":
        model.b.register_forward_hook(lambda b, args, y: y + F.linear(args[0], b.weight))
    sparse = transformed(model.double(), num_paths=3)
    assert set(sparse.report.sparse) == {"a.weight", "c.weight"}
    assert sparse.report.dense["b.weight"].startswith(f"it is read outside of its module's forward, at {__file__}:")


def test_attributes_and_methods_of_the_model_are_not_overwritten():
    class Named(Middle):
        def __init__(self):
            super().__init__()
            self._steps, self._seen, self._is_running = 2, {}, True
            self.b.step_rows = self.b.bias_name = 3.0

        def derive(self, h):
            return h * self.b.step_rows * self._steps

        def _begin_step(self):
            self._seen["b"] = 1

        def middle(self, h):
            self._begin_step()
            return self.b(self.derive(h))

    model = Named().double()
    sparse = transformed(model, num_paths=3)
    gradients(sparse, ONCE)
    assert torch.equal(sparse(ONCE), model(ONCE))
    for module in (model, model.b):
        module._rwfx_step = module._rwfx_steps = 1
        with pytest.raises(ValueError, match=r"(the model|the module 'b') has an attribute named '_rwfx_step"):
            transformed(model, num_paths=3)
        del module._rwfx_step, module._rwfx_steps


def test_a_part_takes_its_input_by_name():
    class Keyword(Middle):
        def middle(self, h):
            return self.b(input=h)

    model = Keyword().double()
    sparse = transformed(model, rows=rwfx.Uniform(0.34))
    gradients(sparse, ONCE)
    assert set(rows_of(model.b.weight.grad).tolist()) <= set(sparse.rows["b.weight"].tolist())


def test_functional_call_gives_the_gradients_of_what_it_is_called_with():
    pair = [transformed(Middle().double(), rows=rwfx.Magnitude(0.34)) for _ in range(2)]
    pair[1].load_state_dict(pair[0].state_dict())
    expected = gradients(pair[0], ONCE)
    given = {name: p.detach().clone().requires_grad_() for name, p in pair[1].named_parameters()}
    loss(torch.func.functional_call(pair[1], given, (ONCE,))).backward()
    assert_close({name: p.grad for name, p in given.items()}, expected)
    assert all(p.grad is None for p in pair[1].parameters())


def test_a_model_that_asks_for_the_class_of_its_parts_is_refused():
    class Asking(Middle):
        def middle(self, h):
            return self.b(h) if type(self.b) is nn.Linear else h

    class Setting(Middle):
        def middle(self, h):
            self.rows = h
            return self.b(h)

    with pytest.raises(ValueError, match=r"Asking does not run .* gives other outputs in train mode"):
        transformed(Asking().double(), num_paths=3)
    with pytest.raises(ValueError, match=r"Setting does not run .* AttributeError"):
        transformed(Setting().double(), num_paths=3)


def test_a_model_whose_outputs_differ_from_call_to_call_is_taken_and_is_left_as_it_was():
    class Private(Middle):
        stream = torch.Generator()
        calls = 0

        def middle(self, h):
            self.calls += 1
            return self.b(h) + torch.rand(1, generator=self.stream, dtype=h.dtype)

    model = Private().double()
    sparse = transformed(model, num_paths=3)
    assert sparse.calls == model.calls == 0
    gradients(sparse, ONCE)
    assert set(rows_of(model.b.weight.grad).tolist()) <= set(sparse.rows["b.weight"].tolist())


def test_a_class_that_registers_its_subclasses_sees_no_other_one():
    names = []

    class Registering(Middle):
        def __init_subclass__(cls, *, name, **kwargs):
            super().__init_subclass__(**kwargs)
            names.append(name)

    class Registered(Registering, name="once"):
        pass

    transformed(Registered().double(), num_paths=3)
    assert names == ["once"]


def write_to_slices(out, first, second):
    out[:, :9].zero_().add_(first)
    out[:, 9:].copy_(second)
    return out


def write_to_views_of_views(out, first, second):
    rows = out.mT[:9]
    rows.mul_(0)
    rows.mT.copy_(first)
    out.view(-1, 14)[:, 9:] = second
    return out


def write_before_a_view_is_read(out, first, second):
    whole = out.narrow(1, 0, 14)
    out[:, :9] += first
    out.narrow(1, 9, 5).copy_(second)
    return whole


@pytest.mark.parametrize("write", [write_to_slices, write_to_views_of_views, write_before_a_view_is_read])
def test_what_is_written_through_a_view_is_in_what_is_viewed(write):
    class Writing(Middle):
        def __init__(self):
            super().__init__()
            self.d = nn.Linear(14, 3)

        def forward(self, x):
            out = torch.zeros(len(x), 14, dtype=x.dtype)
            h = F.relu(self.a(x))
            return self.d(write(out, self.b(h), self.c(h) if x[0, 0] > 0 else h[:, :5]))

    class Functional(Writing):
        def forward(self, x):
            h = F.relu(self.a(x))
            return self.d(torch.cat([self.b(h), self.c(h) if x[0, 0] > 0 else h[:, :5]], 1))

    torch.manual_seed(0)
    pair = [Writing().double(), Functional().double()]
    pair[1].load_state_dict(pair[0].state_dict())
    found = [transformed(model, num_paths=3) for model in pair]
    for sparse in found:
        gradients(sparse, ONCE)
    assert set(found[0].report.sparse) == {"a.weight", "b.weight", "c.weight", "d.weight"}
    assert_close(found[0].rows, found[1].rows)


@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_a_weight_that_another_branch_reads_has_all_its_rows_there_and_the_report_says_so(grad):
    class Elsewhere(Middle):
        def forward(self, x):
            h = F.relu(self.a(x))
            return self.c(torch.tanh(self.b(h) if x[0, 0] > 0 else F.linear(h, self.b.weight)))

    torch.manual_seed(0)
    model = Elsewhere().double()
    sparse = transformed(model, rows=rwfx.Uniform(0.34), grad=grad)
    assert any("other branches are not looked at" in note for note in sparse.report.notes)
    gradients(sparse, ONCE)
    assert set(rows_of(model.b.weight.grad).tolist()) <= set(sparse.rows["b.weight"].tolist())
    gradients(sparse, -ONCE)
    assert len(rows_of(model.b.weight.grad)) == 9
