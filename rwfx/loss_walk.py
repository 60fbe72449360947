"""The sampler of walks that start where the loss is: rows and examples are drawn together, in the backward pass.

In and out: as for every ``RowSampler``, but the row sets are blank; ``rwfx::pick_by_walks`` fills them in, and its
arguments are here.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import rwfx.ops.loss_walk
import rwfx.ops.streams  # noqa: F401  define the operators
from rwfx.policies import RandomWalk
from rwfx.sampler import Buffers, read_chosen
from rwfx.schedules import Schedule
from rwfx.walk import GraphSampler
from rwfx.weight_graph import WeightGraph


class LossWalkSampler(GraphSampler):
    """Says how many rows; which ones, walks say that start at pairs of an example and an output unit."""

    draws: Tensor

    def __init__(
        self,
        graph: WeightGraph,
        kept: Sequence[str],
        seed: int,
        policy: RandomWalk,
        densities: Mapping[str, float | Schedule] | None,
        resample_every: int = 1,
    ) -> None:
        super().__init__(graph, kept, seed, densities, policy.min_rows)
        if not kept:  # every weight keeps all of its rows: the examples are those with the largest gradient
            self._head = -1
            return
        if not self.exactly or resample_every > 1:
            raise ValueError(
                'start="loss" needs a density that is a number, as the rows are drawn in the backward pass, and '
                f"resample_every=1; got density={policy.density!r}, resample_every={resample_every}."
            )
        if len(graph.heads) != 1:
            raise ValueError(f'start="loss" needs one output weight, and this model has {len(graph.heads)}.')
        ((self._head, ids),) = graph.heads.items()
        station = graph.stations[self._head]
        if len(ids) != station.size:
            raise ValueError('start="loss" needs every row of the output weight to reach the output.')
        self.policy = policy
        self.chosen = Buffers(torch.zeros(size + 1, dtype=torch.int64) for size in self.sizes)
        self.register_buffer("draws", torch.tensor([seed, 0]), persistent=False)
        self.remembered = "draws", *(f"chosen.{k}" for k in range(len(kept)))

    def draw(self, *weights: Tensor) -> list[Tensor]:
        """Blank row sets of a step, and the state of its draw."""
        return [*(self.last.new_zeros(count) for count in self.exactly), torch.ops.rwfx.tick_.default(self.draws)]

    @property
    def _num_scales(self) -> int:
        return 1  # what is drawn besides the row sets: the state

    def walk_arguments(self) -> tuple[list[int], int, list[int], int, float, float]:
        """Of ``rwfx::pick_by_walks``: the weights kept, the head, the stations, and the rule of the walks."""
        policy = self.policy
        return self._kept, self._head, list(self._layout), policy.num_paths or 0, policy.temperature, policy.epsilon

    def row_sets(self) -> dict[str, Tensor]:
        """The row sets of the last backward pass, by weight; empty before the first."""
        return dict(zip(self.kept, read_chosen(self.chosen), strict=True))
