"""Random walks over the weight graph, and the sampler that draws a model's row sets with them.

In: a ``WeightGraph`` and its weights. Out: row sets, or the walks themselves. A *walk* starts at a row of an
output weight and steps towards the input: at row ``i`` it draws an input feature ``j`` with probability

    p(j | i) ~ |W[i, j]| ** (1 / temperature)        (with probability epsilon uniformly instead)

(in a convolution a row is an output channel, ``|W[i, j]|`` is summed over the kernel, and ``j`` is one of the channels
of the row's group) and goes on at the row that produces feature ``j``; where several rows are added there, at one of
them, each with the same probability; where none is, it ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rwfx.ops.walk import Station, is_tree, mix, pack_stations, sweep, unpack_stations
from rwfx.policies import AdaptiveWalk, LearnedWalk, RandomWalk
from rwfx.preference import Preference, observed_uses
from rwfx.sampler import WALKS_A_ROW, Buffers, RowSampler
from rwfx.schedules import Schedule
from rwfx.stations import Junction, WeightUse
from rwfx.weight_graph import WeightGraph


def random_walks(
    graph: WeightGraph,
    weights: Mapping[str, Tensor],
    num_paths: int,
    *,
    temperature: float = 1.0,
    epsilon: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Draw walks and return the walks themselves.

    Args:
        graph: from ``rwfx.weight_graph``.    weights: by name, such as ``dict(model.named_parameters())``.
        seed: equal seeds give equal walks.

    Returns:
        ``(num_paths, len(graph.uses))`` int64: the row at which each walk passes each call on a weight, in
        execution order; -1 where it does not pass.
    """
    names = list(graph.names)
    stations, tables = stations_of(graph, names)
    tensors = [graph.tensor(name, weights).detach() for name in names]
    device = tensors[0].device
    visits = sweep(
        stations,
        tensors,
        [table.to(device) for table in tables],
        list(graph.heads),
        [ids.to(device) for ids in graph.heads.values()],
        num_paths,
        temperature,
        epsilon,
        mix(*torch.tensor([seed, 0])),
    )
    passes = [rows_P for _, rows_P in visits]
    return torch.stack(passes[::-1], 1)


def stations_of(graph: WeightGraph, names: Sequence[str]) -> tuple[tuple[Station, ...], list[Tensor]]:
    """The graph as the operator ``rwfx::walk`` takes it: stations, and a table for each."""
    stations, tables = [], []
    for number, s in enumerate(graph.stations):
        targets = graph.station_of(graph.sources(number)).unique().tolist()
        ends = -1 in targets
        crossed = names.index(s.weight) if isinstance(s, WeightUse) else -1
        station = Station(crossed, s.base, s.size, tuple(t for t in targets if t >= 0), ends)
        laid_out = isinstance(s, WeightUse)
        stations.append(replace(station, groups=s.groups, transposed=s.transposed) if laid_out else station)
        # The bits of the float64 ways in an int64: a table that is moved to bfloat16 with its model stays as it is.
        junction = isinstance(s, Junction)
        tables.append(torch.stack([s.members, s.ways.view(torch.int64)]) if junction else s.feature_map)
    return tuple(stations), tables


class GraphSampler(RowSampler):
    """Draws row sets by ``rwfx::walk``, with the weight graph as that takes it."""

    def __init__(
        self,
        graph: WeightGraph,
        kept: Sequence[str],
        seed: int,
        densities: Mapping[str, float | Schedule] | None = None,
        min_rows: int = 1,
        resample_every: int = 1,
    ) -> None:
        super().__init__(graph, kept, seed, densities, min_rows, resample_every)
        self.crossed = tuple(graph.names)
        self._kept = [self.crossed.index(name) for name in kept]
        stations, tables = stations_of(graph, self.crossed)
        self._layout = pack_stations(stations)
        self._heads = list(graph.heads)
        self._tables = Buffers(tables)
        self._starts = Buffers(graph.heads.values())

    def draw_by_walks(
        self,
        weights: Sequence[Tensor],
        num_paths: int,
        policy: RandomWalk,
        budget: Tensor | None,
        factors: Sequence[Tensor] = (),
        start_weights: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """The row sets of ``num_paths`` walks, or as ``budget`` says, and the scales if ``policy`` is unbiased."""
        *drawn, last = torch.ops.rwfx.walk.default(
            weights,
            self._kept,
            self._tables.tensors(),
            self._heads,
            self._starts.tensors(),
            self._layout,
            self.state,
            self.last,
            num_paths,
            policy.temperature,
            policy.epsilon,
            policy.min_rows,
            self.exactly,
            self.resample_every,
            factors,
            start_weights,
            budget,
            policy.unbiased,
        )
        self.last.copy_(last)
        return drawn


class WalkSampler(GraphSampler):
    """Draws row sets by random walks; ``rwfx.policies`` says how."""

    def __init__(
        self,
        graph: WeightGraph,
        kept: Sequence[str],
        seed: int,
        policy: RandomWalk,
        densities: Mapping[str, float | Schedule] | None = None,
        resample_every: int = 1,
    ) -> None:
        super().__init__(graph, kept, seed, densities, policy.min_rows, resample_every)
        self.policy = policy
        self.unbiased = policy.unbiased
        if policy.unbiased and not is_tree(unpack_stations(tuple(self._layout)), self._heads):
            raise ValueError(
                "unbiased=True needs a model whose weights form a tree, each used once and leading to one other: "
                "here rows are added, or a weight is used twice, and the walks' sets are then not independent enough "
                "to be weighed. rwfx.Uniform and rwfx.Magnitude are unbiased wherever no gradient passes a weight "
                "twice."
            )
        self.preference = None
        self._from_gradient = isinstance(policy.start, str) and policy.start == "gradient"
        follows = isinstance(policy, AdaptiveWalk | LearnedWalk) or self._from_gradient
        if follows and observed_uses(graph, kept, policy):
            self.preference = Preference(graph, kept, policy)
            seen = tuple(f"preference.seen.{k}" for k in range(len(self.preference.calls)))
            self.remembered = ("preference.value", "preference.taken", *seen)
        if self._from_gradient and not any(graph.stations[head].weight in kept for head in graph.heads):  # type: ignore[union-attr]
            self.notes = ('start="gradient" needs an output weight that is row-sparse; here walks start uniformly',)
        self._start_weights = Buffers(_start_weights(graph, policy))
        if policy.unbiased and any((weights == 0).any() for weights in self._start_weights.tensors()):
            raise ValueError("unbiased=True needs start weights above zero: other rows would never have a gradient.")
        # A mapping or a tensor of weights is not compared with a word.
        self.starts_at_labels = isinstance(policy.start, str) and policy.start == "labels"
        self._labelled = not self.starts_at_labels

    def draw(self, *weights: Tensor) -> list[Tensor]:
        """Row sets by walks over ``weights``."""
        policy = self.policy
        factors: list[Tensor] = []
        start_weights = self._start_weights.tensors()
        if not self._labelled:
            raise RuntimeError(
                'rows are to start at labels (start="labels"): call start_from(labels) before the forward.'
            )
        if self.preference is not None:
            value_G = self.preference.follow(self.last)
            if isinstance(policy, AdaptiveWalk | LearnedWalk):
                factors = self.preference.factors(value_G)
            if self._from_gradient:
                start_weights = [value_G.index_select(0, ids) for ids in self._starts.tensors()]
        num_paths = policy.num_paths or (None if self._scheduled else self._walks())
        return self.draw_by_walks(weights, num_paths or 0, policy, self._budget(num_paths), factors, start_weights)

    def start_from(self, labels: Tensor) -> None:
        """Let the next walks start at the rows that ``labels`` name, each as often as it is there.

        Raises:
            ValueError: the policy has another ``start``, there are several output weights, or a label is no row of the
                output weight; nothing is changed then.
        """
        if not self.starts_at_labels:
            raise ValueError(f'start_from is for start="labels"; these walks have start={self.policy.start!r}.')
        (weights,) = self._start_weights.tensors()
        labels = torch.as_tensor(labels)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be whole numbers, got {labels.dtype}.")
        flat = labels.detach().flatten().long()
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < len(weights):
            raise ValueError(
                f"labels are from {int(flat.min())} to {int(flat.max())}, and the output weight has {len(weights)} "
                f"rows: they must be from 0 to {len(weights) - 1}. Leave out what is ignored, such as padding."
            )
        weights.copy_(torch.bincount(flat, minlength=len(weights)))
        self._labelled = True

    @property
    def num_paths(self) -> int:
        """How many walks a step draws; under a schedule as many as where it keeps the fewest rows."""
        most = max(super().expected_rows().values()) if self._scheduled else 0
        return self.policy.num_paths or (WALKS_A_ROW * int(most) if self._scheduled else self._walks())

    def expected_rows(self, weights: Sequence[Tensor] = (), draws: int = 3) -> dict[str, float]:
        """As for any sampler; where no density says so, the mean over a few draws of walks that step uniformly.

        Uniformly, and always from one seed: then it is the architecture that decides which weights are row-sparse, and
        not the values that they have at the time, so that a resumed run and every rank decide alike.
        """
        if self._densities:
            return super().expected_rows()
        before = (
            self.state.clone(),
            self.last.clone(),
            self.policy,
            self.preference,
            self.resample_every,
            self._labelled,
        )
        totals = dict.fromkeys(self.kept, 0.0)
        self.policy = RandomWalk(self._walks(), epsilon=1.0, min_rows=self.policy.min_rows)
        self.preference, self.resample_every, self._labelled = None, 1, True
        self.state.zero_()
        with torch.enable_grad():
            for _ in range(draws):
                for weight, rows in zip(self.kept, self(*weights), strict=False):
                    totals[weight] += len(rows) / draws
        state, last, self.policy, self.preference, self.resample_every, self._labelled = before
        self.state.copy_(state)
        self.last.copy_(last)
        return totals

    def _walks(self) -> int:
        """How many walks a step draws, where no schedule decides."""
        return self.policy.num_paths or (WALKS_A_ROW * max(self.exactly) if self.exactly else PATHS)


PATHS = 50
"""Walks a step where neither their number nor a density is given."""


def _start_weights(graph: WeightGraph, policy: RandomWalk) -> list[Tensor]:
    """The weights of the starts at each head, where the policy gives them or ``start_from`` will."""
    names = {station: use.weight for station, use in enumerate(graph.stations) if isinstance(use, WeightUse)}
    if isinstance(policy.start, str) and policy.start == "labels":
        if len(graph.heads) > 1:
            heads = ", ".join(names[station] for station in graph.heads)
            raise ValueError(f'start="labels" needs one output weight, and this model has {len(graph.heads)}: {heads}.')
        ((station, ids),) = graph.heads.items()
        if len(ids) != graph.rows(names[station]):
            raise ValueError(f'start="labels" needs every row of {names[station]} to reach the output.')
        return [torch.zeros(len(ids))]
    if isinstance(policy.start, str):
        return []
    given = policy.start
    if not isinstance(given, Mapping):
        if len(graph.heads) > 1:
            raise ValueError("start weights without a name need one output weight; give them as a mapping by name.")
        given = {names[next(iter(graph.heads))]: given}
    unknown = set(given) - {names[station] for station in graph.heads}
    if unknown:
        heads = ", ".join(names[station] for station in graph.heads)
        raise ValueError(
            f"start names {sorted(unknown)[0]!r}, which is no output weight; the output weights are {heads}."
        )
    found = []
    for station, ids in graph.heads.items():
        name, rows = names[station], graph.rows(names[station])
        weights = torch.as_tensor(given.get(name, torch.ones(rows)), dtype=torch.float32).detach().clone()
        if weights.shape != (rows,) or not weights.isfinite().all() or (weights < 0).any() or not weights.any():
            raise ValueError(
                f"start must have a weight for each of the {rows} rows of {name}: finite, none negative, not all "
                f"zero; got a tensor of shape {tuple(weights.shape)}."
            )
        found.append(weights[ids - graph.stations[station].base])
    return found
