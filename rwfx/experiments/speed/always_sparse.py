"""Always-sparse training beside dense: steps and bytes of a perceptron, growth with the width, and convolutions."""

from rwfx.experiments.speed import sparse_convs, sparse_scaling, sparse_steps
from rwfx.experiments.speed.plan import Plan

TITLES = {
    "Steps and bytes": sparse_steps.run,
    "Growth with the width": sparse_scaling.run,
    "Convolutions": sparse_convs.run,
}


def run(plan: Plan, progress: bool) -> str:
    """Measure all three, write their files and give the tables."""
    return "\n\n".join(f"### {title}\n\n{measure(plan, progress)}" for title, measure in TITLES.items())
