"""Row-sparse grouped products: the laws of tests/test_ops.py, for matrices of experts that are stored either way."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rwfx.ops import grouped_mm, masked_grouped_mm, row_grouped_mm

EXACT = {"rtol": 0, "atol": 1e-12}
OFFSETS = torch.tensor([3, 3, 8], dtype=torch.int32)  # the second expert has no token, the last two tokens no expert
LINES, FEATURES, ROWS = 10, 4, 6

OP = pytest.mark.parametrize("op", [row_grouped_mm, masked_grouped_mm], ids=["row", "masked"])
DX = pytest.mark.parametrize("dx", ["rows", "full"])
STORED = pytest.mark.parametrize("stored", ["EOI", "EIO"])
ROW_SETS = pytest.mark.parametrize("rows", [[], [2], [0, 3, 4], [0, 1, 2, 3, 4, 5]], ids=["none", "one", "some", "all"])


def operands(stored="EOI", dtype=torch.float64, sizes=(LINES, FEATURES, ROWS)):
    """``x`` and a parameter; ``matrices`` gives the weight of it."""
    torch.manual_seed(0)
    lines, features, rows = sizes
    x, p = torch.randn(lines, features), torch.randn(3, *((rows, features) if stored == "EOI" else (features, rows)))
    return x.to(dtype).requires_grad_(), p.to(dtype).requires_grad_()


def matrices(p, stored):
    return p.transpose(1, 2) if stored == "EOI" else p


def dense(x, w, offsets=OFFSETS):
    """Expert by expert."""
    ends = offsets.tolist()
    parts = [x[start:end] @ w_IO for start, end, w_IO in zip([0, *ends], ends, w, strict=False)]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], w.shape[2])])


def gradients(y, inputs):
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).cos()
    return torch.autograd.grad(y, inputs, upstream)


def oracle(x, p, stored, rows, dx, scale=None):
    """Dense autograd; the output's gradient is masked for ``dx="rows"``, that of the parameter for ``"full"``."""
    factor = torch.ones(len(rows), dtype=x.dtype) if scale is None else scale.to(x.dtype)
    mask = torch.zeros(ROWS, dtype=x.dtype).index_copy(0, rows, factor)
    y = dense(x, matrices(p, stored))
    if dx == "rows":
        masked = y * mask
        return gradients(masked + (y - masked).detach(), (x, p))
    of_x, of_p = gradients(y, (x, p))
    return of_x, of_p * (mask[:, None] if stored == "EOI" else mask)


@OP
@DX
@ROW_SETS
@STORED
def test_backward_is_the_dense_one_on_the_rows_and_zero_elsewhere(op, dx, rows, stored):
    rows = torch.tensor(rows, dtype=torch.int64)
    x, p = operands(stored)
    y = op(x, matrices(p, stored), OFFSETS, rows, "mm", dx)
    assert_close(y, dense(x, matrices(p, stored)), rtol=0, atol=0)
    ours = gradients(y, (x, p))
    for a, e in zip(ours, oracle(x, p, stored, rows, dx), strict=True):
        assert_close(a, e, **EXACT)
    assert not ours[1][1].count_nonzero()
    assert ours[1].stride() == p.stride()


@STORED
def test_the_dense_product_has_the_gradients_of_its_matrices(stored):
    x, p = operands(stored)
    ours = gradients(grouped_mm(x, matrices(p, stored), OFFSETS), (x, p))
    for a, e in zip(ours, gradients(dense(x, matrices(p, stored)), (x, p)), strict=True):
        assert_close(a, e, **EXACT)
    assert ours[1].stride() == p.stride()


@STORED
def test_the_dense_product_of_pytorch_has_its_gradients(stored):
    x, p = operands(stored, torch.float32, (LINES, 16, 24))
    y = grouped_mm(x, matrices(p, stored), OFFSETS, "grouped_mm")
    upstream = torch.ones(()).expand_as(y)  # which PyTorch's own backward pass would refuse
    ours = torch.autograd.grad(y, (x, p), upstream)
    for a, e in zip(ours, torch.autograd.grad(dense(x, matrices(p, stored)), (x, p), upstream), strict=True):
        assert_close(a, e)
    assert not ours[0][OFFSETS[-1] :].any()
    assert ours[1].stride() == p.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [grouped_mm, row_grouped_mm, masked_grouped_mm])
@STORED
def test_the_forward_is_that_of_pytorch_bit_for_bit(op, dtype, stored):
    x, p = operands(stored, dtype, (LINES, 16, 24))
    expected = F.grouped_mm(x, matrices(p, stored), offs=OFFSETS)[: OFFSETS[-1]]
    rows = () if op is grouped_mm else (torch.tensor([1]),)
    for by in ("mm", "grouped_mm"):
        assert torch.equal(op(x, matrices(p, stored), OFFSETS, *rows, by)[: OFFSETS[-1]], expected)


@STORED
def test_opcheck(stored):
    x, p = operands(stored)
    w, rows = matrices(p, stored), torch.tensor([0, 3, 4])
    torch.library.opcheck(torch.ops.rwfx.grouped_mm.default, (x, w, OFFSETS, "mm"))
    torch.library.opcheck(torch.ops.rwfx.grouped_outer.default, (x.detach(), x.detach(), OFFSETS, "mm"))
    for op in (torch.ops.rwfx.row_grouped_mm.default, torch.ops.rwfx.masked_grouped_mm.default):
        torch.library.opcheck(op, (x, w, OFFSETS, rows, "mm"))


@STORED
def test_gradcheck_of_the_kept_rows(stored):
    x, p = operands(stored)
    rows, dim = torch.tensor([0, 3, 4]), 1 if stored == "EOI" else 2

    def of_kept(x, kept):
        w = matrices(p.detach().index_copy(dim, rows, kept), stored)
        return row_grouped_mm(x, w, OFFSETS, rows, "mm", "full")

    kept = p.detach().index_select(dim, rows).requires_grad_()
    assert torch.autograd.gradcheck(of_kept, (x, kept))


@OP
def test_a_scale_is_a_factor_of_the_rows_output_gradient(op):
    x, p = operands()
    rows, scale = torch.tensor([1, 3, 5]), torch.tensor([2.0, 0.5, 3.0])
    ours = gradients(op(x, matrices(p, "EOI"), OFFSETS, rows, "mm", scale=scale), (x, p))
    for a, e in zip(ours, oracle(x, p, "EOI", rows, "rows", scale), strict=True):
        assert_close(a, e, **EXACT)


def magnitudes():
    return torch.linspace(-1, 2, LINES * ROWS, dtype=torch.float64).view(LINES, ROWS).cos().abs().sum(0).float()


@pytest.mark.parametrize("seen_all", [False, True])
@OP
def test_what_is_seen_are_the_sums_of_the_output_gradient_over_all_lines(op, seen_all):
    x, p = operands()
    rows, seen = torch.tensor([1, 3]), torch.full((ROWS,), -1.0)
    y = op(x, matrices(p, "EOI"), OFFSETS, rows, "mm", seen=seen, seen_all=seen_all)
    gradients(y, (x, p))
    looked = torch.full((ROWS,), seen_all).index_fill(0, rows, True)
    assert_close(seen[looked], magnitudes()[looked])
    assert (seen[~looked] == -1).all()


@pytest.mark.parametrize("seen_all", [None, False, True])
def test_chosen_rows_are_those_with_the_largest_sums(seen_all):
    x, p = operands()
    chosen, seen = torch.full((ROWS + 1,), -1), torch.full((ROWS,), -1.0)
    more = {} if seen_all is None else {"seen": seen, "seen_all": seen_all}
    blank = torch.zeros(2, dtype=torch.int64)
    ours = gradients(row_grouped_mm(x, matrices(p, "EOI"), OFFSETS, blank, "mm", chosen=chosen, **more), (x, p))
    rows = magnitudes().topk(2).indices.sort().values
    assert chosen.tolist() == [2, *rows.tolist(), *[0] * (ROWS - 2)]
    for a, e in zip(ours, oracle(x, p, "EOI", rows, "rows"), strict=True):
        assert_close(a, e, **EXACT)
    if seen_all is not None:
        assert_close(seen[rows], magnitudes()[rows])
        assert int((seen >= 0).sum()) == (ROWS if seen_all else 2)


@pytest.mark.parametrize("needs", ["x", "p", "xp", ""])
@pytest.mark.parametrize("op", [grouped_mm, row_grouped_mm, masked_grouped_mm])
def test_what_is_frozen_has_no_gradient(op, needs):
    inputs = dict(zip("xp", operands(), strict=True))
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in needs)
    rows = () if op is grouped_mm else (torch.tensor([1, 3]),)
    y = op(inputs["x"], matrices(inputs["p"], "EOI"), OFFSETS, *rows, "mm")
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == list(needs)


@OP
def test_what_is_masked_is_zero_also_where_the_dense_gradient_is_not_finite(op):
    x, p = operands()
    y = op(x, matrices(p, "EOI"), OFFSETS, torch.tensor([1]), "mm")
    g = torch.zeros_like(y)
    g[0, 3], g[1, 4] = float("nan"), float("inf")
    for out in torch.autograd.grad(y, (x, p), g):
        assert out.count_nonzero() == 0


@OP
def test_it_is_no_less_exact_in_bfloat16_than_the_dense_product(op):
    rows, sizes = torch.arange(0, 24, 3), (LINES, 16, 24)

    def errors(call, exact):
        x, p = operands("EOI", torch.bfloat16, sizes)
        found = gradients(call(x, matrices(p, "EOI")), (x, p))
        assert [g.dtype for g in found] == [torch.bfloat16] * 2
        differences = [g.double() - e for g, e in zip(found, exact, strict=True)]
        return differences[0].norm().item(), differences[1][:, rows].norm().item()

    x, p = (t.detach().double().requires_grad_() for t in operands("EOI", torch.bfloat16, sizes))
    exact = gradients(dense(x, matrices(p, "EOI")), (x, p))
    ours = errors(lambda x, w: op(x, w, OFFSETS, rows, "grouped_mm", "full"), exact)
    theirs = errors(lambda x, w: F.grouped_mm(x, w, offs=OFFSETS), exact)
    assert all(a <= 1.05 * t for a, t in zip(ours, theirs, strict=True)), (ours, theirs)


@STORED
def test_compiled_whole_and_once_whatever_the_rows(stored):
    torch._dynamo.reset()
    x, p = operands(stored)

    def plain(x, p, rows):
        return row_grouped_mm((2 * x).relu(), matrices(p, stored), OFFSETS, rows, "mm").relu()

    call = torch.compile(plain, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for kept in ([1, 2, 4], [3, 5], [0, 1, 2, 5], [1, 2, 3, 4, 5]):
            rows = torch.tensor(kept)
            torch._dynamo.decorators.mark_unbacked(rows, 0)
            ours, eager = (gradients(f(x, p, rows), (x, p)) for f in (call, plain))
            for a, e in zip(ours, eager, strict=True):
                assert_close(a, e, **EXACT)


def products(call):
    """The shapes of the operands of every product of matrices that ``call`` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return [tuple(map(tuple, event.shapes()[:2])) for event in events if event.name() == "aten::mm"]


def test_only_the_rows_are_multiplied_with_and_only_where_there_are_tokens():
    x, p = operands()
    y = row_grouped_mm(x, matrices(p, "EOI"), OFFSETS, torch.tensor([1, 3]), "mm")
    assert products(y.sum().backward) == [
        *(((3, 2), (2, 4)), ((5, 2), (2, 4))),
        *(((2, 3), (3, 4)), ((2, 5), (5, 4))),
    ]


@OP
@pytest.mark.parametrize("rows", [torch.tensor([1], dtype=torch.int32), torch.tensor([[1]]), torch.tensor([1.0])])
def test_what_is_no_row_set_is_refused(op, rows):
    x, p = operands()
    with pytest.raises(ValueError, match="one-dimensional int64"):
        op(x, matrices(p, "EOI"), OFFSETS, rows, "mm")


@OP
def test_a_row_that_lies_in_every_matrix_has_no_row_gradient(op):
    x, p = operands()
    with pytest.raises(ValueError, match="must be 'dense'"):
        op(x, matrices(p, "EOI"), OFFSETS, torch.tensor([1]), "mm", "rows", "rows")


@OP
def test_there_is_no_second_derivative(op):
    x, p = operands()
    y = op(x, matrices(p, "EOI"), OFFSETS, torch.tensor([1]), "mm")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
