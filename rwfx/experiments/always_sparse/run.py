"""Always-sparse training: methods that move the non-zeros, beside one another, fixed ones, and dense networks.

    python -m rwfx.experiments always-sparse --dataset fashion-mnist --density 0.1,0.05,0.02 --seeds 3
    python -m rwfx.experiments always-sparse --preset gse-resnet56 --density 0.02 --device cuda

For every seed, each method at each density, the dense network, and a small dense one with as many parameters: trained
for as many steps, on the same examples in the same order, and judged on test data.
Methods: gse, rigl, set, snfs, topkast, gradual, static, dense. Models: mlp, set-mlp, resnet56, vgg16, vit, wrn22-2.

Written are ``always_sparse.md``, ``runs.csv``, ``curves.csv`` and ``tuning.csv`` (after every run; what they hold is
not run again, so that a program that was stopped goes on where it is started again), ``summary.csv`` and figures.
"""

import os
from dataclasses import asdict
from functools import cached_property

from tqdm.auto import tqdm

from rwfx.experiments.always_sparse import figures
from rwfx.experiments.always_sparse.entries import (
    Entry,
    Point,
    Result,
    Trial,
    contenders,
    final_entry,
    trial_entries,
    worded,
)
from rwfx.experiments.always_sparse.plan import Plan, check_plan
from rwfx.experiments.always_sparse.report import headline, legend, table
from rwfx.experiments.always_sparse.runs import Run
from rwfx.experiments.always_sparse.summary import SummaryRow, curves, rows, summarise
from rwfx.experiments.always_sparse.tasks import ImageTask, task_of
from rwfx.experiments.book import Book, entry_of
from rwfx.experiments.machine import as_markdown, conditions, load
from rwfx.experiments.policies.run import check_surroundings
from rwfx.experiments.policies.tasks import METRICS, measure
from rwfx.experiments.policies.tuning import goodness
from rwfx.experiments.tables import write_csv
from rwfx.files import replacing

ACCURACY = METRICS["accuracy"]


def run(plan: Plan, *, progress: bool = True) -> list[Result]:
    """Compare the methods, write the files into ``plan.out`` and print the table.

    Returns:
        The final runs of this plan, those that were there before included.

    Raises:
        ValueError, ImportError: something about the plan, the data or the machine will not do; before any training.
    """
    check_plan(plan)
    check_surroundings(plan.device, plan.out)
    comparison = Comparison(plan, task_of(plan))
    with tqdm(total=comparison.total_steps, unit="step", mininterval=0.5, disable=not progress) as bar:
        rates = comparison.tune(bar)
        for seed in range(plan.seeds):
            for method, density in contenders(plan):
                comparison.finish(final_entry(plan, method, density, seed, rates[method, density]), bar)
            comparison.write()
    comparison.draw()
    print(f"\n{comparison.text()}\n\nwritten: {os.fspath(plan.out)}/")
    return comparison.results


class Comparison:
    """The runs of a plan: which there are, which are done, and what came of them.

    Raises:
        ValueError: the runs are too short for an update of the topology.
    """

    def __init__(self, plan: Plan, task: ImageTask) -> None:
        self.plan, self.task = plan, task
        self.steps = plan.steps_of(len(task.split.train.target))
        self.worded = worded(plan, self.steps)
        if any(method != "static" for method in plan.sparse_methods) and plan.end_of(self.steps) < plan.interval:
            raise ValueError(
                f"the topology would never be updated: the first update is after {plan.interval} steps, and there are "
                f"none after step {plan.end_of(self.steps)}, {plan.end:g} of {self.steps}. Give a smaller interval."
            )
        self.trials = Book(plan.out / "tuning.csv", Trial)
        self.runs = Book(plan.out / "runs.csv", Result)
        self.curves = Book(plan.out / "curves.csv", Point)
        self.results: list[Result] = []

    @property
    def total_steps(self) -> int:
        """How many steps all runs take together, those that are done included."""
        trials = sum(len(trial_entries(self.plan, *contender)) for contender in contenders(self.plan))
        return self.steps * (trials + self.plan.seeds * len(contenders(self.plan)))

    def tune(self, bar: tqdm) -> dict[tuple[str, float], float]:
        """Give the learning rate of each method at each density."""
        rates = {}
        for method, density in contenders(self.plan):
            entries = trial_entries(self.plan, method, density)
            for entry in entries:
                if self._is_done(self.trials, entry, bar):
                    continue
                one = self._trained(entry, bar, f"tuning {method} at {density:g}, lr {entry.lr:g}")
                validation = measure(one.trained.network, self.task.split.validation, ACCURACY)
                self.trials.add(Trial(**asdict(entry), plan=self.worded, validation=validation))
            judged = self.trials.done(entries, self.worded).values()
            best = max(judged, key=lambda of: goodness(of.validation, ACCURACY), default=None)
            rates[method, density] = self.plan.lrs[0] if best is None else best.lr
        return rates

    def finish(self, entry: Entry, bar: tqdm) -> None:
        """Train a final run, and judge it; one that is done already is taken as it is."""
        if not self._is_done(self.runs, entry, bar):
            about = f"seed {entry.seed + 1} of {self.plan.seeds}: {entry.method} at {entry.density:g}"
            points: list[Point] = []
            one = self._trained(entry, bar, about, points)
            # The points first: of a run whose line is there, they are there too.
            self.curves.add(*points)
            self.runs.add(
                Result(
                    **asdict(entry),
                    plan=self.worded,
                    parameters=one.parameters,
                    nnz=one.nnz,
                    bytes=one.bytes,
                    steps=one.done,
                    seconds=one.seconds,
                    topology_seconds=one.topology_seconds,
                    step_ms=one.step_ms,
                    flops=one.flops,
                    published_flops=one.published_flops,
                    accuracy=points[-1].accuracy,
                )
            )
        self.results += self.runs.done([entry], self.worded).values()

    def write(self) -> None:
        """Write the summary and the report of the runs that are done."""
        write_csv(self.plan.out / "summary.csv", SummaryRow, rows(summarise(self.results)))
        with replacing(self.plan.out / "always_sparse.md", "w") as file:
            file.write(self.text() + "\n")

    def draw(self) -> None:
        """Draw the figures, once all runs are done."""
        done = {entry_of(of, Entry) for of in self.results}
        # Of a run that was killed as its lines were written there may be points twice: the later ones count.
        points = {
            (entry, of.step): of
            for of in self.curves.lines
            if of.plan == self.worded and (entry := entry_of(of, Entry)) in done
        }
        several = self.plan.seeds > 1
        said = f"{self.plan.seeds} seed{'s' * several}" + ", mean and 95 % interval" * several
        about = f"{self.plan.model} on {self.plan.dataset}, {self.steps} steps of {self.plan.batch_size}"
        figures.draw(self.plan, summarise(self.results), curves(list(points.values())), (about, said))

    def text(self) -> str:
        """The report."""
        lines = summarise(self.results)
        found = {"run": f"{self.plan.dataset}: {self.worded}; {self.plan.seeds} seeds, one run after the other"}
        found |= conditions(self.plan.device) | load()
        return (
            f"# Always-sparse training: {self.plan.model} on {self.plan.dataset}\n\n"
            f"{table(lines, self.dense_flops)}\n\n{headline(lines)}\n\n## What is compared\n\n{legend(self.plan)}"
            f"\n\n## Conditions of the last process\n\n{as_markdown(found)}"
        )

    @cached_property
    def dense_flops(self) -> tuple[float, float]:
        """The operations of a dense run, as executed and as published."""
        one = Run(self.plan, self.task, final_entry(self.plan, "static", 0.5, 0, 1.0))
        examples = self.steps * self.plan.batch_size
        flops = one.flops_now()
        return examples * flops.executed_dense, examples * flops.published("dense")

    def _is_done(self, book: Book, entry: Entry, bar: tqdm) -> bool:
        done = bool(book.done([entry], self.worded))
        bar.update(self.steps * done)
        return done

    def _trained(self, entry: Entry, bar: tqdm, about: str, points: list[Point] | None = None) -> Run:
        """Train a run to its end; where there are ``points``, judge it on test data as it is trained."""
        bar.set_description(about)
        one, before = Run(self.plan, self.task, entry), 0
        for done in one.train():
            bar.update(done - before)
            before = done
            if points is not None:
                accuracy = measure(one.trained.network, self.task.split.test, ACCURACY)
                points.append(Point(**asdict(entry), plan=self.worded, step=done, seconds=one.seconds,
                                    flops=one.flops, accuracy=accuracy))  # fmt: skip
                bar.set_postfix_str(f"{accuracy:.2%}", refresh=False)
        return one
