"""What a CUDA device would refuse or wait for, seen without one: operators on fake tensors of such a device.

A fake tensor has a device and no numbers: to read one, or to mix it with a tensor of the CPU, is an error.
"""

import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import rwfx
from rwfx.ops.conv_rows import Convolution, _on_rows
from rwfx.ops.examples import _blank_examples, _draw_by_size, _note_needed
from rwfx.ops.observe import _observe, _record, _top_rows
from rwfx.ops.remember import remember

walk = sys.modules["rwfx.ops.walk"].walk
EXAMPLES, ROWS, SIZES = torch.rand(9), torch.tensor([1, 3]), torch.tensor([4, 5])


def walked(exactly, resample_every):
    """The arguments of a draw over a model with a residual connection."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.head(x + self.second(x))

    model = Residual()
    sampler = rwfx.transform(model, density=0.4, include="*", seed=1)._sampler
    weights = [model.get_parameter(name).detach() for name in sampler.crossed]
    graph = weights, sampler._kept, sampler._tables.tensors(), sampler._heads, sampler._starts.tensors()
    sizes = [2] * len(sampler.kept) if exactly else []
    return *graph, sampler._layout, sampler.state, sampler.last, 9, 1.0, 0.1, 1, sizes, resample_every


def depthwise(x, weight, rows):
    conv = Convolution([1, 1], [1, 1], [1, 1], False, [0, 0], 6)
    return _on_rows(conv, x.index_select(1, rows), x, weight.index_select(0, rows), rows, 6, [True] * 3)


def remembered(a, b):
    use, row = a.new_zeros(9, dtype=torch.int64), torch.arange(9, device=a.device)
    last = torch.zeros(12, dtype=torch.int64, device=a.device)
    sizes = row[4:6]
    return remember(
        [a, b], torch.cat([a, b]), torch.cat([b, a]), sizes, use, row, last, 9, True, 0.3, 0.1, 2.0, 0.1, 4.0
    )


READING_NOTHING = {
    "walk": lambda: (walk, walked(True, 1)),
    "walk-resampled": lambda: (walk, walked(True, 2)),
    "examples": lambda: (lambda size, state: _draw_by_size(size, 4, state, 0.1), (EXAMPLES, ROWS)),
    "blank-examples": lambda: (lambda needed: _blank_examples(needed, 9, 4, []), (EXAMPLES[:1],)),
    "needed": lambda: (lambda needed, size: _note_needed(needed, size, 0.9, 0.9), (EXAMPLES[:1], EXAMPLES)),
    "observe": lambda: (lambda seen, g, rows: _observe(seen, g, rows), (EXAMPLES, torch.rand(2, 9), ROWS)),
    "top-rows": lambda: (lambda g: _top_rows(g, 3), (torch.rand(2, 9),)),
    "record": lambda: (_record, (torch.zeros(5, dtype=torch.int64), ROWS)),
    "depthwise": lambda: (depthwise, (torch.rand(2, 6, 5, 5), torch.rand(6, 1, 3, 3), ROWS)),
    "remember": lambda: (remembered, (EXAMPLES[:4], EXAMPLES[4:])),
}


def on_fake_device(run, arguments):
    with FakeTensorMode() as mode:
        return run(*tree_map_only(Tensor, lambda t: mode.from_tensor(t).to("cuda"), arguments))


@pytest.mark.parametrize("case", READING_NOTHING.values(), ids=READING_NOTHING)
def test_what_has_a_fixed_size_is_found_on_the_device_and_nothing_is_read_back(case):
    run, arguments = case()
    found = on_fake_device(run, arguments)
    assert all(t.device.type == "cuda" for t in tree_leaves(found) if isinstance(t, Tensor))


def test_rows_as_walks_visit_them_are_read_back():
    with pytest.raises(DataDependentOutputException):
        on_fake_device(walk, walked(False, 1))
