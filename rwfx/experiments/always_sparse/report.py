"""The report of a comparison: a line for each method and density, what the columns mean, and who is ahead."""

from collections.abc import Sequence

from rwfx.experiments.always_sparse.entries import TUNING_SEED
from rwfx.experiments.always_sparse.plan import DENSE, SMALL, Plan
from rwfx.experiments.always_sparse.summary import Line
from rwfx.experiments.policies.report import worded
from rwfx.experiments.tables import markdown

LEGEND = (
    "*accuracy*: the share of the test images whose label has the largest output, at the end of the run; mean over the "
    "seeds, with its 95 % interval.",
    "*density*: the share of the places of all weights that have a number. `small-dense` is the dense network whose "
    "widths are made smaller by one factor until it has as many parameters as the sparse ones; it is shown at their "
    "density.",
    "*parameters*: all numbers that are trained, biases and norms too. *MB*: of parameters, gradients, optimizer "
    "state, index, and what the topology keeps to find its next places (10^6 bytes), at the end.",
    "*step ms*: the median step: forward, backward, update; means over the seeds. *seconds*: of the whole run, with "
    "the topology's updates, which are given too; batches are made while the clock stands.",
    "*FLOPs*: of linear calls and convolutions over the whole run, as executed; a multiply-add counts two. "
    "*published*: by the formulas of the papers. Both as shares of a run of the dense network.",
)


def table(lines: Sequence[Line], dense_flops: tuple[float, float]) -> str:
    """Give the table; ``dense_flops`` of a dense run, as executed and as published."""
    header = ["method", "density", "lr", "parameters", "MB", "accuracy, %", "step ms", "seconds", "topology s"]
    header += ["FLOPs, dense = 100", "published, dense = 100"]
    cells = [
        [
            of.method,
            f"{of.density:g}",
            f"{of.lr:g}",
            f"{of.parameters:,}",
            f"{of.bytes / 1e6:.2f}",
            worded(of.accuracy, 100, 2),
            worded(of.step_ms, 1, 2),
            worded(of.seconds, 1, 1),
            worded(of.topology_seconds, 1, 2),
            f"{100 * of.flops / dense_flops[0]:.1f}",
            f"{100 * of.published_flops / dense_flops[1]:.1f}",
        ]
        for of in lines
    ]
    return markdown(header, cells)


def headline(lines: Sequence[Line]) -> str:
    """Say of each density which methods end best, and where the dense networks are."""
    found = []
    dense = next((of for of in lines if of.method == DENSE), None)
    for density in dict.fromkeys(of.density for of in lines if of.method not in (DENSE, SMALL)):
        own = [of for of in lines if of.density == density and of.method != DENSE]
        ordered = sorted(own, key=lambda of: of.accuracy.value, reverse=True)
        found.append(f"{density:g}: " + ", ".join(f"{of.method} {worded(of.accuracy, 100, 2)}" for of in ordered))
    text = "\n".join(f"- density {of}" for of in found)
    return text if dense is None else f"{text}\n- dense: {worded(dense.accuracy, 100, 2)}".strip()


def legend(plan: Plan) -> str:
    """Say what the columns mean, and how was tuned."""
    rates = ", ".join(f"{lr:g}" for lr in sorted(plan.lrs))
    how = f"Every run has the learning rate {rates}."
    if len(plan.lrs) > 1:
        how = (
            f"Learning rates: of {rates} each method has, at each density, the one that is best on validation, a tenth "
            f"of the training data that no run is trained on; one run of each with the seed {TUNING_SEED}."
        )
    return "\n".join(f"- {sentence}" for sentence in (*LEGEND, how))
