"""Steps of residual networks of convolutions and of transformers, beside the dense step.

In: a ``Plan``. Out: ``networks.csv`` and a table. Turns are taken by the dense step with the network's optimizer of
``torch.optim`` (``fused=True``), its forward alone, and the step of ``transform(model, density=..., grad="rows")``, 50
walks a step, with that optimizer of ``rwfx.optim``; each eager and compiled, and of images with the channels first and
last in memory.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

import rwfx.optim
from rwfx.experiments.speed.contenders import SEED, train_step
from rwfx.experiments.speed.plan import CLASSES, Network, Plan
from rwfx.experiments.speed.turns import Call, Spread, ratios, take_turns
from rwfx.experiments.tables import markdown, write_csv
from rwfx.transform import transform

FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], Callable[..., Optimizer], dict[str, float]]] = {
    "SGD": (torch.optim.SGD, rwfx.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, rwfx.optim.AdamW, {"lr": 1e-4}),
}
LEGEND = (
    "*times dense*: the best dense step over the best sparse one, each the best of eager and compiled, of images with "
    "channels first and last, by median; *limit*: over the best dense forward. Ratios are medians [least - greatest] "
    "of pairs taken in one round."
)


@dataclass(frozen=True)
class NetworkTurn:
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
    """Measure, write ``networks.csv`` and give the table."""
    turns: list[NetworkTurn] = []
    lines = []
    for of in plan.networks:
        found = _measure(plan, of, progress)
        turns += found
        lines.append(_cells(of, found))
        write_csv(plan.out / "networks.csv", NetworkTurn, turns)
    header = ["network", "input", "rows", "optimizer", "dense", "ms", "sparse", "ms", "times dense", "limit", "share"]
    return f"{markdown(header, lines)}\n\n{LEGEND}"


def _measure(plan: Plan, of: Network, progress: bool) -> list[NetworkTurn]:
    torch.compiler.reset()
    entered = [
        ((kind, channels, compiled), make(plan, of, FORMATS[channels], compiled))
        for kind, make in {"forward": _forward, "dense": _dense, "sparse": _sparse}.items()
        for channels in (FORMATS if of.is_of_images else ("first",))
        for compiled in ((False, True) if plan.compiled else (False,))
    ]
    about = of.name, of.batch_size, of.density
    with tqdm(total=len(entered) * (plan.rounds + 1), desc=of.name, disable=not progress) as bar:
        return [
            NetworkTurn(*about, *entered[place][0], number, spent)
            for number, place, spent in take_turns([call for _, call in entered], plan.rounds, plan.device, bar)
        ]


def _forward(plan: Plan, of: Network, memory: torch.memory_format, compiled: bool) -> Call:
    network, inputs, _ = _made(plan, of, memory)
    called = _called(network, compiled)
    return lambda: called(inputs)


def _dense(plan: Plan, of: Network, memory: torch.memory_format, compiled: bool) -> Call:
    network, inputs, target = _made(plan, of, memory)
    theirs, _, options = OPTIMIZERS[of.optimizer]
    optimizer = theirs(network.parameters(), fused=True, **options)
    called = _called(network, compiled)
    return train_step(lambda: F.cross_entropy(called(inputs), target), optimizer)


def _sparse(plan: Plan, of: Network, memory: torch.memory_format, compiled: bool) -> Call:
    model, inputs, target = _made(plan, of, memory)
    options = {"grad": "rows", "seed": SEED, **plan.transform_options}
    network = transform(model, density=of.density, num_paths=50, example_inputs=(inputs,), **options)
    _, ours, chosen = OPTIMIZERS[of.optimizer]
    optimizer = ours(network.parameters(), **chosen)
    called = _called(network, compiled)
    return train_step(lambda: F.cross_entropy(called(inputs), target), optimizer)


def _called(network: nn.Module, compiled: bool) -> Callable[[Tensor], Tensor]:
    return torch.compile(network, fullgraph=True) if compiled else network


def _made(plan: Plan, of: Network, memory: torch.memory_format) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, its batch of random numbers and the target."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(of.batch_size, *of.example, generator=generator).to(plan.device, plan.dtype)
    target = torch.randint(CLASSES, (of.batch_size,), generator=generator).to(plan.device)
    network = of.make(SEED).to(plan.device, plan.dtype)
    if of.is_of_images:
        inputs, network = inputs.to(memory_format=memory), network.to(memory_format=memory)  # type: ignore[call-overload]
    return network, inputs, target


def _cells(of: Network, turns: list[NetworkTurn]) -> list[str]:
    times: dict[str, dict[tuple[str, bool], list[float]]] = {}
    for turn in turns:
        times.setdefault(turn.contender, {}).setdefault((turn.channels, turn.compiled), []).append(turn.milliseconds)
    best = {kind: min(found.items(), key=lambda item: statistics.median(item[1])) for kind, found in times.items()}

    def told(kind: str) -> list[str]:
        (channels, compiled), spent = best[kind]
        how = "compiled" if compiled else "eager"
        return [f"{how}, channels {channels}" if of.is_of_images else how, f"{statistics.median(spent):.1f}"]

    dense, sparse, forward = (best[kind][1] for kind in ("dense", "sparse", "forward"))
    speed, limit = Spread.of(ratios(dense, sparse)), statistics.median(ratios(dense, forward))
    shape = " x ".join(map(str, (of.batch_size, *of.example)))
    return [
        *(of.name, shape, f"{of.density:g}", of.optimizer, *told("dense"), *told("sparse")),
        *(str(speed), f"{limit:.2f}", f"{speed.median / limit:.0%}"),
    ]
