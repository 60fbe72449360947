"""The ways to choose rows beside dense runs of the same cost, learning rates tuned alike.

    python -m rwfx.experiments policies --tasks mnist,shakespeare --densities 0.05,0.1,0.25 --seeds 5

For every task, each policy at each density, dense, dense with fewer steps and dense with a smaller batch: a rate of a
common grid is chosen on validation data, then all are trained with several seeds, in turns, and judged on test data.
Tasks: digits, mnist, fashion-mnist; shakespeare, a character language model; classes (MNIST's digits 0-4, then 5-9),
transfer (MNIST, then Fashion-MNIST) and digits-classes, fine-tuning, where what is forgotten is measured too.

Written are ``policies.md``, ``policies.csv`` (after every seed), ``tuning.csv`` and figures.
"""

import os
import tempfile
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from rwfx.experiments.extras import require
from rwfx.experiments.machine import as_markdown, check_device, conditions
from rwfx.experiments.policies import figures
from rwfx.experiments.policies.contenders import DENSE, Contender, contenders
from rwfx.experiments.policies.plan import Plan, check_plan
from rwfx.experiments.policies.report import Row, TrialRow, legend, rows_of, section, trial_rows
from rwfx.experiments.policies.runs import Point, Result, Run, take_turns
from rwfx.experiments.policies.tasks import Task, measure, task_of
from rwfx.experiments.policies.tuning import TUNING_SEED, Trial, best_rates, trials
from rwfx.experiments.tables import write_csv
from rwfx.files import replacing

FIRST_LR = 1e-3
"""The learning rate of the dense training before fine-tuning."""


def run(plan: Plan, *, progress: bool = True) -> list[Result]:
    """Compare the policies on every task, write the files into ``plan.out`` and print the tables.

    Raises:
        ValueError, ImportError: something about the plan, the data or the machine will not do; before any training.
    """
    check(plan)
    tasks = [task_of(plan, name) for name in plan.tasks]
    for task in tasks:
        for contender in contenders(plan):  # refuses an option of transform, or a batch that is too large
            Run(plan, contender, task.network(0), task.split.train, 1, FIRST_LR, 0)
    results: list[Result] = []
    made: list[Trial] = []
    text = ""
    with tqdm(
        total=sum(_steps(plan, task) for task in tasks), unit="step", mininterval=0.5, disable=not progress
    ) as bar:
        for task in tasks:
            tuned = _tune(plan, task, bar)
            made += tuned
            write_csv(plan.out / "tuning.csv", TrialRow, trial_rows(made))
            rates = best_rates(tuned, task.metric)
            for seed in range(plan.seeds):
                results += _race(plan, task, rates, seed, bar)
                write_csv(plan.out / "policies.csv", Row, rows_of(results))
            own = [result for result in results if result.task == task.name]
            figures.draw(plan, task, own)
            text += f"{section(plan, task, own)}\n\n"
            with replacing(plan.out / "policies.md", "w") as file:
                file.write(f"# Policies\n\n{text}{_about(plan)}\n")
    print(f"\n{text}{_about(plan)}\n\nwritten: {os.fspath(plan.out)}/")
    return results


def check(plan: Plan) -> None:
    """Refuse, before any work, what would fail after some."""
    check_plan(plan)
    check_surroundings(plan.device, plan.out)


def check_surroundings(device: str, out: Path) -> None:
    """Refuse a device that is not there, a package that is missing for figures, or a folder that cannot be written."""
    check_device(device)
    for package in ("matplotlib", "scipy"):
        require(package)
    check_folder(out)


def check_folder(out: Path) -> None:
    """Make the folder, and refuse one that cannot be written to.

    Raises:
        ValueError: with the system's own reason.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"folder {os.fspath(out)!r} cannot be written to: {error.strerror}") from error


def start_of(plan: Plan, task: Task, seed: int) -> nn.Module:
    """Make the network that every contender of a seed begins with: trained densely where there is an earlier task."""
    network = task.network(seed)
    if task.earlier is None:
        return network
    first = Run(plan, DENSE, network, task.earlier.train, plan.steps_of(task.name), FIRST_LR, seed)
    first.take_turn(first.steps)
    return first.network


def _tune(plan: Plan, task: Task, bar: tqdm) -> list[Trial]:
    start = _start(plan, task, TUNING_SEED, bar)
    bar.set_description(f"{task.name}: tuning")
    made = []
    for trial, steps in trials(plan, task.name, task.split, task.metric, start, contenders(plan)):
        made.append(trial)
        bar.set_postfix_str(f"{trial.contender.name}, lr {trial.lr:g}: {trial.validation:.4g}", refresh=False)
        bar.update(steps)
    return made


def _race(plan: Plan, task: Task, rates: dict[Contender, float], seed: int, bar: tqdm) -> list[Result]:
    """Train every contender with the seed, in turns, and judge each at the ends of some."""
    start = _start(plan, task, seed, bar)
    before = _earlier_metric(task, start)
    runs = [
        Run(plan, one, start, task.split.train, plan.steps_of(task.name), rates[one], seed) for one in contenders(plan)
    ]
    points: dict[Contender, list[Point]] = {one.contender: [] for one in runs}
    bar.set_description(f"{task.name}: seed {seed + 1} of {plan.seeds}")
    for one, count in take_turns(runs):
        bar.update(count)
        share, past = (done * plan.evaluations // one.steps for done in (one.done, one.done - count))
        if share > past:
            metric = measure(one.network, task.split.test, task.metric)
            earlier = _earlier_metric(task, one.network)
            points[one.contender].append(
                Point(one.done, one.seconds, one.parameter_updates, one.flops, metric, earlier)
            )
            bar.set_postfix_str(f"{one.contender.name}: {metric:.4g}", refresh=False)
    return [
        Result(task.name, one.contender, seed, one.lr, one.sparse, before, tuple(points[one.contender])) for one in runs
    ]


def _start(plan: Plan, task: Task, seed: int, bar: tqdm) -> nn.Module:
    bar.set_description(f"{task.name}: seed {seed}")
    start = start_of(plan, task, seed)
    bar.update(_first_steps(plan, task))
    return start


def _earlier_metric(task: Task, network: nn.Module) -> float | None:
    return task.earlier and measure(network, task.earlier.test, task.metric, task.earlier_classes)


def _first_steps(plan: Plan, task: Task) -> int:
    return 0 if task.earlier is None else plan.steps_of(task.name)


def _steps(plan: Plan, task: Task) -> int:
    """How many steps the runs of a task take together."""
    of_each = sum(contender.steps(plan.steps_of(task.name)) for contender in contenders(plan))
    return (len(plan.lrs) + plan.seeds) * of_each + (1 + plan.seeds) * _first_steps(plan, task)


def _about(plan: Plan) -> str:
    options = "".join(f", {name} {value}" for name, value in plan.transform_options.items())
    found = {
        "run": f"{', '.join(plan.tasks)}; batch {plan.batch_size}, {plan.seeds} seeds, eager{options}",
        **conditions(plan.device),
    }
    return f"## What the columns mean\n\n{legend(plan)}\n\n## Conditions\n\n{as_markdown(found)}"
