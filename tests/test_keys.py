"""Operations on keys: equal to what sets and sorting give, by the kernels and by PyTorch's own operators."""

import pytest
import torch
from torch.library import opcheck

from rwfx import nonzeros
from rwfx.native import ready

SHAPES = [(7, 5), (1, 40), (40, 1), (300, 211), (5, 0), (0, 5)]
BY = ["kernels", "PyTorch"]


@pytest.fixture(autouse=True)
def by(request, monkeypatch):
    """The operator as it is dispatched, or its implementation for every device."""
    if getattr(request, "param", None) == "PyTorch":
        for name, function in {
            "index_of": lambda *of: nonzeros.Index(*nonzeros._index_of(*of)),
            "find_keys": nonzeros._find_keys,
            "merge_keys": nonzeros._merge_keys,
            "distinct_keys": torch.unique,
        }.items():
            monkeypatch.setattr(nonzeros, name, function)
    elif not ready():
        pytest.skip("no kernels here")


def keys(rows, columns, share, seed=0):
    every = torch.arange(rows * columns)
    return every[torch.rand(len(every), generator=torch.Generator().manual_seed(seed)) < share]


@pytest.mark.parametrize("by", BY, indirect=True)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_an_index_has_the_same_places_by_columns_and_by_rows(rows, columns, share):
    of = keys(rows, columns, share)
    index = nonzeros.index_of(of, rows, columns)
    dense = torch.zeros(columns * rows, dtype=torch.int64).index_fill(0, of, 1).view(columns, rows)
    number = torch.full((columns * rows,), -1).index_put((of,), torch.arange(len(of))).view(columns, rows)
    starts = [torch.cat([torch.zeros(1, dtype=torch.int64), dense.sum(dim).cumsum(0)]) for dim in (1, 0)]
    by_rows = dense.t().nonzero()
    expected = starts[0], of % max(rows, 1), starts[1], by_rows[:, 1], number.t()[dense.t() == 1]
    for name, found, wanted in zip(index._fields, index, expected, strict=True):
        assert found.dtype == torch.int32, name
        assert found.tolist() == wanted.tolist(), name


@pytest.mark.parametrize("by", BY, indirect=True)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_keys_are_found_where_they_are(share, is_sorted):
    of, wanted = keys(211, 400, share), keys(211, 400, 0.6, seed=1)  # more than one thread is given
    if not is_sorted:
        wanted = wanted[torch.randperm(len(wanted), generator=torch.Generator().manual_seed(2))]
    found, place = nonzeros.find_keys(of, wanted)
    at = {key: n for n, key in enumerate(of.tolist())}
    assert found.tolist() == [key in at for key in wanted.tolist()]
    assert place[found].tolist() == [at[key] for key in wanted.tolist() if key in at]
    assert len(of) == 0 or 0 <= int(place.min()) <= int(place.max()) < len(of)  # of every one something may be read
    assert nonzeros.without(wanted, of).tolist() == [key for key in wanted.tolist() if key not in at]


@pytest.mark.parametrize("by", BY, indirect=True)
@pytest.mark.parametrize("shares", [(0.3, 0.3), (0.0, 0.4), (0.4, 0.0), (0.0, 0.0)], ids=str)
def test_sorted_keys_are_merged(shares):
    of, others = (keys(50, 40, share, seed) for seed, share in enumerate(shares))
    assert nonzeros.merge_keys(of, others).tolist() == sorted(of.tolist() + others.tolist())


@pytest.mark.parametrize("by", BY, indirect=True)
@pytest.mark.parametrize("largest", [1, 2, 2**11, 2**11 + 1, 2**31, 2**62])
@pytest.mark.parametrize("count", [0, 1, 5000])
def test_what_is_drawn_twice_is_there_once(count, largest):
    drawn = torch.randint(largest, (count,), generator=torch.Generator().manual_seed(0))
    assert nonzeros.distinct_keys(torch.cat([drawn, drawn])).tolist() == sorted(set(drawn.tolist()))


def test_the_operators_keep_their_promises():
    of, others = keys(7, 5, 0.4), keys(7, 5, 0.5, seed=1)
    ops = torch.ops.rwfx
    opcheck(ops.index_of.default, (of, 7, 5))
    for op in (ops.find_keys, ops.merge_keys):
        opcheck(op.default, (of, others))
    opcheck(ops.distinct_keys.default, (torch.cat([of, of]),))


def test_keys_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="beyond the 7 rows and 5 columns"):
        nonzeros.index_of(torch.tensor([3, 35]), 7, 5)
    with pytest.raises(ValueError, match="int32 cannot count 5 rows, -1 columns and 1 keys"):
        nonzeros.index_of(torch.tensor([0]), 5, -1)
    for wrong in ([9, 3], [-1]):
        with pytest.raises(ValueError, match="sorted and not negative"):
            nonzeros.index_of(torch.tensor(wrong), 7, 5)
    with pytest.raises(ValueError, match="not be negative, got -1"):
        nonzeros.distinct_keys(torch.tensor([-1]))
    with pytest.raises(ValueError, match="one-dimensional int64 tensor, got Float of shape"):
        nonzeros.distinct_keys(torch.tensor([1.0]))
