"""Accuracy against what it cost: dense, masked and sparse runs that take turns in one process.

In: a ``Plan``. Out: a ``Row`` per step of each contender, and the files drawn from them.

A *contender* is one way to train: ``full`` (dense), ``masked@N`` and ``sparse@N`` (N walks a step), and
``dense@N``, the *compute-matched* dense run: it takes its turn only when the step would not make it dearer,
in floating point operations, than ``sparse@N`` is at that moment. Those of one seed begin with the same
weights and see the same batches in the same order; they step in turn (A B C A B C ...), so that a
disturbance of the machine meets all.
"""

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Generator
from tqdm.auto import tqdm

from rwfx.cost import dense_flops
from rwfx.experiments.data import DataSet, TensorLoader, load
from rwfx.experiments.extras import require
from rwfx.experiments.figures import draw_accuracy, draw_step_times
from rwfx.experiments.machine import as_markdown, check_device, conditions
from rwfx.experiments.models import mlp
from rwfx.experiments.summary import summarise, table
from rwfx.experiments.tables import write_csv
from rwfx.files import replacing
from rwfx.history import Record
from rwfx.policies import RandomWalk
from rwfx.train import RandomWalkTrainer

EPOCHS = {"digits": 60, "mnist": 10, "fashion-mnist": 10, "cifar10": 10}
"""Epochs where none are asked for."""

MODES = {"full": "full", "masked": "rw_masked", "sparse": "rw_sparse", "dense": "full"}
"""The kinds of contender, and the trainer's mode of each."""


@dataclass(frozen=True)
class Plan:
    """What to run."""

    dataset: str
    num_paths: tuple[int, ...] = (10, 50, 200)
    seeds: int = 3
    out: Path = Path("results")
    data_dir: Path | None = None
    epochs: int | None = None
    batch_size: int = 128
    hidden: tuple[int, ...] = (256, 128)
    optimizer: str = "adam"
    lr: float = 1e-3
    evaluations: int = 50
    """Evaluations of a run, half of them spread evenly and half with growing distance."""
    device: str = "cpu"
    compile: bool = False
    walk_options: dict[str, Any] = field(default_factory=dict)
    transform_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A contender after one of its steps; see ``rwfx.history.Record``."""

    contender: str
    num_paths: int | None
    seed: int
    step: int
    seconds: float
    parameter_updates: int
    flops: int
    loss: float
    test_accuracy: float | None


@dataclass
class Contender:
    """A way to train, and how far it has come."""

    kind: str
    num_paths: int | None
    trainer: RandomWalkTrainer
    records: Iterator[Record]
    partner: "Contender | None" = None
    """Whose operations may not be exceeded."""
    step_flops: int = 0
    """Operations of the next step; known beforehand for a dense run only."""

    @property
    def name(self) -> str:
        """The kind, with the number of paths where it has one."""
        return self.kind if self.num_paths is None else f"{self.kind}@{self.num_paths}"

    @property
    def flops(self) -> int:
        """Operations so far."""
        history = self.trainer.history
        return history.flops[-1] if history.flops else 0

    def take_turn(self) -> None:
        """Train a step, unless it would cost more than the partner has."""
        if self.partner is None or self.flops + self.step_flops <= self.partner.flops:
            next(self.records)

    def evaluate(self, loader: TensorLoader) -> float | None:
        """Measure the accuracy after the last step; ``None`` before the first step."""
        history = self.trainer.history
        if not history.test_accuracy:
            return None
        if history.test_accuracy[-1] is None:
            history.test_accuracy[-1] = self.trainer.evaluate(loader)
        return history.test_accuracy[-1]

    def rows(self, seed: int) -> list[Row]:
        """Give the history as rows."""
        columns = zip(*self.trainer.history.columns().values(), strict=True)
        return [Row(self.kind, self.num_paths, seed, *record) for record in columns]


def run(plan: Plan, *, progress: bool = True) -> list[Row]:
    """Run ``plan`` and write ``accuracy.csv``, ``accuracy.md`` and the figures into ``plan.out``.

    The CSV is written anew after each seed, so a run that is interrupted leaves the seeds it has done.
    """
    for package in ("matplotlib", "scipy"):
        require(package)  # better missed now than after the training
    _check(plan)
    data = load(plan.dataset, plan.data_dir).to(plan.device)
    epochs = plan.epochs or EPOCHS[plan.dataset]
    steps = epochs * (len(data.train_inputs) // plan.batch_size)
    rows: list[Row] = []
    with tqdm(total=plan.seeds * steps, desc=plan.dataset, unit="step", mininterval=0.5, disable=not progress) as bar:
        for seed in range(plan.seeds):
            bar.set_description(f"{plan.dataset} seed {seed + 1}/{plan.seeds}")
            rows += _race(plan, data, epochs, steps, seed, bar)
            write_csv(plan.out / "accuracy.csv", Row, rows)
    _report(plan, data, epochs, rows)
    return rows


def _race(plan: Plan, data: DataSet, epochs: int, steps: int, seed: int, bar: tqdm) -> list[Row]:
    contenders = _contenders(plan, data, epochs, seed)
    testing = TensorLoader(data.test_inputs, data.test_target, 2048)
    rounds = _evaluation_rounds(steps, plan.evaluations)
    for number in range(1, steps + 1):
        for contender in contenders:
            contender.take_turn()
        if number in rounds:
            found = {contender.name: contender.evaluate(testing) for contender in contenders}
            shown = {name: f"{value:.3f}" for name, value in found.items() if name.startswith(("full", "sparse"))}
            bar.set_postfix(shown, refresh=False)
        bar.update()
    return [row for contender in contenders for row in contender.rows(seed)]


def _contenders(plan: Plan, data: DataSet, epochs: int, seed: int) -> list[Contender]:
    """Make the contenders of a seed, in the order in which they take turns."""
    model = mlp((data.features, *plan.hidden, data.classes), seed).to(plan.device)
    step_flops, _ = dense_flops(model, [data.train_inputs[: plan.batch_size]])

    def contender(kind: str, num_paths: int | None = None, partner: Contender | None = None) -> Contender:
        options = {}
        if MODES[kind] != "full":
            walk = RandomWalk(num_paths, **plan.walk_options)
            options = {"rows": walk, "break_even": False, **plan.transform_options}
        trainer = RandomWalkTrainer(
            copy.deepcopy(model),
            MODES[kind],
            optimizer=plan.optimizer,
            lr=plan.lr,
            epochs=epochs,
            compile=plan.compile,
            seed=seed,
            progress=False,
            # The method is what is compared, also where it does not pay.
            **options,
        )
        order = Generator().manual_seed(seed)
        loader = TensorLoader(data.train_inputs, data.train_target, plan.batch_size, order)
        return Contender(kind, num_paths, trainer, trainer.steps(loader), partner, step_flops)

    contenders = [contender("full")]
    for num_paths in plan.num_paths:
        sparse = contender("sparse", num_paths)
        contenders += [contender("masked", num_paths), sparse, contender("dense", num_paths, partner=sparse)]
    return contenders


def _evaluation_rounds(steps: int, count: int) -> set[int]:
    """Choose about ``count`` rounds, half evenly and half geometrically, with the last one among them."""
    half = max(1, count // 2)
    evenly = {math.ceil(steps * part / half) for part in range(1, half + 1)}
    growing = {math.ceil(steps ** (part / half)) for part in range(half)}
    return evenly | growing


def _report(plan: Plan, data: DataSet, epochs: int, rows: list[Row]) -> None:
    """Draw the figures, and print and write the table with its conditions."""
    widths = "-".join(str(width) for width in (data.features, *plan.hidden, data.classes))
    title = f"{plan.dataset}, MLP {widths}, batch {plan.batch_size}"
    for against, name in {"seconds": "seconds", "parameter_updates": "updates", "flops": "flops"}.items():
        draw_accuracy(rows, against, plan.out / f"accuracy_against_{name}.png", title)
    draw_step_times(rows, plan.out / "step_times.png", title)
    options = {"optimizer": plan.optimizer, "lr": plan.lr, **plan.walk_options, **plan.transform_options}
    found = {
        "data": f"{plan.dataset}, {len(data.train_inputs)} to train on, {len(data.test_inputs)} to test",
        "run": f"MLP {widths}, batch {plan.batch_size}, {epochs} epochs, {plan.seeds} seeds, "
        + ", ".join(f"{name} {value}" for name, value in options.items())
        + f", {'compiled' if plan.compile else 'eager'}",
        **conditions(plan.device),
    }
    text = table(summarise(rows))
    with replacing(plan.out / "accuracy.md", "w") as file:
        file.write(f"# Accuracy: {title}\n\n{text}\n\n{as_markdown(found)}\n")
    print(f"\n{title}\n\n{text}\n\n{as_markdown(found)}\n\nwritten: {os.fspath(plan.out)}/")


def _check(plan: Plan) -> None:
    counts = {"seeds": plan.seeds, "batch size": plan.batch_size, "evaluations": plan.evaluations}
    if plan.epochs is not None:
        counts["epochs"] = plan.epochs
    for name, given in counts.items():
        if given < 1:
            raise ValueError(f"{name} must be at least 1; given {given}.")
    if len(set(plan.num_paths)) < len(plan.num_paths):
        raise ValueError(f"a number of paths is there twice: {plan.num_paths}.")
    check_device(plan.device)
    plan.out.mkdir(parents=True, exist_ok=True)  # better refused now than after the training
