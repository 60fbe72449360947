"""What a row-sparse backward of a weight is predicted to cost, and whether it pays.

In: the shapes of weights, the rows expected of them, a batch. Out: seconds, and the weights for which it pays. A
row-sparse backward saves products and updates, and costs a call that gathers; on a small weight, or where nearly every
row is drawn, that is more than it saves.

The model has seven numbers, all measured. Per step, for a weight ``(O, I)`` of which K rows are kept, in calls on B
rows of input, of which C columns of the gradient are read (C = I where all may be; the second line only for calls
whose input needs a gradient):

    forward  =  2 B O I * flop
    dense    =  2 B O I * flop                    + O I * update
              + 2 B O I * flop                    + B I * pass_
    sparse   =  2 B K I * flop  +  B K * gather   + K I * update  +  call
              + 2 B K C * flop  +  K C * gather   + B C * pass_
A convolution is such a call on the B places of its output, ``(O, I)`` its weight with the kernel in I. It reads its
input, of N numbers, once for each gradient, and of that input's gradient all columns are read:

    dense    =  2 B O I * flop                    + O I * update
              + 2 B O I * flop                    + N * pass_
    sparse   =  2 B K I * flop  +  B K * gather   + K I * update  +  N * conv  +  call
              + 2 B K I * flop  +  K I * gather   + N * (pass_ + conv)

With ``grad="dense"`` every row is updated, ``O I * update``, and filled with zeros before, ``O I * pass_``; with
``dx="full"`` the second line is the dense one. A step also draws the rows:

    sampler  =  num_paths * (I, over all weights that walks cross) * read  +  call
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from statistics import median

import torch
import torch.nn.functional as F

import rwfx.ops  # noqa: F401  defines the operators
from rwfx.arguments import check_number


@dataclass(frozen=True)
class Candidate:
    """A weight that could have a row-sparse backward."""

    weight: str
    rows: int
    features: int
    kept: float  # the rows expected in its row set
    calls: int  # how often a step uses it
    input_grads: int  # at how many of these calls the input's gradient is needed
    batch_size: int  # rows of input of one call
    sources: tuple[str, ...] = ()  # the weights whose rows are the only columns read of such a gradient
    dense_grad: bool = False  # whether gradients are filled up with zeros, and the optimizer updates every row
    full_dx: bool = False  # whether the input's gradient is that of all rows
    examples: float = 1.0  # the share of the batch that takes part in the backward, whether row-sparse or not
    inputs: int = 0  # the numbers of the input of one call, if it is a convolution


@dataclass(frozen=True)
class Costs:
    """The seconds that a weight is predicted to take in a step."""

    forward: float
    dense: float  # backward and update, dense
    sparse: float  # backward and update, row-sparse

    def share_of_limit(self, is_sparse: bool) -> float:
        """The speed of the step over that with a free backward and update: 1 is the limit."""
        return self.forward / (self.forward + (self.sparse if is_sparse else self.dense))


@dataclass(frozen=True)
class CostModel:
    """Seven numbers of a machine, in seconds, and a batch size.

    The defaults are those of 2 cores of an AMD EPYC with AVX-512 (torch 2.15, float32), where they were measured.
    ``CostModel.measured()`` takes about a second to measure those of the machine that it runs on.

    Args:
        batch_size: the rows of input of a call (examples, or examples times tokens) where no example inputs tell.
        flop: an operation of a product of matrices; a multiply-add counts as two.
        update: a number of a weight that Adam updates.
        gather: a number that is gathered.
        pass_: a number of an activation's gradient that is written, and read again.
        read: a number of a row that a walk reads.
        call: what a row-sparse call takes more than a dense one, whatever its size.
        conv: a number of a convolution's input in each product of its row-sparse backward. A kernel that is given few
            rows takes that much more than its multiply-adds.
    """

    batch_size: int = 128
    flop: float = 6e-12
    update: float = 5e-10
    gather: float = 2e-10
    pass_: float = 4e-10
    read: float = 1.5e-10
    call: float = 4e-5
    conv: float = 2.5e-9

    def __post_init__(self) -> None:
        check_number("batch_size", self.batch_size, Integral, 1)
        for name in ("flop", "update", "gather", "pass_", "read", "call", "conv"):
            # Predictions are divided by what a product takes; the others may be nothing.
            check_number(name, getattr(self, name), Real, 0, above=name == "flop")

    def costs(self, candidate: Candidate, kept: Mapping[str, float]) -> Costs:
        """Predict for a weight; ``kept`` are the rows expected of those whose backward is row-sparse."""
        of, batch = candidate, candidate.batch_size
        product = 2 * batch * of.features * self.flop
        forward = of.calls * of.rows * product
        batch, product = batch * of.examples, product * of.examples
        dense = of.calls * of.rows * product + of.rows * of.features * self.update
        inputs = of.examples * of.inputs or batch * of.features  # the numbers of the input
        dense += of.input_grads * (of.rows * product + inputs * self.pass_)
        sparse = of.calls * (of.kept * product + batch * of.kept * self.gather + self.call)
        sparse += (of.calls + of.input_grads) * of.examples * of.inputs * self.conv
        updated = of.rows if of.dense_grad else of.kept
        sparse += updated * of.features * self.update + of.dense_grad * of.rows * of.features * self.pass_
        if of.full_dx:
            full = of.rows * product + inputs * self.pass_
            return Costs(forward, dense, sparse + of.input_grads * full)
        confined = [kept[source] for source in of.sources if source in kept]
        if of.inputs:
            every = of.kept * product + of.kept * of.features * self.gather + inputs * self.pass_
            return Costs(forward, dense, sparse + of.input_grads * every)
        for columns in [*confined, *[of.features] * (of.input_grads - len(confined))]:
            sparse += columns * (of.kept * (2 * batch * self.flop + self.gather) + batch * self.pass_)
        return Costs(forward, dense, sparse)

    def sampler(self, num_paths: int, features: int) -> float:
        """Predict the sampler, whose walks cross weights with so many input features together."""
        return self.call + num_paths * features * self.read

    def paying(self, candidates: Sequence[Candidate], sampler: float) -> dict[str, Costs]:
        """The weights for which a row-sparse backward pays, with their costs; none if all do not pay the sampler."""
        chosen = {of.weight: of for of in candidates}
        while True:
            kept = {weight: of.kept for weight, of in chosen.items()}
            costs = {weight: self.costs(of, kept) for weight, of in chosen.items()}
            losing = [weight for weight, cost in costs.items() if cost.sparse >= cost.dense]
            if not losing:
                break
            for weight in losing:  # a weight left dense reads all columns: one that fed on that may lose now too
                del chosen[weight]
        saved = sum(cost.dense - cost.sparse for cost in costs.values())
        return costs if saved > sampler else {}

    @classmethod
    def measured(cls, batch_size: int = 128) -> "CostModel":
        """Measure this machine's CPU, with as many threads as torch uses now."""
        check_number("batch_size", batch_size, Integral, 1)
        x, w = torch.randn(256, 1024), torch.nn.Parameter(torch.randn(1024, 1024))
        rows = torch.arange(0, 1024, 4)
        flop = _seconds(lambda: F.linear(x, w.detach())) / (2 * 256 * 1024 * 1024)
        w.grad = torch.randn_like(w)
        adam = torch.optim.Adam([w], fused=True)
        adam.step()
        update = _seconds(adam.step) / w.numel()
        gather = _seconds(lambda: w.detach().index_select(0, rows)) / (len(rows) * 1024)
        pass_ = 2 * _seconds(lambda: torch.ops.aten.threshold_backward(x, x, 0)) / x.numel()
        read = _seconds(lambda: w.detach().abs().sum(1)) / w.numel()
        small, few = torch.randn(2, 4), torch.arange(2)
        tiny = torch.nn.Parameter(torch.randn(4, 4))

        def dense() -> None:
            tiny.grad = None
            F.linear(small, tiny).sum().backward()

        def sparse() -> None:
            tiny.grad = None
            torch.ops.rwfx.row_linear.default(small, tiny, None, few, "rows", "rows").sum().backward()

        call = max(0.0, _seconds(sparse) - _seconds(dense))
        image, kernel, one = torch.randn(16, 64, 16, 16), torch.randn(64, 64, 3, 3), [1, 1]
        g, rows, products = torch.randn_like(image), torch.arange(0, 64, 8), [True, True, False]
        options = None, None, one, one, one, False, [0, 0], 1, False, "values", products
        conv = _seconds(lambda: torch.ops.rwfx.row_conv_backward.default(g, image, kernel, rows, *options)) - call
        conv = conv / 2 - 2 * (g.numel() // 64) * len(rows) * kernel[0].numel() * flop
        return cls(batch_size, flop, update, gather, pass_, read, call, max(0.0, conv / image.numel()))


def _seconds(call: Callable[[], object], repeats: int = 50) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return median(times)
