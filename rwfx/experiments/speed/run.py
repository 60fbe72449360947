"""Speed and memory of sparse training beside the dense step of the same run.

    python -m rwfx.experiments speed --sizes 784-256-128-10@128:10,50,200 --only steps,memory

The parts: *steps*, times of steps and of their parts, all contenders in turn; *examples*, steps that leave out
examples as well; *networks*, steps of convolutions and of attention; *memory*, the peak and what a step keeps;
*sampler*, drawing rows by itself and how it grows; *build*, transforming and compiling; *always-sparse*, steps on the
non-zeros alone. Each writes a CSV, and ``speed.md`` gets its tables and the conditions as soon as it is done.
"""

import os
import tempfile
from collections.abc import Callable

from rwfx.experiments.extras import require
from rwfx.experiments.machine import as_markdown, check_device, conditions, cuda_conditions
from rwfx.experiments.models import mlp
from rwfx.experiments.speed import always_sparse, building, memory, networks, sampler, steps, thin
from rwfx.experiments.speed.contenders import SEED, sparsify
from rwfx.experiments.speed.plan import PARTS, Plan, check_plan
from rwfx.files import replacing

MEASURES: dict[str, Callable[[Plan, bool], str]] = {
    "steps": steps.run,
    "examples": thin.run,
    "networks": networks.run,
    "memory": memory.run,
    "sampler": sampler.run,
    "build": building.run,
    "always-sparse": always_sparse.run,
}
"""What measures each part: it writes the part's files and returns its tables."""


def run(plan: Plan, *, progress: bool = True) -> str:
    """Measure the parts of ``plan``, write their files and ``speed.md`` into ``plan.out``, and print the latter.

    Raises:
        ValueError, ImportError: something about the plan or the machine will not do; before any work.
        ChildProcessError: a measurement in a process of its own failed.
    """
    check(plan)
    text = ""
    for part in plan.parts:
        text += f"## {PARTS[part]}\n\n{MEASURES[part](plan, progress)}\n\n"
        with replacing(plan.out / "speed.md", "w") as file:
            file.write(f"# Speed\n\n{text}{_conditions(plan)}\n")
    print(f"\n{text}{_conditions(plan)}\n\nwritten: {os.fspath(plan.out)}/")
    return text


def check(plan: Plan) -> None:
    """Refuse, before any work, what would fail after some."""
    check_plan(plan)
    check_device(plan.device)
    sparsify(plan, mlp((2, 2), SEED), 1, break_even=False)  # refuses an option of transform
    if "memory" in plan.parts:
        memory.check_memory(plan)
    if "sampler" in plan.parts:
        sampler.check_draws(plan.draws)
    if {"sampler", "always-sparse"} & {*plan.parts}:
        require("matplotlib")
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=plan.out):
            pass
    except OSError as error:
        raise ValueError(f"folder {os.fspath(plan.out)!r} cannot be written to: {error.strerror}") from error


def _conditions(plan: Plan) -> str:
    options = "".join(f", {name} {value}" for name, value in {**plan.walk_options, **plan.transform_options}.items())
    found = {
        "run": f"{plan.rounds} rounds, {plan.repeats} repetitions of a build, {str(plan.dtype).removeprefix('torch.')}"
        f"{options}, {'eager and compiled' if plan.compiled else 'eager'}",
        **conditions(plan.device),
        **cuda_conditions(plan.device),
    }
    return f"## Conditions\n\n{as_markdown(found)}"
