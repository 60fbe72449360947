"""What the row samplers share: a module in the transformed model's graph that gives the row sets of a training step.

In, at every training forward: weights. Out: row sets, one per weight of ``kept``, and with ``unbiased`` a scale for
each. A *budget* is how many rows each set has, where a density says so: fixed numbers, or computed from the step by
schedules.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil

import torch
from torch import Tensor, nn

import rwfx.ops.streams  # noqa: F401  defines the operators
from rwfx.ops.walk import read_last
from rwfx.schedules import Schedule, density_at
from rwfx.weight_graph import WeightGraph


class KeepsTypes(nn.Module):
    """A module whose buffers move with the model to another device, and keep their types when its weights change
    theirs."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsTypes":
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self.get_buffer(name)
            if after.dtype != buffer.dtype:  # not there and back, which would round it
                self._buffers[name] = buffer.to(after.device)
        return self


class RowSampler(KeepsTypes):
    """Gives the row sets of a step; each policy has a sampler that says how in ``draw``.

    Called with the weights of ``crossed``, in order, it returns a row set for each weight of ``kept``, ``(K,)`` int64,
    sorted, then if ``unbiased`` for each the inverse probabilities of its rows, ``(K,)``. Without gradients nothing is
    drawn, and what is returned is empty.

    It has no entries in a ``state_dict``, so that a transformed model's are those of its original; what a resumed run
    needs is in ``sampler_state``: the seed and the number of steps in ``state``, the last draw in ``last``, what the
    names of ``remembered`` hold, and in ``policy`` the ``fingerprint`` by which the state of another policy is known.
    """

    state: Tensor
    last: Tensor
    unbiased = False
    remembered: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    num_paths = 0
    fingerprint = 0

    def __init__(
        self,
        graph: WeightGraph,
        kept: Sequence[str],
        seed: int,
        densities: Mapping[str, float | Schedule] | None = None,
        min_rows: int = 1,
        resample_every: int = 1,
    ) -> None:
        super().__init__()
        self.kept = tuple(kept)
        self.crossed = self.kept
        self.sizes = tuple(graph.rows(name) for name in kept)
        self.resample_every = resample_every
        self._densities = [densities[name] for name in kept] if densities else []
        self._scheduled = any(callable(density) for density in self._densities)
        self._least = [max(1, min(min_rows, size)) for size in self.sizes]
        self.exactly = [] if self._scheduled else self._counts(0)
        last = torch.zeros(len(kept) + 1 + sum(self.sizes), dtype=torch.int64)
        self.register_buffer("last", last, persistent=False)
        state, tick = torch.tensor([seed, 0]), torch.tensor([0, 1])
        if self.exactly:  # moves with the model: nothing of a step has to come back from a GPU
            self.register_buffer("state", state, persistent=False)
            self.register_buffer("_tick", tick, persistent=False)
        else:  # stays on the CPU wherever the model goes: reading it never waits for a GPU
            self.state, self._tick = state, tick

    def forward(self, *weights: Tensor) -> list[Tensor]:
        """The row sets of this step, and the inverse probabilities."""
        if not torch.is_grad_enabled():
            return [self.last.new_empty(0)] * len(self.kept) + [self.last.new_empty(0).float()] * self._num_scales
        torch.ops.rwfx.rewind_.default(self.state, self._tick)
        with torch.no_grad():
            drawn = self.draw(*weights)
        self.state.add_(self._tick)
        return drawn

    def draw(self, *weights: Tensor) -> list[Tensor]:
        """What ``forward`` returns, for the step of ``state``."""
        raise NotImplementedError

    def row_sets(self) -> dict[str, Tensor]:
        """The row sets of the last draw, by weight; empty before the first."""
        return dict(zip(self.kept, read_last(self.last, self.sizes), strict=True))

    def expected_rows(self, weights: Sequence[Tensor] = ()) -> dict[str, float]:
        """How many rows a step is expected to keep of each weight; of a schedule, where it keeps the fewest."""
        # Many, and such that no schedule of a short period has the same density at all of them.
        steps = [*range(12), *(10**k + more for k in range(1, 7) for more in (1, 3, 7))] if self._scheduled else [0]
        counts = [self._counts(step) for step in steps]
        return {name: float(min(of)) for name, of in zip(self.kept, zip(*counts, strict=True), strict=True)}

    def sampler_state(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on with the same draws."""
        found = {name: self._buffer(name).detach().cpu().clone() for name in ("state", "last", *self.remembered)}
        return {"policy": torch.tensor(self.fingerprint, device="cpu"), **found}

    def load_sampler_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``sampler_state`` was taken.

        Raises:
            ValueError: the state is that of another model or is incomplete; nothing is changed then.
        """
        own = self.sampler_state()
        another = "policy" in state and not torch.equal(state["policy"], own["policy"])
        if another or state.keys() - own.keys():
            raise ValueError(
                "the sampler state was saved with another row policy, or another density, schedule or start of it."
            )
        for name, tensor in own.items():
            but = "from a model with other weights, other weights kept dense or another row policy"
            check_entry(name, state.get(name), tensor, but)
        if not self._could_draw(state["last"]):
            raise ValueError("sampler state 'last' holds rows that this model does not have: it is another model's.")
        for name in own.keys() - {"policy"}:
            self._buffer(name).copy_(state[name])

    @property
    def _num_scales(self) -> int:
        return len(self.kept) if self.unbiased else 0

    def _buffer(self, name: str) -> Tensor:
        return self.state if name == "state" else self.get_buffer(name)

    def _counts(self, step: int) -> list[int]:
        return [
            rows_kept(density, size, least, step)
            for density, size, least in zip(self._densities, self.sizes, self._least, strict=False)
        ]

    def _budget(self, num_paths: int | None = 0) -> Tensor | None:
        """The walks of this step and the rows of each set, ``(1 + len(kept),)``, where schedules decide them.

        ``num_paths=None``: ``WALKS_A_ROW`` for each row of the largest set. None are needed for sets of all rows.
        """
        if not self._scheduled:
            return None
        sizes, least = (torch.tensor(numbers, device="cpu") for numbers in (self.sizes, self._least))
        density = torch.stack([density_at(of, self.state[1]) for of in self._densities])
        counts = (density * sizes * (1 - ROUNDING)).ceil().long().maximum(least).minimum(sizes)
        walks = WALKS_A_ROW * counts.amax() if num_paths is None else torch.tensor(num_paths, device="cpu")
        return torch.cat([torch.where((counts == sizes).all(), 0, walks)[None], counts])

    def _could_draw(self, last: Tensor) -> bool:
        """Whether ``last`` holds sorted rows of these weights, or is what it is before the first draw."""
        ends = last[: len(self.sizes) + 1].tolist()
        if ends[0] != 0 or ends != sorted(ends) or ends[-1] > sum(self.sizes):
            return False
        return all(
            len(rows) <= size and (rows.diff() > 0).all() and (rows >= 0).all() and (rows < size).all()
            for rows, size in zip(read_last(last, self.sizes), self.sizes, strict=True)
        )


WALKS_A_ROW = 4
"""So many walks find most of the rows that they would ever come by."""

ROUNDING = 3e-7  # what a decimal loses in binary, up to float32: 0.07 of 100 rows are 7


def rows_kept(density: float | Schedule, size: int, least: int, step: int = 0) -> int:
    """How many rows the set of a weight with ``size`` rows has at ``step``."""
    return min(max(ceil(float(density_at(density, torch.tensor(step))) * size * (1 - ROUNDING)), least), size)


class Buffers(KeepsTypes):
    """A list of tensors that moves with its module and has no part in the ``state_dict``."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        for k, tensor in enumerate(tensors):
            self.register_buffer(str(k), tensor, persistent=False)

    def tensors(self) -> list[Tensor]:
        """The tensors, in order."""
        return list(self._buffers.values())  # type: ignore[arg-type]


def read_chosen(chosen: Buffers) -> list[Tensor]:
    """The row sets that ``rwfx::record_`` wrote, one for each weight."""
    return [of[1 : 1 + int(of[0])].clone() for of in chosen.tensors()]


def check_entry(name: str, given: object, own: Tensor, but: str) -> None:
    """Refuse what is not a tensor such as ``own``.

    Raises:
        ValueError: says what was met, and ``but``: where it comes from.
    """
    if not isinstance(given, Tensor) or given.shape != own.shape or given.dtype != own.dtype:
        met = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        raise ValueError(
            f"sampler state {name!r} is {met}, this model needs {own.dtype} {tuple(own.shape)}: it was saved {but}."
        )
