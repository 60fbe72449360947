"""The report of a visit of the zoo: how many models of each suite are as they should be, and a line for every model."""

from collections.abc import Sequence

from rwfx.experiments.tables import markdown
from rwfx.experiments.zoo.catalogue import SUITES
from rwfx.experiments.zoo.records import EXACT, SHARE, SKIPPED, Record, problem_of

LEGEND = (
    "*weights*: those of linear and convolution modules and of attention, and other parameters that such a call or "
    "another product reads. *row-sparse*: those with a row-sparse backward; *dense*: for a reason, which is given; the "
    "rest are missed: the report does not name them.",
    "*gradient*: the largest difference of a parameter's gradient from plain autograd on the model itself, with the "
    "output gradients of row-sparse weights masked, over the largest number of that gradient (or a millionth of "
    "the largest of all, where that is more). Exact is "
    + ", ".join(f"{bound:.0e} in {dtype}" for dtype, bound in EXACT.items())
    + "; *rounded within* is a model in float64 that computes some things in float32 itself.",
    "*forward*: whether outputs and buffers after a step in train mode are those of the model, bit for bit, under the "
    "same seed. *keys*: whether those of the `state_dict` are the model's, in its order.",
    "*graphs*: how many `torch.compile` makes of a training forward; 1: `fullgraph=True` holds. By the route "
    "substitution the forward pass is the model's own code, with as many graphs as that has.",
    "*seconds*: of `rwfx.transform`, without the first compilation of the kernels.",
    f"Models on the *meta* device are too large here for numbers: what needs them was {SKIPPED}.",
)


def report(records: Sequence[Record]) -> str:
    """The counts, what is wrong, and the table of every suite."""
    suites = [(suite, [r for r in records if r.suite == suite]) for suite in SUITES]
    parts = [summary([(suite, found) for suite, found in suites if found])]
    wrong = [record for record in records if problem_of(record)]
    if wrong:
        parts += ["## What is not as it should be", "\n".join(f"- `{r.entry}`: {_text(problem_of(r))}" for r in wrong)]
    parts += [f"## {SUITES[suite].title}\n\n{table(found)}" for suite, found in suites if found]
    parts += ["## What the columns mean", "\n".join(f"- {sentence}" for sentence in LEGEND)]
    return "\n\n".join(parts)


def summary(suites: Sequence[tuple[str, Sequence[Record]]]) -> str:
    """A line per suite, and per thing that is to be shown a count."""
    header = ["suite", "models", "transformed", f"{SHARE:.0%} of weights explained", "row-sparse weights"]
    header += ["forward equal", "exact gradients", "state_dict equal", "one graph"]
    cells = []
    for suite, records in suites:
        made = [r for r in records if r.route]
        numbers = [r for r in made if r.forward != SKIPPED]
        cells.append(
            [
                SUITES[suite].title,
                str(len(records)),
                str(len(made)),
                str(sum(r.sparse + r.dense >= SHARE * r.weights for r in made)),
                f"{sum(r.sparse for r in made):,} of {sum(r.weights for r in made):,}",
                _of(sum(r.forward == "equal" for r in numbers), numbers),
                _of(sum(bool(r.worst) and r.gradient <= EXACT.get(r.dtype, 0.0) for r in numbers), numbers),
                str(sum(r.state_dict == "equal" for r in made)),
                _of(sum(r.graphs == 1 for r in numbers), numbers),
            ]
        )
    return markdown(header, cells)


def table(records: Sequence[Record]) -> str:
    """A line per model."""
    header = ["model", "parameters", "route", "weights", "row-sparse", "dense, and why", "forward", "gradient"]
    header += ["numbers", "keys", "graphs", "seconds"]
    return markdown(header, [_cells(record) for record in records])


def _cells(record: Record) -> list[str]:
    if not record.route:
        return [record.model, _size(record.parameters), f"none: {_text(record.error, 120)}", *["-"] * 9]
    return [
        record.model,
        _size(record.parameters),
        record.route,
        str(record.weights),
        str(record.sparse),
        _text(record.reasons) or "-",
        record.forward or "-",
        f"{record.gradient:.0e}" if record.worst else "-",
        record.dtype,
        record.state_dict,
        str(record.graphs or "-"),
        f"{record.seconds:.1f}",
    ]


def _of(count: int, records: Sequence[Record]) -> str:
    return f"{count} of {len(records)}"


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters / 1e3:.0f} k"


def _text(text: str, most: int = 400) -> str:
    """What can stand in a cell of a table."""
    shortened = text if len(text) <= most else f"{text[:most]}..."
    return shortened.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
