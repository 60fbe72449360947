"""Which calls follow the examples, and which outputs hold them, where that is hard to see."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import rwfx

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Transposed(nn.Module):
    """Sequences whose places are the other way round in the middle."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.b(self.a(x).transpose(0, 1).contiguous()).relu().mean(0))


def is_exact(model, sparse, inputs, target):
    """Compare with the model whose output gradient is zeroed for all but the three largest examples."""
    F.cross_entropy(sparse(*inputs), target).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    y = model(*inputs)
    (g,) = torch.autograd.grad(F.cross_entropy(y, target), y)
    kept = torch.zeros(len(target), 1, dtype=y.dtype).index_fill(0, g.norm(dim=1).topk(3).indices, 1.0)
    model(*inputs).backward(g * kept)
    for found_grad, p in zip(found, model.parameters(), strict=True):
        assert_close(found_grad, p.grad, **EXACT)


def test_a_weight_that_is_zero_hides_nothing_from_the_trial():
    model, x = Transposed().double(), torch.randn(10, 10, 6, dtype=torch.float64)
    nn.init.zeros_(model.head.weight)
    before = {name: p.clone() for name, p in model.named_parameters()}
    sparse = rwfx.transform(model, examples=0.3, break_even=False, example_inputs=x)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert [note.split()[0] for note in sparse.notes] == ["b.weight"]
    nn.init.normal_(model.head.weight)
    is_exact(model, sparse, (x,), torch.randint(5, (10,)))


class Table(nn.Module):
    """The second input is shared by all examples."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 5)

    def forward(self, x, table):
        return self.head(torch.relu(self.a(x) + self.b(table)).mean(1))


@pytest.mark.parametrize("told", [False, True], ids=["known", "tried"])
@pytest.mark.parametrize("length", [20, 7])
def test_an_input_that_holds_no_examples_is_not_dealt_to_them(length, told):
    model = Table().double()
    inputs = torch.randn(10, length, 6, dtype=torch.float64), torch.randn(length, 4, dtype=torch.float64)
    if not told:
        with pytest.raises(ValueError, match=r"b\.weight computes with all examples"):
            rwfx.transform(model, examples=0.3, break_even=False)
        return
    sparse = rwfx.transform(model, examples=0.3, break_even=False, example_inputs=inputs)
    assert any(note.startswith("b.weight computes with all examples") for note in sparse.notes)
    is_exact(model, sparse, inputs, torch.randint(5, (10,)))


class PerFeature(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 5)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h), h.mean(0)


@pytest.mark.parametrize("width", [10, 11])
def test_an_output_of_as_many_features_as_examples_is_not_taken_for_them(width):
    model = PerFeature(width)
    sparse = rwfx.transform(model, examples=0.3, break_even=False, example_inputs=torch.randn(4, 6))
    y, of_features = sparse(torch.randn(10, 6))
    (of_features.sum() + 1e-3 * F.cross_entropy(y, torch.randint(5, (10,)))).backward()
    assert (model.a.weight.grad.abs().sum(1) > 1e-4).all()


def test_unbiased_is_refused_where_an_output_has_no_entry_for_each_example():
    policy = rwfx.SampledExamples(0.3, floor=0.3, unbiased=True)
    with pytest.raises(ValueError, match="unbiased=True needs outputs with an entry for each example"):
        rwfx.transform(PerFeature(8), examples=policy, break_even=False, example_inputs=torch.randn(4, 6))


class OverTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 1)

    def forward(self, x):
        return F.log_softmax(self.b(torch.relu(self.a(x)))[:, 0], -1)


@pytest.mark.parametrize("inputs", [None, torch.randn(10, 6)], ids=["known", "tried"])
def test_the_last_dimension_may_be_the_first(inputs):
    with pytest.raises(ValueError, match="finds no linear call"):
        rwfx.transform(OverTheBatch(), examples=0.3, break_even=False, example_inputs=inputs)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, scale, x):
        return self.head(self.a(x).relu() * scale)


@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0, dtype=torch.float64)], ids=["number", "tensor"])
def test_the_first_input_with_a_first_dimension_is_the_batch(scale):
    model, x = Scaled().double(), torch.randn(10, 6, dtype=torch.float64)
    sparse = rwfx.transform(model, examples=0.3, break_even=False, example_inputs=(scale, x))
    is_exact(model, sparse, (scale, x), torch.randint(5, (10,)))
    assert sparse.examples == (3, 10)


def test_a_report_before_the_first_step_and_walks_without_a_row_sparse_weight():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    for options in ({}, {"rows": rwfx.RandomWalk(density=0.25, start="loss")}):
        sparse = rwfx.transform(model, examples=0.3, **options)
        assert sparse.examples is None
        assert "examples: TopExamples(fraction=0.3)\n" in str(sparse.report)
        F.cross_entropy(sparse(torch.randn(10, 6)), torch.randint(5, (10,))).backward()
        assert "3 of 10 in the last step" in str(sparse.report)


def test_what_is_remembered_is_float32_whatever_the_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
        for rows in (rwfx.AdaptiveWalk(5), rwfx.LearnedWalk(5)):
            sparse = rwfx.transform(model, rows=rows, examples=rwfx.AdaptiveExamples(0.9), break_even=False)
            for _ in range(2):
                F.cross_entropy(sparse(torch.randn(10, 6)), torch.randint(5, (10,))).backward()
            assert {t.dtype for t in sparse.sampler_state().values()} == {torch.int64, torch.float32}
    finally:
        torch.set_default_dtype(before)


class Dropped(nn.Module):
    """A mean over the batch that a dropout takes away, or not."""

    def __init__(self):
        super().__init__()
        self.a, self.head, self.drop = nn.Linear(6, 16), nn.Linear(16, 5), nn.Dropout(0.5)

    def forward(self, x):
        y = self.a(x)
        return self.head(y + self.drop(torch.ones_like(x[:1, :1])) * y.mean(0, keepdim=True))


@pytest.mark.parametrize("seed", range(4))
def test_no_draw_of_a_dropout_hides_from_the_trial_that_examples_are_mixed(seed):
    torch.manual_seed(seed)
    sparse = rwfx.transform(Dropped(), examples=0.5, break_even=False, example_inputs=torch.randn(6, 6))
    assert [note.split()[0] for note in sparse.notes] == ["a.weight"]


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x):
        y = self.a(x)
        mean, var = self.norm.running_mean, self.norm.running_var
        return self.head(F.batch_norm(y, mean, var, self.norm.weight, self.norm.bias, self.training))


def test_what_goes_through_a_functional_batch_norm_is_left_out_as_well():
    sparse = rwfx.transform(Normed(), examples=0.5, break_even=False, example_inputs=torch.randn(6, 6))
    assert sparse.notes == ()


def test_a_model_on_the_meta_device_is_not_tried():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to("meta")
    x = torch.randn(4, 8, device="meta")
    sparse = rwfx.transform(model, examples=0.5, density=0.5, break_even=False, example_inputs=x)
    assert "all rows of the kept examples" in str(sparse.report)
