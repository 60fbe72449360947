"""What every transformed model offers, whichever way it was made: its row sets, its report, the state of its draws."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rwfx.example_sampler import ExampleSampler
from rwfx.passes.sample_rows import SAMPLER
from rwfx.passes.sparse_examples import EXAMPLES
from rwfx.report import Line, Report
from rwfx.sampler import RowSampler
from rwfx.walk import WalkSampler


class Transformed(nn.Module):
    """A model with a row-sparse backward: a mixin, whose other base says how the forward pass runs.

    Parameters and buffers are the original's own, and so are the keys of the ``state_dict``.
    """

    lines: tuple[Line, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def rows(self) -> dict[str, Tensor]:
        """The row sets of the last training forward: ``{weight: (K,) int64}``, sorted, without repeats."""
        return self._sampler.row_sets()

    @property
    def report(self) -> Report:
        """What was rewritten, what stayed dense and why, and the cost of the last step against dense."""
        drawn = bool(self._sampler.state[1])
        kept = {name: len(rows) for name, rows in self.rows.items()} if drawn else {}
        if not any(kept.values()):  # TopK chooses in the backward pass, which has not been
            kept = {}
        settings = self.settings
        about = settings["mode"], settings["dx"], settings["rows"], kept, self.notes
        return Report(self.lines, *about, settings["examples"], self.examples, settings["route"], settings["grad"])

    def sampler_state(self) -> dict[str, Tensor]:
        """The row sampler's random stream, last draw and memory: with ``state_dict`` all for an exact resume."""
        return {**self._sampler.sampler_state(), **(self._examples.sampler_state() if self._examples else {})}

    def load_sampler_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``sampler_state`` was taken.

        Raises:
            ValueError: the state does not fit this model; nothing is changed then.
        """
        of_examples = {name: tensor for name, tensor in state.items() if name.startswith("examples.")}
        if self._examples is None:
            if of_examples:
                raise ValueError("the sampler state was saved from a model that leaves out examples (examples=).")
            self._sampler.load_sampler_state(state)
            return
        self._examples.check_state(of_examples)
        self._sampler.load_sampler_state({name: state[name] for name in state.keys() - of_examples.keys()})
        self._examples.load_sampler_state(of_examples)

    @property
    def examples(self) -> tuple[int, int] | None:
        """How many examples the last training forward kept for its backward, and of how many.

        None before the first, and for a model that was made without ``examples=``.
        """
        kept, of = (0, 0) if self._examples is None else self._examples.last.tolist()
        return (kept, of) if of else None

    @property
    def starts_at_labels(self) -> bool:
        """Whether walks start at the labels given to ``start_from``."""
        return isinstance(self._sampler, WalkSampler) and self._sampler.starts_at_labels

    def start_from(self, labels: Tensor) -> None:
        """Let the walks of the next training forward start at the output rows that ``labels`` name.

        And of those after it, until other labels are given. For ``RandomWalk(start="labels")`` and its kin; ``labels``:
        whole numbers of any shape, each starts in
        proportion to how often it is there.

        Raises:
            ValueError: the policy has another ``start``, or a label is no row of the output weight; nothing is changed
            then.
        """
        if not isinstance(self._sampler, WalkSampler):
            raise ValueError(
                f'start_from is for walks with start="labels"; the row policy is {self.settings["rows"]!r}.'
            )
        self._sampler.start_from(labels)

    @property
    def _sampler(self) -> RowSampler:
        return self._modules[SAMPLER]  # type: ignore[return-value]

    @property
    def _examples(self) -> ExampleSampler | None:
        return self._modules.get(EXAMPLES)  # type: ignore[return-value]
