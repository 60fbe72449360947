"""Labels: where each number of an activation comes from, found by running a model's graph on row numbers.

In: a normalized ``GraphModule``. Out: a ``Trail``: the stations of its weight graph and the ids in its output.

Instead of numbers, the graph is run on *labels*: the value of a tensor is a tensor of the same shape that
says, for every element, the global id of the row that produced it (-1: none, it comes from an input or
a constant). A weighted call gives fresh ids, one per row; structural operations (reshape, concatenate,
slice, ...) are executed on the ids, so no rule has to know which dimension holds the features; elementwise
operations leave the ids where they are; where several ids meet (an addition, a pool) a *junction* gives the
place an id of its own that leads to all of them. ``rwfx.label_rules`` lists the operations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from rwfx.label_run import Guess, LabelRun, Width
from rwfx.label_values import UnknownShape, operands_of
from rwfx.passes.normalize import CONVOLUTIONS, weight_of
from rwfx.stations import Junction, Station, WeightUse, leaves

# Where no example says: the leading dimensions of the first linear call (a batch, of sequences, of grids), and how many
# places a side of the first convolution's input has.
LEADS = ((2,), (2, 3), (2, 3, 5))
SIDES = (224, 64, 32, 28, 16, 128, 96, 8)


@dataclass(frozen=True)
class Trail:
    """What a run on labels showed."""

    stations: tuple[Station, ...]  # in execution order, ids rising
    output_ids: Tensor  # (n,) int64, distinct
    notes: tuple[str, ...]  # where an operation could only be followed roughly


def follow_rows(gm: GraphModule, names: Mapping[int, str], shapes: Mapping[str, torch.Size] | None = None) -> Trail:
    """Run ``gm`` on labels.

    Args:
        gm: a normalized graph module.    names: the name of each parameter, by ``id``.
        shapes: the shape of each node's value. Without them the leading dimensions of the first linear call
            and the size of images are guessed (``LEADS``, ``SIDES``); a guess holds when every later weighted call
            finds as many features as its weight has. Where none holds for a model with convolutions, any row of a
            convolution may feed what is behind it.

    Raises:
        ValueError: no guess holds (the remedy is to give example inputs), or the shapes contradict the graph.
    """
    with torch.random.fork_rng(devices=[]):
        if shapes is not None:
            try:
                return _run(gm, names, Guess(shapes=shapes))[0]
            except UnknownShape as error:
                raise ValueError(f"cannot tell which row feeds which input feature ({error}).") from error
        convolves = any(node.target in CONVOLUTIONS and weight_of(gm, node) is not None for node in gm.graph.nodes)
        failures: list[str] = []
        for side in (*SIDES, None) if convolves else (None,):
            if trail := _guessed(gm, names, side, failures):
                return trail
    raise ValueError(
        "cannot tell which row feeds which input feature without the shapes of the inputs "
        f"({'; '.join(dict.fromkeys(failures))}). Give example_inputs."
    )


def _guessed(gm: GraphModule, names: Mapping[int, str], side: int | None, failures: list[str]) -> Trail | None:
    """What all guesses of the leading dimensions that fit come to."""
    trails = []
    for lead in LEADS:
        try:
            trail, lead_was_guessed = _run(gm, names, Guess(lead=lead, side=side))
            trails.append(trail)
            if not lead_was_guessed:
                break
        except UnknownShape as error:
            failures.append(f"with {len(lead) + 1} dimensions, {error}")
    if trails and all(_agree(trails[0], trail) for trail in trails[1:]):
        return trails[0]
    if trails:
        failures[:] = ["inputs with more and with fewer dimensions fit, and differ in what reaches what"]
    return None


def _agree(a: Trail, b: Trail) -> bool:
    """Whether two guesses of the shapes come to the same weight graph."""
    uses = [[s for s in trail.stations if isinstance(s, WeightUse)] for trail in (a, b)]
    return all(
        x.base == y.base and torch.equal(x.feature_map, y.feature_map) for x, y in zip(*uses, strict=True)
    ) and torch.equal(leaves(a.stations, a.output_ids), leaves(b.stations, b.output_ids))


def _run(gm: GraphModule, names: Mapping[int, str], guess: Guess) -> tuple[Trail, bool]:
    widths: dict[str, int] = {}
    while True:
        run = LabelRun(gm, names, guess, widths)
        try:
            output = run.run()
        except Width as found:
            widths[found.node] = found.width
            continue
        ids = torch.cat([torch.empty(0).long(), *[run.ids_of(x) for x in operands_of(output)]]).unique()
        trail = Trail(tuple(run.register.stations), ids, tuple(dict.fromkeys(run.register.notes)))
        return _pruned(trail), run.lead_was_guessed


def _pruned(trail: Trail) -> Trail:
    """Without the junctions that nothing reads, and the ids numbered anew."""
    size = sum(s.size for s in trail.stations)
    read = torch.zeros(size, dtype=torch.bool)
    read[trail.output_ids] = True
    kept = []
    for s in reversed(trail.stations):
        if isinstance(s, Junction) and not read[s.base : s.base + s.size].any():
            continue
        sources = s.members if isinstance(s, Junction) else s.feature_map
        read[sources[sources >= 0]] = True
        kept.append(s)
    renumbered = torch.full((size + 1,), -1)  # the last one is for -1
    base = 0
    stations = []
    for s in reversed(kept):
        renumbered[s.base : s.base + s.size] = torch.arange(base, base + s.size)
        if isinstance(s, Junction):
            stations.append(replace(s, base=base, members=renumbered[s.members]))
        else:
            stations.append(replace(s, base=base, feature_map=renumbered[s.feature_map]))
        base += s.size
    return Trail(tuple(stations), renumbered[trail.output_ids], trail.notes)
