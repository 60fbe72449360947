"""Step times of dense, masked and sparse training, eager and compiled, measured by turns in one process.

A *step* is forward, backward and Adam on one fixed batch of random numbers. A *round* gives every contender
of a perceptron one turn, A B C A B C ...; a *turn* is a few steps in a row, timed together. *Dense* is the
better of eager and compiled, by median, with ``Adam(fused=True)``. The *speed* of a contender is the dense
time over its own in the same round: 1 is as fast as dense, and a disturbance of the machine meets both.
*Limit* is the dense step over its forward alone: what a free backward and update would give.
"""

import copy
import csv
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import rwfx.optim
from rwfx.experiments.machine import as_markdown, conditions
from rwfx.experiments.models import mlp
from rwfx.experiments.summary import markdown
from rwfx.files import replacing
from rwfx.transform import transform


@dataclass(frozen=True)
class Perceptron:
    """A size to measure: its widths, batch and numbers of paths."""

    widths: tuple[int, ...]
    batch_size: int
    num_paths: tuple[int, ...]

    @property
    def name(self) -> str:
        """The widths, joined by hyphens."""
        return "-".join(map(str, self.widths))


PERCEPTRONS = (
    Perceptron((784, 256, 128, 10), 128, (10, 50, 200)),
    Perceptron((784, 1024, 1024, 10), 128, (10, 50, 200)),
    Perceptron((784, 2048, 2048, 10), 256, (50, 200)),
    Perceptron((1024, 4096, 4096, 1024), 512, (200,)),
)


@dataclass(frozen=True)
class Turn:
    """The time of one turn, per step."""

    size: str
    batch_size: int
    num_paths: int | None
    contender: str
    compiled: bool
    round: int
    milliseconds: float


@dataclass
class Contender:
    """Something to be timed."""

    kind: str
    num_paths: int | None
    compiled: bool
    step: Callable[[], None]


def run(
    perceptrons: Sequence[Perceptron] = PERCEPTRONS,
    *,
    out: Path = Path("results"),
    rounds: int = 20,
    compiled: bool = True,
    device: str = "cpu",
    progress: bool = True,
) -> list[Turn]:
    """Measure ``perceptrons`` and write ``steps.csv`` and ``steps.md`` into ``out``."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; given {rounds}.")
    turns: list[Turn] = []
    with tqdm(total=len(perceptrons) * rounds, unit="round", disable=not progress) as bar:
        for perceptron in perceptrons:
            bar.set_description(f"{perceptron.name}: warm-up and compilation")
            turns += measure(perceptron, rounds, compiled, device, bar)
            _write_csv(out / "steps.csv", turns)
    text = table(turns)
    found = {"rounds": str(rounds), **conditions(device)}
    with replacing(out / "steps.md", "w") as file:
        file.write(f"# Step times\n\n{text}\n\n{as_markdown(found)}\n")
    print(f"\n{text}\n\n{as_markdown(found)}\n\nwritten: {os.fspath(out)}/")
    return turns


def measure(perceptron: Perceptron, rounds: int, compiled: bool, device: str, bar: tqdm) -> list[Turn]:
    """Give ``rounds`` turns of every contender of ``perceptron``."""
    torch.compiler.reset()  # or the eighth contender of a size would meet the limit of recompilations
    contenders = _contenders(perceptron, compiled, device)
    for contender in contenders:
        for _ in range(3):
            contender.step()
    steps = _steps_per_turn(_time(contenders[0].step, 3, device))
    turns = []
    bar.set_description(perceptron.name)
    for number in range(rounds):
        for contender in contenders:
            spent = _time(contender.step, steps, device)
            where = perceptron.name, perceptron.batch_size, contender.num_paths
            turns.append(Turn(*where, contender.kind, contender.compiled, number, 1000 * spent))
        bar.update()
    return turns


def _contenders(perceptron: Perceptron, compiled: bool, device: str) -> list[Contender]:
    """Make every contender of ``perceptron``, from the same weights."""
    model = mlp(perceptron.widths, seed=0).to(device)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(perceptron.batch_size, perceptron.widths[0], generator=generator).to(device)
    target = torch.randint(perceptron.widths[-1], (perceptron.batch_size,), generator=generator).to(device)
    contenders = [Contender("forward", None, False, _forward(copy.deepcopy(model), inputs))]
    for through_compiler in (False, True) if compiled else (False,):
        dense = copy.deepcopy(model)
        optimizer = torch.optim.Adam(dense.parameters(), fused=True)
        contenders.append(
            Contender("full", None, through_compiler, _step(dense, optimizer, through_compiler, inputs, target))
        )
        for num_paths in perceptron.num_paths:
            for kind in ("masked", "sparse"):
                network = transform(copy.deepcopy(model), num_paths, mode=kind, grad="rows", seed=0)
                optimizer = rwfx.optim.Adam(network.parameters())
                step = _step(network, optimizer, through_compiler, inputs, target)
                contenders.append(Contender(kind, num_paths, through_compiler, step))
    return contenders


def _forward(network: nn.Module, inputs: Tensor) -> Callable[[], None]:
    def forward() -> None:
        network(inputs)

    return forward


def _step(
    network: nn.Module, optimizer: torch.optim.Optimizer, compiled: bool, inputs: Tensor, target: Tensor
) -> Callable[[], None]:
    stepped = torch.compile(network, fullgraph=True) if compiled else network

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(stepped(inputs), target).backward()
        optimizer.step()

    return step


def _steps_per_turn(seconds: float) -> int:
    """Choose so many dense steps that a turn takes about 20 ms, and no more than ten."""
    return max(1, min(10, round(0.02 / seconds)))


def _time(step: Callable[[], None], steps: int, device: str) -> float:
    """Give the seconds of one of ``steps`` steps in a row."""
    started = _now(device)
    for _ in range(steps):
        step()
    return (_now(device) - started) / steps


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(turns: Sequence[Turn]) -> str:
    """Give a Markdown table, a line per size and number of paths, speeds as median [least - greatest]."""
    header = ["MLP", "batch", "paths", "dense ms", "limit"]
    kinds = list(dict.fromkeys((turn.contender, turn.compiled) for turn in turns if turn.num_paths is not None))
    header += [f"{kind}, {'compiled' if compiled else 'eager'}" for kind, compiled in kinds]
    cells = []
    for size, batch_size, num_paths in dict.fromkeys(
        (turn.size, turn.batch_size, turn.num_paths) for turn in turns if turn.num_paths is not None
    ):
        times: dict[tuple[str, bool], list[float]] = {}
        for turn in turns:
            if turn.size == size and turn.batch_size == batch_size and turn.num_paths in (None, num_paths):
                times.setdefault((turn.contender, turn.compiled), []).append(turn.milliseconds)
        best = min((key for key in times if key[0] == "full"), key=lambda key: statistics.median(times[key]))
        how = "compiled" if best[1] else "eager"
        limit = statistics.median(times[best]) / statistics.median(times["forward", False])
        speeds = [_speed(times[best], times[key]) if key in times else "" for key in kinds]
        dense = f"{statistics.median(times[best]):.2f} ({how})"
        cells.append([size, str(batch_size), str(num_paths), dense, f"{limit:.2f}", *speeds])
    return markdown(header, cells)


def _speed(dense: Sequence[float], own: Sequence[float]) -> str:
    ratios = [reference / time for reference, time in zip(dense, own, strict=True)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f} - {max(ratios):.2f}]"


def _write_csv(path: Path, turns: Sequence[Turn]) -> None:
    names = [column.name for column in fields(Turn)]
    with replacing(path, "w") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(turn, name) for name in names] for turn in turns)
