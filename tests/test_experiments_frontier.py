"""A frontier counts what every contender costs, tunes on validation alone, goes on where it stopped, and says so."""

import csv
import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rwfx
from rwfx.cost import dense_flops
from rwfx.experiments.book import Book, entry_of
from rwfx.experiments.cli import main
from rwfx.experiments.data import DataSet, TensorLoader, load
from rwfx.experiments.frontier import run
from rwfx.experiments.frontier.contenders import CONTENDERS
from rwfx.experiments.frontier.cost import confined_to_examples, products_of
from rwfx.experiments.frontier.entries import TUNING_SEED, Entry, Result, Trial
from rwfx.experiments.frontier.plan import SPARSE_NAMES, Plan, check_plan
from rwfx.experiments.frontier.race import refusals
from rwfx.experiments.frontier.report import headline, section
from rwfx.experiments.frontier.runs import Run, take_turns
from rwfx.experiments.frontier.summary import Reached, reached, summarise
from rwfx.experiments.frontier.tasks import task_of, with_wrong_labels
from rwfx.experiments.frontier.tuning import at_the_edge, choices, final_entries, trial_entries
from rwfx.experiments.frontier.two_pass import TwoPass, WithTarget, two_pass_loss
from rwfx.experiments.models import character_mlp, cnn, mlp, sentence_transformer
from rwfx.experiments.policies.runs import TURN
from rwfx.experiments.policies.tasks import METRICS, Task, measure, split_off
from rwfx.experiments.sentences import load_sst2
from rwfx.experiments.tables import read_csv, write_csv

pytestmark = pytest.mark.usefixtures("one_thread")

ACCURACY, LOSS = METRICS["accuracy"], METRICS["loss"]
PNG = b"\x89PNG"
NUMBERED = Entry("digits", "dense", 32, 1e-3, 1.0, 0)


def plan(out, **changes):
    return Plan(
        **{
            "out": out,
            "tasks": ("digits",),
            "contenders": ("rows-0.25", "examples-0.5", "adaptive-0.9", "two-pass-0.3"),
            "shares": (0.5, 1.0),
            "sparse_shares": (0.25, 0.6),
            "batch_sizes": (32, 64),
            "sparse_batch_sizes": (32, 64),
            "lrs": (1e-3, 4e-3),
            "seeds": 2,
            "steps": 6,
            "hidden": (24, 16),
            "transform_options": {"break_even": False},  # small networks would not pay
            **changes,
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small comparison: its plan and its results."""
    made = plan(tmp_path_factory.mktemp("frontier"))
    return made, run.run(made, progress=False)


@functools.cache
def digits(hidden):
    return task_of(plan("", hidden=hidden), "digits")


def run_of(plan, contender, batch=32, share=1.0, seed=0, lr=1e-3):
    task = digits(plan.hidden)
    network = task.network(seed)
    products = products_of(network, task.split.train.inputs[:2])
    return Run(plan, Entry("digits", contender, batch, lr, share, seed), task, network, products)


def to_end(one):
    while not one.ended:
        one.take_turn()
    return one


def result(contender="dense", batch=32, share=1.0, seed=0, process=1, seconds=1.0, metric=0.9):
    return Result(
        "digits",
        contender,
        batch,
        1e-3,
        share,
        seed,
        "p",
        process,
        "",
        "",
        10,
        1.0,
        round(1000 * share),
        seconds,
        metric,
    )


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- What a step costs


def test_the_operations_of_a_perceptron_are_those_counted_by_hand():
    """64-24-16-10: f = 2 O I an example; the first weight's input needs no gradient."""
    products = products_of(mlp((64, 24, 16, 10), 0), torch.randn(3, 64))
    first, second, third = 2 * 64 * 24, 2 * 24 * 16, 2 * 16 * 10
    assert products.forward(8) == 8 * (first + second + third)
    assert products.dense(8) == 8 * (2 * first + 3 * second + 3 * third)
    every = {"0.weight": 3, "2.weight": 3, "4.weight": 3}
    on_examples = 8 * (first + second + third) + 3 * (first + 2 * second + 2 * third)
    assert products.sparse(8, every, {}) == on_examples
    on_both = 8 * (first + second + third) + 3 * (first // 4 + 2 * second // 2 + 2 * third)
    assert products.sparse(8, every, {"0.weight": 6, "2.weight": 8}) == on_both
    assert products.sparse(8, {"4.weight": 3}, {}) == 8 * (2 * first + 3 * second + third) + 3 * 2 * third
    assert products.two_passes(8, 3) == 8 * (first + second + third) + 3 * (2 * first + 3 * second + 3 * third)


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (mlp((64, 24, 10), 0), torch.randn(4, 64)),
        (character_mlp(20, 8, 4, (16,), 0), torch.randint(0, 20, (4, 8))),
        (cnn((3, 4, 6), 8, 10, 0), torch.randn(4, 3, 8, 8)),
        (sentence_transformer(50, 8, 16, 2, 1, 0), torch.randint(1, 50, (4, 8))),
    ],
    ids=["perceptron", "characters", "convolutions", "transformer"],
)
def test_a_dense_step_has_as_many_operations_as_are_counted_when_it_is_done(network, inputs):
    products = products_of(network, inputs[:2])
    assert products.dense(4) == dense_flops(network, (inputs,))[0]
    assert all(not hook for module in network.modules() for hook in [module._forward_hooks])


def test_attention_has_products_without_a_weight_that_are_done_for_the_whole_batch():
    network = sentence_transformer(50, 8, 16, 2, 1, 0)
    products = products_of(network, torch.randint(1, 50, (2, 8)))
    attention = 2 * 2 * 8 * 8 * 16  # scores and sums over 8 places of 16 numbers
    backward = 2 * attention + attention // 2  # four products, and the scores once more
    assert (products.other_forward, products.other_backward) == (attention, backward)
    nothing = dict.fromkeys((call.weight for call in products.calls), 0)
    assert products.sparse(4, nothing, {}) == products.forward(4) + 4 * backward


@pytest.mark.parametrize("kind", ["dense", *SPARSE_NAMES])
def test_a_run_counts_the_examples_and_rows_that_its_steps_kept(kind, tmp_path):
    """64-24-16-10 with batches of 32; the weight that gives the outputs keeps all its rows."""
    one = run_of(plan(tmp_path), kind)
    one.take_turn(3)
    first, second, third = 2 * 64 * 24, 2 * 24 * 16, 2 * 16 * 10
    forward = 32 * (first + second + third)
    kept = {"0.3": math.ceil(0.3 * 32), "0.5": 16}.get(kind.rpartition("-")[2], 32)
    if kind == "adaptive-0.9":
        assert 0.1 < one.examples_share <= 1
        assert one.flops == 3 * forward + one.examples * (first + 2 * second + 2 * third)
        return
    share = {"rows-0.1": (3, 2), "rows-0.25": (6, 4)}.get(kind, (6, 4) if kind.startswith("both") else (24, 16))
    backward = kept * (first * share[0] // 24 + 2 * second * share[1] // 16 + 2 * third)
    second_forward = kept * (first + second + third) if kind.startswith("two") else 0
    assert one.examples == 3 * kept
    assert one.flops == 3 * (forward + second_forward + backward)


def test_a_weight_that_is_not_confined_to_the_examples_counts_with_all():
    network = cnn((3, 4), 8, 10, 0)
    sparse_model = rwfx.transform(network, examples=0.5, example_inputs=torch.randn(4, 3, 8, 8))
    there = {name for name, _ in network.named_parameters() if name.endswith("weight")}
    assert "4.weight" in confined_to_examples(sparse_model) <= there


# --- Budgets and turns


def test_the_whole_budget_is_that_of_dense_steps_of_128(tmp_path):
    given = plan(tmp_path, steps=6)
    assert to_end(run_of(given, "dense", 128)).done == 6
    assert to_end(run_of(given, "dense", 32)).done == 24
    assert to_end(run_of(given, "dense", 128, share=0.5)).done == 3


@pytest.mark.parametrize("kind", ["rows-0.25", "examples-0.3", "adaptive-0.9", "both-0.5", "two-pass-0.5"])
def test_a_run_ends_within_half_a_step_of_its_budget_and_its_rate_near_zero(kind, tmp_path):
    one = to_end(run_of(plan(tmp_path, steps=12), kind, share=0.6))
    assert abs(one.flops - one.budget) <= one.flops / one.done * 0.75  # an adaptive step may cost more than the mean
    assert 0 < one.trainer.optimizer.param_groups[0]["lr"] < 0.02 * 1e-3


def test_turns_keep_the_shares_spent_together(tmp_path):
    given = plan(tmp_path, steps=60)
    runs = [run_of(given, kind, share=share) for kind, share in (("dense", 1.0), ("examples-0.3", 0.6), ("dense", 0.3))]
    for _, operations in take_turns(runs):
        assert operations > 0
        shares = [of.progress for of in runs]
        turns = [TURN * of.products.dense(32) / of.budget for of in runs]  # no turn costs more
        assert max(shares) - min(shares) <= max(turns)
    assert all(one.ended for one in runs)


def test_runs_of_a_seed_begin_alike_and_see_the_same_examples(tmp_path):
    given = plan(tmp_path, contenders=SPARSE_NAMES)
    seen = {}
    for kind in CONTENDERS:
        one = run_of(given, kind, seed=3)
        one.take_turn(1)
        seen[kind] = one.trainer.history.loss[0]
    whole = {kind: loss for kind, loss in seen.items() if not kind.startswith("two-pass")}
    assert set(whole.values()) == {seen["dense"]}  # the forward pass is dense's, bit for bit


# --- Selective backprop in two passes


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_two_passes_have_the_gradient_of_one_that_keeps_the_same_examples(share):
    inputs, target = torch.randn(20, 12, dtype=torch.float64), torch.randint(0, 5, (20,))
    network = mlp((12, 9, 5), 0).double()
    two_pass_loss(TwoPass(network, share)(inputs, target), target).backward()
    found = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    sparse_model = rwfx.transform(network, examples=share, example_inputs=inputs)
    F.cross_entropy(sparse_model(inputs), target).backward()
    assert sparse_model.examples == (math.ceil(share * 20), 20)
    torch.testing.assert_close(found, [parameter.grad for parameter in network.parameters()])


def test_two_passes_keep_the_examples_whose_output_gradient_is_largest():
    inputs, target = torch.randn(20, 12), torch.randint(0, 5, (20,))
    network = mlp((12, 9, 5), 0)
    output = network(inputs)
    (g,) = torch.autograd.grad(F.cross_entropy(output, target), output)
    _, chosen = TwoPass(network, 0.25)(inputs, target)
    assert set(chosen.tolist()) == set(g.norm(dim=1).argsort(descending=True)[:5].tolist())


def test_a_loader_with_targets_gives_the_same_batches():
    tensors = torch.arange(10.0), torch.arange(10)
    plain, twice = (TensorLoader(*tensors, 3, torch.Generator().manual_seed(1)) for _ in range(2))
    for (x, y), (x_2, y_2, y_3) in zip(plain, WithTarget(twice), strict=True):
        assert torch.equal(x, x_2)
        assert torch.equal(y, y_2)
        assert y_2 is y_3
    assert len(WithTarget(twice)) == len(twice)


# --- The headline


@pytest.mark.parametrize(
    ("points", "goal", "sign", "expected"),
    [
        ([(0.2, 0.5), (0.6, 0.9)], 0.7, 1, Reached(0.4, False)),
        ([(0.6, 0.9), (0.2, 0.5)], 0.9, 1, Reached(0.6, False)),
        ([(0.2, 0.5), (0.6, 0.9)], 0.5, 1, Reached(0.2, True)),
        ([(0.2, 0.5), (0.6, 0.9)], 0.91, 1, None),
        ([(0.2, 0.5), (0.4, 0.8), (0.6, 0.7), (0.8, 0.9)], 0.75, 1, Reached(0.2 + 0.2 * 5 / 6, False)),
        ([(0.2, 3.0), (0.6, 1.0)], 2.0, -1, Reached(0.4, False)),
        ([(0.2, 3.0), (0.6, 1.0)], 0.9, -1, None),
        ([(0.2, math.nan), (0.6, 0.9)], 0.95, 1, None),
    ],
    ids=["between", "at the end", "at once", "never", "first of several", "a loss", "a loss, never", "diverged"],
)
def test_a_goal_is_reached_linearly_between_budgets_and_nowhere_else(points, goal, sign, expected):
    found = reached(points, goal, sign)
    if expected is None:
        assert found is None
    else:
        assert found == Reached(pytest.approx(expected.cost), expected.first)


@pytest.mark.parametrize(("metric", "worse"), [(ACCURACY, 0.8), (LOSS, 1.5)])
def test_the_best_of_dense_is_the_batch_that_ends_best_in_the_mean(metric, worse):
    results = [result(batch=16, seed=seed, metric=0.9 + seed / 100) for seed in (0, 1)]
    results += [result(batch=64, seed=0, metric=0.91), result(batch=64, seed=1, metric=worse)]
    results += [result(batch=64, share=0.5, seed=seed, metric=0.5 + metric.sign) for seed in (0, 1)]  # not its end
    summary = summarise(results, metric)
    assert summary.best.batch == 16
    assert summary.goal.value == pytest.approx(0.905)


def test_seconds_are_shares_of_those_of_the_best_of_dense_in_the_same_process():
    results = [result(seed=0, process=1, seconds=10.0), result(seed=1, process=2, seconds=20.0)]
    results += [result("rows-0.1", seed=seed, process=1 + seed, share=0.5, seconds=6.0, metric=0.95) for seed in (0, 1)]
    summary = summarise(results, ACCURACY)
    assert summary.lines[1].end.seconds.value == pytest.approx((0.6 + 0.3) / 2)
    assert summary.lines[1].end.flops.value == 0.5
    assert summary.strangers == 0
    assert "rows-0.1 with at most 0.45 of its seconds, at most 0.50 of its FLOPs" in headline(summary, ACCURACY)
    assert "(dense, batch 32)" in headline(summary, ACCURACY)
    alone = summarise([*results, result("rows-0.1", seed=2, process=3, share=0.5, seconds=6.0)], ACCURACY)
    assert alone.strangers == 1
    assert alone.lines[1].end.seconds.value == pytest.approx((0.6 + 0.3 + 0.4) / 3)


def test_seconds_are_compared_with_those_of_the_same_seed_and_else_of_the_same_process():
    results = [result(seed=0, seconds=10.0), result(seed=1, seconds=20.0), result(seed=2, process=2, seconds=40.0)]
    results += [result("rows-0.1", seed=seed, share=0.5, seconds=6.0 * (seed + 1)) for seed in (0, 1)]
    results.append(result("rows-0.1", seed=2, process=1, share=0.5, seconds=9.0))  # as is 15, the mean of its process
    assert summarise(results, ACCURACY).lines[1].end.seconds.value == pytest.approx(0.6)
    assert summarise(results, ACCURACY).lines[1].end.seconds.half_width == pytest.approx(0)


def test_what_is_not_reached_is_said():
    summary = summarise([result(), result("rows-0.1", share=0.5, metric=0.8)], ACCURACY)
    assert "reached by no other contender" in headline(summary, ACCURACY)


@pytest.mark.parametrize(
    ("batch", "said"),
    [(16, "the smallest batch"), (32, None), (64, "the largest batch")],
    ids=["least", "middle", "most"],
)
def test_it_is_said_where_dense_was_best_at_the_edge_of_the_batches_tried(batch, said, tmp_path):
    results = [result(batch=size, metric=0.9 + (size == batch) / 100) for size in (16, 32, 64)]
    text = section(plan(tmp_path, batch_sizes=(16, 32, 64)), task_of(plan(tmp_path), "digits"), results, [], {})
    assert ("Dense's best has" in text) is (said is not None)
    assert said is None or said in text


# --- Tuning


def test_dense_has_a_rate_for_each_batch_and_another_contender_the_best_of_all(tmp_path):
    given = plan(tmp_path)
    for contender, expected in {"dense": {(32, 1e-3), (64, 4e-3)}, "rows-0.1": {(64, 4e-3)}}.items():
        entries = trial_entries(given, "digits", contender)
        assert {of.share for of in entries} == {1.0 if contender == "dense" else 0.6}
        assert {of.seed for of in entries} == {TUNING_SEED}
        judged = {(32, 1e-3): 0.7, (32, 4e-3): math.nan, (64, 1e-3): 0.6, (64, 4e-3): 0.9}
        trials = [Trial(**vars(of), plan="", validation=judged[of.batch, of.lr]) for of in entries]
        chosen = choices(trials, ACCURACY)
        assert {(of.batch, of.lr) for of in chosen} == expected
        finals = final_entries(given, chosen, 1)
        assert {(of.batch, of.lr) for of in finals} == expected
        assert {of.share for of in finals} == ({0.5, 1.0} if contender == "dense" else {0.25, 0.6})
        assert {of.seed for of in finals} == {1}
        edges = {at_the_edge(given, of) for of in chosen}
        assert edges == ({"rate"} if contender == "dense" else {"batch and rate"})
    assert at_the_edge(replace(given, lrs=(1e-4, 4e-3, 1.0)), chosen[0]) == "batch"


def test_final_runs_have_the_batch_and_rate_that_were_best_on_validation(finished):
    made, results = finished
    trials = lines_of(made.out / "tuning.csv")
    assert len(trials) == 5 * 2 * 2
    for contender in ("dense", *made.contenders):
        own = [line for line in trials if line["contender"] == contender]
        for batch in (32, 64) if contender == "dense" else (None,):
            tried = [line for line in own if batch in (None, int(line["batch"]))]
            best = max(tried, key=lambda line: float(line["validation"]))
            ran = {(of.batch, of.lr) for of in results if of.contender == contender and batch in (None, of.batch)}
            assert ran == {(int(best["batch"]), float(best["lr"]))}


def test_a_final_run_is_judged_on_test_data_and_a_trial_on_validation(finished):
    made, results = finished
    task = task_of(made, "digits")
    found = next(of for of in results if of.contender == "examples-0.5" and of.seed == 1)
    again = to_end(run_of(made, found.contender, found.batch, found.share, 1, found.lr))
    assert found.metric == measure(again.network, task.split.test, ACCURACY)
    assert (found.flops, found.steps) == (again.flops, again.done)
    trial = next(of for of in read_csv(made.out / "tuning.csv", Trial) if of.contender == "dense")
    again = to_end(run_of(made, "dense", trial.batch, trial.share, TUNING_SEED, trial.lr))
    assert trial.validation == measure(again.network, task.split.validation, ACCURACY)


# --- What is written, and going on


def test_what_is_written(finished):
    made, results = finished
    assert len(results) == 2 * (2 * 2 + 4 * 2)
    assert [entry_of(of, Entry) for of in read_csv(made.out / "frontier.csv", Result)] != []
    assert set(read_csv(made.out / "frontier.csv", Result)) == set(results)
    for cost in ("seconds", "flops"):
        assert (made.out / f"digits_against_{cost}.png").read_bytes().startswith(PNG)
    text = (made.out / "frontier.md").read_text()
    assert "Dense's best accuracy is" in text
    assert "2 seeds of 2" in text
    assert "learning rates 0.001, 0.004 with batches of 32, 64" in text
    assert "processes" not in text.split("## What is compared")[0]
    assert not list(made.out.glob("*.partial"))
    assert {(of.row_sparse, of.example_sparse) for of in results if of.contender == "rows-0.25"} == {("2 of 3", "")}
    assert {(of.row_sparse, of.example_sparse) for of in results if of.contender == "examples-0.5"} == {
        ("0 of 3", "3 of 3")
    }


@pytest.fixture
def stopped(finished, tmp_path):
    """A plan whose folder holds what a finished one wrote."""
    made, _ = finished
    for name in ("frontier.csv", "tuning.csv"):
        (tmp_path / name).write_bytes((made.out / name).read_bytes())
    return replace(made, out=tmp_path)


def test_what_is_done_is_not_done_again(stopped, finished, monkeypatch):
    monkeypatch.setattr(Run, "take_turn", lambda *_: pytest.fail("a run was trained again"))
    before = (stopped.out / "frontier.csv").read_bytes()
    assert set(run.run(stopped, progress=False)) == set(finished[1])
    assert (stopped.out / "frontier.csv").read_bytes() == before
    assert (stopped.out / "frontier.md").exists()


@pytest.mark.parametrize("cut", [1, 30])
def test_a_last_line_that_was_cut_off_is_run_again_and_nothing_else(cut, stopped, finished, monkeypatch):
    path = stopped.out / "frontier.csv"
    lost = read_csv(path, Result)[-1]
    path.write_bytes(path.read_bytes()[:-cut])
    ran, train = [], Run.take_turn
    monkeypatch.setattr(Run, "take_turn", lambda one, *count: (ran.append(one.entry), train(one, *count))[1])
    results = run.run(stopped, progress=False)
    assert set(ran) == {entry_of(lost, Entry)}
    (again,) = [of for of in results if of.process == 2]
    assert replace(again, process=1, seconds=lost.seconds) == lost
    assert len(read_csv(path, Result)) == len(results) == len(finished[1])
    assert "2 processes" in (stopped.out / "frontier.md").read_text()


@pytest.mark.parametrize(
    "change", [{"steps": 4}, {"hidden": (24, 8)}, {"transform_options": {"break_even": False, "dx": "full"}}]
)
def test_runs_of_another_plan_are_kept_and_not_taken_for_this_one(change, stopped):
    before = read_csv(stopped.out / "frontier.csv", Result)
    results = run.run(replace(stopped, seeds=1, contenders=("rows-0.25",), **change), progress=False)
    assert {of.process for of in results} == {2}
    assert read_csv(stopped.out / "frontier.csv", Result) == before + results


def test_further_seeds_and_contenders_go_on_from_those_there(stopped, finished):
    more = replace(stopped, seeds=3, contenders=("rows-0.25", "uniform-0.3"))
    results = run.run(more, progress=False)
    old = {entry_of(of, Entry) for of in finished[1]}
    for of in results:
        assert of.process == (1 if entry_of(of, Entry) in old else 2)
    assert {of.contender for of in results} == {"dense", "rows-0.25", "uniform-0.3"}
    assert len(results) == 3 * (2 * 2 + 2 * 2)


def test_lines_are_read_as_they_were_written(tmp_path):
    lines = [Trial(**vars(NUMBERED), plan='a, "b"', validation=value) for value in (0.1 + 0.2, math.inf, 1e-17)]
    write_csv(tmp_path / "some.csv", Trial, lines)
    assert read_csv(tmp_path / "some.csv", Trial) == lines
    assert read_csv(tmp_path / "none.csv", Trial) == []
    assert Book(tmp_path / "some.csv", Trial).done([NUMBERED], 'a, "b"') == {NUMBERED: lines[-1]}
    assert Book(tmp_path / "some.csv", Trial).done([NUMBERED], "other") == {}
    (tmp_path / "some.csv").write_text("")
    with pytest.raises(ValueError, match="columns"):
        read_csv(tmp_path / "some.csv", Trial)


@pytest.mark.parametrize("damage", ["digits,dense,many", "digits,dense,32,1,1,1,p,x", "a,b"])
def test_a_damaged_line_is_refused(damage, tmp_path):
    path = tmp_path / "some.csv"
    write_csv(path, Trial, [Trial(**vars(NUMBERED), plan="p", validation=0.5)] * 2)
    header, first, second = path.read_text().splitlines()
    path.write_text("\n".join([header, damage, first, second]) + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        read_csv(path, Trial)


# --- Tasks


def test_a_fifth_of_the_labels_is_wrong_and_the_rest_is_as_it_was():
    data = load("digits")
    noisy = with_wrong_labels(data, 0.2)
    wrong = noisy.train_target != data.train_target
    assert int(wrong.sum()) == round(0.2 * len(wrong))
    assert set(noisy.train_target[wrong].tolist()) == set(range(10))
    steps = (noisy.train_target - data.train_target)[wrong] % 10
    assert set(steps.tolist()) == set(range(1, 10))
    assert torch.equal(noisy.test_target, data.test_target)
    assert torch.equal(noisy.train_inputs, data.train_inputs)
    assert torch.equal(with_wrong_labels(data, 0.2).train_target, noisy.train_target)


def test_noisy_validation_is_noisy_and_the_test_is_clean(monkeypatch, tmp_path):
    data = replace(load("digits"), name="mnist")
    monkeypatch.setattr("rwfx.experiments.frontier.tasks.load", lambda *_: data)
    noisy, clean = task_of(plan(tmp_path), "noisy-mnist").split, split_off(data, "cpu")
    for part, share in (("train", 0.2), ("validation", 0.2), ("test", 0.0)):
        wrong = (getattr(noisy, part).target != getattr(clean, part).target).float().mean()
        assert float(wrong) == pytest.approx(share, abs=0.07)


def test_images_in_colour_are_channels_first(monkeypatch, tmp_path):
    pixels = torch.arange(20 * 32 * 32 * 3, dtype=torch.float32)
    images = pixels.view(20, 32, 32, 3)
    data = DataSet("cifar10", images.flatten(1), torch.arange(20) % 10, images[:4].flatten(1), torch.arange(4))
    monkeypatch.setattr("rwfx.experiments.frontier.tasks.load", lambda *_: data)
    task = task_of(plan(tmp_path), "cifar10")
    assert torch.equal(task.split.test.inputs[2, :, 5, 7], images[2, 5, 7])
    assert task.network(0)(task.split.test.inputs).shape == (4, 10)


def test_sentences_are_words_and_then_blanks(tmp_path):
    (tmp_path / "sst2").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "sst2" / name).write_text("sentence\tlabel\na good good film \t1\nbad\t0\n" * 1)
    data = load_sst2(tmp_path, length=3)
    assert data.train_target.tolist() == [1, 0]
    a, good, again = data.train_inputs[0].tolist()
    assert good == again != a
    assert data.train_inputs[1].tolist()[1:] == [0, 0]
    assert 0 < int(data.train_inputs.max()) < 4096
    assert task_of(plan(tmp_path, data_dir=tmp_path), "sst2").network(0)(data.test_inputs.repeat(1, 11)[:, :32]).shape
    (tmp_path / "sst2" / "dev.tsv").write_text("sentence\tlabel\nbad\tno\n")
    with pytest.raises(ValueError, match=r"line 2 of .*dev\.tsv"):
        load_sst2(tmp_path)
    with pytest.raises(ValueError, match=r"train\.tsv of SST-2 is not in"):
        load_sst2(tmp_path / "elsewhere")


def test_a_transformer_does_not_look_at_blanks():
    network = sentence_transformer(50, 8, 16, 2, 2, 0)
    words = torch.randint(1, 50, (3, 8))
    words[0, 3:] = words[1, 6:] = 0
    before = network(words)
    with torch.no_grad():
        network.words.weight[0] += torch.randn(16)
        network.places[7] += torch.randn(16)
    after = network(words)
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])


@pytest.mark.parametrize("kind", ["rows-0.25", "examples-0.3", "adaptive-0.9", "uniform-0.3", "both-0.3"])
def test_the_transformer_can_be_trained_by_every_contender(kind):
    contender = CONTENDERS[kind]
    words = torch.randint(1, 50, (10, 8))
    network = sentence_transformer(50, 8, 16, 2, 1, 0)
    options = {"rows": contender.rows, "examples": contender.examples}
    sparse_model = rwfx.transform(network, **options, example_inputs=words, break_even=False)
    F.cross_entropy(sparse_model(words), torch.arange(10) % 2).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# --- What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("mnist", "nist")}, "the tasks are .*given 'nist'"),
        ({"contenders": ("dense",)}, "the contenders are rows-0.25.*given 'dense'"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"shares": (0.5,)}, "whole budget"),
        ({"shares": (1.0, 1.5)}, "share of the budget .*1.5"),
        ({"sparse_shares": (0.0,)}, "share of the budget .*0.0"),
        ({"sparse_shares": ()}, "at least one of the sparse shares"),
        ({"batch_sizes": (0,)}, "batch size must be at least 1"),
        ({"lrs": (1e-3, 1e-3)}, "one of the lrs is there twice"),
        ({"lrs": (math.nan,)}, "learning rate must be above 0"),
        ({"lrs": (math.inf,)}, "learning rate must be above 0"),
    ],
)
def test_a_plan_that_makes_no_comparison_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_plan(plan(tmp_path, **change))


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    given = plan(tmp_path, sparse_batch_sizes=(32, 4096))
    with pytest.raises(ValueError, match="a batch of 4096 is more than the 1295 examples"):
        run.run(given, progress=False)
    assert not list(tmp_path.iterdir())


def test_contenders_that_a_network_cannot_have_are_left_out_and_named(tmp_path):
    inputs, target = torch.randn(100, 3, 8, 8), torch.arange(100) % 10
    split = split_off(DataSet("", inputs, target, inputs, target), "cpu")
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))  # its one weight gives the outputs
    task = Task("linear", split, lambda _: network, ACCURACY, "")
    refused = refusals(plan(tmp_path, contenders=SPARSE_NAMES), task)
    assert set(refused) == {"rows-0.25", "rows-0.1", "both-0.5", "both-0.3", "both-mixed-0.5"}
    assert "1.weight" in refused["rows-0.1"]
    with pytest.raises(ValueError, match="linear: no weight is left to make sparse"):
        refusals(plan(tmp_path, contenders=("rows-0.25", "two-pass-0.3")), task)


def test_the_command(tmp_path, capsys):
    options = "--tasks digits --contenders examples-0.3 --steps 2 --shares 1 --sparse-shares 0.5 --batch-sizes 64"
    options += " --sparse-batch-sizes 32 --lrs 1e-3 --seeds 1 --hidden 16 --quiet --out"
    assert main(["frontier", *options.split(), str(tmp_path)]) == 0
    assert "digits: Dense's best accuracy is" in capsys.readouterr().out
    assert {of.contender for of in read_csv(tmp_path / "frontier.csv", Result)} == {"dense", "examples-0.3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tasks nist", "the tasks are"),
        ("--shares 0.5", "whole budget"),
        ("--tasks sst2 --data-dir /nowhere", "SST-2 is not in"),
    ],
)
def test_the_command_says_what_is_wrong(options, message, tmp_path, capsys):
    assert main(["frontier", *options.split(), "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", CONTENDERS)
def test_every_contender_trains_the_network_that_is_judged(kind, tmp_path):
    one = run_of(plan(tmp_path, steps=40), kind, lr=5e-3)
    assert isinstance(one.network, nn.Sequential)
    test = digits((24, 16)).split.test
    before = measure(one.network, test, ACCURACY)
    one.take_turn(25)
    assert measure(one.network, test, ACCURACY) > before + 0.1
