"""Row magnitudes, and row sets that are chosen by them in the backward pass."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracles import to_dense
from test_ops import DX, GRAD, OP, gradients, operands, oracle, overload, products
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from rwfx import native, ops
from rwfx.ops import masked_linear, observe, row_linear
from rwfx.ops.linear import _RowLinear

# --- The operators on magnitudes -------------------------------------------------------------------------------------


@pytest.fixture(params=["fastest", "python"])
def of(request):
    """The operators, by the CPU kernels where there are any, and in Python."""
    native.ready()
    if request.param == "fastest":
        return ops
    return SimpleNamespace(observe_=observe._observe, top_rows=observe._top_rows, record_=observe._record)


LAYOUTS = {
    "rows": lambda g: g.clone(),
    "columns": lambda g: g.movedim(-1, 0).contiguous().movedim(0, -1),
    "strided": lambda g: torch.stack([g, -g], -1)[..., 0],
    "expanded": lambda g: g[..., :1].expand_as(g),
}
ROWS = {"all": None, "none": [], "one": [299], "some": [0, 17, 255, 256, 298], "every": list(range(300))}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_seen_as_the_sum_of_its_absolute_gradients_and_others_keep_their_value(of, dtype, layout, rows):
    for shape in [(300,), (70, 300), (2, 5, 300), (0, 300), (1030, 300)]:
        g = layout(100 * torch.randn(shape).to(dtype))
        seen = torch.arange(300.0)
        expected = seen.double()
        index = torch.arange(300) if rows is None else torch.tensor(rows, dtype=torch.int64)
        expected[index] = g.double().abs().reshape(-1, 300).sum(0)[index]
        of.observe_(seen, g, None if rows is None else index)
        assert seen.dtype == torch.float32
        assert_close(seen.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", [LAYOUTS["rows"], LAYOUTS["columns"]], ids=["rows", "columns"])
def test_small_gradients_are_not_lost_in_a_long_sum(of, layout):
    seen = torch.zeros(3)
    of.observe_(seen, layout(torch.full((400_000, 3), 0.1)))
    assert_close(seen, torch.full((3,), 40_000.0), rtol=1e-4, atol=0)


def by_size(g, count):
    """The rule, row by row: the largest sums first, of equal ones the lower row, what is not finite before all."""
    sizes = g.double().abs().reshape(-1, g.shape[-1]).sum(0).nan_to_num(nan=torch.inf).tolist()
    return torch.tensor(sorted(sorted(range(len(sizes)), key=lambda r: (-sizes[r], r))[:count]), dtype=torch.int64)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rows_with_the_largest_sums_are_taken_and_of_equal_ones_the_lower(of, dtype, layout):
    for shape in [(40,), (9, 40), (2, 3, 40), (0, 40)]:
        g = layout(torch.randint(-2, 3, shape).to(dtype))  # small integers: many sums are equal
        for count in (0, 1, 13, 39, 40):
            rows = of.top_rows(g, count)
            assert rows.dtype == torch.int64
            assert torch.equal(rows, by_size(g, count))


def test_what_is_not_finite_is_taken_first(of):
    g = torch.ones(3, 6)
    g[1, 5], g[2, 3], g[0, 1], g[0, 2] = float("nan"), float("inf"), float("-inf"), 1e30
    assert of.top_rows(g, 3).tolist() == [1, 3, 5]
    assert of.top_rows(g, 4).tolist() == [1, 2, 3, 5]
    assert of.top_rows(g, 2).tolist() == [1, 3]


@pytest.mark.parametrize("count", [-1, 7])
def test_more_rows_than_there_are_cannot_be_taken(of, count):
    with pytest.raises(ValueError, match=f"from 0 to all 6 rows, got count={count}"):
        of.top_rows(torch.ones(2, 6), count)


@pytest.mark.parametrize("rows", [[], [2], [0, 1, 3, 4], [0, 1, 2, 3, 4]], ids=str)
def test_a_row_set_is_written_with_its_length_and_zeros_behind(of, rows):
    chosen = torch.full((6,), -1)
    of.record_(chosen, torch.tensor(rows, dtype=torch.int64))
    assert chosen.tolist() == [len(rows), *rows, *[0] * (5 - len(rows))]


def test_autograd_notices_what_is_written(of):
    seen, chosen = torch.zeros(5), torch.zeros(5, dtype=torch.int64)
    losses = [(torch.ones(5, requires_grad=True) * buffer).sum() for buffer in (seen, chosen)]
    of.observe_(seen, torch.ones(2, 5))
    of.record_(chosen, torch.tensor([1]))
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_opcheck():
    native.ready()
    g, rows = torch.randn(2, 4, 5), torch.tensor([1, 4])
    torch.library.opcheck(torch.ops.rwfx.observe_.default, (torch.zeros(5), g))
    torch.library.opcheck(torch.ops.rwfx.observe_.default, (torch.zeros(5), g, rows))
    torch.library.opcheck(torch.ops.rwfx.top_rows.default, (g, 3))
    torch.library.opcheck(torch.ops.rwfx.record_.default, (torch.zeros(6, dtype=torch.int64), rows))
