"""Steps of residual networks of convolutions, beside the dense step.

In: a ``Plan``. Out: ``convolutions.csv`` and a table. Turns are taken by the dense step with
``torch.optim.SGD(momentum=0.9, fused=True)``, its forward alone, and the step of ``transform(model, density=...,
grad="rows")``, 50 walks a step, with ``rwfx.optim.SGD(momentum=0.9)``; each eager and compiled, with the channels first
and last in memory.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import rwfx.optim
from rwfx.experiments.models import residual_cnn
from rwfx.experiments.speed.contenders import SEED, train_step
from rwfx.experiments.speed.plan import Images, Plan
from rwfx.experiments.speed.turns import Call, Spread, ratios, take_turns
from rwfx.experiments.tables import markdown, write_csv
from rwfx.transform import transform

CLASSES = 10
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
LEGEND = (
    "*times dense*: the best dense step over the best sparse one, each the best of eager and compiled, channels first "
    "and last, by median; *limit*: over the best dense forward. Ratios are medians [least - greatest] of pairs taken "
    "in one round."
)


@dataclass(frozen=True)
class ImageTurn:
    """The time of one turn, per step."""

    network: str
    batch_size: int
    density: float
    contender: str
    channels: str
    compiled: bool
    round: int
    milliseconds: float


def run(plan: Plan, progress: bool) -> str:
    """Measure, write ``convolutions.csv`` and give the table."""
    turns: list[ImageTurn] = []
    lines = []
    for images in plan.images:
        found = _measure(plan, images, progress)
        turns += found
        lines.append(_cells(images, found))
        write_csv(plan.out / "convolutions.csv", ImageTurn, turns)
    header = ["network", "batch", "rows", "dense", "ms", "sparse", "ms", "times dense", "limit"]
    return f"{markdown(header, lines)}\n\n{LEGEND}"


def _measure(plan: Plan, images: Images, progress: bool) -> list[ImageTurn]:
    torch.compiler.reset()
    entered = [
        ((kind, channels, compiled), make(plan, images, FORMATS[channels], compiled))
        for kind, make in {"forward": _forward, "dense": _dense, "sparse": _sparse}.items()
        for channels in FORMATS
        for compiled in ((False, True) if plan.compiled else (False,))
    ]
    about = images.name, images.batch_size, images.density
    with tqdm(total=len(entered) * (plan.rounds + 1), desc=images.name, disable=not progress) as bar:
        return [
            ImageTurn(*about, *entered[place][0], number, spent)
            for number, place, spent in take_turns([call for _, call in entered], plan.rounds, plan.device, bar)
        ]


def _forward(plan: Plan, images: Images, memory: torch.memory_format, compiled: bool) -> Call:
    network, inputs, _ = _made(plan, images, memory)
    called = _called(network, compiled)
    return lambda: called(inputs)


def _dense(plan: Plan, images: Images, memory: torch.memory_format, compiled: bool) -> Call:
    network, inputs, target = _made(plan, images, memory)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, fused=True)
    called = _called(network, compiled)
    return train_step(lambda: F.cross_entropy(called(inputs), target), optimizer)


def _sparse(plan: Plan, images: Images, memory: torch.memory_format, compiled: bool) -> Call:
    model, inputs, target = _made(plan, images, memory)
    options = {"grad": "rows", "seed": SEED, **plan.transform_options}
    network = transform(model, density=images.density, num_paths=50, example_inputs=(inputs,), **options)
    optimizer = rwfx.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    called = _called(network, compiled)
    return train_step(lambda: F.cross_entropy(called(inputs), target), optimizer)


def _called(network: nn.Module, compiled: bool) -> Callable[[Tensor], Tensor]:
    return torch.compile(network, fullgraph=True) if compiled else network


def _made(plan: Plan, images: Images, memory: torch.memory_format) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, its batch of random numbers and the target."""
    network = residual_cnn(images.channels, images.blocks, CLASSES, SEED)
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(images.batch_size, 3, images.side, images.side, generator=generator)
    target = torch.randint(CLASSES, (images.batch_size,), generator=generator)
    network = network.to(plan.device, plan.dtype).to(memory_format=memory)  # type: ignore[call-overload]
    return network, inputs.to(plan.device, plan.dtype, memory_format=memory), target.to(plan.device)


def _cells(images: Images, turns: list[ImageTurn]) -> list[str]:
    times: dict[str, dict[tuple[str, bool], list[float]]] = {}
    for turn in turns:
        times.setdefault(turn.contender, {}).setdefault((turn.channels, turn.compiled), []).append(turn.milliseconds)
    best = {kind: min(found.items(), key=lambda item: statistics.median(item[1])) for kind, found in times.items()}

    def told(kind: str) -> list[str]:
        (channels, compiled), spent = best[kind]
        return [f"{'compiled' if compiled else 'eager'}, channels {channels}", f"{statistics.median(spent):.1f}"]

    dense, sparse, forward = (best[kind][1] for kind in ("dense", "sparse", "forward"))
    limit = f"{statistics.median(ratios(dense, forward)):.2f}"
    speed = str(Spread.of(ratios(dense, sparse)))
    return [
        images.name, str(images.batch_size), f"{images.density:g}", *told("dense"), *told("sparse"), speed, limit
    ]  # fmt: skip
