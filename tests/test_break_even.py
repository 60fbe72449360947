"""The prediction of what a row-sparse backward costs, and what ``transform`` does with it."""

import copy
import dataclasses
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

import rwfx
from rwfx import CostModel
from rwfx.break_even import Candidate, Costs

FREE = CostModel(call=0, gather=0, pass_=0, read=0)
DEFAULT = CostModel()


def mlp(*widths):
    layers = [nn.Linear(i, o) for i, o in pairwise(widths)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])


# --- The model -------------------------------------------------------------------------------------------------------


def test_costs_are_those_worked_out_by_hand():
    # Powers of ten apart, so that a number in the wrong place is seen.
    model = CostModel(batch_size=99, flop=1, update=10, gather=100, pass_=1000, read=10_000, call=100_000)
    of = Candidate("w", rows=3, features=5, kept=2, calls=1, input_grads=1, batch_size=7, sources=("v",))
    forward = 2 * 7 * 5 * 3
    dense = forward + 3 * 5 * 10 + forward + 7 * 5 * 1000
    weight_part = 2 * 7 * 2 * 5 + 7 * 2 * 100 + 2 * 5 * 10 + 100_000

    def input_part(columns):
        return 2 * 7 * 2 * columns + 2 * columns * 100 + 7 * columns * 1000

    assert (forward, dense) == (210, 35_570)
    assert model.costs(of, {"v": 4}) == Costs(210, 35_570, weight_part + input_part(4))
    assert weight_part + input_part(4) == 101_640 + 28_912
    # The weight that it feeds on is dense: every column is read.
    assert model.costs(of, {}) == Costs(210, 35_570, weight_part + input_part(5))
    assert model.costs(of, {"u": 1}) == model.costs(of, {})
    # No gradient of the input, as in the first layer.
    first = Candidate("w", 3, 5, 2, calls=1, input_grads=0, batch_size=7)
    assert model.costs(first, {}) == Costs(210, 210 + 150, weight_part)
    # Two calls, the input's gradient of both, one of them confined: one update.
    twice = Candidate("w", 3, 5, 2, calls=2, input_grads=2, batch_size=7, sources=("v",))
    dense_twice = 2 * (210 + 210 + 35_000) + 150
    sparse_twice = 2 * (140 + 1400 + 100_000) + 100 + input_part(4) + input_part(5)
    assert model.costs(twice, {"v": 4}) == Costs(420, dense_twice, sparse_twice)
    assert model.sampler(num_paths=3, features=20) == 100_000 + 3 * 20 * 10_000


def test_costs_of_a_convolution_are_those_worked_out_by_hand():
    model = CostModel(1, flop=1, update=10, gather=100, pass_=1000, read=10_000, call=100_000, conv=1_000_000)
    of = Candidate("w", rows=3, features=5, kept=2, calls=1, input_grads=1, batch_size=7, groups=4)
    weight_part = 2 * 7 * 2 * 5 + 7 * 2 * 100 + 2 * 5 * 10 + 7 * 5 * 4 * 1_000_000 + 100_000
    input_part = 2 * 7 * 2 * 5 + 2 * 5 * 100 + 7 * 5 * 4 * 1_000_000
    assert model.costs(of, {}) == Costs(210, 210 + 150 + 210, weight_part + input_part)
    full = dataclasses.replace(of, full_dx=True)
    assert model.costs(full, {}) == Costs(210, 210 + 150 + 210, weight_part + 210)
    first = dataclasses.replace(of, input_grads=0)
    assert model.costs(first, {}) == Costs(210, 210 + 150, weight_part)


def test_the_share_of_the_limit_is_the_speed_over_that_with_a_free_backward():
    costs = Costs(forward=2, dense=6, sparse=3)
    assert costs.share_of_limit(is_sparse=True) == 2 / 5
    assert costs.share_of_limit(is_sparse=False) == 2 / 8


def test_a_weight_that_does_not_pay_is_dropped_and_then_those_that_fed_on_it():
    model = CostModel(flop=1, update=0, gather=0, pass_=0, read=0, call=17)

    def candidate(name, size=4, kept=3, input_grads=1, sources=()):
        return Candidate(name, size, size, kept, 1, input_grads, 1, sources)

    a = candidate("a", input_grads=0)  # dense 32, sparse 24 + 17
    b = candidate("b", sources=("a",))  # dense 64, sparse 24 + 17 + 18 on three columns or 24 on all four
    c = candidate("c", sources=("b",))
    d = candidate("d", size=40)  # dense 6400, sparse 240 + 17 + 240
    assert model.costs(b, {"a": 3}).sparse == 59 < model.costs(b, {}).dense == 64 < model.costs(b, {}).sparse == 65
    assert model.paying([b, c, d], 0).keys() == {"d"}
    assert model.paying([a, b, c, d], 0) == {"d": model.costs(d, {})}
    cheaper = CostModel(flop=1, update=0, gather=0, pass_=0, read=0, call=7)  # a: 31 < 32
    assert cheaper.paying([a, b, c, d], 0).keys() == {"a", "b", "c", "d"}


def test_weights_that_do_not_pay_the_sampler_together_are_all_dropped():
    model = CostModel(flop=1, update=0, gather=0, pass_=0, read=0, call=0)
    both = [Candidate(name, 4, 4, 3, 1, 0, 1) for name in "ab"]  # dense 32, sparse 24
    assert model.paying(both, 15.9).keys() == {"a", "b"}
    assert model.paying(both, 16) == {}
    assert model.paying([], 0) == {}
    even = Candidate("even", 4, 4, 4, 1, 0, 1)  # with every row kept, 32 either way: nothing is gained
    assert model.paying([*both, even], 0).keys() == {"a", "b"}


def test_what_is_measured_is_above_zero_and_of_the_batch_given():
    measured = CostModel.measured(batch_size=7)
    assert measured.batch_size == 7
    assert measured.call >= 0
    assert min(measured.flop, measured.update, measured.gather, measured.pass_, measured.read) > 0


# --- The whole model -------------------------------------------------------------------------------------------------


def transformed_densely(model, **options):
    with pytest.warns(UserWarning, match="no weight of Sequential is large enough"):
        return rwfx.transform(model, 4, seed=0, break_even=DEFAULT, **options)


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "options", [{}, {"grad": "rows"}, {"density": {"*": 0.5}}, {"example_inputs": torch.ones(2, 8)}]
)
def test_a_model_too_small_to_pay_trains_densely_and_says_so(options):
    model = mlp(8, 16, 16, 4)
    small = transformed_densely(model, **options)
    x = torch.randn(5, 8)
    expected = gradients(model, x)
    variants = {
        "itself": small,
        "pickled": pickle.loads(pickle.dumps(small)),
        "deep copy": copy.deepcopy(small),
        "copy": copy.copy(small),
        "compiled": torch.compile(small, backend="aot_eager", fullgraph=True),
    }
    for name, variant in variants.items():
        assert torch.equal(variant(x), model(x)), name
        for ours, theirs in zip(gradients(variant, x), expected, strict=True):
            assert ours.layout == torch.strided
            torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")
    assert small.rows == {}
    assert small.state_dict().keys() == model.state_dict().keys()
    small.load_sampler_state(small.sampler_state())

    report = small.report
    assert report.sparse == ()
    assert report.dense.keys() == {"0.weight", "2.weight", "4.weight"}
    assert all(reason.startswith("it would not pay (") for reason in report.dense.values())
    predicted, limit = report.predicted
    assert predicted == pytest.approx(1.0)
    assert limit > 1.5
    printed = str(report)
    assert "no rows drawn" not in printed
    assert "predicted: a step 1.0 times as fast as dense" in printed
    assert printed.count("dense: it would not pay") == 3
    assert report.flops(5).total == report.flops(5).dense_total


def test_it_still_learns():
    small = transformed_densely(mlp(8, 16, 1))
    optimizer = rwfx.optim.Adam(small.parameters(), lr=0.01)
    x = torch.randn(64, 8)
    losses = []
    for _ in range(100):
        loss = (small(x) - x[:, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_only_what_pays_is_sparse():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse = rwfx.transform(mlp(1024, 2048, 64, 4), 20, seed=0, break_even=DEFAULT)
    report = sparse.report
    assert report.sparse == ("0.weight", "2.weight")
    assert report.dense["4.weight"].startswith("it would not pay (")
    assert " of 4 rows expected, predicted " in report.dense["4.weight"]
    x = torch.randn(3, 1024)
    sparse(x).square().sum().backward()
    assert sparse.rows.keys() == {"0.weight", "2.weight"}
    for name, p in sparse.named_parameters():
        rows = sparse.rows.get(name.replace("bias", "weight"))
        touched = p.grad.reshape(len(p), -1).any(1).nonzero().squeeze(1)
        assert len(touched) == len(p) == 4 if rows is None else set(touched.tolist()) <= set(rows.tolist())
    # What was promised and what is drawn are in one report.
    lines = {line.weight: line for line in report.lines}
    printed = str(sparse.report).splitlines()
    assert printed[0].split() == ["weight", "shape", "rows", "kept", "of", "limit", "backward"]
    for line, text in zip(report.lines, printed[1:], strict=False):
        costs = lines[line.weight].costs
        share = costs.forward / (costs.forward + (costs.dense if line.dense_because else costs.sparse))
        assert line.share_of_limit == share
        assert f" {share:.0%} " in text
    forward = sum(line.costs.forward for line in report.lines)
    dense = sum(line.costs.dense for line in report.lines)
    ours = sum(line.costs.dense if line.dense_because else line.costs.sparse for line in report.lines)
    assert report.predicted == pytest.approx(((forward + dense) / (forward + ours), (forward + dense) / forward))
    assert f"predicted: a step {report.predicted[0]:.1f} times as fast as dense, at most" in printed[-1]


def test_where_nothing_but_products_costs_every_weight_that_saves_some_is_sparse():
    sparse = rwfx.transform(mlp(8, 64, 32, 16), 3, seed=0, break_even=FREE)
    assert sparse.report.sparse == ("0.weight", "2.weight", "4.weight")
    # With every row kept nothing is saved: dense and sparse cost the same.
    whole = CostModel(flop=1, update=1, call=0, gather=0, pass_=0, read=0)
    with pytest.warns(UserWarning, match="no weight of Sequential"):
        full = rwfx.transform(mlp(8, 64, 32), density={"*": 1.0}, seed=0, break_even=whole)
    assert full.report.dense.keys() == {"0.weight", "2.weight"}
    assert all(line.costs.dense == line.costs.sparse for line in full.report.lines)


@pytest.mark.parametrize("dx", ["rows", "full"])
@pytest.mark.parametrize("grad", ["rows", "dense"])
def test_a_weight_is_weighed_with_the_rows_and_columns_that_it_will_have(grad, dx):
    model, how = CostModel(batch_size=10, flop=1e-9), (grad == "dense", dx == "full")
    sparse = rwfx.transform(mlp(64, 128, 96, 80), density={"*": 0.25}, seed=0, break_even=model, grad=grad, dx=dx)
    assert sparse.report.sparse == ("0.weight", "2.weight", "4.weight")
    kept = {"0.weight": 32, "2.weight": 24, "4.weight": 20}
    sources = [(), ("0.weight",), ("2.weight",)] if dx == "rows" else [()] * 3
    first = Candidate("0.weight", 128, 64, 32, 1, 0, 10, sources[0], *how)
    second = Candidate("2.weight", 96, 128, 24, 1, 1, 10, sources[1], *how)
    third = Candidate("4.weight", 80, 96, 20, 1, 1, 10, sources[2], *how)
    for of, line in zip((first, second, third), sparse.report.lines, strict=True):
        assert line.costs == model.costs(of, kept)


def test_gradients_filled_with_zeros_cost_a_dense_update_and_a_full_input_gradient_a_dense_product():
    model, numbers = CostModel(flop=1e-12, update=3e-10, gather=0, pass_=1e-10, call=0), ("w", 100, 80, 10, 1, 1, 32)
    by_row = model.costs(Candidate(*numbers), {}).sparse
    filled = model.costs(Candidate(*numbers, dense_grad=True), {}).sparse
    full = model.costs(Candidate(*numbers, full_dx=True), {}).sparse
    assert filled - by_row == pytest.approx(90 * 80 * 3e-10 + 100 * 80 * 1e-10)
    assert full - by_row == pytest.approx(2 * 32 * 90 * 80 * 1e-12)


@pytest.mark.parametrize(
    ("numbers", "error"),
    [
        ({"flop": -1}, ValueError),
        ({"flop": 0}, ValueError),
        ({"flop": float("nan")}, ValueError),
        ({"update": float("inf")}, ValueError),
        ({"batch_size": 0}, ValueError),
        ({"batch_size": 2.5}, TypeError),
        ({"call": "x"}, TypeError),
    ],
    ids=str,
)
def test_a_cost_model_of_impossible_numbers_is_refused(numbers, error):
    with pytest.raises(error, match=next(iter(numbers))):
        CostModel(**numbers)
    if "batch_size" in numbers:
        with pytest.raises(error, match="batch_size"):
            CostModel.measured(**numbers)


def test_to_weigh_draws_nothing_from_the_stream_of_the_walks():
    model = mlp(32, 64, 32)
    weighed, not_weighed = (rwfx.transform(model, 5, seed=3, break_even=b) for b in (FREE, False))
    assert weighed.report.sparse == not_weighed.report.sparse
    for m in (weighed, not_weighed):
        m(torch.ones(1, 32)).sum().backward()
    for name, rows in weighed.rows.items():
        assert torch.equal(rows, not_weighed.rows[name])


class Tokens(nn.Module):
    """The first layer is called on every token, the second on one number per example; one weight is used twice."""

    def __init__(self):
        super().__init__()
        self.token, self.twice, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 24)

    def forward(self, x):
        h = self.twice(self.twice(self.token(x)).relu().mean(1))
        return self.head(h)


@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_the_batch_is_that_of_the_example_inputs(grad):
    model = CostModel(batch_size=1000, flop=1e-9)

    def forwards(**options):
        report = rwfx.transform(Tokens(), 3, seed=0, break_even=model, grad=grad, **options).report
        return {line.weight: line.costs.forward for line in report.lines}

    def expected(tokens, most, examples):
        flops = {
            "token.weight": 2 * tokens * 16 * 32,
            "twice.weight": 2 * 2 * most * 32 * 32,  # weighed by its larger call
            "head.weight": 2 * examples * 32 * 24,
        }
        return pytest.approx({name: 1e-9 * n for name, n in flops.items()})

    assert forwards() == expected(1000, 1000, 1000)
    assert forwards(example_inputs=torch.randn(6, 7, 16)) == expected(42, 42, 6)


def test_masking_is_never_weighed():
    masked = rwfx.transform(mlp(8, 16, 4), 3, mode="masked", break_even=DEFAULT)
    assert masked.report.sparse == ("0.weight", "2.weight")
    assert masked.report.predicted is None


@pytest.mark.parametrize("given", [3, 1.0, "yes", None, CostModel], ids=str)
def test_what_is_no_cost_model_is_refused(given):
    with pytest.raises(TypeError, match=r"break_even must be True, False or a rwfx\.CostModel"):
        rwfx.transform(mlp(4, 3, 2), 2, break_even=given)


def test_without_a_break_even_nothing_is_predicted():
    sparse = rwfx.transform(mlp(8, 16, 4), 3, seed=0, break_even=False)
    assert sparse.report.sparse == ("0.weight", "2.weight")
    assert sparse.report.predicted is None
    assert "predicted" not in str(sparse.report)
    assert all(line.share_of_limit is None for line in sparse.report.lines)


class TestByDefault:
    """The fixture that makes the tests' own small models sparse is undone here."""

    @pytest.fixture(autouse=True)
    def small_models_are_sparse(self):
        """Leave ``transform`` as it is."""

    @pytest.mark.parametrize("options", [{}, {"example_inputs": torch.ones(2, 8)}], ids=["alone", "examples"])
    def test_a_model_on_a_cpu_is_weighed(self, options):
        with pytest.warns(UserWarning, match="no weight of Sequential is large enough"):
            small = rwfx.transform(mlp(8, 16, 4), 4, **options)
        assert small.report.sparse == ()

    @pytest.mark.parametrize("options", [{"mode": "masked"}, {"break_even": False}], ids=str)
    def test_it_is_not_where_that_is_turned_off_or_of_no_use(self, options):
        assert rwfx.transform(mlp(8, 16, 4), 4, **options).report.sparse == ("0.weight", "2.weight")
