"""A comparison of policies compares like with like, tunes on validation alone, and writes what it found."""

import csv
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import rwfx
from rwfx import AdaptiveWalk, LearnedWalk, TopK
from rwfx.experiments.cli import main
from rwfx.experiments.data import TEXT, load, load_text, windows
from rwfx.experiments.models import character_mlp, mlp
from rwfx.experiments.policies import overhead, run, tuning, variance
from rwfx.experiments.policies.contenders import DENSE, POLICIES, Contender, contenders
from rwfx.experiments.policies.plan import Plan
from rwfx.experiments.policies.report import table
from rwfx.experiments.policies.runs import TURN, Point, Result, Run, learning_rate, take_turns, turn_seconds
from rwfx.experiments.policies.summary import at_cost, summarise
from rwfx.experiments.policies.tasks import METRICS, Part, measure, split_off, task_of
from rwfx.experiments.policies.tuning import Trial, best_rates

pytestmark = pytest.mark.usefixtures("one_thread")

PNG = b"\x89PNG"
ACCURACY, LOSS = METRICS["accuracy"], METRICS["loss"]
FEWER = Contender("dense", steps_share=0.5)
TOPK = Contender("TopK", 0.1)
LINES = "First Citizen: speak, speak.\n" * 100


def plan(out, **changes):
    return Plan(
        **{
            "out": out,
            "tasks": ("digits",),
            "policies": ("TopK", "DenseFirst+AdaptiveWalk"),
            "densities": (0.1, 0.5),
            "dense_shares": (0.1, 0.5),
            "batch_shares": (0.5,),
            "lrs": (1e-3, 4e-3),
            "seeds": 2,
            "steps": 60,
            "batch_size": 32,
            "hidden": (48, 32),
            "evaluations": 2,
            "transform_options": {"break_even": False},  # small networks would not pay
            **changes,
        }
    )


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small comparison on one task of each kind: its plan and its results."""
    made = plan(tmp_path_factory.mktemp("policies"), tasks=("digits", "digits-classes"))
    return made, run.run(made, progress=False)


def results_of(results, contender, task="digits"):
    return [result for result in results if result.contender == contender and result.task == task]


def result(contender, seed, cost, metric, earlier=None):
    """A finished run all of whose costs are ``cost``."""
    point = Point(cost, float(cost), cost, cost, metric, None if earlier is None else 0.0)
    return Result("digits", contender, seed, 1e-3, "", earlier, (point,))


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- The frontier, and what is said of a contender


@pytest.mark.parametrize(
    ("cost", "expected"),
    [(1.0, 0.5), (2.0, 0.7), (2.5, 0.8), (3.0, 0.9), (5.0, 0.8), (0.99, None), (7.01, None)],
)
def test_the_frontier_is_linear_between_dense_runs_and_silent_beyond_them(cost, expected):
    found = at_cost([(1.0, 0.5), (3.0, 0.9), (7.0, 0.7)], cost)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_contender_is_ahead_of_the_frontier_of_its_own_seed():
    results = [
        *(result(DENSE, seed, 100, 0.90 + 0.02 * seed) for seed in (0, 1)),
        *(result(FEWER, seed, 50, 0.80 + 0.04 * seed) for seed in (0, 1)),
        result(TOPK, 0, 75, 0.86),  # dense: 0.85
        result(TOPK, 1, 60, 0.85),  # dense: 0.84 + 0.02
    ]
    dense, fewer, topk = summarise(results, ACCURACY)
    assert topk.ahead["seconds"].value == pytest.approx((0.01 - 0.006) / 2)
    assert topk.shares["flops"].value == pytest.approx((0.75 + 0.60) / 2)
    assert topk.metric.value == pytest.approx(0.855)
    assert set(dense.ahead.values()) == set(fewer.ahead.values()) == {None}


def test_one_seed_beyond_the_frontier_leaves_no_number():
    results = [result(DENSE, seed, 100, 0.9) for seed in (0, 1)] + [result(FEWER, seed, 50, 0.8) for seed in (0, 1)]
    results += [result(TOPK, 0, 75, 0.9), result(TOPK, 1, 49, 0.9)]
    assert summarise(results, ACCURACY)[-1].ahead["seconds"] is None


def test_a_smaller_loss_is_ahead():
    results = [result(DENSE, 0, 100, 2.0), result(FEWER, 0, 50, 3.0), result(TOPK, 0, 75, 2.4)]
    assert summarise(results, LOSS)[-1].ahead["seconds"].value == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("metric", "dense", "own", "cost", "expected"),
    [
        (ACCURACY, 0.970, 0.966, 60, True),
        (ACCURACY, 0.970, 0.964, 60, False),
        (ACCURACY, 0.970, 0.980, 61, False),
        (LOSS, 2.00, 2.019, 60, True),
        (LOSS, 2.00, 2.021, 60, False),
        (LOSS, 2.00, 1.9, 61, False),
    ],
)
def test_what_is_near_dense_in_sixty_per_cent_of_its_seconds_is_bold(metric, dense, own, cost, expected):
    lines = summarise([result(DENSE, 0, 100, dense), result(TOPK, 0, cost, own)], metric)
    assert lines[1].stands_out is expected
    assert ("**TopK**" in table(lines, metric)) is expected
    assert "**dense**" not in table(lines, metric)


def test_forgetting_is_the_first_task_before_minus_after():
    lines = summarise([result(DENSE, seed, 9, 0.9, earlier=0.8 + seed / 10) for seed in (0, 1)], ACCURACY)
    assert lines[0].forgetting.value == pytest.approx(0.85)
    assert "forgetting" in table(lines, ACCURACY)
    assert "forgetting" not in table(summarise([result(DENSE, 0, 9, 0.9)], ACCURACY), ACCURACY)


# --- Tuning


def test_the_best_rate_is_that_of_the_best_validation():
    made = [Trial("digits", TOPK, lr, value) for lr, value in ((1e-3, 0.8), (2e-3, 0.9), (4e-3, math.nan))]
    assert best_rates(made, ACCURACY) == {TOPK: 2e-3}
    assert best_rates(made, LOSS) == {TOPK: 1e-3}
    made.append(Trial("digits", DENSE, 4e-3, math.nan))
    assert best_rates(made, LOSS) == {TOPK: 1e-3, DENSE: 4e-3}


def test_tuning_looks_at_no_test_data(tmp_path):
    """With test data that would poison whatever touches them, the trials are the same."""
    given = plan(tmp_path, steps=8)
    task = task_of(given, "digits")
    split = task.split
    poison = Part(torch.full_like(split.test.inputs, math.nan), torch.full_like(split.test.target, 99))
    entered = [DENSE, TOPK]
    trials = [
        [trial for trial, _ in tuning.trials(given, "digits", of, task.metric, task.network(0), entered)]
        for of in (split, replace(split, test=poison))
    ]
    assert trials[0] == trials[1]
    assert len(trials[0]) == len(entered) * len(given.lrs)


def test_a_trial_is_judged_on_validation(tmp_path):
    given = plan(tmp_path, steps=8, lrs=(1e-3,))
    task = task_of(given, "digits")
    ((trial, steps),) = tuning.trials(given, "digits", task.split, task.metric, task.network(0), [DENSE])
    again = Run(given, DENSE, task.network(0), task.split.train, 8, 1e-3, tuning.TUNING_SEED)
    again.take_turn(8)
    assert trial.validation == measure(again.network, task.split.validation, task.metric)
    assert steps == 8


def test_a_final_run_has_the_rate_that_tuning_chose(finished):
    made, results = finished
    for task in made.tasks:
        trials = [line for line in lines_of(made.out / "tuning.csv") if line["task"] == task]
        assert len(trials) == len(contenders(made)) * len(made.lrs)
        for contender in contenders(made):
            own = [line for line in trials if line["contender"] == contender.name]
            best = max(own, key=lambda line: float(line["validation"]))
            assert {of.lr for of in results_of(results, contender, task)} == {float(best["lr"])}
        assert tuning.TUNING_SEED not in {of.seed for of in results}


@pytest.mark.parametrize("contender", [DENSE, TOPK], ids=lambda one: one.name)
def test_a_final_run_is_judged_on_test_data(contender, finished):
    made, results = finished
    task = task_of(made, "digits")
    found = results_of(results, contender)[1]
    again = Run(made, contender, task.network(1), task.split.train, 60, found.lr, seed=1)
    again.take_turn(60)
    assert found.end.metric == measure(again.network, task.split.test, ACCURACY)


def test_validation_is_a_tenth_of_the_training_data_that_no_run_is_trained_on(digits):
    split = split_off(digits, "cpu")
    rows = [{tuple(row) for row in part.inputs.tolist()} for part in (split.train, split.validation)]
    assert len(split.validation.target) == len(digits.train_target) // 10
    assert len(split.train.target) + len(split.validation.target) == len(digits.train_target)
    assert rows[0] | rows[1] == {tuple(row) for row in digits.train_inputs.tolist()}
    assert len(rows[0] & rows[1]) <= 2  # digits has examples that are there twice
    assert torch.equal(split.test.inputs, digits.test_inputs)


# --- Runs


@pytest.mark.parametrize(("share", "steps"), [(1.0, 60), (0.5, 30), (0.1, 6), (0.001, 1)])
def test_fewer_steps_end_a_schedule_of_their_own(share, steps):
    assert Contender("dense", steps_share=share).steps(60) == steps
    assert learning_rate(0.1, 0, steps) == 0.1
    assert learning_rate(0.1, steps, steps) == pytest.approx(0)
    rates = [learning_rate(0.1, step, steps) for step in range(steps)]
    assert rates == sorted(rates, reverse=True)


def test_a_step_is_taken_with_its_rate(tmp_path, digits):
    made = Run(plan(tmp_path), FEWER, mlp((64, 8, 10), 0), split_off(digits, "cpu").train, 10, 0.1, 0)
    seen = []
    for step in range(5):
        made.take_turn(1)
        seen.append(made.trainer.optimizer.param_groups[0]["lr"])
        assert seen[step] == learning_rate(0.1, step, 5)


def test_the_contenders_of_a_seed_begin_alike_and_see_the_same_examples(tmp_path, digits):
    given, train = plan(tmp_path), split_off(digits, "cpu").train
    start = mlp((64, 24, 16, 10), 0)
    runs = {one: Run(given, one, start, train, 60, 1e-3, seed=5) for one in contenders(given)}
    batches = {one: [] for one in runs}
    for one, of in runs.items():
        of.trainer.loss_fn = lambda output, target, seen=batches[one]: (
            seen.append(target),
            nn.functional.cross_entropy(output, target),
        )[1]
        of.take_turn(min(of.steps, 20))
    whole = torch.cat(batches[DENSE])
    for one, of in runs.items():
        seen = torch.cat(batches[one])
        assert torch.equal(seen, whole[: len(seen)]), one
        assert {len(batch) for batch in batches[one]} == {one.batch(32)}
        if one.batch_share == 1:
            assert of.trainer.history.loss[0] == runs[DENSE].trainer.history.loss[0], one
    assert len({id(of.network) for of in runs.values()}) == len(runs)
    assert all(
        torch.equal(*pair) for pair in zip(start.parameters(), mlp((64, 24, 16, 10), 0).parameters(), strict=True)
    )


def test_the_first_step_of_a_turn_counts_as_the_median_of_the_others():
    assert turn_seconds([9.0, 1.0, 2.0, 3.0]) == 8.0
    assert turn_seconds([9.0]) == 9.0


@pytest.mark.parametrize("shares", [(1.0, 0.5, 0.04), (0.5, 0.3)])
def test_turns_take_every_run_to_its_end_and_shorter_ones_sit_out(shares):
    class Counted:
        def __init__(self, steps):
            self.steps, self.done = steps, 0

        def take_turn(self, count):
            self.done += count

    runs = [Counted(round(1000 * share)) for share in shares]
    turns = {id(of): [] for of in runs}
    for of, count in take_turns(runs):
        turns[id(of)].append(count)
        assert of.done == sum(turns[id(of)])
        behind = [of.done / of.steps - runs[0].done / runs[0].steps for of in runs]
        assert all(abs(share) <= 2 * TURN / of.steps for share, of in zip(behind, runs, strict=True))
    for of in runs:
        assert of.done == of.steps
        assert all(count >= min(TURN, of.steps) for count in turns[id(of)][:-1])


def test_costs_grow_by_the_rows_that_are_kept(finished):
    _, results = finished
    for seed in (0, 1):
        ends = {of.contender: of.end for of in results if of.task == "digits" and of.seed == seed}
        dense, few, many = ends[DENSE], ends[TOPK], ends[Contender("TopK", 0.5)]
        for cost in ("parameter_updates", "flops"):
            assert getattr(few, cost) < getattr(many, cost) < getattr(dense, cost)
            assert getattr(ends[FEWER], cost) == getattr(dense, cost) // 2
        half = ends[Contender("dense", batch_share=0.5)]
        assert (half.parameter_updates, half.flops) == (dense.parameter_updates, dense.flops // 2)
        # K of O rows of (48, 64) and (32, 48), and all of (10, 32), each with its bias
        assert few.parameter_updates == 60 * (5 * 65 + 4 * 49 + 10 * 33)


def test_a_dense_first_contender_begins_densely(tmp_path, digits):
    made = Run(
        plan(tmp_path),
        Contender("DenseFirst+TopK", 0.1),
        mlp((64, 24, 10), 0),
        split_off(digits, "cpu").train,
        20,
        1e-3,
        0,
    )
    made.take_turn(4)
    updates = made.trainer.history.parameter_updates
    whole, few = 24 * 65 + 10 * 25, 3 * 65 + 10 * 25
    assert updates == [whole, 2 * whole, 2 * whole + few, 2 * whole + 2 * few]


@pytest.mark.parametrize("kind", POLICIES)
def test_every_policy_trains(kind, tmp_path, digits):
    split = split_off(digits, "cpu")
    made = Run(plan(tmp_path), Contender(kind, 0.25), mlp((64, 24, 16, 10), 0), split.train, 30, 5e-3, 0)
    before = measure(made.network, split.test, ACCURACY)
    made.take_turn(30)
    assert made.sparse == "2 of 3"
    assert measure(made.network, split.test, ACCURACY) > before


# --- Tasks


def test_fine_tuning_moves_from_one_half_of_the_classes_to_the_other(tmp_path):
    task = task_of(plan(tmp_path), "digits-classes")
    for name in ("train", "validation", "test"):
        assert set(getattr(task.earlier, name).target.tolist()) == {0, 1, 2, 3, 4}
        assert set(getattr(task.split, name).target.tolist()) == {5, 6, 7, 8, 9}
    assert task.network(0)[-1].out_features == 10


def test_the_first_task_is_measured_among_its_classes(tmp_path):
    task = task_of(plan(tmp_path), "digits-classes")

    class Sure(nn.Module):
        """Names class 3 where it may, and class 7 before it."""

        def forward(self, x):
            return torch.eye(10)[3].expand(len(x), 10) + 2 * torch.eye(10)[7]

    share = (task.earlier.test.target == 3).float().mean().item()
    assert run._earlier_metric(task, Sure()) == pytest.approx(share)
    assert measure(Sure(), task.earlier.test, ACCURACY) == 0
    assert measure(Sure(), Part(torch.zeros(2, 1), torch.tensor([7, 6])), ACCURACY, slice(5, 10)) == 0.5


def test_fine_tuning_begins_with_a_network_that_knows_the_first_task(tmp_path):
    given = plan(tmp_path, steps=200)
    task = task_of(given, "digits-classes")
    start = run.start_of(given, task, 0)
    assert measure(start, task.earlier.test, ACCURACY) > 0.9
    assert measure(start, task.split.test, ACCURACY) == 0
    assert run.start_of(given, task_of(given, "digits"), 0)[0].weight.equal(task.network(0)[0].weight)


def test_every_contender_of_a_fine_tuning_seed_begins_with_what_was_learned(finished):
    _, results = finished
    for seed in (0, 1):
        before = {of.earlier_before for of in results if of.task == "digits-classes" and of.seed == seed}
        assert len(before) == 1
    assert {of.earlier_before for of in results_of(results, DENSE)} == {None}


@pytest.mark.parametrize("place", [TEXT, TEXT.name, ""], ids=["in its folder", "in the folder", "the file itself"])
def test_a_text_is_found_where_it_may_lie(place, tmp_path):
    path = tmp_path / (place or "text")
    path.parent.mkdir(exist_ok=True)
    path.write_text("banana")
    text = load_text(tmp_path if place else path)
    assert text.vocabulary == "abn"
    assert text.codes.tolist() == [1, 0, 2, 0, 2, 0]


def test_a_missing_text_is_an_error_that_says_where_it_comes_from(tmp_path):
    with pytest.raises(ValueError, match=r"input\.txt of tiny Shakespeare is not in .*github\.com/karpathy/char-rnn"):
        load_text(tmp_path)


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b"\xff\xfe\xfd", "is no text in UTF-8")])
def test_a_file_that_is_no_text_is_an_error(content, words, tmp_path):
    (tmp_path / TEXT.name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_text(tmp_path)


def test_windows_are_every_run_of_characters_and_the_one_after():
    inputs, target = windows(torch.arange(6), 3)
    assert inputs.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert target.tolist() == [3, 4, 5]


def test_the_language_model_is_judged_on_text_that_it_was_not_trained_on(tmp_path):
    text = "".join(chr(32 + code) for code in torch.randint(90, (5000,)).tolist())
    (tmp_path / TEXT.name).write_text(text)
    given = plan(tmp_path, data_dir=tmp_path)
    task = task_of(given, "shakespeare")
    codes = load_text(tmp_path).codes
    parts = {"train": codes[:4050], "validation": codes[4050:4500], "test": codes[4500:]}
    for name, of in parts.items():
        found = getattr(task.split, name)
        whole = {tuple(row) for row in torch.cat(windows(of, 16)[:1], 1).tolist()}
        assert {tuple(row) for row in found.inputs.tolist()} == whole
    first = Run(given, TOPK, task.network(0), task.split.train, 40, 1e-2, 0)
    assert measure(first.network, task.split.test, LOSS) == pytest.approx(math.log(90), rel=0.1)
    assert first.sparse == "2 of 3"


def test_a_language_model_learns_a_text_that_repeats(tmp_path):
    (tmp_path / TEXT.name).write_text(LINES)
    given = plan(tmp_path, data_dir=tmp_path)
    task = task_of(given, "shakespeare")
    made = Run(given, Contender("TopK", 0.5), task.network(0), task.split.train, 40, 1e-2, 0)
    before = measure(made.network, task.split.test, task.metric)
    made.take_turn(40)
    assert measure(made.network, task.split.test, task.metric) < before / 3


def test_equal_seeds_give_equal_character_networks_and_leave_the_global_generator_alone():
    stream = torch.get_rng_state()
    first, second, other = (character_mlp(5, 3, 2, (4,), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert first(torch.zeros(7, 3, dtype=torch.int64)).shape == (7, 5)


@pytest.mark.parametrize(
    ("metric", "expected"), [(ACCURACY, 2 / 3), (LOSS, -(2 * math.log(0.75) + math.log(0.25)) / 3)]
)
def test_a_metric_is_the_mean_over_examples(metric, expected):
    class Same(nn.Module):
        def forward(self, x):
            return torch.tensor([0.75, 0.25]).log().expand(len(x), 2)

    part = Part(torch.zeros(3000, 1), (torch.arange(3000) % 3 == 0).long())
    assert measure(Same(), part, metric) == pytest.approx(expected, rel=1e-5)


# --- What is written


def test_the_files_hold_the_tables_the_conditions_and_the_figures(finished):
    made, results = finished
    text = (made.out / "policies.md").read_text()
    for task in made.tasks:
        own = [of for of in results if of.task == task]
        assert f"## {task}" in text
        assert table(summarise(own, ACCURACY), ACCURACY) in text
    assert "0.001, 0.004, for every contender alike" in text
    assert all(f"- {name}: " in text for name in ("hardware", "threads", "versions", "command"))
    figures = sorted(path.name for path in made.out.glob("*.png"))
    assert figures == sorted(
        [f"{task}_against_{what}.png" for task in made.tasks for what in ("seconds", "steps")]
        + ["digits-classes_forgetting.png"]
    )
    assert all((made.out / name).read_bytes().startswith(PNG) for name in figures)
    assert not list(made.out.glob("*.partial"))


def test_the_csv_holds_every_point(finished):
    made, results = finished
    lines = lines_of(made.out / "policies.csv")
    assert len(lines) == sum(len(of.points) for of in results)
    last = results[-1].end
    assert (int(lines[-1]["step"]), float(lines[-1]["metric"])) == (last.step, last.metric)
    assert float(lines[-1]["earlier_metric"]) == last.earlier_metric
    assert lines[0]["earlier_metric"] == lines[0]["density"] == ""
    assert all(of.end.step == of.contender.steps(60) for of in results)


def test_the_csv_of_an_interrupted_run_holds_the_seeds_that_are_done(tmp_path, monkeypatch):
    race = run._race

    def interrupted(plan_, task, rates, seed, bar):
        if seed == 1:
            raise KeyboardInterrupt
        return race(plan_, task, rates, seed, bar)

    monkeypatch.setattr(run, "_race", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run(plan(tmp_path, steps=4), progress=False)
    assert {line["seed"] for line in lines_of(tmp_path / "policies.csv")} == {"0"}
    assert (tmp_path / "tuning.csv").exists()


SMALL = [
    *("--tasks", "digits", "--policies", "TopK,Uniform", "--densities", "0.1", "--dense-shares", "0.5"),
    *("--batch-shares", "0.5", "--lrs", "1e-3", "--seeds", "1", "--steps", "6", "--hidden", "16,8", "--quiet"),
]


def test_the_command_runs(tmp_path, capsys):
    assert main(["policies", *SMALL, "--out", str(tmp_path), "--break-even", "off"]) == 0
    shown = capsys.readouterr().out
    assert "| Uniform" in shown
    assert "±" not in shown.partition("## What")[0]  # a single seed has no interval
    assert shown.partition("## What")[0].strip() in (tmp_path / "policies.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "imagenet"], "the tasks are digits, mnist"),
        (["--policies", "BottomK"], "the policies are RandomWalk"),
        (["--densities", "0.1,x"], "numbers, separated by commas"),
        (["--densities", "-0.1"], "density"),
        (["--densities", "0.1,0.1"], "one of the densities is there twice"),
        (["--dense-shares", "1.5"], "a dense share must be above 0 and below 1; given 1.5"),
        (["--batch-shares", "0"], "a batch share must be above 0 and below 1; given 0"),
        (["--lrs", "0"], "a learning rate must be above 0"),
        (["--seeds", "0"], "seeds must be at least 1; given 0"),
        (["--steps", "0"], "steps must be at least 1; given 0"),
        (["--batch-size", "5000"], "a batch of 5000 is more than the"),
        (["--dx", "half"], "dx"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--tasks", "shakespeare", "--data-dir", "/nowhere"], "github.com/karpathy/char-rnn"),
    ],
)
def test_a_wrong_command_line_ends_with_two_and_says_what_is_wrong(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_tune", lambda *_: pytest.fail("training began"))
    try:
        status = main(["policies", *SMALL, "--out", str(tmp_path), *arguments])
    except SystemExit as leaving:  # argparse's own
        status = leaving.code
    assert status == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["policies", *SMALL, "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


# --- Bias and variance


def test_bias_and_variance_are_those_of_the_draws():
    spread = variance.Spread(torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64))
    for drawn in ([[6.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]):
        spread.add(torch.tensor(drawn, dtype=torch.float64), kept=1)
    kept, bias, noise, found = spread.summary()
    assert kept == 0.5
    assert bias == pytest.approx(2 / 5)  # the mean is (3, 2)
    assert found == pytest.approx((9 + 4) / 25)
    assert noise == pytest.approx(math.sqrt(found / 2))


@pytest.mark.parametrize(("density", "rows"), [(0.05, 512), (0.5, 100), (1.0, 16), (0.01, 10)])
def test_so_many_uniform_walks_visit_that_share(density, rows):
    walks = variance.paths_for(density, rows)
    visited = [1 - (1 - 1 / rows) ** number for number in (walks - 1, walks, walks + 1)]
    wanted = min(density, 1 - 1 / rows)
    assert min(visited, key=lambda share: abs(share - wanted)) == pytest.approx(visited[1], abs=1 / rows)


def test_an_unbiased_policy_shows_the_noise_as_its_bias_and_a_biased_one_more(tmp_path, capsys):
    lines = variance.run(plan(tmp_path, densities=(0.4,), hidden=(24, 16)), progress=False)
    assert {line.policy for line in lines} == {"RandomWalk", "AdaptiveWalk", "Uniform", "Magnitude"}
    for line in lines:
        if line.unbiased:
            assert line.bias < 1.5 * line.noise, line
        elif line.kept < 1:
            assert line.bias > 3 * line.noise, line
        if line.policy in ("Uniform", "Magnitude"):
            assert line.kept == pytest.approx(0.4, abs=0.05)
    found = lines_of(tmp_path / "variance.csv")
    assert [float(line["bias"]) for line in found] == [line.bias for line in lines]
    assert variance.table(lines) in (tmp_path / "variance.md").read_text()
    assert variance.table(lines) in capsys.readouterr().out


def test_the_variance_of_networks_where_nothing_is_sparse_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(variance, "measure_task", lambda *_: [])
    assert main(["policies", *SMALL, "--out", str(tmp_path), "--variance"]) == 2
    assert "no row-sparse backward would pay" in capsys.readouterr().err


# --- What choosing takes


@pytest.mark.usefixtures("one_thread", "short_turns")
def test_the_overhead_of_every_policy_is_measured_beside_its_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "ROUNDS", 2)
    plain = [name for name in POLICIES if "+" not in name]
    given = plan(tmp_path, policies=tuple(POLICIES), densities=(0.25,), hidden=(48, 32))
    lines = overhead.run(given, progress=False)
    assert [line.policy for line in lines] == plain
    assert all(line.choosing > 0 and line.share.least > 0 and line.times_dense.least > 0 for line in lines)
    assert "784-48-32-10" in capsys.readouterr().out
    assert (tmp_path / "overhead.md").exists()
    assert len((tmp_path / "overhead.csv").read_text().splitlines()) == 1 + len(plain)


def test_choosing_leaves_in_the_buffers_what_a_step_leaves_there(tmp_path):
    for policy in (TopK(0.25), AdaptiveWalk(density=0.25), LearnedWalk(density=0.25)):
        sparse = rwfx.transform(mlp((64, 24, 16, 10), 0), rows=policy, seed=0)
        overhead.choosing(sparse, 8)()
        state = sparse.sampler_state()
        noted = [value for name, value in state.items() if "seen" in name or "chosen" in name]
        assert len(noted) == 2
        assert all(value.count_nonzero() for value in noted)
