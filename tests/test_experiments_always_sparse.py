"""A comparison of always-sparse methods trains what it says, counts it, and goes on where it was stopped."""

import csv
import functools
from dataclasses import replace

import pytest
import torch

from rwfx.experiments.always_sparse import run
from rwfx.experiments.always_sparse.contenders import network_of, small_width
from rwfx.experiments.always_sparse.entries import Entry, Result, contenders, final_entry
from rwfx.experiments.always_sparse.plan import CHOICES, Plan, check_plan
from rwfx.experiments.always_sparse.report import headline
from rwfx.experiments.always_sparse.runs import Run, learning_rate
from rwfx.experiments.always_sparse.summary import summarise
from rwfx.experiments.always_sparse.tasks import task_of
from rwfx.experiments.book import entry_of
from rwfx.experiments.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

PNG = b"\x89PNG"


def plan(out="", **changes):
    return Plan(
        **{
            "out": out,
            "dataset": "digits",
            "methods": ("static", "dense"),
            "densities": (0.3, 0.1),
            "seeds": 2,
            "steps": 6,
            "hidden": (24, 16),
            "evaluations": 2,
            "batch_size": 32,
            "interval": 2,
            **changes,
        }
    )


@functools.cache
def digits():
    return task_of(plan())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small comparison: its plan and its results."""
    made = plan(tmp_path_factory.mktemp("always-sparse"), lrs=(1e-3, 4e-3))
    return made, run.run(made, progress=False)


def trained(of, method, density=0.3, lr=1e-3):
    one = Run(of, digits(), final_entry(of, method, density, 0, lr))
    assert list(one.train())[-1] == of.steps
    return one


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def result(method, density, seed, accuracy):
    return Result(
        *("digits", "mlp", method, density, seed, 1e-3, "p", 100, 50, 1000, 10),
        *(1.0, 0.1, 2.0, 1e6, 1e6, accuracy),
    )


def test_every_method_is_run_at_every_density_beside_both_dense_networks(finished):
    made, results = finished
    expected = [("dense", 1.0), ("static", 0.3), ("small-dense", 0.3), ("static", 0.1), ("small-dense", 0.1)]
    assert contenders(made) == expected
    assert [(of.method, of.density, of.seed) for of in results] == [(*of, seed) for seed in (0, 1) for of in expected]


def test_the_files_hold_what_was_run(finished):
    made, results = finished
    assert len(lines_of(made.out / "runs.csv")) == len(results)
    assert len(lines_of(made.out / "curves.csv")) == len(results) * made.evaluations
    assert len(lines_of(made.out / "tuning.csv")) == len(contenders(made)) * len(made.lrs)
    assert len(lines_of(made.out / "summary.csv")) == len(contenders(made))
    for name in ("density", "seconds", "flops"):
        assert (made.out / f"accuracy_against_{name}.png").read_bytes().startswith(PNG)
    text = (made.out / "always_sparse.md").read_text()
    assert "command" in text
    assert "load" in text


def test_each_contender_has_the_rate_that_is_best_on_validation(finished):
    made, results = finished
    trials = lines_of(made.out / "tuning.csv")
    for of in results:
        own = {
            float(trial["lr"]): float(trial["validation"])
            for trial in trials
            if (trial["method"], float(trial["density"])) == (of.method, of.density)
        }
        assert own[of.lr] == max(own.values())


def test_a_line_that_was_lost_is_the_only_run_that_is_done_again(finished, tmp_path, monkeypatch):
    made, results = finished
    for path in made.out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = (tmp_path / "runs.csv").read_text().splitlines(keepends=True)
    (tmp_path / "runs.csv").write_text("".join(lines[:3] + lines[4:]))
    ran = []
    train = Run.train
    monkeypatch.setattr(Run, "train", lambda self: (ran.append(self.entry), train(self))[1])
    again = run.run(replace(made, out=tmp_path), progress=False)
    assert ran == [entry_of(results[2], Entry)]
    assert [(of.accuracy, of.flops) for of in again] == [(of.accuracy, of.flops) for of in results]


def test_what_is_stopped_goes_on_with_the_run_that_it_was_at(tmp_path, monkeypatch):
    made = plan(tmp_path, seeds=1)
    whole = run.run(replace(made, out=tmp_path / "whole"), progress=False)
    step, calls = Run._step, []

    def stopping(self, *batch):
        calls.append(self.entry)
        if len(calls) == 10:  # the fourth step of the second run
            raise KeyboardInterrupt
        step(self, *batch)

    monkeypatch.setattr(Run, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run.run(made, progress=False)
    assert len(lines_of(tmp_path / "runs.csv")) == 1
    done = calls[0]
    calls.clear()
    calls += [done] * 100
    found = run.run(made, progress=False)
    assert done not in calls[100:]
    assert [of.accuracy for of in found] == [of.accuracy for of in whole]


def test_another_plan_is_another_run(finished):
    made, _ = finished
    other = run.Comparison(replace(made, batch_size=16), digits())
    assert not other.runs.done([final_entry(made, "static", 0.3, 0, 1e-3)], other.worded)


@pytest.mark.parametrize("density", [0.3, 0.1])
def test_the_small_dense_network_has_as_many_parameters_as_the_sparse_one_or_hardly_fewer(density):
    made = plan(hidden=(128, 128))
    task = task_of(made)
    sparse, small = (network_of(made, task, method, density, 0) for method in ("static", "small-dense"))
    wanted, found = (sum(p.numel() for p in of.parameters()) for of in (sparse, small))
    assert 0.9 * wanted <= found <= wanted
    assert small_width(made, task, density) < 1


def test_the_operations_of_a_run_are_those_of_its_steps():
    made = plan()
    one = trained(made, "static")
    shapes = [(24, 64), (16, 24), (10, 16)]
    counts = [weight.nnz for weight in one.trained.network.sparse_weights.values()]
    assert sum(counts) == one.nnz == round(0.3 * sum(o * i for o, i in shapes))
    by = [weight.by for weight in one.trained.network.sparse_weights.values()]
    numbers = [n if how == "nonzeros" else o * i for n, how, (o, i) in zip(counts, by, shapes, strict=True)]
    assert one.flops == 6 * 32 * 2 * (2 * numbers[0] + 3 * numbers[1] + 3 * numbers[2])
    assert one.published_flops == 6 * 32 * 2 * 3 * sum(counts)
    dense = trained(made, "dense", 1.0)
    sizes = [o * i for o, i in shapes]
    assert dense.flops == 6 * 32 * 2 * (2 * sizes[0] + 3 * sizes[1] + 3 * sizes[2])


@pytest.mark.parametrize("method", ["gse", "rigl", "set", "snfs", "topkast", "gradual"])
def test_a_method_moves_the_non_zeros_and_its_operations_are_those_of_its_steps_and_updates(method):
    made = plan(steps=8, densities=(0.1,), lrs=(0.01,))
    one = Run(made, digits(), final_entry(made, method, 0.1, 0, 0.01))
    places = {name: weight.keys() for name, weight in one.trained.network.sparse_weights.items()}
    assert one.nnz == (2080 if method == "gradual" else 208)  # of 64 x 24 + 24 x 16 + 16 x 10
    step = one.flops_now()
    assert list(one.train()) == [4, 8]
    assert one.trained.topology.updates == 3  # after steps 2, 4 and 6, three quarters of 8
    assert one.nnz == 208
    moved = [weight.keys() for weight in one.trained.network.sparse_weights.values()]
    assert any(not torch.equal(a, b) for a, b in zip(moved, places.values(), strict=True))
    assert one.topology_seconds > 0
    if method == "gradual":
        assert one.published_flops < 32 * 8 * step.published("gradual")
    else:
        times = 8 if method in ("snfs", "topkast") else 3
        expected = 8 * step.executed("static") + times * step.candidates(method)
        assert one.flops == pytest.approx(32 * expected)
        assert one.published_flops == pytest.approx(32 * 8 * step.published(method, 2))


def test_runs_of_a_seed_move_to_the_same_places():
    made = plan(steps=8)
    first, second = (trained(made, "gse") for _ in range(2))
    for a, b in zip(first.trained.network.parameters(), second.trained.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_too_short_for_an_update_is_refused(tmp_path):
    with pytest.raises(ValueError, match="would never be updated"):
        run.run(plan(tmp_path, methods=("gse",), interval=5), progress=False)


def test_the_bytes_of_a_dense_run_are_four_numbers_a_parameter_with_adam():
    one = trained(plan(), "dense", 1.0)
    assert one.bytes == 4 * 4 * one.parameters + 4 * 6  # and a counter of each tensor


def test_runs_of_a_seed_see_the_same_batches(monkeypatch):
    seen = {}
    step = Run._step
    monkeypatch.setattr(
        Run, "_step", lambda self, x, t: (seen.setdefault(self.entry.method, []).append(x.clone()), step(self, x, t))
    )
    for method in ("static", "dense"):
        trained(plan(augment=True), method)
    assert len(seen["static"]) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen["static"], seen["dense"], strict=True))


def test_a_run_leaves_the_stream_of_others_as_it_was():
    before = torch.get_rng_state()
    trained(plan(), "static")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_rate_falls_by_a_cosine_to_zero():
    rates = [learning_rate(plan(), 0.1, step, 100) for step in (0, 50, 100)]
    assert rates == pytest.approx([0.1, 0.05, 0.0])


def test_epochs_are_passes_over_the_training_examples():
    assert plan(steps=None, epochs=2).steps_of(320) == 20
    assert plan(steps=None).steps_of(320) == 300


def test_the_headline_orders_the_methods_by_their_means():
    runs = [
        result(method, density, seed, accuracy + 0.01 * seed)
        for method, density, accuracy in (("set", 0.1, 0.8), ("gse", 0.1, 0.9), ("dense", 1.0, 0.95))
        for seed in (0, 1)
    ]
    said = headline(summarise(runs)).splitlines()
    assert said[0].startswith("- density 0.1: gse 90.50")
    assert said[0].index("gse") < said[0].index("set")
    assert said[1].startswith("- dense: 95.50")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ("lottery",)}, "the methods are"),
        ({"methods": ()}, "at least one of the methods"),
        ({"densities": (0.1, 0.1)}, "twice"),
        ({"densities": (0.0,)}, "density must be above 0"),
        ({"densities": (1.5,)}, "at most 1"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"epochs": 2.0}, "steps and epochs"),
        ({"lrs": (0.0,)}, "lr must be above 0"),
        *[({name: "no such"}, f"{name} must be one of") for name in CHOICES],
    ],
    ids=str,
)
def test_a_plan_that_makes_no_comparison_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        check_plan(plan(**changes))


def test_a_batch_of_more_than_all_examples_is_refused():
    with pytest.raises(ValueError, match="is more than the"):
        task_of(plan(batch_size=5000))


def test_the_command_runs_what_it_is_asked_for(tmp_path, capsys):
    asked = "always-sparse --dataset digits --methods static --density 0.2 --seeds 1 --steps 2 --hidden 8 --quiet --out"
    assert main([*asked.split(), str(tmp_path)]) == 0
    assert "small-dense" in capsys.readouterr().out
    assert [line["method"] for line in lines_of(tmp_path / "summary.csv")] == ["static", "small-dense"]


def test_what_is_given_beside_a_preset_counts_instead(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "run", lambda plan, progress: asked.append(plan))
    arguments = "always-sparse --preset gse-vit --steps 7 --lr 0.3 --augment off --out"
    assert main([*arguments.split(), str(tmp_path)]) == 0
    (made,) = asked
    assert (made.model, made.steps, made.epochs, made.lrs, made.augment) == ("vit", 7, None, (0.3,), False)
    assert (made.optimizer, made.batch_size, made.interval) == ("sgd", 128, 1000)


def test_the_command_says_what_it_cannot_do(capsys):
    assert main(["always-sparse", "--dataset", "digits", "--density", "2"]) == 2
    assert "density must be above 0" in capsys.readouterr().err
