"""The samplers that do not walk: rows drawn uniformly, by norm, or chosen in the backward pass.

In and out: as for every ``RowSampler``; ``rwfx.policies`` gives the equations.
"""

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

import rwfx.ops.blank_rows  # noqa: F401  defines the operator
from rwfx.labels import WeightUse
from rwfx.loss_walk import LossWalkSampler
from rwfx.policies import Magnitude, Policy, RandomWalk, TopK, Uniform
from rwfx.sampler import Buffers, RowSampler, read_chosen
from rwfx.schedules import Schedule
from rwfx.walk import GraphSampler, WalkSampler
from rwfx.weight_graph import WeightGraph


class UniformSampler(GraphSampler):
    """Draws rows uniformly: what walks do to fill a set up, without a walk."""

    def __init__(
        self,
        graph: WeightGraph,
        kept: Sequence[str],
        seed: int,
        policy: Uniform,
        densities: Mapping[str, float | Schedule],
        resample_every: int = 1,
    ) -> None:
        super().__init__(graph, kept, seed, densities, resample_every=resample_every)
        self.unbiased = policy.unbiased
        _check_passed_once(graph, kept, policy)

    def draw(self, *weights: Tensor) -> list[Tensor]:
        """K rows of O for each weight."""
        rows = self.draw_by_walks(weights, 0, RandomWalk(), self._budget())
        if not self.unbiased:
            return rows
        ones = [torch.ones_like(rows_K, dtype=torch.float32) for rows_K in rows]
        return [*rows, *[one_K * size / one_K.sum() for one_K, size in zip(ones, self.sizes, strict=True)]]


class MagnitudeSampler(RowSampler):
    """Draws rows by the norms of their weights."""

    remembered = ("chances", "order")
    chances: Tensor
    order: Tensor

    def __init__(
        self,
        graph: WeightGraph,
        kept: Sequence[str],
        seed: int,
        policy: Magnitude,
        densities: Mapping[str, float | Schedule],
        resample_every: int = 1,
    ) -> None:
        super().__init__(graph, kept, seed, densities, resample_every=resample_every)
        self.policy, self.unbiased = policy, policy.unbiased
        _check_passed_once(graph, kept, policy)
        self.register_buffer("chances", torch.zeros(sum(self.sizes), dtype=torch.float64), persistent=False)
        self.register_buffer("order", torch.zeros(sum(self.sizes), dtype=torch.int64), persistent=False)

    def draw(self, *weights: Tensor) -> list[Tensor]:
        """K rows of O for each weight."""
        policy = self.policy
        *drawn, chances, order, last = torch.ops.rwfx.draw_by_norm.default(
            weights,
            self.chances,
            self.order,
            self.state,
            self.last,
            policy.power,
            policy.refresh,
            self.exactly,
            self._budget(),
            self.resample_every,
            policy.unbiased,
        )
        self.chances.copy_(chances)
        self.order.copy_(order)
        self.last.copy_(last)
        return drawn


class TopKSampler(RowSampler):
    """Says only how many rows: which ones, each call chooses in the backward pass and writes into ``chosen``.

    The row sets that it gives are blank, of the right size.
    """

    def __init__(
        self,
        graph: WeightGraph,
        kept: Sequence[str],
        seed: int,
        policy: TopK,
        densities: Mapping[str, float | Schedule],
        resample_every: int = 1,
    ) -> None:
        super().__init__(graph, kept, seed, densities)
        if resample_every > 1:
            raise ValueError(
                f"TopK chooses rows by the gradient of every step, so resample_every must be 1, got {resample_every}."
            )
        self.chosen = Buffers(torch.zeros(size + 1, dtype=torch.int64) for size in self.sizes)
        self._blank = Buffers(torch.zeros(count, dtype=torch.int64) for count in self.exactly)
        self.remembered = tuple(f"chosen.{k}" for k in range(len(kept)))

    def draw(self, *weights: Tensor) -> list[Tensor]:
        """Blank row sets."""
        if self.exactly:
            return self._blank.tensors()
        return list(torch.ops.rwfx.blank_rows.default(self.last, self._budget(), self.sizes))

    def row_sets(self) -> dict[str, Tensor]:
        """The row sets of the last backward pass, by weight; empty before the first."""
        return dict(zip(self.kept, read_chosen(self.chosen), strict=True))


SAMPLERS: Mapping[type, type[RowSampler]] = {
    RandomWalk: WalkSampler,
    Uniform: UniformSampler,
    Magnitude: MagnitudeSampler,
    TopK: TopKSampler,
}
"""The sampler of each policy and of those derived from it."""


def sampler_of(
    policy: Policy,
    graph: WeightGraph,
    kept: Sequence[str],
    seed: int,
    densities: Mapping[str, float | Schedule] | None,
    resample_every: int,
) -> RowSampler:
    """The sampler of ``policy`` for the weights of ``kept``.

    Raises:
        ValueError: the policy does not go with this model.
    """
    (kind,) = (sampler for of, sampler in SAMPLERS.items() if isinstance(policy, of))
    if starts_at_loss(policy):
        kind = LossWalkSampler
    sampler = kind(graph, kept, seed, policy, densities, resample_every)  # type: ignore[arg-type]
    sampler.fingerprint = zlib.crc32(b"".join(_words(policy)))
    return sampler


def starts_at_loss(policy: Policy) -> bool:
    """Whether its walks are drawn in the backward pass, from the gradient at the output."""
    return isinstance(policy, RandomWalk) and isinstance(policy.start, str) and policy.start == "loss"


def _words(of: Any) -> Iterator[bytes]:
    """What tells a policy from others, in every process alike: its fields, whole tensors, and a function's code."""
    if isinstance(of, Tensor):
        yield of.detach().cpu().double().numpy().tobytes()
    elif is_dataclass(of):
        yield type(of).__name__.encode()
        for column in fields(of):
            yield from _words(getattr(of, column.name))
    elif isinstance(of, Mapping):
        for name, value in of.items():
            yield repr(name).encode()
            yield from _words(value)
    elif (code := getattr(of, "__code__", None)) is not None:
        yield code.co_code + repr([c for c in code.co_consts if not hasattr(c, "co_code")]).encode()
    else:
        yield re.sub(r" at 0x[0-9a-f]+", "", repr(of)).encode()


def _check_passed_once(graph: WeightGraph, kept: Sequence[str], policy: Uniform | Magnitude) -> None:
    """Refuse to weigh a row set that lies twice on one way through the network."""
    if not policy.unbiased:
        return
    leads_to: list[set[int]] = []  # for each station those that can be come to from it
    for number in range(len(graph.stations)):
        targets = set(graph.station_of(graph.sources(number)).tolist()) - {-1}
        leads_to.append(targets.union(*(leads_to[target] for target in targets)))
    for weight in kept:
        uses = {k for k, s in enumerate(graph.stations) if isinstance(s, WeightUse) and s.weight == weight}
        if any(uses & leads_to[use] for use in uses):
            raise ValueError(
                f"unbiased=True needs weights that a gradient passes once: {weight} is used {len(uses)} times, one use "
                "behind the other and with the same row set, which would be weighed once too often."
            )
