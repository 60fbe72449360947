"""What a training step allocates: bytes in proportion to the rows, as counted by the allocator itself."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rwfx
import rwfx.optim
from rwfx import native

BATCH = 32
WIDTHS = (784, 1024, 1024, 10)
FLOAT, INT = 4, 8  # bytes
DENSE = 1024 * 1024 * FLOAT  # the largest weight, and so its dense gradient


def model():
    layers = [nn.Linear(i, o) for i, o in pairwise(WIDTHS)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def allocated(call):
    """The bytes of each allocation that ``call`` makes, also in C++: the allocator's own records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    # What is freed counts below zero.
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def in_backward_and_step(model, optimizer):
    """The allocations of the second step: the first makes the optimizer's state."""
    x, y = torch.randn(BATCH, WIDTHS[0]), torch.randint(WIDTHS[-1], (BATCH,))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    return allocated(lambda: [loss.backward(), optimizer.step()])


def bound(rows, copies):
    """For K rows of I numbers each, so many copies; and a few copies of every activation's gradient."""
    of_rows = sum(len(kept) * inputs * FLOAT for kept, inputs in zip(rows.values(), WIDTHS, strict=False))
    of_activations = BATCH * sum(WIDTHS) * FLOAT
    return copies * of_rows + 3 * of_activations


# With the kernels a row is held twice: once gathered from its weight, once as a gradient. Python's optimizers also hold
# rows of both moments, of the weight, and of what they are updated by.
@pytest.mark.parametrize(("with_kernels", "copies"), [(True, 2), (False, 8)], ids=["kernels", "python"])
def test_backward_and_step_allocate_in_proportion_to_the_rows(with_kernels, copies, monkeypatch):
    if with_kernels and not native.ready():
        pytest.skip("there are no CPU kernels here: no C++ compiler, or RWFX_NATIVE=0")
    sparse = rwfx.transform(model(), 50, grad="rows", break_even=False, seed=0)
    optimizer = rwfx.optim.Adam(sparse.parameters())
    monkeypatch.setattr(native, "ready", lambda: with_kernels)
    found = in_backward_and_step(sparse, optimizer)
    assert max(found) < DENSE / 16
    assert sum(found) <= bound(sparse.rows, copies) < DENSE

    dense = model()
    control = in_backward_and_step(dense, torch.optim.Adam(dense.parameters()))
    assert max(control) >= DENSE
    assert sum(control) > bound(sparse.rows, copies) + DENSE


def test_memory_does_not_grow_with_the_rows_that_are_not_kept():
    """Equal row sets of a weight and of one four times as tall: equal allocations."""

    def allocations(height):
        w, b = (nn.Parameter(torch.randn(size)) for size in ((height, 64), (height,)))
        optimizer = rwfx.optim.Adam([w, b])
        x, rows = torch.randn(8, 64, requires_grad=True), torch.arange(10)
        for _ in range(2):  # the first step makes the optimizer's state
            w.grad = b.grad = None
            y = rwfx.ops.row_linear(x, w, b, rows, "rows", "rows")
            upstream = torch.ones_like(y)
            found = allocated(lambda y=y, upstream=upstream: [y.backward(upstream), optimizer.step()])
        return sorted(found)

    assert allocations(512) == allocations(2048)


def test_the_bytes_of_the_gradients_are_those_of_the_rows():
    sparse = rwfx.transform(model(), 50, grad="rows", break_even=False, seed=0)
    for _ in range(3):
        sparse.zero_grad()
        sparse(torch.randn(BATCH, WIDTHS[0])).square().sum().backward()
        held = expected = 0
        for name, parameter in sparse.named_parameters():
            grad, rows = parameter.grad, sparse.rows[name.replace("bias", "weight")]
            numbers = parameter[0].numel()
            assert grad._indices().untyped_storage().nbytes() == len(rows) * INT
            assert grad._values().untyped_storage().nbytes() == len(rows) * numbers * FLOAT
            held += sum(t.untyped_storage().nbytes() for t in (grad._indices(), grad._values()))
            expected += len(rows) * (numbers * FLOAT + INT)
        assert 0 < held == expected < sum(p.numel() * FLOAT for p in sparse.parameters()) / 10
