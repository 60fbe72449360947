"""The report of a comparison: for each task what is reached for which cost, every point, and what the columns mean."""

from collections.abc import Mapping, Sequence

from rwfx.experiments.frontier.entries import TUNING_SEED, Result, Trial
from rwfx.experiments.frontier.plan import REFERENCE_BATCH, Plan
from rwfx.experiments.frontier.summary import Line, Reached, Summary, reached_by, summarise
from rwfx.experiments.frontier.tuning import at_the_edge
from rwfx.experiments.policies.report import worded
from rwfx.experiments.policies.runs import TURN
from rwfx.experiments.policies.tasks import Metric, Task
from rwfx.experiments.tables import markdown

LEGEND = (
    "*accuracy*: the share of the test examples whose label has the largest output. *loss*: the mean cross entropy.",
    "*dense's best*: what dense ends with after the whole budget, in the mean over the seeds, with the batch size for "
    "which that is best on test data: the choice among the batch sizes is in dense's favour.",
    "*seconds to it*, *FLOPs to it*: the smallest share of those of dense's best with which a contender's mean is as "
    "good, linearly between its budgets; *at most* where its smallest budget will do, *not reached* where its largest "
    "will not. Nothing is said of budgets that were not run.",
    "*budget*: the share of the whole budget that a run was given, its rate falling by a cosine to zero over it. "
    f"The whole is the FLOPs of the dense steps named above, with a batch of {REFERENCE_BATCH}.",
    "*FLOPs*: of products of matrices, a multiply-add counting 2: forward on all examples, backward on the examples "
    "and the rows that are kept, nothing for the gradient of the network's input; products without a weight, as in "
    "attention, and weights that are not example-sparse, on all examples. Of two passes both forward passes count.",
    "*seconds*: measured, of forward, backward, optimizer and `zero_grad`, over those of dense's best of the same "
    "seed, which took turns with the run.",
    "*examples kept*: the share of the examples that took part in the backward pass; *row-sparse*, *example-sparse*: "
    "how many of the weights had a backward on some of their rows alone, or on the kept examples alone.",
    "± is half a 95 % interval of the mean over seeds (Student's).",
)
NAMES = {
    "dense": "every row of every example; a contender with each batch size",
    "rows-d": "the share d of the rows of each weight, those with the largest gradient (`TopK`)",
    "examples-f": "the share f of the examples, those with the largest gradient at the output (`TopExamples`)",
    "adaptive-s": "as many of them as keep the share s of the squared gradient (`AdaptiveExamples`)",
    "uniform-f": "the share f of the examples, whatever their gradients (`SampledExamples(floor=1)`): the control",
    "both-f": "`examples-f` and `rows-0.25`",
    "two-pass-f": "all examples forward, then densely the share f with the largest gradient: selective backprop",
}


def section(
    plan: Plan, task: Task, results: Sequence[Result], chosen: Sequence[Trial], refused: Mapping[str, str]
) -> str:
    """Give a task's headline and tables, with what was trained."""
    summary = summarise(results, task.metric)
    sizes = ", ".join(f"{len(getattr(task.split, part).target):,} {part}" for part in ("train", "validation", "test"))
    budget = f"budget: {plan.steps_of(task.name)} dense steps of {REFERENCE_BATCH}"
    seeds = len({of.seed for of in results})
    parts = [
        f"## {task.name}",
        f"{task.about}; {sizes}; {budget}; {_count(seeds, 'seed')} of {plan.seeds}.",
        headline(summary, task.metric),
        reached_table(summary, task.metric),
        points_table(summary, task.metric),
        *_remarks(plan, summary, results, chosen, refused),
    ]
    return "\n\n".join(parts)


def headline(summary: Summary, metric: Metric) -> str:
    """Say what dense reaches at best, and which contenders reach it for less."""
    found = []
    for line in summary.lines:
        seconds, flops = _reached(line, summary, metric)
        if line.contender != "dense" and seconds is not None:
            found.append(
                (seconds.cost, f"{line.name} with {_share(seconds)} of its seconds, {_share(flops)} of its FLOPs")
            )
    said = "; ".join(text for _, text in sorted(found)) or "no other contender, with the budgets they were given"
    best = f"{_metric(summary.best, metric)} ({summary.best.name})"
    return f"Dense's best {metric.name} is {best}. It is reached by {said}."


def reached_table(summary: Summary, metric: Metric) -> str:
    """Give a line per contender: its choice, its end, and what it takes to reach dense's best."""
    header = [
        "contender",
        "batch",
        "lr",
        "row-sparse",
        "example-sparse",
        "largest budget",
        f"{metric.name} with it, {metric.unit}",
    ]
    header += ["seconds to dense's best", "FLOPs to it"]
    cells = [
        [
            line.name,
            str(line.batch),
            f"{line.lr:g}",
            line.row_sparse,
            line.example_sparse,
            f"{line.end.share:g}",
            _metric(line, metric),
            *map(_share, _reached(line, summary, metric)),
        ]
        for line in summary.lines
    ]
    return markdown(header, cells)


def points_table(summary: Summary, metric: Metric) -> str:
    """Give a line per contender and budget."""
    header = ["contender", "budget", "steps", "examples kept", f"{metric.name}, {metric.unit}", "seconds", "FLOPs"]
    cells = [
        [
            line.name,
            f"{point.share:g}",
            f"{point.steps:.0f}",
            f"{point.examples:.0%}",
            worded(point.metric, metric.scale, _digits(metric)),
            worded(point.seconds, 1, 2),
            f"{point.flops.value:.3f}",
        ]
        for line in summary.lines
        for point in line.points
    ]
    return markdown(header, cells)


def legend(plan: Plan) -> str:
    """Say what the contenders are and what the columns mean, how was tuned and how the seconds were taken."""
    rates, dense, sparse = (
        ", ".join(f"{value:g}" for value in sorted(of)) for of in (plan.lrs, plan.batch_sizes, plan.sparse_batch_sizes)
    )
    how = (
        f"Tuning: learning rates {rates} with batches of {sparse}, together, the best on validation, a tenth of the "
        f"training data that no run is trained on; dense's rate with each batch of {dense} by itself. One run of each "
        f"with the seed {TUNING_SEED}, for {plan.shares_of('dense')[-1]:g} of the budget for dense and "
        f"{max(plan.sparse_shares):g} for the others. Final runs are judged on test data, at "
        "their ends.",
        "The runs of a seed begin with the same weights, and those of equal batches see the same examples in the same "
        f"order. They take turns of {TURN} steps, such that all have spent the same share of their budgets; the first "
        "step of a turn counts as long as the median of the others.",
    )
    names = "\n".join(f"- `{name}`: {meaning}" for name, meaning in NAMES.items())
    return names + "\n\n" + "\n".join(f"- {sentence}" for sentence in (*LEGEND, *how))


def _remarks(
    plan: Plan, summary: Summary, results: Sequence[Result], chosen: Sequence[Trial], refused: Mapping[str, str]
) -> list[str]:
    """Say what a reader has to know to trust the numbers less."""
    found = [f"- `{name}` cannot be trained on this network: {reason}" for name, reason in refused.items()]
    edges = [f"{Line(of.contender, of.batch, of.lr, '', '', ()).name} ({at_the_edge(plan, of)})" for of in chosen]
    edges = [text for text in edges if not text.endswith("()")]
    if edges:
        found.append(f"- Tuned to the edge of what was tried, so that more might be better: {', '.join(edges)}.")
    sizes = plan.batch_sizes_of("dense")
    if len(sizes) > 1 and summary.best.batch in (sizes[0], sizes[-1]):
        which = "smallest" if summary.best.batch == sizes[0] else "largest"
        found.append(f"- Dense's best has the {which} batch that was tried: with another, dense might be better.")
    processes = sorted({of.process for of in results})
    if len(processes) > 1:
        said = f"- The runs come from {len(processes)} processes (column `process` of the CSV)."
        if summary.strangers:
            said += (
                f" {_count(summary.strangers, 'run')} had no run of dense's best in their process: their seconds are "
                "over the mean of the other processes', and say less."
            )
        found.append(said)
    return ["\n".join(found)] if found else []


def _reached(line: Line, summary: Summary, metric: Metric) -> tuple[Reached | None, Reached | None]:
    """Give the seconds and the operations with which a contender reaches dense's best."""
    seconds, flops = (reached_by(line, cost, summary.goal.value, metric) for cost in ("seconds", "flops"))
    return seconds, flops


def _metric(line: Line, metric: Metric) -> str:
    return worded(line.end.metric, metric.scale, _digits(metric))


def _digits(metric: Metric) -> int:
    return 2 if metric.scale == 100 else 3


def _share(found: Reached | None) -> str:
    if found is None:
        return "not reached"
    return f"at most {found.cost:.2f}" if found.first else f"{found.cost:.2f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
