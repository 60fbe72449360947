"""The report of a comparison: for each task a table with a line per contender, and what its columns mean."""

from collections.abc import Sequence
from dataclasses import dataclass

from rwfx.experiments.policies.plan import Plan
from rwfx.experiments.policies.runs import TURN, Result
from rwfx.experiments.policies.summary import COSTS, FAST, Line, summarise
from rwfx.experiments.policies.tasks import Metric, Task
from rwfx.experiments.policies.tuning import TUNING_SEED, Trial
from rwfx.experiments.summary import Mean
from rwfx.experiments.tables import markdown

LEGEND = (
    "*lr*: the learning rate that was best for this contender on validation; every one falls by a cosine to zero over "
    "the contender's own steps.",
    "*row-sparse*: how many of the weights have a row-sparse backward; it would not pay for the others, or they were "
    "asked to stay dense.",
    "*seconds*, *FLOPs*, *updates*: of the whole run, over those of `dense`, of the same seed. Seconds are measured, "
    "of forward, backward, optimizer and `zero_grad`; FLOPs are those of products of matrices, of which a sparse "
    "backward has those of the rows that it keeps and the columns that are read; updates are scalars that the "
    "optimizer changed.",
    "*ahead at equal ...*: how much better the metric is than what dense runs with fewer steps reach at the "
    "same cost, linearly between the two nearest of them, of the same seed; above 0 is better than dense. Empty where "
    "no dense run is as cheap or as dear, and for those dense runs themselves.",
    "*forgetting*: the accuracy on the first task before fine-tuning minus that after it, the answer chosen among the "
    "first task's classes: among all classes, networks that were fine-tuned on others name hardly any but these.",
    "± is half a 95 % interval of the mean over seeds (Student's).",
)


@dataclass(frozen=True)
class Row:
    """A point of a final run, as a line of ``policies.csv``."""

    task: str
    contender: str
    density: float | None
    steps_share: float
    batch_share: float
    lr: float
    seed: int
    row_sparse: str
    step: int
    seconds: float
    parameter_updates: int
    flops: int
    metric: float
    earlier_metric: float | None
    earlier_before: float | None


@dataclass(frozen=True)
class TrialRow:
    """A trial, as a line of ``tuning.csv``."""

    task: str
    contender: str
    lr: float
    validation: float


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Give every point as a line of ``policies.csv``."""
    return [
        Row(
            result.task,
            result.contender.kind,
            result.contender.density,
            result.contender.steps_share,
            result.contender.batch_share,
            result.lr,
            result.seed,
            result.sparse,
            **vars(point),
            earlier_before=result.earlier_before,
        )
        for result in results
        for point in result.points
    ]


def trial_rows(made: Sequence[Trial]) -> list[TrialRow]:
    """Give every trial as a line of ``tuning.csv``."""
    return [TrialRow(trial.task, trial.contender.name, trial.lr, trial.validation) for trial in made]


def section(plan: Plan, task: Task, results: Sequence[Result]) -> str:
    """Give the table of a task, with what was trained."""
    lines = summarise(results, task.metric)
    sizes = ", ".join(f"{len(getattr(task.split, part).target):,} {part}" for part in ("train", "validation", "test"))
    about = f"{task.about}; {sizes}; {plan.steps_of(task.name)} steps of {plan.batch_size}, {plan.seeds} seeds."
    near = "half a point of `dense` or above" if task.metric.sign > 0 else "one per cent of `dense` or below"
    bold = f"Bold: within {near}, in at most {FAST:.0%} of its seconds."
    if not any(line.stands_out for line in lines):
        bold += " None is."
    return f"## {task.name}\n\n{about}\n\n{table(lines, task.metric)}\n\n{bold}"


def legend(plan: Plan) -> str:
    """Say what the columns mean, and how the rates were chosen and the seconds taken."""
    grid = ", ".join(f"{lr:g}" for lr in plan.lrs)
    how = (
        f"Learning rates: {grid}, for every contender alike; one run each with the seed {TUNING_SEED}, judged on a "
        "tenth of the training data that no run is trained on. The final runs are judged on test data.",
        "The contenders of a seed begin with the same weights and see the same examples in the same order. They take "
        f"turns of {TURN} steps; the first step of a turn counts as long as the median of the others.",
    )
    return "\n".join(f"- {sentence}" for sentence in (*LEGEND, *how))


def table(lines: Sequence[Line], metric: Metric) -> str:
    """Give ``lines`` as a Markdown table."""
    digits = 2 if metric.scale == 100 else 3
    forgetful = any(line.forgetting for line in lines)
    header = ["contender", "density", "lr", "row-sparse", f"{metric.name}, {metric.unit}"]
    header += [COSTS[cost] for cost in ("seconds", "flops", "parameter_updates")]
    header += [f"ahead at equal {name}" for name in COSTS.values()]
    header += ["forgetting, points"] * forgetful
    cells = []
    for line in lines:
        of, policy = line.contender, line.contender.density is not None
        own = [
            of.kind if policy else of.name,
            f"{of.density:g}" if policy else "",
            f"{line.lr:g}",
            line.sparse,
            worded(line.metric, metric.scale, digits),
            worded(line.shares["seconds"], 1, 2),
            *(f"{line.shares[cost].value:.2f}" for cost in ("flops", "parameter_updates")),
            *("" if mean is None else worded(mean, metric.scale, digits, "+") for mean in line.ahead.values()),
        ]
        if forgetful:
            own.append(worded(line.forgetting, 100, 2) if line.forgetting else "")
        cells.append([f"**{cell}**" if line.stands_out and cell else cell for cell in own])
    return markdown(header, cells)


def worded(number: Mean, scale: float, digits: int, sign: str = "") -> str:
    """Write a mean with its interval, such as ``97.31 ± 0.12``."""
    text = f"{scale * number.value:{sign}.{digits}f}"
    return text if number.half_width is None else f"{text} ± {scale * number.half_width:.{digits}f}"
