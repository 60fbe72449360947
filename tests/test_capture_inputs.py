"""Example inputs: how they become arguments, and which models and inputs are refused."""

import copy
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

import rwfx
from rwfx.capture import CaptureError, capture, exported, untouched
from rwfx.capture.inputs import bind_inputs


def module_with(forward, **parts):
    return zoo.model_with(forward, 4, 6, 3, **parts)


X, Y, MASK = torch.randn(5, 4), torch.zeros(5), torch.ones(5, 4)


def one(self, x):
    return self.b(self.a(x))


def optional(self, x, mask=None):
    return one(self, x)


def keywords(self, input_ids, labels=None):
    return one(self, input_ids)


BATCHES = {
    "a value": (one, X, ((X,), {})),
    "a tuple": (optional, (X, MASK), ((X, MASK), {})),
    "a dict": (optional, {"x": X, "mask": MASK}, ((), {"x": X, "mask": MASK})),
    "a mapping": (keywords, UserDict(input_ids=X, labels=Y), ((), {"input_ids": X, "labels": Y})),
    "inputs and labels": (one, [X, Y], ((X,), {})),
    "a pair": (one, (X, Y), ((X,), {})),
    "a dict and labels": (keywords, ({"input_ids": X}, Y), ((), {"input_ids": X})),
    "a dict as the input": (one, [{"image": X}, Y], (({"image": X},), {})),
    "one input in a list": (one, [X], ((X,), {})),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_is_bound_as_the_loop_would_call_the_model(kind):
    forward, given, (args, kwargs) = BATCHES[kind]
    bound = bind_inputs(module_with(forward), given)
    assert str((bound.args, dict(bound.kwargs))) == str((args, kwargs))


@pytest.mark.parametrize(
    ("forward", "given", "match"),
    [
        (optional, [X, Y], "a list of two, which fits Model.forward as two arguments and as a batch"),
        (one, (X, Y, Y), r"do not fit Model\.forward\(x\): too many positional arguments"),
        (one, {"y": X}, "missing a required argument: 'x'"),
        (keywords, {"input_ids": X, "label": Y}, "unexpected keyword argument 'label'"),
        (one, (), "missing a required argument"),
    ],
    ids=["ambiguous", "too many", "missing", "misspelled", "empty"],
)
def test_inputs_that_do_not_fit_are_refused_with_what_does(forward, given, match):
    with pytest.raises(ValueError, match=match):
        rwfx.transform(module_with(forward), example_inputs=given)


def branching(self, x):
    return one(self, x * 2 if x.shape[0] > 2 else x)


def in_place(self, x):
    x.mul_(2)
    return one(self, x)


def put_into(self, x):
    x["twice"] = x["once"] * 2
    return one(self, x["twice"])


REFUSED = {
    "no example inputs": (
        branching,
        None,
        ["torch.fx.symbolic_trace fails", "give example_inputs", "x.shape\\[0\\] > 2"],
    ),
    "wrong example inputs": (one, torch.randn(5, 3), ["fails on example_inputs in module 'a'", "mat1 and mat2"]),
    "changed in place": (in_place, X, ["changes its input x in place in .*: `x.mul_", "input.clone"]),
    "changed in what it holds": (
        put_into,
        ({"once": X},),
        ["changes what its input x holds, at x\\['twice'\\]", "dict"],
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_route_captures_is_refused_with_its_line_and_a_remedy(kind):
    forward, given, words = REFUSED[kind]
    model = module_with(forward)
    state, stream = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    before = copy.deepcopy(given)
    for word in words:
        with pytest.raises(ValueError, match=word):
            capture(model, given)
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), stream)
    assert_close(given, before, rtol=0, atol=0)


def by_value(self, x):
    return one(self, x) * (2 if x.sum() > 0 else 3)


def layer_drop(self, x):
    return x if self.training and torch.rand(()) < 0.5 else one(self, x)


WHY = {
    "a branch on values": (
        by_value,
        ["torch.fx.symbolic_trace fails", "torch.export fails in train mode", "x.sum() > 0", "torch.where"],
    ),
    "random branches in training": (layer_drop, ["In eval mode it does not", "torch.rand", "layerdrop=0"]),
}


@pytest.mark.parametrize("kind", WHY)
def test_what_no_graph_holds_is_captured_as_one_run_with_the_reasons_lines_and_remedies(kind):
    forward, words = WHY[kind]
    torch.manual_seed(1)
    captured = capture(module_with(forward), X.abs())
    assert captured.route == "substitution"
    for word in words:
        assert word in captured.notes[-1]


def test_a_quantised_model_is_refused():
    class PackedLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self._packed_params = object()

    with pytest.raises(ValueError, match=r"module 'part' is quantised .* quantise it after training"):
        rwfx.transform(module_with(one, part=PackedLinear()))


def test_an_example_without_any_number_is_refused():
    with pytest.raises(ValueError, match="is given no number at all on example_inputs"):
        rwfx.transform(module_with(one), example_inputs=torch.randn(0, 4))


def test_an_example_with_what_is_no_number_is_not_taken_for_a_changed_one():
    x = X.clone()
    x[0, 0] = torch.nan
    rwfx.transform(module_with(one), example_inputs=x, num_paths=4, break_even=False)


def test_an_input_that_no_example_shows_to_be_changed_is_changed_as_by_the_model():
    model = module_with(in_place)
    sparse = rwfx.transform(model, num_paths=4, break_even=False)
    theirs, ours = X.clone(), X.clone()
    assert_close(sparse(ours), model(theirs), rtol=0, atol=0)
    assert torch.equal(ours, theirs)


class Signed(nn.Module):
    """A parametrization that is decided by the numbers of the weight."""

    def forward(self, w):
        return w if w.sum() > 0 else -w


@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_that_its_own_numbers_decide_is_the_model_s_and_stays_dense(sign):
    model = module_with(one)
    with torch.no_grad():
        model.a.weight.abs_().mul_(sign)
    parametrize.register_parametrization(model.a, "weight", Signed())
    sparse = rwfx.transform(model, num_paths=4, break_even=False, example_inputs=X)
    assert sparse.report.sparse == ("b.weight",)
    assert sparse.report.dense["a.parametrizations.weight.original"].endswith("computes a weight from it")
    for factor in (1, -1):
        with torch.no_grad():
            model.a.parametrizations.weight.original.mul_(factor)
        assert_close(sparse(X), model(X), rtol=0, atol=0)


def test_a_float_model_that_is_written_for_quantisation_is_a_model_as_any_other():
    def added(self, x):
        return self.sum.add(one(self, x), self.b(self.a(x).relu()))

    model = module_with(added, sum=torch.ao.nn.quantized.FloatFunctional())
    sparse = rwfx.transform(model, num_paths=4, break_even=False)
    assert sparse.report.sparse == ("a.weight", "b.weight")
    assert_close(sparse(X), model(X), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_model_prepared_for_quantisation_is_refused_for_having_no_plain_weight():
    model = module_with(one)
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    prepared = torch.ao.quantization.prepare_qat(model)
    state = copy.deepcopy(prepared.state_dict())
    with pytest.raises(ValueError, match="the model has no weight with rows"):
        rwfx.transform(prepared, example_inputs=X)
    assert_close(prepared.state_dict(), state, rtol=0, atol=0)  # also the sizes of what it observes


def compiled_method(self, x):
    return self.compiled(x) * (2 if x.shape[0] > 2 else 1)


@pytest.mark.filterwarnings("ignore")
def test_a_parameter_that_is_read_past_its_module_is_no_constant_of_a_graph():
    model = module_with(compiled_method)
    model.compiled = torch.compile(lambda x: model.b(model.a(x)), backend="eager")
    with pytest.raises(CaptureError, match=r"reads a\.weight by another way than from its module"):
        exported.capture(model, bind_inputs(model, X))

    def data(self, x):
        return one(self, x * 2 if x.shape[0] > 2 else x) + self.b.weight.data.sum()

    model = module_with(data)
    sparse = rwfx.transform(model, num_paths=4, break_even=False, example_inputs=X)
    with torch.no_grad():
        model.b.weight.mul_(3)
    assert_close(sparse(X), model(X), rtol=0, atol=0)
    model.double()
    with torch.no_grad():
        model.b.weight.mul_(3)
    assert_close(sparse(X.double()), model(X.double()), rtol=0, atol=0)


def test_two_transformed_models_of_one_share_its_parameters_and_draw_rows_of_their_own():
    model = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 3))
    first, second = (rwfx.transform(model, num_paths=4, break_even=False, seed=seed) for seed in (0, 1))
    for sparse in (first, second):
        sparse(X).sum().backward()
    assert not torch.equal(first.rows["0.weight"], second.rows["0.weight"])
    assert all(p is q is r for p, q, r in zip(*(m.parameters() for m in (model, first, second)), strict=True))
    touched = model[0].weight.grad.any(1).nonzero().squeeze(1).tolist()
    assert set(touched) <= {*first.rows["0.weight"].tolist(), *second.rows["0.weight"].tolist()}


def test_a_weight_that_is_computed_from_the_inputs_stays_dense_and_its_producer_is_walked():
    def hyper(self, x):
        x = x * 2 if x.shape[0] > 2 else x
        return self.b(F.linear(x, self.hyper(x).mean(0).view(6, 4)))

    model = module_with(hyper, hyper=nn.Linear(4, 24))
    sparse = rwfx.transform(model, num_paths=4, break_even=False, example_inputs=X)
    assert set(sparse.report.sparse) == {"hyper.weight", "b.weight"}
    assert any("linear" in note for note in sparse.report.notes)
    assert_close(sparse(X), model(X), rtol=0, atol=0)


def test_a_parametrised_weight_and_its_buffers_are_those_of_the_model():
    model = module_with(branching)
    parametrizations.spectral_norm(model.a)
    parametrizations.weight_norm(model.b)
    graph = capture(model, X)
    twin = module_with(branching)
    parametrizations.spectral_norm(twin.a)
    parametrizations.weight_norm(twin.b)
    twin.load_state_dict(model.state_dict())
    module = torch.fx.GraphModule(graph.host, graph.train)
    for _ in range(3):
        assert_close(module(X), twin(X), rtol=0, atol=0)
    assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=0)


def test_a_part_without_gradients_or_under_autocast_is_kept_so():
    def switching(self, x):
        with torch.no_grad():
            h = self.a(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.a(x) + h
        return self.b(h.float())

    model, twin = module_with(switching), module_with(switching)
    twin.load_state_dict(model.state_dict())
    found = capture(model, X)
    assert found.route == "torch.export"
    graph = torch.fx.GraphModule(found.host, found.train)
    for module in (graph, twin):
        module(X).square().sum().backward()
    assert_close(graph(X), twin(X), rtol=0, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad, rtol=0, atol=0)


def test_a_buffer_that_is_assigned_is_written_and_an_attribute_is_reported():
    def averaging(self, x):
        self.last = x = x * 2 if x.shape[0] > 2 else x
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return one(self, x - self.mean)

    model, twin = (module_with(averaging, mean=torch.zeros(4)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    found = capture(model, X)
    assert torch.equal(model.mean, torch.zeros(4))
    assert not hasattr(model, "last")
    assert "last is assigned in the forward pass" in "".join(found.notes)
    graph = torch.fx.GraphModule(found.host, found.train)
    for _ in range(3):
        assert_close(graph(X), twin(X), rtol=0, atol=0)
    assert_close(model.mean, twin.mean, rtol=0, atol=0)


def test_a_look_at_a_forward_that_puts_other_buffers_in_place_leaves_the_model_s_own_as_they_were():
    def filling(self, x):
        self.mean.add_(1)
        self.mean = torch.ones(4)
        self.register_buffer("last", x)
        return one(self, x)

    model = module_with(filling, mean=torch.zeros(4))
    mean = model.mean
    with untouched(model):
        model(X)
    assert torch.equal(mean, torch.zeros(4))


def test_hooks_that_an_exported_graph_cannot_keep_are_reported():
    model = module_with(branching)
    seen = []
    model.a.register_forward_hook(lambda module, inputs, output: seen.append(1) or output * 2)
    model.b.register_full_backward_hook(lambda *_: seen.append(2))
    found = capture(model, X)
    assert {note.partition(";")[0] for note in found.notes} == {"a has forward hooks", "b has backward hooks"}
    seen.clear()
    graph = torch.fx.GraphModule(found.host, found.train)
    assert_close(graph(X), model(X), rtol=0, atol=0)
    assert seen == [1]  # the model's own
