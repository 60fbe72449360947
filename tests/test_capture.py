import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    with pytest.raises(ValueError, match="gives other outputs than the model"):
        rwfx.transform(Frozen(), example_inputs=torch.randn(2, 3))


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
    assert sparse.report.dense["unused.weight"].startswith("no plain linear call uses it")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.compile(nn.Linear(2, 2)), "is compiled"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "Transform model.module"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), "is lazy"),
        (lambda: rwfx.transform(nn.Sequential(nn.Linear(2, 2))), "already transformed"),
        (lambda: torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2)), "ScriptModule"),
    ],
    ids=["compiled", "data-parallel", "lazy", "transformed", "script"],
)
@pytest.mark.filterwarnings("ignore")
def test_wrapped_models_are_refused_with_what_to_do(make, match):
    with pytest.raises(ValueError, match=match):
        rwfx.transform(make())


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        capture(lambda x: x)
