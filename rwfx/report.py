"""The report of a transformed model: what was rewritten, what stayed dense and why, and what a step costs.

In: the lines that ``rwfx.transform`` writes and the row counts of the last draw. Out: numbers, and a table.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rwfx.break_even import Costs
from rwfx.examples import ExamplePolicy
from rwfx.policies import Policy, TopK


@dataclass(frozen=True)
class Line:
    """One parameter with rows."""

    weight: str
    rows: int
    features: int
    calls: int  # how many times a forward pass uses it
    input_grads: int  # at how many of these calls the backward pass also needs the input's gradient
    dense_because: str = ""  # empty: its backward is row-sparse
    sources: tuple[str, ...] = ()  # for some of these, the weights whose rows are the only columns read of it
    costs: Costs | None = None  # predicted; None: nothing was
    leaves_examples: bool = False  # whether its calls compute their backward with the kept examples alone
    # At how many places of an example a call multiplies the weight: a convolution at those of its output, or of its
    # input if transposed, on average over its calls; a token goes to some experts, a share of a grouped product's
    # weight. None: only example inputs would tell.
    places: float | None = 1
    expected: float | None = None  # how many rows a step is expected to keep; None: nothing is drawn for it
    itemsize: int = 4  # bytes of one number

    @property
    def share_of_limit(self) -> float | None:
        """The predicted speed of a step on this weight over that with a free backward and update."""
        return self.costs.share_of_limit(is_sparse=not self.dense_because) if self.costs else None


@dataclass(frozen=True)
class Flops:
    """Floating point operations of linear calls and convolutions in one training step; a multiply-add counts as two."""

    forward: int
    backward: int  # as computed: on the rows alone where the backward is sparse
    dense_backward: int

    @property
    def total(self) -> int:
        """The step as computed."""
        return self.forward + self.backward

    @property
    def dense_total(self) -> int:
        """The same step of the original model."""
        return self.forward + self.dense_backward

    @property
    def share(self) -> float:
        """``total / dense_total``."""
        return self.total / self.dense_total


@dataclass(frozen=True)
class Report:
    """What became of each weight, and the cost of a step with the row sets of the last training forward."""

    lines: tuple[Line, ...]  # execution order, then what no linear call uses
    mode: str
    dx: str
    policy: Policy
    kept_rows: Mapping[str, int]  # of the last draw; empty before the first
    notes: tuple[str, ...] = ()
    example_policy: ExamplePolicy | None = None
    examples: tuple[int, int] | None = None  # how many the last training forward kept, and of how many
    route: str = "symbolic_trace"  # by which the model was captured
    grad: str = "dense"

    @property
    def predicted(self) -> tuple[float, float] | None:
        """How many times as fast as dense a step is predicted to be, and the limit: that with a free backward.

        Where examples are left out: as fast as with all rows of the examples kept.

        Of the weights alone: not counted are the sampler, the loss and whatever else the model computes.
        """
        costs = [(line.costs, not line.dense_because) for line in self.lines if line.costs is not None]
        if not costs:
            return None
        forward = sum(of.forward for of, _ in costs)
        dense = forward + sum(of.dense for of, _ in costs)
        return dense / (forward + sum(of.sparse if sparse else of.dense for of, sparse in costs)), dense / forward

    @property
    def sparse(self) -> tuple[str, ...]:
        """The weights with a row-sparse backward."""
        return tuple(line.weight for line in self.lines if not line.dense_because)

    @property
    def dense(self) -> dict[str, str]:
        """The weights that stayed dense, and why."""
        return {line.weight: line.dense_because for line in self.lines if line.dense_because}

    def flops(self, batch_size: int = 1) -> Flops:
        """The linear calls of one step on ``batch_size`` inputs (examples, or examples times tokens).

        Per call on a weight ``(O, I)`` with K rows kept: forward ``2 B O I``; backward ``2 B K I`` for the
        weight and, where the input needs a gradient, ``2 B K C`` for it, with C the columns of it that are read: I, or
        the rows kept of the weight that produces it (with ``dx="full"`` it is ``2 B O I``). A masked backward computes
        what the dense one does. A convolution does that at every place of its output, a grouped product with a share of
        its weight; where that is not known, it counts as one. Before the first draw, K is what is expected. In the
        backward of a call that leaves examples out, B is the share of the batch that the last step kept.
        """
        kept_examples, of_examples = self.examples or (1, 1)
        forward = backward = dense = 0.0
        lines = {line.weight: line for line in self.lines}
        for line in self.lines:
            at = batch_size * (1 if line.places is None else line.places)
            product = 2 * at * line.rows * line.features
            kept = self._kept(line) if self.mode == "sparse" else line.rows
            taking_part = at * kept_examples / of_examples if line.leaves_examples else at
            on_rows = 2 * taking_part * kept * line.features
            forward += product * line.calls
            dense += product * (line.calls + line.input_grads)
            backward += on_rows * line.calls
            if self.dx == "full":
                backward += 2 * taking_part * line.rows * line.features * line.input_grads
                continue
            read = [self._kept(lines[source]) for source in line.sources]
            backward += sum(2 * taking_part * kept * columns for columns in read)
            backward += on_rows * (line.input_grads - len(read))
        return Flops(round(forward), round(backward), round(dense))

    @property
    def gradient_bytes(self) -> tuple[int, int]:
        """The bytes of the gradients of these weights after a step, and of those of dense training.

        A row gradient holds the rows kept, and for each an int64 that says which it is.
        """
        ours = dense = 0.0
        for line in self.lines:
            row = line.features * line.itemsize
            whole = line.dense_because or self.grad == "dense"
            ours += line.rows * row if whole else self._kept(line) * (row + 8)
            dense += line.rows * row
        return round(ours), round(dense)

    def _kept(self, line: Line) -> float:
        """How many rows of a weight the last draw kept, or before the first the next one is expected to."""
        if line.dense_because:
            return line.rows
        return self.kept_rows.get(line.weight, line.rows if self.kept_rows or line.expected is None else line.expected)

    @property
    def kept_share(self) -> float:
        """The share of the dense backward's products kept by rows, K of O of each: by the last draw, or as expected."""
        weighed = [(line, line.features * (line.calls + line.input_grads) * (line.places or 1)) for line in self.lines]
        kept = sum(self._kept(line) * each for line, each in weighed)
        return kept / sum(line.rows * each for line, each in weighed)

    def __str__(self) -> str:
        width = max(len(line.weight) for line in self.lines)
        text = [f"{'weight':<{width}}  {'shape':>13}  {'rows kept':>13}  {'of limit':>8}  backward"]
        drawn = bool(self.kept_rows or self.examples)
        for line in self.lines:
            kept = self.kept_rows.get(line.weight)
            if not drawn and not line.dense_because and line.expected is not None:
                kept = round(line.expected)
            share = "" if kept is None else f"{kept:>5} {kept / line.rows:>7.1%}"
            how = f"dense: {line.dense_because}" if line.dense_because else self.mode
            if line.dense_because and line.leaves_examples:
                how = f"all rows of the kept examples: {line.dense_because}"
            shape = f"{line.rows} x {line.features}"
            limit = "" if line.share_of_limit is None else f"{line.share_of_limit:.0%}"
            text.append(f"{line.weight:<{width}}  {shape:>13}  {share:>13}  {limit:>8}  {how}")
        flops, (gradients, of_dense) = self.flops(), self.gradient_bytes
        text.append(
            f"multiply-adds of the linear calls, per input: {flops.total // 2:,} of {flops.dense_total // 2:,} "
            f"({flops.share:.1%}); backward {flops.backward // 2:,} of {flops.dense_backward // 2:,}"
        )
        text.append(f"bytes of these weights' gradients: {gradients:,} of {of_dense:,}")
        if any(line.places is None for line in self.lines):
            text.append(
                "of a convolution, at one place of its output, and of experts, with all: example_inputs would tell more"
            )
        if self.sparse and not drawn:
            text.append("no training step yet: rows as expected")
        if self.example_policy is not None:
            last = "" if self.examples is None else f", {self.examples[0]} of {self.examples[1]} in the last step"
            text.append(f"examples: {self.example_policy}{last}")
        where = "in the backward pass" if isinstance(self.policy, TopK) else "before the forward pass"
        text.append(f"rows: {self.policy}, chosen {where}")
        if self.route != "symbolic_trace":
            text.append(f"captured by {self.route}")
        if self.predicted:
            than = "dense" if self.example_policy is None else "with all rows of the kept examples"
            times, limit = self.predicted
            text.append(f"predicted: a step {times:.1f} times as fast as {than}, at most {limit:.1f} (the limit)")
        text += [f"note: {note}" for note in self.notes]
        return "\n".join(text)
