"""The commands of ``python -m rwfx.experiments``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from rwfx.experiments import accuracy, steps
from rwfx.experiments.data import DATA_SETS
from rwfx.experiments.steps import PERCEPTRONS, Perceptron
from rwfx.train import OPTIMIZERS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rwfx.experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_accuracy(commands)
    _add_steps(commands)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
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


def perceptrons(text: str) -> tuple[Perceptron, ...]:
    """Read ``784-256-128-10,64-32-10``; a size not in ``PERCEPTRONS`` gets batch 128, 50 and 200 paths."""
    known = {perceptron.name: perceptron for perceptron in PERCEPTRONS}
    found = []
    for name in text.split(","):
        widths = numbers(name.replace("-", ","))
        if len(widths) < 2:
            raise argparse.ArgumentTypeError(f"sizes are widths joined by hyphens, at least two; given {name!r}")
        found.append(known.get(name, Perceptron(widths, 128, (50, 200))))
    return tuple(found)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="where to train (default: cpu)")
    command.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_accuracy(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "accuracy",
        help="accuracy against time and parameter updates: FULL, masked, sparse and compute-matched dense",
        description=accuracy.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    for name, kind in {"temperature": float, "epsilon": float, "min-rows": int, "dx": str}.items():
        command.add_argument(f"--{name}", type=kind, help="as in rwfx.transform")
    _add_common(command)
    command.set_defaults(run=_run_accuracy)


def _run_accuracy(options: argparse.Namespace) -> None:
    names = ("temperature", "epsilon", "min_rows", "dx")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
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
        transform_options=given,
    )
    accuracy.run(plan, progress=not options.quiet)


def _add_steps(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "steps",
        help="step times of dense, masked and sparse training, eager and compiled",
        description=steps.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ",".join(perceptron.name for perceptron in PERCEPTRONS)
    command.add_argument("--sizes", type=perceptrons, default=PERCEPTRONS, help=f"default: {known}")
    command.add_argument("--rounds", type=int, default=20, help="turns of each contender (default: 20)")
    command.add_argument("--out", type=Path, default=Path("results/steps"), help="default: results/steps")
    command.add_argument("--eager", action="store_true", help="leave torch.compile out")
    _add_common(command)
    command.set_defaults(run=_run_steps)


def _run_steps(options: argparse.Namespace) -> None:
    steps.run(
        options.sizes,
        out=options.out,
        rounds=options.rounds,
        compiled=not options.eager,
        device=options.device,
        progress=not options.quiet,
    )
