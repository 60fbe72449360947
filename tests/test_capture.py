import copy
import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.testing import assert_close

import rwfx
from rwfx.capture import capture


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        if x.sum() > 0:  # the line that cannot be traced
            return self.fc(x)
        return x


class Net(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.body = nn.ModuleDict({"inner": inner})
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.body["inner"](x))


def test_what_cannot_be_traced_is_named_with_its_module_line_and_a_remedy():
    with pytest.raises(ValueError, match="cannot trace Net") as error:
        rwfx.transform(Net(Branching()))
    message = str(error.value)
    assert "'body.inner'" in message
    assert "if x.sum() > 0:" in message
    assert "test_capture.py:" in message
    assert "torch.where" in message


def test_a_forward_that_draws_while_traced_is_refused():
    def by(draw):
        class Noisy(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(3, 2)

            def forward(self, x):
                return self.fc(x) * draw()

        return Noisy()

    for draw in (lambda: torch.rand(2), random.random, np.random.random_sample):
        model, state = by(draw), torch.get_rng_state()
        with pytest.raises(ValueError, match="draws random numbers while it is traced"):
            rwfx.transform(model)
        assert torch.equal(torch.get_rng_state(), state)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x, mask=None, scale=2.0, *, hidden: bool = False):
        h = self.fc(x)
        if mask is not None:
            h = h * mask
        return (h * scale, h) if hidden else h * scale


def test_an_optional_argument_is_held_at_its_default_unless_an_example_gives_it():
    model, x, mask = Optional(), torch.randn(4, 3), torch.rand(4, 2)
    plain = rwfx.transform(model)
    assert_close(plain(x), model(x), rtol=0, atol=0)
    assert_close(plain(x, None, scale=2.0), model(x), rtol=0, atol=0)
    for other in ({"mask": mask}, {"scale": 3.0}, {"hidden": True}):
        with pytest.raises(AssertionError, match="specialized"):
            plain(x, **other)
    masked = rwfx.transform(model, example_inputs={"x": x, "mask": mask})
    assert_close(masked(x, mask), model(x, mask), rtol=0, atol=0)
    assert_close(masked(x, mask=mask), model(x, mask), rtol=0, atol=0)


def test_example_inputs_are_checked():
    model = Optional()
    with pytest.raises(ValueError, match=r"do not fit Optional\.forward"):
        rwfx.transform(model, example_inputs={"y": torch.randn(1, 3)})

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x) * next(calls)

    calls = itertools.count(1)
    sparse = rwfx.transform(Frozen(), example_inputs=torch.randn(2, 3), break_even=False)
    assert sparse.report.route == "substitution"
    assert "gives other outputs than the model" in str(sparse.report)


def test_both_modes_are_captured():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(3, 64), nn.Linear(64, 2)

        def forward(self, x):
            h = F.dropout(self.fc(x), 0.5, self.training)
            if self.training:
                h = h + 1
            return self.out(h)

    model = Model()
    model.eval()
    sparse = rwfx.transform(model)
    assert not sparse.training
    x = torch.randn(5, 3)
    for train in (True, False, True):
        outputs = []
        for module in (model.train(train), sparse.train(train)):
            torch.manual_seed(0)
            outputs.append(module(x))
        assert_close(*outputs, rtol=0, atol=0)


def test_assignments_in_the_forward_pass_are_reported_and_do_not_reach_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.last = None

        def forward(self, x):
            self.last = self.fc(x)
            return self.last

    model = Model()
    sparse = rwfx.transform(model)
    assert model.last is None
    assert "last is assigned in the forward pass" in str(sparse.report)


def test_constants_of_the_trace_move_with_the_model_and_stay_out_of_its_state():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(x) + torch.arange(4.0)

    sparse = rwfx.transform(Model())
    assert list(sparse.state_dict()) == ["fc.weight", "fc.bias"]
    sparse.double()
    assert sparse(torch.randn(1, 3).double()).dtype == torch.float64
    assert {t.dtype for t in sparse.get_submodule("_traced_constants").buffers()} == {torch.float64}


def test_the_host_keeps_classes_attributes_hooks_and_unused_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.unused = nn.Linear(3, 2), nn.Linear(5, 5)
            self.config = {"width": 3}

        def forward(self, x):
            return self.fc(x)

    model = Model()
    seen = []
    model.register_forward_hook(lambda *_: seen.append("forward"))
    sparse = rwfx.transform(model)
    sparse(torch.randn(1, 3))
    assert seen == ["forward"]
    assert sparse.config is model.config
    assert isinstance(sparse.fc, nn.Linear)
    assert sparse.report.dense["unused.weight"].endswith("the forward pass does not read it")


def compiled_in_place(model, part):
    model.get_submodule(part).compile()
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.compile(nn.Linear(2, 2)), "model is compiled"),
        (lambda: compiled_in_place(nn.Sequential(nn.Linear(2, 2)), ""), "model is compiled"),
        (lambda: nn.Sequential(torch.compile(nn.Linear(2, 2))), "module '0' of the model is compiled"),
        (lambda: compiled_in_place(nn.Sequential(nn.Linear(2, 2)), "0"), "module '0' of the model is compiled"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "Transform model.module"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), "is lazy"),
        (lambda: rwfx.transform(nn.Sequential(nn.Linear(2, 2))), "model is already transformed"),
        (
            lambda: nn.Sequential(rwfx.transform(nn.Sequential(nn.Linear(2, 2))), nn.ReLU()),
            "'0' of the model is already",
        ),
        (lambda: torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2)), "ScriptModule"),
    ],
    ids=[
        "compiled",
        "compiled-in-place",
        "compiled-part",
        "part-compiled-in-place",
        "data-parallel",
        "lazy",
        "transformed",
        "transformed-part",
        "script",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrapped_models_are_refused_with_what_to_do(make, match):
    with pytest.raises(ValueError, match=match):
        rwfx.transform(make())


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        capture(lambda x: x)


def model_with(forward, **parts):
    return zoo.model_with(forward, 6, 8, 4, **parts)


def test_a_switch_of_gradients_or_autocast_inside_the_forward_is_refused():
    def without_gradient(self, x):
        with torch.no_grad():
            h = self.a(x)
        return self.b(h)

    def with_autocast(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.a(x)
        return self.b(h.float())

    for forward in (without_gradient, with_autocast):
        with pytest.raises(ValueError, match="switches gradients or autocast"):
            rwfx.transform(model_with(forward))


def test_buffers_are_updated_by_the_graph_and_not_while_tracing():
    def forward(self, x):
        h = self.a(x)
        self.ema.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return self.b(h - self.ema)

    model = model_with(forward, ema=torch.ones(8))
    other = copy.deepcopy(model)
    sparse = rwfx.transform(model)
    assert torch.equal(model.ema, torch.ones(8))
    for _ in range(3):
        x = torch.randn(5, 6)
        assert_close(sparse(x), other(x), rtol=0, atol=0)
    assert_close(model.ema, other.ema, rtol=0, atol=0)

    def counting(self, x):
        self.n += 1
        return self.b(self.a(x))

    model = model_with(counting, n=torch.tensor(0))
    sparse = rwfx.transform(model)
    assert model.n == 0
    for _ in range(3):
        sparse(torch.randn(5, 6))
    assert model.n == 3


def test_operations_in_place_stay_in_place():
    def forward(self, x):
        h = self.a(x)
        skip = h
        h *= 2
        h += 1
        return self.b(h + skip)

    model = model_with(forward)
    x = torch.randn(5, 6)
    sparse = rwfx.transform(model)
    assert_close(sparse(x), model(x), rtol=0, atol=0)
    assert_close(sparse.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_a_part_that_is_frozen_in_eval_mode_is_traced_so():
    class Part(nn.Module):
        def forward(self, x):
            return x if self.training else x * 0.5

    model = model_with(lambda self, x: self.b(self.part(self.a(x))), part=Part())
    model.part.eval()
    x = torch.randn(5, 6)
    assert_close(rwfx.transform(model)(x), model(x), rtol=0, atol=0)


def test_a_replaced_forward_is_not_taken_for_its_class():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    original = model[0].forward
    model[0].forward = lambda x: original(x) * 2
    sparse = rwfx.transform(model)
    x = torch.randn(5, 6)
    assert_close(sparse(x), model(x), rtol=0, atol=0)
    assert sparse.report.sparse == ("2.weight",)
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="replaced on the instance"):
        rwfx.transform(model)


def test_backward_hooks_that_are_lost_are_reported():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 4))
    model[0].register_full_backward_hook(lambda *_: None)
    assert "0 has backward hooks" in str(rwfx.transform(model).report)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_the_hooks_of_the_model_itself_are_called_as_often_as_its_own(kind):
    model, seen = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), []
    getattr(model, f"register_{kind}_hook")(lambda *_: seen.append(1))
    sparse = rwfx.transform(model, num_paths=3, break_even=False)
    counts = []
    for module in (model, sparse):
        seen.clear()
        module(torch.randn(5, 6)).sum().backward()
        counts.append(len(seen))
    assert counts == [1, 1]


def test_a_weight_whose_module_has_hooks_is_dense_for_them():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    model[0].register_forward_hook(lambda *_: None)
    dense = rwfx.transform(model, num_paths=3, break_even=False).report.dense
    assert dense["0.weight"].endswith("its module has hooks, so that it is called as it is")


def test_defaults_that_are_no_plain_values():
    def listed(self, x, opts=(1, 2)):
        return self.b(self.a(x)) * opts[1]

    model = model_with(listed)
    x = torch.randn(5, 6)
    assert_close(rwfx.transform(model)(x), model(x), rtol=0, atol=0)

    def called(self, x, act=F.relu):
        return self.b(act(self.a(x)))

    with pytest.raises(ValueError, match="argument 'act'"):
        rwfx.transform(model_with(called))


def test_a_value_given_as_an_example_chooses_its_branch():
    x = torch.randn(4, 3)
    model = Optional()
    sparse = rwfx.transform(model, example_inputs={"x": x, "scale": 3.0, "hidden": True})
    assert_close(sparse(x, scale=3.0, hidden=True), model(x, scale=3.0, hidden=True), rtol=0, atol=0)


def test_names_that_a_transformed_model_needs_itself_are_refused():
    for name in ("rows", "report", "graph", "row_sampler", "notes"):
        model = model_with(lambda self, x: self.b(self.a(x)), **{name: nn.Linear(2, 2)})
        with pytest.raises(ValueError, match=f"named '{name}'"):
            rwfx.transform(model)


def test_weights_that_are_no_parameters_are_left_alone():
    def fixed(self, x):
        return self.b(F.linear(self.a(x), self.proj))

    def computed(self, x):
        return self.b(F.linear(x, weight=self.a.weight * 2, bias=self.a.bias))

    x = torch.randn(5, 6)
    for model in (model_with(fixed, proj=torch.randn(8, 8)), model_with(computed)):
        for grad in ("dense", "rows"):
            sparse = rwfx.transform(model, grad=grad)
            assert_close(sparse(x), model(x), rtol=0, atol=0)
            sparse(x).sum().backward()


def test_a_vector_as_the_weight_of_a_linear_call_is_left_alone():
    model = model_with(lambda self, x: F.linear(self.b(self.a(x)), self.v)[..., None])
    model.v = nn.Parameter(torch.randn(4))
    sparse = rwfx.transform(model)
    x = torch.randn(5, 6)
    assert_close(sparse(x), model(x), rtol=0, atol=0)


class Chosen(nn.Module):
    """Its forward is a method that was put in its place."""

    def __init__(self, fast):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.forward = self.forward_fast if fast else self.forward_slow

    def forward_fast(self, x):
        return self.fc(x)

    def forward_slow(self, x):
        return self.forward_fast(x * 1) if x.shape[0] > 1 else self.fc(x)


@pytest.mark.parametrize("fast", [True, False])
def test_a_method_that_is_kept_as_an_attribute_reads_the_weights_of_its_copy(fast):
    model = nn.Sequential(nn.Linear(4, 4), Chosen(fast))
    x = torch.randn(3, 4)
    sparse = rwfx.transform(model, rows=rwfx.Uniform({"*": 0.5}), example_inputs=x)
    assert set(sparse.rows) == {"0.weight", "1.fc.weight"}
    sparse(x).square().sum().backward()
    for name, rows in sparse.rows.items():
        assert torch.equal(model.get_parameter(name).grad.abs().sum(1).nonzero().flatten(), rows)
