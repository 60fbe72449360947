import pytest
import torch
import torch.nn.functional as F
from oracles import to_dense
from torch.testing import assert_close

from rwfx.ops import keep_parts, keep_rows, masked_linear, pack_rows, row_linear, take_rows

OPS = [row_linear, masked_linear]
ROW_SETS = pytest.mark.parametrize("rows", [[], [2], [0, 3], [0, 1, 2, 3, 4]], ids=["none", "one", "some", "all"])
OP = pytest.mark.parametrize("op", OPS, ids=["row", "masked"])
DX = pytest.mark.parametrize("dx", ["rows", "full"])
GRAD = pytest.mark.parametrize("grad", ["dense", "rows"])
SHAPES = {"vector": (7,), "matrix": (6, 7), "sequence": (2, 3, 7), "grid": (2, 1, 3, 7), "empty": (0, 7)}


def overload(op):
    return getattr(torch.ops.rwfx, op.__name__).default


def operands(shape=(6, 7), bias=True, dtype=torch.float64):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    w = torch.randn(5, 7, dtype=dtype, requires_grad=True)
    b = torch.randn(5, dtype=dtype, requires_grad=True) if bias else None
    return x, w, b


def gradients(y, *inputs):
    weights = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad((y * weights).sum(), inputs)


def oracle(x, w, b, rows, dx):
    """Dense autograd; the output's gradient is masked for ``dx="rows"``, the parameters' for ``"full"``."""
    mask = torch.zeros(5, dtype=x.dtype).index_fill(0, rows, 1)
    y = F.linear(x, w, b)
    inputs = [t for t in (x, w, b) if t is not None]
    if dx == "rows":
        return gradients(y * mask + (y * (1 - mask)).detach(), *inputs)
    grads = gradients(y, *inputs)
    return (grads[0], *[g * mask.view(-1, *[1] * (g.dim() - 1)) for g in grads[1:]])


@OP
@DX
@GRAD
@ROW_SETS
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_backward_is_the_dense_one_on_the_rows_and_zero_elsewhere(op, dx, grad, rows, shape, bias):
    x, w, b = operands(shape, bias)
    rows = torch.tensor(rows, dtype=torch.int64)
    y = op(x, w, b, rows, dx, grad)
    assert_close(y, F.linear(x, w, b), rtol=0, atol=0)
    ours = gradients(y, *[t for t in (x, w, b) if t is not None])
    for ours_, theirs in zip(ours, oracle(x, w, b, rows, dx), strict=True):
        assert_close(to_dense(ours_), theirs, rtol=0, atol=1e-12)
    if grad == "rows":
        for g in ours[1:]:
            assert g.layout == torch.sparse_coo
            assert g.is_coalesced()
            assert torch.equal(g.indices()[0], rows)
            assert g.values().shape == (len(rows), *g.shape[1:])


@OP
@DX
@GRAD
@ROW_SETS
def test_opcheck(op, dx, grad, rows):
    torch.library.opcheck(overload(op), (*operands(), torch.tensor(rows, dtype=torch.int64), dx, grad))


# A view, its parameter's shape, and whether it is a whole matrix.
STORED = {
    "by-columns": (lambda p: p.t(), (7, 5), True),
    "a-part-of-columns": (lambda p: p.t()[2:7], (7, 9), False),
    "a-part-of-rows": (lambda p: p[2:7], (9, 7), False),
    "by-columns-in-a-stack": (lambda p: p[1].t(), (3, 7, 5), True),
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@OP
@DX
@ROW_SETS
def test_a_weight_that_is_a_view_has_the_gradient_of_one_that_is_not(op, dx, rows, stored):
    (view, shape, whole), (x, _, b) = stored, operands((2, 3, 7))
    p, rows = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.tensor(rows, dtype=torch.int64)
    w = view(p)
    y = op(x, w, b, rows, dx)
    assert_close(y, F.linear(x, w, b), rtol=0, atol=0)
    dense = oracle(x, w.detach().clone(memory_format=torch.contiguous_format).requires_grad_(), b, rows, dx)
    ours = gradients(y, x, w, b, p)
    for ours_, theirs in zip(ours[:3], dense, strict=True):
        assert_close(ours_, theirs, rtol=0, atol=1e-12)
    assert_close(view(ours[3]), dense[1], rtol=0, atol=1e-12)
    # As the parameter is stored, for autograd would copy any other; a part it copies in any case.
    assert ours[3].is_contiguous() or op is masked_linear or not whole


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@OP
def test_opcheck_of_a_weight_that_is_a_view(op, stored):
    (view, shape, _), (x, _, b) = stored, operands()
    w = view(torch.randn(shape, dtype=torch.float64)).requires_grad_()
    torch.library.opcheck(overload(op), (x, w, b, torch.tensor([0, 3])))


@OP
@DX
@ROW_SETS
def test_kept_rows_receive_the_gradient_of_every_call_that_shares_them(op, dx, rows):
    x, w, b = operands()
    rows = torch.tensor(rows, dtype=torch.int64)
    kept = keep_rows(w, rows), keep_rows(b, rows)
    y = sum(op(factor * x, w, b, rows, dx, "rows", None, *kept) for factor in (1, 2))
    ours = gradients(y, x, w, b)
    parts = [oracle(x, w, b, rows, dx)]  # the loss is linear in y, so the calls' gradients add up
    x2 = (2 * x).detach().requires_grad_()
    second = oracle(x2, w, b, rows, dx)
    parts.append((2 * second[0], *second[1:]))
    for k, ours_ in enumerate(ours):
        assert_close(to_dense(ours_), parts[0][k] + parts[1][k], rtol=0, atol=1e-12)
    assert ours[1].is_sparse
    assert ours[1].is_coalesced()
    torch.library.opcheck(overload(op), (x, w, b, rows, dx, "rows", None, kept[0].detach().requires_grad_(), None))


def test_kept_rows_have_a_backward_pass_for_each_part_of_the_model_that_has_one_of_its_own():
    w, rows = torch.randn(5, 7, requires_grad=True), torch.tensor([1, 4])
    kept = keep_rows(w, rows)
    for factor in (1, 2):
        (factor * kept).sum().backward()
    assert_close(w.grad.to_dense(), torch.zeros(5, 7).index_fill(0, rows, 3))
    w.grad = None
    one, two = keep_parts(w, [torch.tensor([1]), torch.tensor([0, 2])], [0, 2])
    for part in (one, 2 * two):
        part.sum().backward()
    assert_close(w.grad.to_dense(), torch.tensor([0.0, 1, 2, 0, 2])[:, None].expand(5, 7))


def test_opcheck_of_row_gradients():
    w = torch.randn(5, 7, requires_grad=True)
    torch.library.opcheck(keep_rows, (w, torch.tensor([1, 4])))
    torch.library.opcheck(keep_parts, (w, [torch.tensor([1]), torch.tensor([0, 2])], [0, 2]))
    torch.library.opcheck(pack_rows, (torch.randn(2, 7), torch.tensor([1, 4]), 5))
    rows = torch.tensor([1, 4])
    torch.library.opcheck(take_rows, (torch.randn(5, 7), rows))


@OP
@ROW_SETS
def test_gradcheck_of_the_kept_rows(op, rows):
    x, w, b = operands()
    rows = torch.tensor(rows, dtype=torch.int64)

    def of_kept(x, kept_w, kept_b):
        return op(x, w.detach().index_copy(0, rows, kept_w), b.detach().index_copy(0, rows, kept_b), rows, "full")

    assert torch.autograd.gradcheck(of_kept, (x, *(t.detach()[rows].requires_grad_() for t in (w, b))))


@OP
@GRAD
def test_non_contiguous_operands(op, grad):
    x = torch.randn(7, 6, dtype=torch.float64).t().requires_grad_()
    w = torch.randn(7, 10, dtype=torch.float64)[:, ::2].t().detach().requires_grad_()
    b = torch.randn(5, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 1, 2, 3, 4, 0])[1::2]
    for upstream in (lambda y: y.sum(), lambda y: y.t().square().sum()):
        ours = torch.autograd.grad(upstream(op(x, w, b, rows, "rows", grad)), (x, w, b))
        mask = torch.zeros(5, dtype=torch.float64).index_fill(0, rows, 1)
        y = F.linear(x, w, b)
        y.register_hook(lambda g, mask=mask: g * mask)
        for ours_, theirs in zip(ours, torch.autograd.grad(upstream(y), (x, w, b)), strict=True):
            assert_close(to_dense(ours_), theirs, rtol=0, atol=1e-12)


def products(call):
    """The shapes of every matrix product that ``call`` runs, also inside compiled kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    shapes = [(event.start_ns(), *event.shapes()[:2]) for event in events if event.name() == "aten::mm"]
    return [(a[0], a[1], b[1]) for _, a, b in sorted(shapes)]


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ("xw", [(6, 2, 7), (2, 6, 7)]),
        ("x", [(6, 2, 7)]),
        ("w", [(2, 6, 7)]),
        ("b", []),
    ],
)
@GRAD
def test_only_products_on_the_rows_are_run_and_none_for_what_is_frozen(needs, expected, grad):
    x, w, b = operands()
    for name, tensor in {"x": x, "w": w, "b": b}.items():
        tensor.requires_grad_(name in needs)
    y = row_linear(x, w, b, torch.tensor([1, 3]), "rows", grad)
    assert sorted(products(y.sum().backward)) == sorted(expected)


def test_masking_runs_the_dense_products():
    y = masked_linear(*operands(), torch.tensor([1, 3]), "full")
    assert sorted(products(y.sum().backward)) == [(5, 6, 7), (6, 5, 7)]


@OP
@GRAD
def test_what_is_masked_is_zero_also_where_the_dense_gradient_is_not_finite(op, grad):
    x, w, b = operands()
    y = op(x, w, b, torch.tensor([1]), "rows", grad)
    g = torch.zeros_like(y)
    g[0, 3] = float("nan")
    g[1, 4] = float("inf")
    for out in torch.autograd.grad(y, (x, w, b), g):
        assert to_dense(out).count_nonzero() == 0


@OP
@GRAD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_type_and_is_no_less_exact_than_the_dense_call(op, grad, dtype):
    torch.manual_seed(3)
    x, w, b = (torch.randn(s).requires_grad_() for s in ((64, 96), (48, 96), (48,)))
    rows = torch.arange(0, 48, 3)

    def errors(call, reference):
        with torch.autocast("cpu", dtype=dtype):
            y = call(x, w, b)
        assert y.dtype == dtype
        grads = torch.autograd.grad(y.float().square().mean(), (x, w, b))
        assert [g.dtype for g in grads] == [torch.float32] * 3
        out = []
        for g, r in zip(grads, reference, strict=True):
            g = to_dense(g).double()
            on_rows = rows if len(r) == 48 else slice(None)
            out.append(((g - r)[on_rows].norm() / r[on_rows].norm()).item())
        return out

    doubles = [t.detach().double().requires_grad_() for t in (x, w, b)]
    dense = torch.autograd.grad(F.linear(*doubles).square().mean(), doubles)
    ours = errors(lambda *t: op(*t, rows, "full", grad), dense)
    theirs = errors(F.linear, dense)
    assert all(a <= 1.05 * t for a, t in zip(ours, theirs, strict=True)), (ours, theirs)


@OP
def test_autocast_leaves_double_precision_alone(op):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(*operands(), torch.tensor([1])).dtype == torch.float64


@OP
@pytest.mark.parametrize("rows", [torch.tensor([1], dtype=torch.int32), torch.tensor([[1]]), torch.tensor([1.0])])
def test_what_is_no_row_set_is_refused(op, rows):
    with pytest.raises(ValueError, match="one-dimensional int64"):
        op(*operands(), rows)


LAYOUTS = {
    "contiguous": lambda x: x,
    "batch and sequence swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@OP
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "frozen"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_forward_is_that_of_the_dense_call_bit_for_bit_whatever_the_layout(op, layout, learned, bias):
    torch.manual_seed(0)
    x, w = layout(torch.randn(9, 11, 64, dtype=torch.float64)), torch.randn(48, 64, dtype=torch.float64)
    w, b = w.requires_grad_(learned), torch.randn(48, dtype=torch.float64) if bias else None
    assert torch.equal(op(x, w, b, torch.tensor([1, 3])), F.linear(x, w, b))
