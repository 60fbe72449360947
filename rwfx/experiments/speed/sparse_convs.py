"""Steps of single convolutions, sparse beside dense, at several densities.

In: a ``Plan``. Out: ``always_sparse_convs.csv``, a figure and a table. A step is the forward and the backward pass of
one layer whose input needs a gradient, and the update of its weight by ``torch.optim.Adam(fused=True)``. Dense is the
better of images with channels first and last in memory; sparse computes with the non-zeros.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

import rwfx
from rwfx.experiments.speed.contenders import SEED
from rwfx.experiments.speed.plan import Plan
from rwfx.experiments.speed.sparse_figures import draw_convs
from rwfx.experiments.speed.sparse_plan import ConvLayer
from rwfx.experiments.speed.turns import Call, Spread, ratios, take_turns
from rwfx.experiments.tables import markdown, write_csv

FORMATS = {"dense, channels first": torch.contiguous_format, "dense, channels last": torch.channels_last}


@dataclass(frozen=True)
class ConvTurn:
    """The time of one turn, per step."""

    layer: str
    batch_size: int
    density: float
    contender: str
    round: int
    milliseconds: float


LEGEND = (
    "The dense step over the sparse one at each density: above 1 is faster than dense. Medians [least - greatest] of "
    "pairs taken in one round."
)


def run(plan: Plan, progress: bool) -> str:
    """Measure, write the files and give the table."""
    turns: list[ConvTurn] = []
    for layer in plan.always_sparse.convs:
        turns += measure(plan, layer, progress)
        write_csv(plan.out / "always_sparse_convs.csv", ConvTurn, turns)
    found = speeds(turns)
    draw_convs({layer: of for layer, (_, of) in found.items()}, plan.out / "always_sparse_convs.png")
    return table(plan, found)


def measure(plan: Plan, layer: ConvLayer, progress: bool) -> list[ConvTurn]:
    """Give the dense step of a layer and the sparse ones their turns."""
    entered: list[tuple[float, str, Call]] = [
        (1.0, name, _step(plan, layer, _conv(plan, layer), memory)) for name, memory in FORMATS.items()
    ]
    for density in plan.always_sparse.conv_densities:
        sparse = rwfx.sparsify(nn.Sequential(_conv(plan, layer)), density, growth="static", by="nonzeros", seed=SEED)
        entered.append((density, "sparse", _step(plan, layer, sparse, torch.contiguous_format)))
    with tqdm(total=len(entered) * (plan.rounds + 1), desc=f"convolution {layer.name}", disable=not progress) as bar:
        return [
            ConvTurn(layer.name, layer.batch_size, *entered[place][:2], number, spent)
            for number, place, spent in take_turns([call for *_, call in entered], plan.rounds, plan.device, bar)
        ]


def speeds(turns: Sequence[ConvTurn]) -> dict[str, tuple[float, dict[float, Spread]]]:
    """Give the dense milliseconds of each layer, and how many times as fast it is at each density."""
    times: dict[str, dict[tuple[str, float], list[float]]] = {}
    for turn in turns:
        times.setdefault(turn.layer, {}).setdefault((turn.contender, turn.density), []).append(turn.milliseconds)
    found = {}
    for layer, of in times.items():
        dense = min((spent for (kind, _), spent in of.items() if kind != "sparse"), key=statistics.median)
        sparse = {density: spent for (kind, density), spent in of.items() if kind == "sparse"}
        faster = {density: Spread.of(ratios(dense, spent)) for density, spent in sparse.items()}
        found[layer] = statistics.median(dense), faster
    return found


def table(plan: Plan, found: dict[str, tuple[float, dict[float, Spread]]]) -> str:
    """Give a line per layer."""
    densities = plan.always_sparse.conv_densities
    header = ["channels, image", "batch", "dense ms", *(f"times dense at {density:g}" for density in densities)]
    batches = {layer.name: layer.batch_size for layer in plan.always_sparse.convs}
    cells = [
        [layer, str(batches[layer]), f"{dense:.2f}", *(str(of[density]) for density in densities)]
        for layer, (dense, of) in found.items()
    ]
    return f"{markdown(header, cells)}\n\n{LEGEND}"


def _conv(plan: Plan, layer: ConvLayer) -> nn.Conv2d:
    conv = nn.Conv2d(layer.channels, layer.outputs, 3, layer.stride, padding=1, bias=False)
    return conv.to(plan.device, plan.dtype)


def _step(plan: Plan, layer: ConvLayer, network: nn.Module, memory: torch.memory_format) -> Call:
    generator = torch.Generator().manual_seed(SEED)
    shape = layer.batch_size, layer.channels, layer.side, layer.side
    x = torch.randn(shape, generator=generator).to(plan.device, plan.dtype, memory_format=memory).requires_grad_()
    network = network.to(memory_format=memory)  # type: ignore[call-overload]
    g = torch.randn(network(x).shape, generator=generator).to(x.device, x.dtype, memory_format=memory)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        network(x).backward(g)
        optimizer.step()

    return step
