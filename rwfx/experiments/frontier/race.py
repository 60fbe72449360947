"""A race: all runs of a task, its trials and then its final runs.

In: a plan, a task, and the two books, in which the runs that are done are found and the others are put down as they
end. Out: the task's part of the report, and its figures.
"""

from dataclasses import asdict

from tqdm.auto import tqdm

from rwfx.experiments.book import Book
from rwfx.experiments.frontier import figures
from rwfx.experiments.frontier.contenders import CONTENDERS, trainer_of
from rwfx.experiments.frontier.cost import products_of
from rwfx.experiments.frontier.entries import Entry, Result, Trial, plan_of
from rwfx.experiments.frontier.plan import REFERENCE_BATCH, Plan
from rwfx.experiments.frontier.report import headline, section
from rwfx.experiments.frontier.runs import Run, budget_of, take_turns
from rwfx.experiments.frontier.summary import summarise
from rwfx.experiments.frontier.tuning import choices, final_entries, trial_entries
from rwfx.experiments.policies.runs import row_sparse
from rwfx.experiments.policies.tasks import Task, measure


class Race:
    """The runs of a task: which there are, which are done, and what came of them.

    Raises:
        ValueError: a batch has more examples than there are, or no contender but dense can be trained.
    """

    def __init__(self, plan: Plan, task: Task, tuned: Book[Trial], raced: Book[Result], process: int) -> None:
        self.plan, self.task, self.tuned, self.raced, self.process = plan, task, tuned, raced, process
        self.worded = plan_of(plan, task)
        self.products = products_of(task.network(0), task.split.train.inputs[:2])
        self.refused = refusals(plan, task)
        self.entered = [name for name in ("dense", *plan.contenders) if name not in self.refused]
        self.chosen: list[Trial] = []
        self.results: list[Result] = []

    @property
    def operations(self) -> int:
        """How many operations all runs take together, those that are done included."""
        shares = 0.0
        for name in self.entered:
            trials = trial_entries(self.plan, self.task.name, name)
            many = len(self.plan.batch_sizes) if name == "dense" else 1
            shares += sum(of.share for of in trials) + self.plan.seeds * many * sum(self.plan.shares_of(name))
        return round(shares * self.plan.steps_of(self.task.name) * self.products.dense(REFERENCE_BATCH))

    def tune(self, bar: tqdm) -> None:
        """Choose each contender's batch size and rate."""
        for name in self.entered:
            entries = trial_entries(self.plan, self.task.name, name)
            done = self.tuned.done(entries, self.worded)
            bar.set_description(f"{self.task.name}: tuning {name}")
            for entry in entries:
                if entry in done:
                    _advance(bar, budget_of(self.plan, entry, self.products))
                    continue
                one = self._run(entry)
                while not one.ended:
                    _advance(bar, one.take_turn())
                judged = measure(one.network, self.task.split.validation, self.task.metric)
                bar.set_postfix_str(f"batch {entry.batch}, lr {entry.lr:g}: {judged:.4g}", refresh=False)
                self.tuned.add(Trial(**asdict(entry), plan=self.worded, validation=judged))
            self.chosen += choices(self.tuned.done(entries, self.worded).values(), self.task.metric)

    def run_seed(self, seed: int, bar: tqdm) -> None:
        """Train every contender with the seed, in turns, and judge each at its end."""
        bar.set_description(f"{self.task.name}: seed {seed + 1} of {self.plan.seeds}")
        entries = final_entries(self.plan, self.chosen, seed)
        done = self.raced.done(entries, self.worded)
        _advance(bar, sum(budget_of(self.plan, entry, self.products) for entry in done))
        runs = [self._run(entry) for entry in entries if entry not in done]
        for one, operations in take_turns(runs):
            _advance(bar, operations)
            if one.ended:
                self._finish(one)
        self.results += self.raced.done(entries, self.worded).values()

    def section(self) -> str:
        """Report on the seeds that are done."""
        return section(self.plan, self.task, self.results, self.chosen, self.refused)

    def headline(self) -> str:
        """Say what dense reaches at best, and who reaches it for less."""
        return headline(summarise(self.results, self.task.metric), self.task.metric)

    def draw(self) -> None:
        """Draw the figures, once all seeds are done."""
        figures.draw(self.plan, self.task, summarise(self.results, self.task.metric))

    def _run(self, entry: Entry) -> Run:
        return Run(self.plan, entry, self.task, self.task.network(entry.seed), self.products)

    def _finish(self, one: Run) -> None:
        self.raced.add(
            Result(
                **asdict(one.entry),
                plan=self.worded,
                process=self.process,
                row_sparse=one.row_sparse,
                example_sparse=one.example_sparse,
                steps=one.done,
                examples=one.examples_share,
                flops=one.flops,
                seconds=one.seconds,
                metric=measure(one.network, self.task.split.test, self.task.metric),
            )
        )


def refusals(plan: Plan, task: Task) -> dict[str, str]:
    """Say which contenders ``rwfx.transform`` cannot make of the task's network, and why.

    Raises:
        ValueError: a batch has more examples than there are; or it can make none of those that need it.
    """
    examples = len(task.split.train.target)
    for batch in (*plan.batch_sizes, *plan.sparse_batch_sizes):
        if batch > examples:
            raise ValueError(f"a batch of {batch} is more than the {examples} examples that {task.name} trains on.")
    found = {name: _refusal(plan, task, name) for name in plan.contenders if CONTENDERS[name].two_pass is None}
    refused = {name: reason for name, reason in found.items() if reason}
    if found and len(refused) == len(found):
        raise ValueError(f"{task.name}: {next(iter(refused.values()))}")
    return refused


def _refusal(plan: Plan, task: Task, name: str) -> str:
    inputs = task.split.train.inputs[: max(plan.sparse_batch_sizes)]
    try:
        trainer = trainer_of(plan, name, task.network(0), inputs, plan.lrs[0], 1, 0)
    except ValueError as error:
        return str(error)
    if CONTENDERS[name].rows is not None and row_sparse(trainer.network).startswith("0 "):
        return "no weight of it has a row-sparse backward, or would gain by one."
    return ""


def _advance(bar: tqdm, operations: int) -> None:
    """Move the bar on: a run ends within half a step of its budget, which may be more than was counted on."""
    bar.update(min(operations, bar.total - bar.n))
