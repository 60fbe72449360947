"""What the trainer promises: the plain training loop, its cost counted, and runs that do not meet."""

import csv
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rwfx.optim
import rwfx.train
from rwfx.cost import dense_flops
from rwfx.history import COLUMNS
from rwfx.sparse_module import SparseModule
from rwfx.train import OPTIMIZERS, RandomWalkTrainer

MODES = ["rw_sparse", "rw_masked", "full"]
WIDTHS = (6, 32, 16, 3)
EXAMPLES, BATCH = 64, 16


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    first, second, third, last = WIDTHS
    return nn.Sequential(
        nn.Linear(first, second), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(second, third), nn.ReLU(), nn.Linear(third, last),
    )  # fmt: skip


def make_loader(seed=0):
    """Three classes that a small network tells apart at once."""
    generator = torch.Generator().manual_seed(7)
    target = torch.arange(EXAMPLES) % 3
    centres = 2 * torch.randn(3, WIDTHS[0], generator=generator)
    inputs = centres[target] + 0.3 * torch.randn(EXAMPLES, WIDTHS[0], generator=generator)
    shuffling = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(inputs, target), BATCH, shuffle=True, generator=shuffling)


def make_trainer(mode="full", *, model=None, **options):
    options = {"num_paths": 4, "lr": 0.01, "progress": False, "epochs": 3, **options}
    return RandomWalkTrainer(model or make_model(), mode, **options)


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_full_is_the_plain_loop_with_torch_optim(name):
    trainer = make_trainer(model=make_model(dropout=0.2), optimizer=name)
    torch.manual_seed(3)
    trainer.fit(make_loader())

    model = make_model(dropout=0.2)
    optimizer = getattr(torch.optim, OPTIMIZERS[name])(model.parameters(), lr=0.01, fused=True)
    torch.manual_seed(3)
    loader = make_loader()
    for _ in range(3):
        for inputs, target in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), target).backward()
            optimizer.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert torch.equal(weights(trainer), expected)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_in_place(mode):
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    history = make_trainer(mode, model=model, epochs=25, num_paths=8).fit(make_loader(), make_loader())
    assert history.test_accuracy[-1] is not None
    assert history.test_accuracy[-1] > 0.9
    assert all(not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_the_network_shares_the_parameters_and_the_keys_of_the_model(mode):
    trainer = make_trainer(mode)
    assert trainer.network.state_dict().keys() == trainer.model.state_dict().keys()
    shared = zip(trainer.network.parameters(), trainer.model.parameters(), strict=True)
    assert all(here is there for here, there in shared)


@pytest.mark.parametrize(
    ("mode", "namesakes"), [("rw_sparse", rwfx.optim), ("rw_masked", rwfx.optim), ("full", torch.optim)]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_named_optimizer_is_of_torch_optim_for_full_and_of_rwfx_optim_for_rows(mode, namesakes, name):
    assert type(make_trainer(mode, optimizer=name).optimizer) is getattr(namesakes, OPTIMIZERS[name])


def test_an_optimizer_can_be_made_by_a_function_of_the_trainable_parameters():
    model = make_model()
    next(model.parameters()).requires_grad_(False)
    trainer = make_trainer(model=model, optimizer=lambda parameters: torch.optim.RMSprop(parameters, lr=0.02))
    (group,) = trainer.optimizer.param_groups
    assert group["lr"] == 0.02
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]
    trainer.fit(make_loader())


def dense_count(batch):
    forward = [2 * batch * inputs * outputs for inputs, outputs in pairwise(WIDTHS)]
    return 3 * sum(forward) - forward[0]  # the input needs no gradient


def test_always_sparse_trains_a_model_of_its_own_whose_connections_move():
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    topology = {"interval": 4, "end": 60, "distribution": "grabo"}
    trainer = make_trainer("always_sparse", model=model, epochs=25, density=0.5, lr=0.02, topology=topology)
    nonzeros = trainer.network.nnz
    history = trainer.fit(make_loader(), make_loader())
    assert history.test_accuracy[-1] > 0.9
    assert trainer.topology.updates == min(15, len(history) // 4)
    assert trainer.network.nnz == nonzeros
    assert all(torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))
    report = trainer.network.report.flops
    step = dense_count(BATCH) + BATCH * (report.executed("gse", 4, 1.0) - report.executed_dense)
    assert history.flops == [round(step) * n for n in history.step]


def test_full_costs_every_parameter_and_every_dense_operation():
    history = make_trainer().fit(make_loader())
    scalars = sum(parameter.numel() for parameter in make_model().parameters())
    assert history.parameter_updates == [scalars * step for step in history.step]
    assert history.flops == [dense_count(BATCH) * step for step in history.step]


def test_counting_operations_leaves_gradients_buffers_and_random_streams_alone():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    inputs = torch.randn(4, 6)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    assert dense_flops(model, [inputs])[0] == 2 * (2 * 4 * 6 * 5)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", ["rw_sparse", "rw_masked"])
def test_a_row_run_updates_the_scalars_of_its_rows_and_no_others(mode):
    trainer = make_trainer(mode)
    past, before = 0, [parameter.detach().clone() for parameter in trainer.model.parameters()]
    for record in trainer.steps(make_loader()):
        assert isinstance(trainer.network, SparseModule)
        rows = trainer.network.rows
        fan_in = {name: value.shape[1] for name, value in trainer.model.named_parameters() if value.dim() == 2}
        expected = sum(len(rows[name]) * (fan_in[name] + 1) for name in fan_in)
        assert record.parameter_updates - past == expected
        after = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        changed = sum(int((new != old).sum()) for new, old in zip(after, before, strict=True))
        assert changed <= expected
        past, before = record.parameter_updates, after


def test_masked_costs_the_dense_operations_and_sparse_fewer():
    counts = {mode: make_trainer(mode).fit(make_loader()).flops[-1] for mode in MODES}
    assert counts["rw_masked"] == counts["full"]
    assert counts["rw_sparse"] < counts["full"]


def test_with_every_row_visited_sparse_costs_the_dense_operations():
    counts = {mode: make_trainer(mode, num_paths=5000).fit(make_loader()).flops[-1] for mode in MODES}
    assert counts["rw_sparse"] == counts["full"]


def test_seconds_are_those_of_training_alone(monkeypatch, tmp_path):
    class Clock:
        now = 0.0

    class SlowLoader:
        def __init__(self):
            self.loader = make_loader()

        def __iter__(self):
            for batch in self.loader:
                Clock.now += 100
                yield batch

    def slow_loss(output, target):
        Clock.now += 1
        return F.cross_entropy(output, target)

    def slow_save(*arguments):
        Clock.now += 1000

    monkeypatch.setattr(rwfx.train.time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(rwfx.train.checkpoints, "save", slow_save)
    trainer = make_trainer(loss_fn=slow_loss, checkpoint=tmp_path / "run.pt", checkpoint_every=1, eval_every=1)
    history = trainer.fit(SlowLoader(), SlowLoader())
    assert history.seconds == [float(step) for step in history.step]


@pytest.mark.parametrize(
    ("eval_every", "evaluated"),
    [(None, [4, 8, 12]), (5, [5, 10, 12]), (100, [12])],
    ids=["epoch", "five", "end"],
)
def test_the_accuracy_is_there_where_the_run_was_evaluated_and_nowhere_else(eval_every, evaluated):
    trainer = make_trainer(eval_every=eval_every)
    history = trainer.fit(make_loader(), make_loader())
    assert [record.step for record in history if record.test_accuracy is not None] == evaluated
    assert history.test_accuracy[-1] == trainer.evaluate(make_loader())


def test_runs_that_take_turns_are_the_runs_on_their_own():
    alone = [weights(trainer) for trainer in map(make_trainer, MODES) if trainer.fit(make_loader())]
    trainers = [make_trainer(mode) for mode in MODES]
    for records in zip(*(trainer.steps(make_loader()) for trainer in trainers), strict=True):
        assert len({record.step for record in records}) == 1
    for trainer, expected in zip(trainers, alone, strict=True):
        assert torch.equal(weights(trainer), expected)


def test_the_seed_decides_the_rows_and_the_global_generator_does_not():
    def trained(seed, global_seed):
        trainer = make_trainer("rw_sparse", seed=seed)
        torch.manual_seed(global_seed)
        trainer.fit(make_loader())
        return weights(trainer)

    assert torch.equal(trained(seed=1, global_seed=1), trained(seed=1, global_seed=2))
    assert not torch.equal(trained(seed=1, global_seed=1), trained(seed=2, global_seed=1))


def test_a_second_fit_goes_on_from_the_first():
    twice, once = make_trainer(epochs=1), make_trainer(epochs=2)
    loader = make_loader()
    twice.fit(loader)
    history = twice.fit(loader)
    assert once.fit(make_loader()).loss == history.loss
    assert history.step == list(range(1, 9))


def test_the_history_as_csv_is_the_history(tmp_path):
    history = make_trainer(eval_every=5).fit(make_loader(), make_loader())
    history.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    for name, column in history.columns().items():
        assert list(columns[name]) == ["" if value is None else str(value) for value in column]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "sparse"}, "mode must be one of 'rw_sparse', 'rw_masked', 'always_sparse', 'full'; given 'sparse'"),
        ({"mode": None}, "given None"),
        ({"num_paths": 0}, "num_paths must be a whole number from 1 or None; given 0"),
        ({"num_paths": "50"}, "num_paths must be a whole number from 1 or None; given '50'"),
        ({"num_paths": True}, "num_paths must be a whole number from 1 or None; given True"),
        ({"epochs": 0}, "epochs must be a whole number from 1; given 0"),
        ({"eval_every": -1}, "eval_every must be a whole number from 1 or None; given -1"),
        ({"checkpoint": "x", "checkpoint_every": 0.5}, "checkpoint_every must be a whole number from 1 or"),
        ({"checkpoint_every": 5}, "checkpoint_every=5 needs a file"),
        ({"optimizer": "rmsprop"}, "optimizer must be one of 'sgd', 'adam', 'adamw' or a function"),
        ({"optimizer": 3}, "given 3"),
        ({"epsilon": 0.1}, "'full' transforms nothing, so it takes no ['epsilon']"),
        ({"topology": {"end": 9}}, "mode 'full' moves no connections, so it takes no topology={'end': 9}"),
        ({"model": "mlp"}, "model must be an nn.Module, given str"),
        ({"model": nn.ReLU()}, "ReLU has no parameter that requires a gradient"),
    ],
)  # fmt: skip
def test_an_argument_outside_what_is_allowed_is_an_error_that_says_so(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make_trainer(**{"mode": "full", **arguments})


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ([], "(list) gave no batch in epoch 1"),
        (iter([(torch.zeros(2, 6), torch.zeros(2).long())]), "gave no batch in epoch 2"),
        ([torch.zeros(2, 6)], "a batch must be a sequence of tensors (input, ..., target), given Tensor"),
        ([(torch.zeros(2, 6), 3)], "given ['Tensor', 'int']"),
        ([{"x": torch.zeros(2, 6)}], "given dict"),
    ],
)
def test_a_loader_that_cannot_be_trained_on_is_an_error_that_says_why(loader, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make_trainer().fit(loader)


def test_resuming_needs_a_file():
    with pytest.raises(ValueError, match="resume=True needs the file"):
        make_trainer().fit(make_loader(), resume=True)


def test_the_bar_shows_the_loss_and_is_silent_when_not_wanted(capsys):
    make_trainer(progress=True).fit(make_loader(), make_loader())
    shown = capsys.readouterr().err
    assert "full" in shown
    assert "12/12" in shown
    assert "loss=" in shown
    make_trainer(progress=False).fit(make_loader())
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_run_is_the_eager_run_up_to_rounding(mode):
    eager, compiled = make_trainer(mode), make_trainer(mode, compile=True)
    eager.fit(make_loader())
    torch._dynamo.utils.counters.clear()
    compiled.fit(make_loader(), make_loader())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(weights(compiled), weights(eager))


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_given_by_name_is_the_fused_one(mode):
    """With ``examples=`` alone gradients are dense, and an update tensor by tensor would take longer than is saved."""
    assert make_trainer(mode).optimizer.defaults["fused"]
