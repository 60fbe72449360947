"""Operations on keys and numbers by place: what sets and sorting give, by the kernels and by PyTorch's operators."""

import math

import pytest
import torch
from torch.library import opcheck

from rwfx import extremes, keys, nonzeros
from rwfx.native import ready
from rwfx.ops import candidates

SHAPES = [(7, 5), (1, 40), (40, 1), (300, 211), (1500, 90), (90, 1500), (5, 0), (0, 5)]
FOR_EVERY_DEVICE = {
    keys: ("replaced", "without", "origins", "carried"),
    nonzeros: ("columns_of", "rows_of", "keys_of"),
}
"""Operators whose implementation for every device is called as they are, with an underscore before."""
EXTREMES = {"largest": (True, False), "largest_magnitudes": (True, True), "smallest_magnitudes": (False, True)}
"""Whether each takes the largest, and whether of magnitudes."""


@pytest.fixture(params=["kernels, one thread", "kernels, three threads", "PyTorch"])
def by(request, monkeypatch):
    """The operators as they are dispatched, or their implementations for every device."""
    if request.param != "PyTorch":
        if not ready():
            pytest.skip("no kernels here")
        before = torch.get_num_threads()
        torch.set_num_threads(1 if "one" in request.param else 3)
        yield
        torch.set_num_threads(before)
        return
    for module, names in FOR_EVERY_DEVICE.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, f"_{name}"))
    monkeypatch.setattr(keys, "distinct_keys", torch.unique)
    for name, how in EXTREMES.items():
        monkeypatch.setattr(extremes, name, lambda of, count, how=how: extremes._extremes(of, count, *how))
    yield


def some_keys(rows, columns, share, seed=0):
    every = torch.arange(rows * columns)
    return every[torch.rand(len(every), generator=torch.Generator().manual_seed(seed)) < share]


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.usefixtures("by")
def test_an_index_has_the_same_places_by_columns_and_by_rows(rows, columns, share):
    of = some_keys(rows, columns, share)
    index = nonzeros.index_of(of, rows, columns)
    dense = torch.zeros(columns * rows, dtype=torch.int64).index_fill(0, of, 1).view(columns, rows)
    number = torch.full((columns * rows,), -1).index_put((of,), torch.arange(len(of))).view(columns, rows)
    starts = [torch.cat([torch.zeros(1, dtype=torch.int64), dense.sum(dim).cumsum(0)]) for dim in (1, 0)]
    by_rows = dense.t().nonzero()
    expected = starts[0], of % max(rows, 1), starts[1], by_rows[:, 1], number.t()[dense.t() == 1]
    for name, found, wanted in zip(index._fields, index, expected, strict=True):
        assert found.dtype == torch.int32, name
        assert found.tolist() == wanted.tolist(), name
    assert nonzeros.keys_of(index.ccol_indices, index.row_indices, rows).tolist() == of.tolist()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.usefixtures("by")
def test_what_is_without_others_is_a_difference_of_sets(share):
    of, others = some_keys(211, 800, share), some_keys(211, 800, 0.6, seed=1)
    for a, b in ((of, others), (others, of)):
        assert keys.without(a, b).tolist() == sorted(set(a.tolist()) - set(b.tolist()))


@pytest.mark.parametrize(("share", "gone"), [(0.3, 0.2), (0.0, 0.0), (0.3, 0.0), (0.3, 1.0), (0.9, 0.5)])
@pytest.mark.parametrize("grown", [0.0, 0.2, 1.0])
@pytest.mark.usefixtures("by")
def test_what_is_pruned_goes_and_what_is_grown_comes_in_its_place(share, gone, grown):
    of = some_keys(211, 800, share)
    pruned, wanted = some_keys(1, len(of), gone, seed=1), some_keys(211, 800, grown, seed=2)
    wanted = keys.without(wanted, of)
    kept = set(of.tolist()) - {of[n].item() for n in pruned}
    assert keys.replaced(of, pruned, wanted).tolist() == sorted(kept | set(wanted.tolist()))


@pytest.mark.parametrize("largest", [1, 2, 2**9, 2**9 + 1, 2**31, 2**62])
@pytest.mark.parametrize("count", [0, 1, 5000, 100_000])
@pytest.mark.usefixtures("by")
def test_what_is_drawn_twice_is_there_once(count, largest):
    drawn = torch.randint(largest, (count,), generator=torch.Generator().manual_seed(0))
    assert keys.distinct_keys(torch.cat([drawn, drawn])).tolist() == sorted(set(drawn.tolist()))


@pytest.mark.usefixtures("by")
def test_a_key_that_is_drawn_far_more_often_than_others_is_there_once():
    drawn = torch.cat([torch.full((50_000,), 12345), torch.tensor([0, 2**40])])
    assert keys.distinct_keys(drawn).tolist() == [0, 12345, 2**40]


@pytest.mark.parametrize("shares", [(0.3, 0.35), (0.0, 0.4), (0.4, 0.0), (0.9, 0.02), (0.02, 0.9)], ids=str)
@pytest.mark.usefixtures("by")
def test_numbers_are_carried_to_the_keys_after(shares):
    before, after = (some_keys(211, 1600, share, seed) for seed, share in enumerate(shares))
    kinds = torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool
    numbers = [torch.randn(len(before)).mul(9).to(kind) for kind in kinds]
    numbers[0][::7] = math.nan  # what is not carried is 0, whatever there was
    origin = keys.origins(before, after)
    place = {key: n for n, key in enumerate(before.tolist())}
    assert origin.dtype == torch.int32
    assert origin.tolist() == [place.get(key, -1) for key in after.tolist()]
    for kind, of in zip(kinds, numbers, strict=True):
        moved = keys.carried(of, origin)
        wanted = torch.cat([of, of.new_zeros(1)])[origin.long()]  # a new one's, -1, is the last
        assert moved.dtype == kind
        assert torch.equal(moved.nan_to_num(77), wanted.nan_to_num(77))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (9, 0), (9, 9), (1000, 100), (100_000, 20_000), (100_000, 99_999)])
@pytest.mark.usefixtures("by")
def test_extremes_are_the_largest_and_the_smallest_in_the_order_of_their_places(size, count, dtype):
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name, (largest, magnitudes) in EXTREMES.items():
        places = getattr(extremes, name)(numbers, count)
        sizes = numbers.abs() if magnitudes else numbers
        assert (places.diff() > 0).all()
        assert torch.equal(sizes[places].sort().values, sizes.sort(descending=largest).values[:count].sort().values)


@pytest.mark.usefixtures("by")
def test_infinities_and_nan_are_as_large_as_for_topk():
    numbers = torch.tensor([1.0, -math.inf, math.nan, 0.0, -1e-45, math.inf, 1e-44, -2.0])
    assert extremes.largest(numbers, 3).tolist() == [0, 2, 5]
    assert extremes.largest(numbers, 1).tolist() == [2]
    assert extremes.largest(numbers, 7).tolist() == [0, 2, 3, 4, 5, 6, 7]
    assert extremes.largest_magnitudes(numbers, 3).tolist() == [1, 2, 5]
    assert extremes.smallest_magnitudes(numbers, 3).tolist() == [3, 4, 6]
    assert extremes.smallest_magnitudes(-numbers, 7).tolist() == [0, 1, 3, 4, 5, 6, 7]


def test_of_equal_numbers_the_first_are_taken():
    if not ready():
        pytest.skip("no kernels here")
    numbers = torch.tensor([2.0, -1.0, -2.0, 3.0, 2.0, 1.0])
    assert extremes.largest(numbers, 2).tolist() == [0, 3]
    assert extremes.largest_magnitudes(numbers, 3).tolist() == [0, 2, 3]
    assert extremes.smallest_magnitudes(numbers, 3).tolist() == [0, 1, 5]
    zeros = torch.tensor([-0.0, 0.0, 1.0, -0.0])
    assert extremes.largest(zeros, 2).tolist() == [0, 2]
    assert extremes.smallest_magnitudes(zeros, 2).tolist() == [0, 1]
    assert extremes.smallest_magnitudes(torch.full((100_000,), 3.0), 70_000).equal(torch.arange(70_000))


@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.parametrize("kind", ["alike", "skewed"])
def test_kernels_draw_what_pytorch_draws(groups, kind):
    if not ready():
        pytest.skip("no kernels here")
    rows, columns, count, key = 300, 70, 100_000, torch.tensor(77)
    sums = None, None
    if groups:
        of_inputs, of_rows = torch.rand(groups, columns), torch.rand(rows)
        if kind == "skewed":
            of_inputs, of_rows = of_inputs**30, of_rows**30
            of_inputs[:, 3:9] = of_inputs[:, -1] = of_rows[:5] = of_rows[-3:] = 0
            of_inputs[1:] = 0  # groups whose rows are never drawn
        sums = candidates._sums(of_inputs.double(), of_rows.double())
    wanted = candidates._draw_places(key, *sums, rows, columns, count)
    assert torch.equal(torch.ops.rwfx.draw_places(key, *sums, rows, columns, count), wanted)


def test_the_operators_keep_their_promises():
    of, others, ops = some_keys(7, 5, 0.4), some_keys(7, 5, 0.5, seed=1), torch.ops.rwfx
    ccol, row, *_ = nonzeros.index_of(of, 7, 5)
    sums = candidates._sums(torch.rand(1, 5).double(), torch.rand(7).double())
    for op, arguments in (
        (ops.columns_of, (of, 7, 5)),
        (ops.rows_of, (ccol, row, 7)),
        (ops.keys_of, (ccol, row, 7)),
        (ops.replaced, (of, torch.tensor([0, 2]), keys.without(others, of))),
        (ops.without, (of, others)),
        (ops.distinct_keys, (torch.cat([of, of]),)),
        (ops.origins, (of, others)),
        (ops.carried, (torch.rand(len(of)), keys.origins(of, others))),
        (ops.extremes, (torch.rand(9), 4, True, False)),
        (ops.extremes, (torch.randn(9), 4, False, True)),
        (ops.draw_places, (torch.tensor(5), None, None, 7, 5, 20)),
        (ops.draw_places, (torch.tensor(5), *sums, 7, 5, 20)),
    ):
        opcheck(op.default, arguments)


@pytest.mark.skipif(not ready(), reason="no kernels here")
def test_what_does_not_fit_is_refused():
    def refuses(said, call, *arguments):
        with pytest.raises(ValueError, match=said):
            call(*arguments)

    refuses("beyond the 7 rows and 5 columns", nonzeros.index_of, torch.tensor([3, 35]), 7, 5)
    refuses("beyond the 7 rows and 0 columns", nonzeros.index_of, torch.tensor([0]), 7, 0)
    refuses("int32 cannot count 5 rows, -1 columns and 1 keys", nonzeros.index_of, torch.tensor([0]), 5, -1)
    for wrong in ([9, 3], [-1], [-1, 3]):
        refuses("sorted and not negative", nonzeros.index_of, torch.tensor(wrong), 7, 5)
    row, *starts = (torch.tensor(of, dtype=torch.int32) for of in ([0, 1, 3], [0, 3], [1, 3], [0, 4, 1, 3], [0, 9], []))
    for wrong in starts[1:]:
        refuses("begin at 0 and end at its 3 numbers", nonzeros.rows_of, wrong, row, 4)
    refuses("row 3 is not one of 3", nonzeros.rows_of, starts[0], row, 3)
    for call in (nonzeros.rows_of, nonzeros.keys_of):
        refuses("int32 cannot count -1 rows", call, starts[0], row, -1)
    refuses("one-dimensional int32 tensors, got Long of shape", nonzeros.keys_of, torch.tensor([0]), row, 3)
    for pruned in ([2], [-1], [0, 0], [1, 0]):
        refuses("positions of 2 keys", keys.replaced, torch.tensor([4, 7]), torch.tensor(pruned), torch.tensor([5]))
    refuses("grown must be sorted", keys.replaced, torch.tensor([4, 7]), torch.tensor([1]), torch.tensor([9, 5]))
    many, before = torch.arange(200_000), torch.get_num_threads()
    torch.set_num_threads(3)
    refuses("keys must be sorted", keys.replaced, 2 * many.flip(0), many[:1], 2 * many + 1)
    torch.set_num_threads(before)
    refuses("not be negative, got -1", keys.distinct_keys, torch.tensor([-1]))
    refuses("one-dimensional int64 tensor, got Float of shape", keys.distinct_keys, torch.tensor([1.0]))
    origin = torch.tensor([1, -1], dtype=torch.int32)
    refuses("there are 1 numbers and not one at 1", keys.carried, torch.ones(1), origin)
    refuses("numbers of ComplexDouble", keys.carried, torch.ones(2, dtype=torch.cdouble), origin)
    refuses("their origins int32, got the shape .* and Long", keys.carried, torch.ones(2), origin.long())
    refuses("no 3 extremes of numbers of Float", extremes.largest, torch.ones(2), 3)
    refuses("numbers of Long", extremes.largest, torch.ones(2, dtype=torch.int64), 1)
    sums = torch.ones(2, 5).double(), torch.ones(7).double()
    draw, key = torch.ops.rwfx.draw_places, torch.tensor(5)
    refuses("are not of 7 rows and 5 columns", draw, key, *sums, 7, 5, 3)
    refuses("are not of 7 rows and 5 columns", draw, key, sums[0][:0], sums[1], 7, 5, 3)
    for worthless in (0, -1, math.nan, math.inf):
        refuses("nothing can be drawn by 5 sums", draw, key, worthless * sums[0][:1], sums[1], 7, 5, 3)
