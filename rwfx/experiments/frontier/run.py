"""Fewer rows and fewer examples in the backward pass, beside dense runs: what is reached for which cost.

    python -m rwfx.experiments frontier --tasks mnist,fashion-mnist --seeds 5

For every task each contender is trained for shares of a budget, counted in operations of products of matrices: dense,
with several batch sizes; the rows with the largest gradient; the examples with the largest gradient; both; and
selective backprop in two passes. Batch size and learning rate are chosen on validation data, of a grid common to all;
then all are trained with several seeds, in turns, and judged on test data.
Tasks: digits, mnist, fashion-mnist, noisy-mnist (a fifth of the training labels wrong); shakespeare, a character
language model; cifar10, a network of convolutions; sst2, a transformer that tells sentences.

Written are ``frontier.md``, ``frontier.csv`` and ``tuning.csv`` (a line after every run; what they hold is not run
again, so that a program that was stopped goes on where it is started again) and figures.
"""

import os

from tqdm.auto import tqdm

from rwfx.experiments.book import Book
from rwfx.experiments.frontier.entries import Result, Trial
from rwfx.experiments.frontier.plan import Plan, check_plan
from rwfx.experiments.frontier.race import Race
from rwfx.experiments.frontier.report import legend
from rwfx.experiments.frontier.tasks import task_of
from rwfx.experiments.machine import as_markdown, conditions
from rwfx.experiments.policies.run import check_surroundings
from rwfx.files import replacing


def run(plan: Plan, *, progress: bool = True) -> list[Result]:
    """Compare the contenders on every task, write the files into ``plan.out`` and print the tables.

    Returns:
        The final runs of this plan, those that were there before included.

    Raises:
        ValueError, ImportError: something about the plan, the data or the machine will not do; before any training.
    """
    check(plan)
    tuned, raced = Book(plan.out / "tuning.csv", Trial), Book(plan.out / "frontier.csv", Result)
    process = 1 + max((line.process for line in raced.lines), default=0)
    races = [Race(plan, task_of(plan, name), tuned, raced, process) for name in plan.tasks]
    results: list[Result] = []
    with tqdm(
        total=sum(race.operations for race in races),
        unit="FLOP",
        unit_scale=True,
        mininterval=0.5,
        disable=not progress,
    ) as bar:
        text = ""
        for race in races:
            race.tune(bar)
            for seed in range(plan.seeds):
                race.run_seed(seed, bar)
                _write(plan, text + race.section())
            race.draw()
            text += f"{race.section()}\n\n"
            results += race.results
    print(f"\n{_whole(plan, text.strip())}")
    for race in races:
        print(f"\n{race.task.name}: {race.headline()}")
    print(f"\nwritten: {os.fspath(plan.out)}/")
    return results


def check(plan: Plan) -> None:
    """Refuse, before any work, what would fail after some."""
    check_plan(plan)
    check_surroundings(plan.device, plan.out)


def _write(plan: Plan, text: str) -> None:
    with replacing(plan.out / "frontier.md", "w") as file:
        file.write(_whole(plan, text) + "\n")


def _whole(plan: Plan, text: str) -> str:
    found = {"run": f"{', '.join(plan.tasks)}; {plan.seeds} seeds, eager", **conditions(plan.device)}
    return (
        f"# Frontier\n\n{text}\n\n## What is compared\n\n{legend(plan)}\n\n## Conditions of the last process\n\n"
        f"{as_markdown(found)}"
    )
