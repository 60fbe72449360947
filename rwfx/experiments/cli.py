"""The commands of ``python -m rwfx.experiments``."""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rwfx.arguments import check_number
from rwfx.experiments import accuracy
from rwfx.experiments.always_sparse import plan as always_sparse_plan
from rwfx.experiments.always_sparse import run as always_sparse
from rwfx.experiments.always_sparse.presets import PRESETS
from rwfx.experiments.data import DATA_SETS
from rwfx.experiments.frontier import plan as frontier_plan
from rwfx.experiments.frontier import run as frontier
from rwfx.experiments.policies import overhead, variance
from rwfx.experiments.policies import plan as policies_plan
from rwfx.experiments.policies import run as policies
from rwfx.experiments.speed import run as speed
from rwfx.experiments.speed.plan import DTYPES, PARTS, SIZES, Plan, Size, read_parts, read_size
from rwfx.experiments.speed.sparse_plan import ALWAYS_SPARSE
from rwfx.experiments.zoo import plan as zoo_plan
from rwfx.experiments.zoo import run as zoo
from rwfx.train import OPTIMIZERS

WALK_OPTIONS: dict[str, Callable[[str], Any]] = {"temperature": float, "epsilon": float, "min_rows": int}
"""The arguments of ``rwfx.RandomWalk`` that a command hands on, and their types."""

TRANSFORM_OPTIONS: dict[str, Callable[[str], Any]] = {"dx": str, "break_even": lambda text: on_or_off(text)}
"""Those of ``rwfx.transform``."""


Lists = Mapping[str, tuple[Callable[[str], Any], str]]
"""Options that are lists: how one is read, and what it means."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rwfx.experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_accuracy(commands)
    _add_speed(commands)
    _add_policies(commands)
    _add_frontier(commands)
    _add_always_sparse(commands)
    _add_zoo(commands)
    options = parser.parse_args(arguments)
    try:
        if options.threads is not None:
            check_number("threads", options.threads, Integral, 1)
            torch.set_num_threads(options.threads)
        options.run(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"{parser.prog} {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def numbers(text: str) -> tuple[int, ...]:
    """Read ``10,50,200``."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"whole numbers from 1, separated by commas; given {text!r}")
    return found


def decimals(text: str) -> tuple[float, ...]:
    """Read ``0.05,0.1,2e-3``."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers, separated by commas; given {text!r}") from None


def names(text: str) -> tuple[str, ...]:
    """Read ``mnist,shakespeare``."""
    return tuple(text.split(","))


def size(text: str) -> Size:
    """Read ``784-256-128-10@128:10,50,200``."""
    try:
        return read_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parts(text: str) -> tuple[str, ...]:
    """Read ``steps,memory``."""
    try:
        return read_parts(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def on_or_off(text: str) -> bool:
    """Read ``on`` or ``off``."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"on or off; given {text!r}")
    return text == "on"


def _add_common(command: argparse.ArgumentParser, walks: bool = True) -> None:
    """Add where to run, and the options of what is run; those of walks only where every contender is one."""
    command.add_argument("--device", default="cpu", help="default: cpu")
    _add_process(command)
    for owner, known in {"RandomWalk": WALK_OPTIONS if walks else {}, "transform": TRANSFORM_OPTIONS}.items():
        for name, kind in known.items():
            command.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"as in rwfx.{owner}")


def _add_process(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_lists(command: argparse.ArgumentParser, lists: Lists, plan: Any, every: Sequence[str]) -> None:
    """Add the options that are lists, with the defaults of ``plan``; those of ``every`` have all there are."""
    for name, (kind, meaning) in lists.items():
        default = getattr(plan, name)
        shown = "all" if name in every else ",".join(map(str, default))
        command.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{meaning} (default: {shown})"
        )


def _given(options: argparse.Namespace, known: Iterable[str]) -> dict[str, Any]:
    given = {name: getattr(options, name) for name in known}
    return {name: value for name, value in given.items() if value is not None}


def _add_command(
    commands: argparse._SubParsersAction, name: str, program: ModuleType, about: str
) -> argparse.ArgumentParser:
    """A command that tells of itself what ``program`` does."""
    shape = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=about, description=program.__doc__, formatter_class=shape)


def _fields_of(plan: type, options: argparse.Namespace) -> dict[str, Any]:
    """What was given for the fields of a plan that have an option each."""
    names = [column.name for column in fields(plan)]
    return {name: getattr(options, name) for name in names if name != "transform_options"}


def _add_accuracy(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands,
        "accuracy",
        accuracy,
        "accuracy against time and parameter updates: FULL, masked, sparse and compute-matched dense",
    )
    command.add_argument("--dataset", choices=DATA_SETS, required=True)
    command.add_argument("--num-paths", type=numbers, default=(10, 50, 200), help="default: 10,50,200")
    command.add_argument("--seeds", type=int, default=3, help="how many seeds, counted from 0 (default: 3)")
    command.add_argument("--out", type=Path, help="folder for the results (default: results/accuracy-DATASET)")
    command.add_argument("--data-dir", type=Path, help="folder with the data, in torchvision's layout")
    command.add_argument("--epochs", type=int, help=f"default: {accuracy.EPOCHS}")
    command.add_argument("--batch-size", type=int, default=128)
    command.add_argument("--hidden", type=numbers, default=(256, 128), help="widths between (default: 256,128)")
    command.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    command.add_argument("--lr", type=float, default=1e-3)
    command.add_argument("--evaluations", type=int, default=50, help="evaluations of a run (default: 50)")
    command.add_argument("--compile", action="store_true", help="step through torch.compile")
    _add_common(command)
    command.set_defaults(run=_run_accuracy)


def _run_accuracy(options: argparse.Namespace) -> None:
    plan = accuracy.Plan(
        dataset=options.dataset,
        num_paths=options.num_paths,
        seeds=options.seeds,
        out=options.out or Path("results") / f"accuracy-{options.dataset}",
        data_dir=options.data_dir,
        epochs=options.epochs,
        batch_size=options.batch_size,
        hidden=options.hidden,
        optimizer=options.optimizer,
        lr=options.lr,
        evaluations=options.evaluations,
        device=options.device,
        compile=options.compile,
        walk_options=_given(options, WALK_OPTIONS),
        transform_options=_given(options, TRANSFORM_OPTIONS),
    )
    accuracy.run(plan, progress=not options.quiet)


def _add_speed(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands,
        "speed",
        speed,
        "step times, memory, the sampler and building: sparse beside dense, eager and compiled",
    )
    known = "; ".join(f"on {kind} {' '.join(map(str, sizes))}" for kind, sizes in SIZES.items())
    command.add_argument(
        "--sizes",
        type=size,
        nargs="+",
        metavar="WIDTHS@BATCH:PATHS",
        help="perceptrons, each with its batch and its numbers of paths, such as 784-256-128-10@128:10,50,200 "
        f"(default: {known})",
    )
    known = ",".join(PARTS)
    command.add_argument("--only", type=parts, default=tuple(PARTS), metavar="PARTS", help=f"of {known} (default: all)")
    command.add_argument("--rounds", type=int, default=20, help="turns of each contender (default: 20)")
    command.add_argument("--repeats", type=int, default=Plan.repeats, help="of transforming and compiling (default: 5)")
    command.add_argument("--eager", action="store_true", help="leave torch.compile out")
    command.add_argument("--masked", action="store_true", help='measure mode="masked" too')
    command.add_argument("--dtype", choices=DTYPES, help="of model and data (default: float32; on cuda bfloat16)")
    sparse = ALWAYS_SPARSE
    wide = ",".join(map(str, sparse.scaling_widths))
    command.add_argument("--width", type=int, default=sparse.width, help=f"of always-sparse (default: {sparse.width})")
    command.add_argument(
        "--scaling-widths", type=numbers, default=sparse.scaling_widths, help=f"of always-sparse (default: {wide})"
    )
    command.add_argument("--out", type=Path, default=Plan.out, help=f"default: {Plan.out}")
    _add_common(command)
    command.set_defaults(run=_run_speed)


def _run_speed(options: argparse.Namespace) -> None:
    kind = "cuda" if options.device.startswith("cuda") else "cpu"
    plan = Plan(
        out=options.out,
        parts=options.only,
        sizes=tuple(options.sizes or SIZES[kind]),
        rounds=options.rounds,
        repeats=options.repeats,
        compiled=not options.eager,
        masked=options.masked,
        device=options.device,
        dtype=DTYPES[options.dtype or {"cpu": "float32", "cuda": "bfloat16"}[kind]],
        walk_options=_given(options, WALK_OPTIONS),
        transform_options=_given(options, TRANSFORM_OPTIONS),
        always_sparse=replace(ALWAYS_SPARSE, width=options.width, scaling_widths=options.scaling_widths),
    )
    speed.run(plan, progress=not options.quiet)


def _add_policies(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands,
        "policies",
        policies,
        "the ways to choose rows: accuracy or loss at equal steps, seconds, FLOPs and updates, beside dense",
    )
    plan = policies_plan.Plan()
    lists: Lists = {
        "tasks": (names, f"of {','.join(policies_plan.STEPS)}"),
        "policies": (names, f"of {','.join(policies_plan.POLICY_NAMES)}"),
        "densities": (decimals, "shares of the rows kept"),
        "dense_shares": (decimals, "shares of the steps after which further dense runs end"),
        "batch_shares": (decimals, "shares of the batch of further dense runs"),
        "lrs": (decimals, "learning rates to choose from"),
        "hidden": (numbers, "widths between"),
    }
    _add_lists(command, lists, plan, every=("policies",))
    steps = ", ".join(f"{task} {steps}" for task, steps in policies_plan.STEPS.items())
    command.add_argument("--steps", type=int, help=f"steps of a whole run (default: {steps})")
    command.add_argument("--seeds", type=int, default=plan.seeds, help="how many, counted from 0 (default: 3)")
    command.add_argument("--batch-size", type=int, default=plan.batch_size, help=f"default: {plan.batch_size}")
    command.add_argument("--evaluations", type=int, default=plan.evaluations, help="of a final run (default: 20)")
    command.add_argument("--data-dir", type=Path, help="folder with the data, in torchvision's layout")
    command.add_argument("--out", type=Path, default=plan.out, help=f"default: {plan.out}")
    instead = command.add_mutually_exclusive_group()
    instead.add_argument("--variance", action="store_true", help="instead: bias and variance of the gradients")
    instead.add_argument("--overhead", action="store_true", help="instead: what choosing the rows takes of a step")
    _add_common(command, walks=False)
    command.set_defaults(run=_run_policies)


def _run_policies(options: argparse.Namespace) -> None:
    plan = policies_plan.Plan(
        **_fields_of(policies_plan.Plan, options), transform_options=_given(options, TRANSFORM_OPTIONS)
    )
    run = overhead.run if options.overhead else variance.run if options.variance else policies.run
    run(plan, progress=not options.quiet)


def _add_frontier(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands,
        "frontier",
        frontier,
        "fewer rows and fewer examples in the backward pass: accuracy or loss against seconds and FLOPs",
    )
    plan = frontier_plan.Plan()
    lists: Lists = {
        "tasks": (names, f"of {','.join(frontier_plan.STEPS)}"),
        "contenders": (names, f"beside dense, of {','.join(frontier_plan.SPARSE_NAMES)}"),
        "shares": (decimals, "shares of the budget for which dense is trained"),
        "sparse_shares": (decimals, "those for which the others are"),
        "batch_sizes": (numbers, "of dense, a contender with each"),
        "sparse_batch_sizes": (numbers, "of the others, each with the best"),
        "lrs": (decimals, "learning rates to choose from"),
        "hidden": (numbers, "widths between, of a perceptron"),
    }
    _add_lists(command, lists, plan, every=("contenders",))
    steps = ", ".join(f"{task} {steps}" for task, steps in frontier_plan.STEPS.items())
    batch = frontier_plan.REFERENCE_BATCH
    command.add_argument("--steps", type=int, help=f"dense steps of {batch} that the budget pays (default: {steps})")
    command.add_argument("--seeds", type=int, default=plan.seeds, help="how many, counted from 0 (default: 5)")
    command.add_argument("--data-dir", type=Path, help="folder with the data: torchvision's files, and others")
    command.add_argument("--out", type=Path, default=plan.out, help=f"default: {plan.out}")
    _add_common(command, walks=False)
    command.set_defaults(run=_run_frontier)


def _run_frontier(options: argparse.Namespace) -> None:
    plan = frontier_plan.Plan(
        **_fields_of(frontier_plan.Plan, options), transform_options=_given(options, TRANSFORM_OPTIONS)
    )
    frontier.run(plan, progress=not options.quiet)


ALWAYS_SPARSE_OPTIONS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "steps": (int, "steps of a run"),
    "epochs": (float, "instead of steps: passes over the training examples"),
    "seeds": (int, "how many, counted from 0"),
    "width": (float, "times the widths of the model"),
    "hidden": (numbers, "widths between, of the model mlp"),
    "batch_size": (int, "examples of a step"),
    "momentum": (float, "of sgd"),
    "weight_decay": (float, "of the optimizer"),
    "alpha": (float, "share of the non-zeros that the first update moves, at most"),
    "interval": (int, "steps from one update of the topology to the next"),
    "end": (float, "share of the run after which the topology stays as it is"),
    "gamma": (float, "candidates for each non-zero, of gse"),
    "evaluations": (int, "of a final run"),
}
"""Options of the command always-sparse that are fields of its plan, beside those with few choices."""


def _add_always_sparse(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands,
        "always-sparse",
        always_sparse,
        "methods that train the non-zeros of a network alone, beside dense networks of both sizes",
    )
    plan = always_sparse_plan.Plan()
    command.add_argument("--preset", choices=PRESETS, help="published settings; what is given beside counts instead")
    for name, choices in always_sparse_plan.CHOICES.items():
        default = getattr(plan, name)
        command.add_argument(f"--{name.replace('_', '-')}", choices=choices, help=f"default: {default}")
    lists: Lists = {
        "methods": (names, f"of {','.join(always_sparse_plan.METHODS)}"),
        "density": (decimals, "shares of the weights' places that have a number"),
        "lr": (decimals, "learning rates, of which each method has the best at each density"),
    }
    for name, (kind, meaning) in lists.items():
        default = getattr(plan, ALWAYS_SPARSE_LISTS.get(name, name))
        command.add_argument(f"--{name}", type=kind, help=f"{meaning} (default: {','.join(map(str, default))})")
    for name, (kind, meaning) in ALWAYS_SPARSE_OPTIONS.items():
        default = getattr(plan, name)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        told = f"{meaning} (default: {shown})" if default is not None else meaning
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, help=told)
    command.add_argument("--augment", type=on_or_off, help="shift and mirror the training images (default: off)")
    command.add_argument("--data-dir", type=Path, help="folder with the data, in torchvision's layout")
    command.add_argument("--out", type=Path, help=f"default: {plan.out}")
    command.add_argument("--device", default="cpu", help="default: cpu")
    _add_process(command)
    command.set_defaults(run=_run_always_sparse)


ALWAYS_SPARSE_LISTS = {"density": "densities", "lr": "lrs"}
"""The fields of a plan whose options have other names."""


def _run_always_sparse(options: argparse.Namespace) -> None:
    given = {ALWAYS_SPARSE_LISTS.get(name, name): value for name, value in vars(options).items() if value is not None}
    settings = PRESETS[options.preset].settings() if options.preset else {}
    if "steps" in given:
        settings.pop("epochs", None)
    plan_fields = {column.name for column in fields(always_sparse_plan.Plan)}
    settings |= {name: value for name, value in given.items() if name in plan_fields}
    always_sparse.run(always_sparse_plan.Plan(**settings), progress=not options.quiet)


def _add_zoo(commands: argparse._SubParsersAction) -> None:
    command = _add_command(
        commands, "zoo", zoo, "models of torchvision, timm and Hugging Face, transformed and compared with themselves"
    )
    plan = zoo_plan.Plan()
    lists: Lists = {
        "suites": (names, f"of {','.join(plan.suites)}"),
        "models": (names, "names of models, where * matches any letters"),
    }
    _add_lists(command, lists, plan, every=("suites", "models"))
    command.add_argument("--limit", type=float, default=plan.limit, help="seconds for a model (default: 1800)")
    command.add_argument("--again", action="store_true", help="also what is written down with a problem")
    _add_process(command)
    command.add_argument("--out", type=Path, default=plan.out, help=f"default: {plan.out}")
    command.set_defaults(run=_run_zoo)


def _run_zoo(options: argparse.Namespace) -> None:
    plan = zoo_plan.Plan(**_fields_of(zoo_plan.Plan, options))
    zoo.run(plan, progress=not options.quiet)
