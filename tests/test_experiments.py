"""The experiments compare like with like, write what they found, and say what is wrong with what they are given."""

import csv
import gzip
import importlib
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwfx.experiments import accuracy, machine
from rwfx.experiments.accuracy import Plan, Row
from rwfx.experiments.cli import main
from rwfx.experiments.data import TensorLoader, load
from rwfx.experiments.extras import require
from rwfx.experiments.models import mlp
from rwfx.experiments.summary import by_run, mean, step_times, summarise, table

PNG = b"\x89PNG"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A small run of the whole accuracy experiment: its folder and its rows."""
    out = tmp_path_factory.mktemp("digits")
    plan = Plan("digits", num_paths=(3, 20), seeds=2, out=out, epochs=2, hidden=(32, 16), evaluations=6)
    return out, accuracy.run(plan, progress=False)


def runs_of(rows, contender, num_paths=None):
    return by_run(rows)[contender, num_paths]


def test_every_contender_begins_with_the_same_weights_and_the_same_batch(digits_run):
    _, rows = digits_run
    for seed in (0, 1):
        first = {row.loss for row in rows if row.seed == seed and row.step == 1}
        assert len(first) == 1, seed
    assert runs_of(rows, "full")[0][0].loss != runs_of(rows, "full")[1][0].loss


@pytest.mark.parametrize("num_paths", [3, 20])
def test_the_matched_dense_run_costs_as_much_as_its_sparse_partner_and_no_more(digits_run, num_paths):
    _, rows = digits_run
    for seed, run in runs_of(rows, "dense", num_paths).items():
        limit = runs_of(rows, "sparse", num_paths)[seed][-1].flops
        assert limit - run[0].flops < run[-1].flops <= limit


def test_the_matched_dense_run_is_the_beginning_of_full(digits_run):
    _, rows = digits_run
    for seed, run in runs_of(rows, "dense", 3).items():
        full = runs_of(rows, "full")[seed][: len(run)]
        assert [row.loss for row in run] == [row.loss for row in full]
        assert len(run) < len(runs_of(rows, "full")[seed])


def test_masked_costs_the_operations_of_full_and_sparse_the_updates_of_masked(digits_run):
    _, rows = digits_run
    for seed, full in runs_of(rows, "full").items():
        masked, sparse = runs_of(rows, "masked", 3)[seed], runs_of(rows, "sparse", 3)[seed]
        assert masked[-1].flops == full[-1].flops > sparse[-1].flops
        # The walks follow the weights, which are the same at the first step.
        assert masked[0].parameter_updates == sparse[0].parameter_updates < full[0].parameter_updates


def test_every_run_is_evaluated_after_its_last_step(digits_run):
    _, rows = digits_run
    assert all(run[-1].test_accuracy is not None for seeds in by_run(rows).values() for run in seeds.values())


def test_the_csv_holds_the_rows(digits_run):
    out, rows = digits_run
    with open(out / "accuracy.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [
        *("contender", "num_paths", "seed", "step", "seconds"),
        *("parameter_updates", "flops", "loss", "test_accuracy"),
    ]
    expected = [{name: "" if value is None else str(value) for name, value in vars(row).items()} for row in rows]
    assert found == expected


def test_the_files_hold_the_table_the_conditions_and_the_figures(digits_run):
    out, rows = digits_run
    text = (out / "accuracy.md").read_text()
    assert table(summarise(rows)) in text
    assert all(f"- {name}: " in text for name in ("data", "run", "hardware", "threads", "versions", "command"))
    figures = sorted(path.name for path in out.glob("*.png"))
    assert figures == [
        "accuracy_against_flops.png",
        "accuracy_against_seconds.png",
        "accuracy_against_updates.png",
        "step_times.png",
    ]
    assert all((out / name).read_bytes().startswith(PNG) for name in figures)
    assert not list(out.glob("*.partial"))


def test_a_single_seed_has_no_interval(tmp_path, capsys):
    plan = Plan("digits", num_paths=(3,), seeds=1, out=tmp_path, epochs=1, hidden=(8,), evaluations=2)
    accuracy.run(plan, progress=False)
    shown = capsys.readouterr().out
    assert "| FULL" in shown
    assert "±" not in shown
    assert (tmp_path / "step_times.png").exists()


@pytest.mark.parametrize("steps_", [1, 7, 500])
def test_the_last_round_is_evaluated_and_none_beyond_it(steps_):
    rounds = accuracy._evaluation_rounds(steps_, 20)
    assert max(rounds) == steps_
    assert min(rounds) == 1
    assert len(rounds) <= 20


def test_the_interval_is_students():
    found = mean([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert mean([5.0]).half_width is None


def test_a_line_of_the_summary_is_taken_seed_by_seed():
    def run(contender, num_paths, seed, milliseconds, flops):
        accuracies = [None, 0.5, 0.4]
        return [
            Row(contender, num_paths, seed, n, n * milliseconds / 1000, n * 10, n * flops, 1.0, accuracies[n - 1])
            for n in (1, 2, 3)
        ]

    rows = (
        run("sparse", 4, 0, 2, 5)
        + run("sparse", 4, 1, 4, 5)
        + run("full", None, 0, 4, 10)
        + run("full", None, 1, 4, 10)
    )
    full, sparse = summarise(rows)
    assert (full.contender, sparse.contender) == ("full", "sparse")
    assert full.speed.value == 1.0
    assert sparse.speed.value == pytest.approx((4 / 2 + 4 / 4) / 2)
    assert sparse.flops_share.value == 0.5
    assert sparse.final_accuracy.value == pytest.approx(0.4)
    assert sparse.best_accuracy.value == pytest.approx(0.5)
    assert step_times(rows[:3]) == pytest.approx([2, 2, 2])


def test_an_epoch_of_shuffled_batches_holds_every_example_once_in_a_new_order():
    inputs = torch.arange(20).float().unsqueeze(1)
    loader = TensorLoader(inputs, torch.arange(20), 5, torch.Generator().manual_seed(0))
    epochs = [torch.cat([target for _, target in loader]) for _ in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert all(torch.equal(batch.squeeze(1), target.float()) for batch, target in loader)
    again = TensorLoader(inputs, torch.arange(20), 5, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([target for _, target in again]), epochs[0])


def test_a_last_smaller_batch_is_left_out_of_training_and_kept_in_testing():
    inputs, target = torch.zeros(7, 1), torch.arange(7)
    training, testing = TensorLoader(inputs, target, 3, torch.Generator()), TensorLoader(inputs, target, 3)
    assert [len(labels) for _, labels in training] == [3, 3]
    assert len(training) == 2
    assert torch.cat([labels for _, labels in testing]).tolist() == list(range(7))
    assert len(testing) == 3
    with pytest.raises(ValueError, match="a batch of 8 is more than the 7 examples"):
        TensorLoader(inputs, target, 8, torch.Generator())


def test_digits_are_standardised_and_testing_shares_nothing_with_training():
    data = load("digits")
    assert (data.features, data.classes) == (64, 10)
    assert len(data.train_inputs) + len(data.test_inputs) == 1797
    assert data.train_inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train_inputs.std().item() == pytest.approx(1, abs=1e-5)
    assert set(data.test_target.tolist()) == set(range(10))


def write_small_mnist(folder, *, compressed=False):
    """Write MNIST's four files with 20 images to train on and 10 to test, whose pixels are their label."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in {"train": 20, "t10k": 10}.items():
        labels = bytes(index % 10 for index in range(count))
        images = b"".join(bytes([label]) * 784 for label in labels)
        for name, content in {
            f"{part}-images-idx3-ubyte": struct.pack(">4i", 2051, count, 28, 28) + images,
            f"{part}-labels-idx1-ubyte": struct.pack(">2i", 2049, count) + labels,
        }.items():
            path = raw / (name + ".gz" * compressed)
            path.write_bytes(gzip.compress(content) if compressed else content)


@pytest.fixture
def no_download(monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def refuse(self):
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets.MNIST, "download", refuse)


@pytest.mark.usefixtures("no_download")
def test_a_folder_that_holds_the_data_is_read_without_any_download(tmp_path):
    write_small_mnist(tmp_path)
    data = load("mnist", tmp_path)
    assert data.train_inputs.shape == (20, 784)
    assert data.test_inputs.shape == (10, 784)
    assert data.train_target.tolist() == [index % 10 for index in range(20)]
    pixels = torch.arange(10.0)
    expected = (data.train_inputs[:10, 0] - data.train_inputs[0, 0]) / (
        data.train_inputs[1, 0] - data.train_inputs[0, 0]
    )
    torch.testing.assert_close(expected, pixels)


@pytest.mark.usefixtures("no_download")
def test_data_that_is_neither_there_nor_downloadable_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(ValueError, match=r"mnist is not in '.*' and cannot be downloaded \(no network\).*--data-dir"):
        load("mnist", tmp_path)


def test_an_unknown_data_set_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="must be one of digits, mnist, fashion-mnist, cifar10; given 'imagenet'"):
        load("imagenet")


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch):
    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ImportError, match=r'need matplotlib, .*pip install "rwfx\[experiments\]"'):
        require("matplotlib.figure")


def test_equal_seeds_give_equal_networks_and_leave_the_global_generator_alone():
    stream = torch.get_rng_state()
    first, second, other = mlp((4, 3, 2), 1), mlp((4, 3, 2), 1), mlp((4, 3, 2), 2)
    assert torch.equal(torch.get_rng_state(), stream)
    flat = [
        torch.cat([value.flatten() for value in network.state_dict().values()]) for network in (first, second, other)
    ]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["accuracy", "--dataset", "imagenet"], "invalid choice: 'imagenet'"),
        (["accuracy", "--dataset", "digits", "--num-paths", "10,x"], "whole numbers from 1"),
        (["accuracy", "--dataset", "digits", "--num-paths", "0"], "whole numbers from 1"),
        (["accuracy", "--dataset", "digits", "--num-paths", "5,5"], "twice"),
        (["accuracy", "--dataset", "digits", "--seeds", "0"], "seeds must be at least 1; given 0"),
        (["accuracy", "--dataset", "digits", "--epochs", "0"], "epochs must be at least 1; given 0"),
        (["accuracy", "--dataset", "digits", "--batch-size", "2000"], "a batch of 2000 is more than the 1438"),
        (["accuracy", "--dataset", "digits", "--temperature", "-1"], "temperature"),
        ([], "command"),
    ],
)
def test_a_wrong_command_line_ends_with_two_and_says_what_is_wrong(arguments, words, capsys, tmp_path):
    try:
        status = main([*arguments, *(["--out", str(tmp_path), "--quiet"] if arguments else [])])
    except SystemExit as leaving:  # argparse's own
        status = leaving.code
    assert status == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_conditions_name_the_machine_the_versions_and_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/rwfx/experiments/__main__.py", "speed", "--out", "a folder"])
    found = machine.conditions()
    assert found["command"] == "python -m rwfx.experiments speed --out 'a folder'"
    assert torch.__version__ in found["versions"]
    assert "cores" in found["hardware"]


def test_the_original_spelling_runs_the_experiment(tmp_path):
    root = Path(__file__).parents[1]
    arguments = ["--dataset", "digits", "--num-paths", "5", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "examples/run_experiments.py", *arguments],
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| sparse" in done.stdout
    assert "digits seed 1/1" in done.stderr
    assert "examples/run_experiments.py --dataset digits" in (tmp_path / "accuracy.md").read_text()
