"""A run that was stopped at any moment and resumed is the run that was never stopped."""

import multiprocessing
import random
import signal

import pytest
import torch
from killable import STEPS, global_order, make_trainer, own_order, run, sampler_order, seed_everything, weights
from torch import nn

from rwfx import checkpoint as checkpoints
from rwfx.files import replacing
from rwfx.train import RandomWalkTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_equal(here, there):
    assert here.keys() == there.keys()
    for name in here:
        assert torch.equal(here[name], there[name]), name


RESUMED = [
    ("rw_sparse", loader, every) for loader in (global_order, own_order, sampler_order) for every in (1, 5, None)
]
RESUMED += [("rw_masked", own_order, 5), ("full", global_order, 5), ("full", own_order, 1)]
RESUMED += [("gse of all weights", global_order, 5), ("gse of all weights", own_order, 1)]


@pytest.mark.parametrize(("mode", "loader", "every"), RESUMED)
def test_a_run_stopped_after_any_step_and_resumed_ends_with_the_same_weights(mode, loader, every, tmp_path):
    undisturbed = make_trainer(mode)
    undisturbed.fit(loader())
    for stop in [1, 7, 8, 9, 23]:  # an epoch has eight steps
        path = tmp_path / f"stopped-{stop}.pt"
        stopped = make_trainer(mode, path, checkpoint_every=every)
        records = stopped.steps(loader())
        for _ in range(stop):
            next(records)
        resumed = make_trainer(mode, path, checkpoint_every=every)
        seed_everything(99)  # the resumed process knows nothing of the streams of the first one
        if not path.exists():
            assert stop < (every or 8)
            continue
        history = resumed.fit(loader(), resume=True)
        assert_equal(weights(resumed), weights(undisturbed))
        assert history.step == list(range(1, STEPS + 1))
        assert history.loss == undisturbed.history.loss
        assert history.parameter_updates == undisturbed.history.parameter_updates


def test_a_run_with_evaluations_is_the_run_without_them():
    plain = make_trainer("full")
    plain.fit(global_order())
    evaluated = make_trainer("full", eval_every=2)
    history = evaluated.fit(global_order(), global_order())
    assert_equal(weights(evaluated), weights(plain))
    assert [
        step for step, accuracy in zip(history.step, history.test_accuracy, strict=True) if accuracy is not None
    ] == [*range(2, STEPS + 1, 2)]


@pytest.mark.parametrize(
    ("mode", "loader"),
    [
        ("rw_sparse", "global_order"),
        ("rw_masked", "sampler_order"),
        ("gse of all weights", "global_order"),
        ("graest", "own_order"),
        ("snfs", "sampler_order"),
        ("topkast", "own_order"),
        ("full", "own_order"),
    ],
)
def test_a_process_killed_at_random_steps_and_started_again_ends_with_the_same_weights(mode, loader, tmp_path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch._dynamo"])  # imported once, not by every process

    def start(name, ends):
        listening, telling = processes.Pipe(duplex=False)
        process = processes.Process(target=run, args=(mode, loader, str(tmp_path / name), telling, ends))
        process.start()
        telling.close()
        return process, listening

    undisturbed, _ = start("undisturbed", ends=True)
    done = 0
    for kill in sorted(random.Random(mode).sample(range(3, STEPS), 4)):
        process, listening = start("killed", ends=False)
        while done < kill:
            done = listening.recv()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        done = len(checkpoints.load(tmp_path / "killed.pt").history["step"])
        assert done >= kill - 2
    last, listening = start("killed", ends=True)
    for process in (last, undisturbed):
        process.join()
        assert process.exitcode == 0
    assert done == STEPS or listening.recv() == done + 1  # it went on from there
    assert_equal(torch.load(tmp_path / "killed.weights"), torch.load(tmp_path / "undisturbed.weights"))


@pytest.fixture
def checkpoint_file(tmp_path):
    path = tmp_path / "run.pt"
    records = make_trainer("full", path, checkpoint_every=2).steps(own_order())
    for _ in range(5):
        next(records)
    return path


def test_an_existing_checkpoint_is_not_overwritten_unless_resumed(checkpoint_file):
    before = checkpoint_file.read_bytes()
    with pytest.raises(ValueError, match=r"run\.pt.*exists already.*resume=True"):
        make_trainer("full", checkpoint_file).fit(own_order())
    assert checkpoint_file.read_bytes() == before


def test_resuming_without_a_file_starts_from_the_beginning(tmp_path):
    trainer, plain = make_trainer("full", tmp_path / "new" / "run.pt"), make_trainer("full")
    seed_everything(2)
    trainer.fit(own_order(), resume=True)
    seed_everything(2)
    plain.fit(own_order())
    assert_equal(weights(trainer), weights(plain))
    assert (tmp_path / "new" / "run.pt").exists()


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    finished = make_trainer("full", tmp_path / "run.pt")
    finished.fit(own_order())
    again = make_trainer("full", tmp_path / "run.pt")
    assert again.fit(own_order(), resume=True) == finished.history
    assert_equal(weights(again), weights(finished))


def truncate(content):
    return content[: len(content) // 2]


def flip_a_bit(content):
    middle = content.rindex(b"data/", 0, len(content) // 2) + 200
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, lambda content: b"", lambda content: b"not a checkpoint"],
    ids=["truncated", "one bit", "empty", "text"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_changes(damage, checkpoint_file):
    checkpoint_file.write_bytes(damage(checkpoint_file.read_bytes()))
    trainer = make_trainer("full", checkpoint_file)
    before, state = weights(trainer), checkpoints.random_state()
    with pytest.raises(ValueError, match=r"run\.pt.*cannot be read"):
        trainer.fit(own_order(), resume=True)
    assert_equal(weights(trainer), before)
    assert torch.equal(torch.get_rng_state(), state["torch"])
    assert len(trainer.history) == 0
    assert trainer.optimizer.state_dict()["state"] == {}


def test_a_torch_file_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="does not hold what RandomWalkTrainer writes"):
        make_trainer("full", tmp_path / "run.pt").fit(own_order(), resume=True)


@pytest.mark.parametrize(
    ("mode", "options", "loader", "words"),
    [
        (
            "rw_sparse",
            {},
            own_order,
            r"mode is 'rw_sparse' here and 'full' in the file.*num_paths=3\)' here",
        ),
        ("full", {"lr": 0.5}, own_order, r"lr is 0\.5 here and 0\.01 in the file"),
        (
            "full",
            {"optimizer": "sgd"},
            own_order,
            r"optimizer is 'torch.*SGD' here and 'torch.*Adam' in the file",
        ),
        ("full", {}, global_order, r"generators of the loader is 0 here and 1 in the file"),
    ],
    ids=["mode", "lr", "optimizer", "loader"],
)
def test_a_checkpoint_of_another_configuration_is_refused_with_what_differs(
    mode, options, loader, words, checkpoint_file
):
    trainer = make_trainer(mode, checkpoint_file, **options)
    before = weights(trainer)
    with pytest.raises(ValueError, match=rf"run\.pt.*another run.*{words}"):
        trainer.fit(loader(), resume=True)
    assert_equal(weights(trainer), before)


def test_a_checkpoint_of_another_model_is_refused_with_the_entry_that_differs(checkpoint_file):
    other = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 3))
    trainer = RandomWalkTrainer(other, "full", lr=0.01, checkpoint=checkpoint_file, progress=False)
    words = r"'3\.weight' is 'float32 \(9, 16\)' here and 'float32 \(8, 16\)' in the file"
    with pytest.raises(ValueError, match=words):
        trainer.fit(own_order(), resume=True)


def test_another_number_of_paths_is_another_run(tmp_path):
    make_trainer("rw_sparse", tmp_path / "run.pt", epochs=1).fit(own_order())
    other = RandomWalkTrainer(nn.Linear(6, 3), num_paths=4, lr=0.01, checkpoint=tmp_path / "run.pt", progress=False)
    with pytest.raises(ValueError, match=r"num_paths=4\)' here and 'RandomWalk\(num_paths=3\)' in the file"):
        other.fit(own_order(), resume=True)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_half_way():
        with replacing(path) as file:
            file.write(b"ne")
            raise KeyError("half way")

    with pytest.raises(KeyError):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_loader_whose_workers_live_on_is_refused_with_a_checkpoint(tmp_path):
    model = torch.nn.Linear(3, 2)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randint(2, (8,)))
    loader = torch.utils.data.DataLoader(data, 4, num_workers=1, persistent_workers=True)
    trainer = RandomWalkTrainer(model, "full", checkpoint=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="persistent_workers=False"):
        trainer.fit(loader)


@pytest.mark.parametrize("field", ["model", "optimizer", "sampler", "history", "epoch", "epoch_start", "now"])
def test_a_checkpoint_damaged_inside_changes_nothing(tmp_path, field):
    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randint(2, (8,)))
    loader = torch.utils.data.DataLoader(data, 4)

    def trainer():
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        return RandomWalkTrainer(model, checkpoint=tmp_path / "run", progress=False)

    trainer().fit(loader)
    content = torch.load(tmp_path / "run")
    content[field] = None
    torch.save(content, tmp_path / "run")
    resumed = trainer()
    before = {name: value.clone() for name, value in resumed.model.state_dict().items()}
    with pytest.raises(ValueError, match="checkpoint"):
        resumed.fit(loader, resume=True)
    torch.testing.assert_close(dict(resumed.model.state_dict()), before, rtol=0, atol=0)
    assert not resumed.optimizer.state_dict()["state"]
