"""Row-sparse convolutions: the laws of tests/test_ops.py, for every kind of convolution."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracles import to_dense
from torch.testing import assert_close

from rwfx.ops import keep_rows, masked_conv, row_conv

EXACT = {"rtol": 0, "atol": 1e-12}


class Case(NamedTuple):
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int = 1
    transposed: bool = False
    output_padding: list[int] | None = None
    format: torch.memory_format = torch.contiguous_format

    @property
    def call(self):
        return self[2:8]

    @property
    def rows(self):
        return self.weight[1] * self.groups if self.transposed else self.weight[0]


CASES = {
    "1d": Case((4, 3, 7), (6, 3, 3), [2], [1], [1]),
    "2d": Case((4, 3, 7, 6), (6, 3, 3, 2), [2, 1], [2, 0], [2, 1]),
    "3d": Case((4, 2, 3, 4, 3), (6, 2, 2, 1, 2), [1] * 3, [0, 1, 0], [1] * 3),
    "pointwise": Case((4, 5, 3, 3), (6, 5, 1, 1), [1, 1], [0, 0], [1, 1]),
    "unbatched": Case((3, 6, 6), (6, 3, 3, 3), [1, 1], [1, 1], [1, 1]),
    "channels-last": Case((4, 3, 7, 6), (6, 3, 3, 3), [2, 1], [1, 1], [1, 1], format=torch.channels_last),
    "groups": Case((4, 4, 6, 5), (6, 2, 3, 3), [1, 2], [1, 1], [1, 1], 2),
    "depthwise": Case((4, 6, 6, 5), (6, 1, 3, 3), [2, 2], [1, 1], [1, 1], 6),
    "depthwise channels-last": Case((4, 3, 6, 5), (6, 1, 3, 3), [1, 1], [1, 1], [1, 1], 3, format=torch.channels_last),
    "transposed": Case((4, 3, 4, 5), (3, 6, 3, 2), [2, 1], [1, 0], [1, 2], 1, True, [1, 0]),
    "transposed groups": Case((4, 4, 4, 5), (4, 3, 3, 2), [2, 1], [1, 0], [1, 2], 2, True, [1, 0]),
    "transposed 1d channels": Case((4, 6, 5), (6, 1, 3), [2], [1], [1], 6, True, [0]),
}
COMPILED = {"2d": "rows", "depthwise": "rows", "channels-last": "dense", "transposed": "dense"}  # to ``grad``
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
OP = pytest.mark.parametrize("op", [row_conv, masked_conv], ids=["row", "masked"])
DX = pytest.mark.parametrize("dx", ["rows", "full"])
GRAD = pytest.mark.parametrize("grad", ["dense", "rows"])
ROW_SETS = pytest.mark.parametrize("rows", [[], [2], [0, 3, 4], [0, 1, 2, 3, 4, 5]], ids=["none", "one", "some", "all"])


def operands(case, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    x = torch.randn(case.x, dtype=dtype).to(memory_format=case.format)
    w = torch.randn(case.weight, dtype=dtype).to(memory_format=case.format)
    b = torch.randn(case.rows, dtype=dtype)
    return [t.requires_grad_() for t in (x, w, *[b] * bias)]


def dense(x, w, b, case):
    *call, groups, transposed, output_padding = case.call
    space = [0] * len(case.stride) if output_padding is None else output_padding
    batch = x if x.dim() == w.dim() else x[None]
    y = torch.convolution(batch, w, b, *call, transposed, space, groups)
    return y if x.dim() == w.dim() else y[0]


def over_rows(case, mask):
    """A mask of the rows in the shape of the output, of the weight and of the bias."""
    space = [1] * len(case.stride)
    of_weight = mask.view(-1, 1, *space)
    if case.transposed:
        of_weight = mask.view(case.groups, 1, -1, *space).expand(-1, case.x[-1 - len(space)] // case.groups, -1, *space)
        of_weight = of_weight.reshape(case.weight[0], case.weight[1], *space)
    return mask.view(-1, *space), of_weight, mask


def gradients(y, inputs):
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).cos()
    return torch.autograd.grad(y, inputs, upstream)


def oracle(x, w, b, rows, case, dx, scale=None, kept=None):
    """Dense autograd; the output's gradient is masked for ``dx="rows"``, those of the parameters for ``"full"``."""
    factor = torch.ones(len(rows), dtype=x.dtype) if scale is None else scale.to(x.dtype)
    mask = torch.zeros(case.rows, dtype=x.dtype).index_copy(0, rows, factor)
    of_output, *of_parameters = over_rows(case, mask)
    y = dense(x, w, b, case)
    if kept is not None:
        y.register_hook(
            lambda g: g * torch.zeros(len(y), dtype=x.dtype).index_fill(0, kept, 1).view(-1, *[1] * (y.dim() - 1))
        )
    inputs = [x, w] if b is None else [x, w, b]
    if dx == "rows":
        masked = y * of_output
        return gradients(masked + (y - masked).detach(), inputs)
    found = gradients(y, inputs)
    return (found[0], *[g * m for g, m in zip(found[1:], of_parameters, strict=False)])


def has(grad, case):
    """Whether the case can have such gradients."""
    return grad == "dense" or not case.transposed


@OP
@DX
@GRAD
@ROW_SETS
@CASE
def test_backward_is_the_dense_one_on_the_rows_and_zero_elsewhere(op, dx, grad, rows, case):
    if not has(grad, case):
        return
    rows = torch.tensor(rows, dtype=torch.int64)
    for bias in (True, False):
        inputs = operands(case, bias=bias)
        x, w, b = (*inputs, None)[:3]
        y = op(x, w, b, rows, *case.call, dx, grad)
        assert_close(y, dense(x, w, b, case), rtol=0, atol=0)
        ours = gradients(y, inputs)
        for ours_, theirs in zip(ours, oracle(x, w, b, rows, case, dx), strict=True):
            assert_close(to_dense(ours_), theirs, **EXACT)
        for g in ours[1:] if grad == "rows" else ():
            assert g.is_coalesced()
            assert torch.equal(g.indices()[0], rows)
            assert g.values().shape == (len(rows), *g.shape[1:])


@GRAD
@CASE
def test_opcheck(grad, case):
    if has(grad, case):
        torch.library.opcheck(
            torch.ops.rwfx.row_conv.default, (*operands(case), torch.tensor([0, 3, 4]), *case.call, "rows", grad)
        )


@pytest.mark.parametrize("rows", [[], [0, 1, 2, 3, 4, 5]], ids=["none", "all"])
@OP
@GRAD
def test_opcheck_of_no_rows_and_all(op, grad, rows):
    rows, case = torch.tensor(rows, dtype=torch.int64), CASES["2d"]
    overload = getattr(torch.ops.rwfx, op.__name__).default
    torch.library.opcheck(overload, (*operands(case), rows, *case.call, "rows", grad))


@CASE
def test_gradcheck_of_the_kept_rows(case):
    if case.transposed:  # the weight's rows are no rows of the tensor
        return
    x, w, b = operands(case)
    rows = torch.tensor([0, 3, 4])

    def of_kept(x, kept_w, kept_b):
        w_, b_ = w.detach().index_copy(0, rows, kept_w), b.detach().index_copy(0, rows, kept_b)
        return row_conv(x, w_, b_, rows, *case.call, "full")

    assert torch.autograd.gradcheck(of_kept, (x, *(t.detach()[rows].requires_grad_() for t in (w, b))))


@CASE
def test_gradients_lie_in_memory_as_their_tensors_do(case):
    x, w, b = operands(case)
    dx, dw, _ = gradients(row_conv(x, w, b, torch.tensor([1, 4]), *case.call), (x, w, b))
    assert dx.stride() == x.stride()
    assert dw.stride() == w.stride()


@OP
@pytest.mark.parametrize("case", [CASES["2d"], CASES["groups"]], ids=["2d", "groups"])
def test_kept_rows_receive_the_gradient_of_every_call_that_shares_them(op, case):
    x, w, b = operands(case)
    rows = torch.tensor([0, 4])
    kept = keep_rows(w, rows), keep_rows(b, rows)
    y = sum(op(factor * x, w, b, rows, *case.call, "rows", "rows", None, *kept) for factor in (1, 2))
    _, dw, db = gradients(y, (x, w, b))
    first, second = (
        oracle(x, w, b, rows, case, "rows"),
        oracle((2 * x).detach().requires_grad_(), w, b, rows, case, "rows"),
    )
    assert dw.is_sparse
    assert_close(to_dense(dw), first[1] + second[1], **EXACT)
    assert_close(to_dense(db), first[2] + second[2], **EXACT)


@OP
@CASE
def test_a_scale_is_a_factor_of_the_rows_output_gradient(op, case):
    x, w, b = operands(case)
    rows, scale = torch.tensor([1, 3, 5]), torch.tensor([2.0, 0.5, 3.0])
    ours = gradients(op(x, w, b, rows, *case.call, scale=scale), (x, w, b))
    for a, e in zip(ours, oracle(x, w, b, rows, case, "rows", scale), strict=True):
        assert_close(a, e, **EXACT)


def magnitudes(x, w, b, case, kept=None):
    y = dense(x, w, b, case)
    g = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).cos().abs()
    g = g if x.dim() == w.dim() else g[None]
    return (g if kept is None else g[kept]).transpose(0, 1).flatten(1).sum(1).float()


@pytest.mark.parametrize("seen_all", [False, True])
@OP
@CASE
def test_what_is_seen_are_the_sums_of_the_output_gradient_over_batch_and_space(op, case, seen_all):
    x, w, b = operands(case)
    rows, seen = torch.tensor([1, 3]), torch.full((case.rows,), -1.0)
    gradients(op(x, w, b, rows, *case.call, seen=seen, seen_all=seen_all), (x, w, b))
    expected = magnitudes(x, w, b, case)
    looked = (
        torch.ones(case.rows, dtype=torch.bool)
        if seen_all
        else torch.zeros(6, dtype=torch.bool).index_fill(0, rows, True)
    )
    assert_close(seen[looked], expected[looked])
    assert (seen[~looked] == -1).all()


@pytest.mark.parametrize("seen_all", [None, False, True])
@pytest.mark.parametrize("kept", [None, [0, 3]], ids=["batch", "examples"])
@CASE
def test_chosen_rows_are_those_with_the_largest_sums(case, kept, seen_all):
    if kept is not None and len(case.x) < len(case.weight):
        return
    x, w, b = operands(case)
    examples = None if kept is None else torch.tensor(kept)
    chosen, seen = torch.full((case.rows + 1,), -1), torch.full((case.rows,), -1.0)
    more = {} if seen_all is None else {"seen": seen, "seen_all": seen_all}
    blank = torch.zeros(2, dtype=torch.int64)
    y = row_conv(x, w, b, blank, *case.call, chosen=chosen, examples=examples, num_examples=4 if kept else 0, **more)
    ours = gradients(y, (x, w, b))
    sums = magnitudes(x, w, b, case, kept)
    rows = sums.topk(2).indices.sort().values
    assert chosen.tolist() == [2, *rows.tolist(), *[0] * (case.rows - 2)]
    for a, e in zip(ours, oracle(x, w, b, rows, case, "rows", kept=examples), strict=True):
        assert_close(a, e, **EXACT)
    if seen_all is not None:
        assert_close(seen[rows], sums[rows])
        assert int((seen >= 0).sum()) == (case.rows if seen_all else 2)


@DX
@GRAD
@pytest.mark.parametrize("kept", [[], [0], [1, 3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("rows", [[0, 3, 4], [0, 1, 2, 3, 4, 5]], ids=["some", "all"])
@CASE
def test_the_gradient_of_dropped_examples_counts_as_zero(dx, grad, kept, rows, case):
    if not has(grad, case) or len(case.x) < len(case.weight):
        return
    x, w, b = operands(case)
    rows, kept = torch.tensor(rows), torch.tensor(kept, dtype=torch.int64)
    y = row_conv(x, w, b, rows, *case.call, dx, grad, examples=kept, num_examples=4)
    for a, e in zip(gradients(y, (x, w, b)), oracle(x, w, b, rows, case, dx, kept=kept), strict=True):
        assert_close(to_dense(a), e, **EXACT)


def convolutions(call):
    """The shapes of output gradient and weight in every backward of a convolution that ``call`` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return [tuple(map(tuple, event.shapes()[:3:2])) for event in events if event.name() == "aten::convolution_backward"]


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("2d", [1, 3], ((4, 2, 4, 5), (2, 3, 3, 2))),
        ("groups", [0, 2], ((4, 2, 6, 3), (2, 2, 3, 3))),
        ("groups", [0, 2, 4], ((4, 4, 6, 3), (4, 2, 3, 3))),  # one place of the second group is empty
        ("depthwise", [1, 3], ((4, 2, 3, 3), (2, 1, 3, 3))),
        ("transposed", [1, 3], ((4, 2, 8, 7), (3, 2, 3, 2))),
    ],
)
def test_only_the_rows_are_computed_with(name, rows, expected):
    case = CASES[name]
    y = row_conv(*operands(case), torch.tensor(rows), *case.call)
    (found,) = convolutions(y.sum().backward)
    assert found == expected


@pytest.mark.parametrize("needs", ["x", "w", "b", "xw", ""])
@OP
def test_what_is_frozen_has_no_gradient(op, needs):
    case = CASES["2d"]
    inputs = dict(zip("xwb", operands(case), strict=True))
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in needs)
    y = op(*inputs.values(), torch.tensor([1, 3]), *case.call)
    assert y.requires_grad == bool(needs)
    if needs:
        y.sum().backward()
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == list(needs)


@OP
@GRAD
def test_what_is_masked_is_zero_also_where_the_dense_gradient_is_not_finite(op, grad):
    x, w, b = operands(CASES["2d"])
    y = op(x, w, b, torch.tensor([1]), *CASES["2d"].call, "rows", grad)
    g = torch.zeros_like(y)
    g[0, 3], g[1, 4] = float("nan"), float("inf")
    for out in torch.autograd.grad(y, (x, w, b), g):
        assert to_dense(out).count_nonzero() == 0


@OP
@GRAD
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_type_and_is_no_less_exact_than_the_dense_call(op, grad, dtype):
    case = Case((8, 16, 9, 9), (24, 16, 3, 3), [1, 1], [1, 1], [1, 1])
    rows = torch.arange(0, 24, 3)

    def errors(call, reference):
        x, w, b = operands(case, torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            y = call(x, w, b)
        assert y.dtype == dtype
        found = torch.autograd.grad(y.float().square().mean(), (x, w, b))
        assert [g.dtype for g in found] == [torch.float32] * 3
        out = []
        for g, r in zip(found, reference, strict=True):
            on_rows = rows if len(r) == 24 else slice(None)
            out.append(((to_dense(g).double() - r)[on_rows].norm() / r[on_rows].norm()).item())
        return out

    doubles = [t.detach().double().requires_grad_() for t in operands(case, torch.float32)]
    exact = torch.autograd.grad(dense(*doubles, case).square().mean(), doubles)
    ours = errors(lambda *t: op(*t, rows, *case.call, "full", grad), exact)
    theirs = errors(lambda *t: F.conv2d(*t, *case.call[:4]), exact)
    assert all(a <= 1.05 * t for a, t in zip(ours, theirs, strict=True)), (ours, theirs)


@OP
def test_autocast_leaves_double_precision_alone(op):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(*operands(CASES["2d"]), torch.tensor([1]), *CASES["2d"].call).dtype == torch.float64


@pytest.mark.parametrize(("name", "grad"), COMPILED.items(), ids=COMPILED)
def test_compiled_whole_and_once_whatever_the_rows(name, grad):
    case = CASES[name]
    torch._dynamo.reset()
    x, w, b = operands(case)

    @torch.compile(fullgraph=True)
    def call(x, w, b, rows):
        return row_conv((2 * x).relu(), w, b, rows, *case.call, "rows", grad).relu()

    with torch._dynamo.config.patch(error_on_recompile=True):
        for kept in ([1, 2, 4], [3, 5], [0, 1, 2, 5], [1, 2, 3, 4, 5][: case.rows]):
            rows = torch.tensor(kept).clamp(max=case.rows - 1).unique()
            torch._dynamo.decorators.mark_unbacked(rows, 0)
            ours = gradients(call(x, w, b, rows), (x, w, b))
            eager = gradients(row_conv((2 * x).relu(), w, b, rows, *case.call, "rows", grad).relu(), (x, w, b))
            for a, e in zip(ours, eager, strict=True):
                assert_close(to_dense(a), to_dense(e), **EXACT)


@OP
@pytest.mark.parametrize("rows", [torch.tensor([1], dtype=torch.int32), torch.tensor([[1]]), torch.tensor([1.0])])
def test_what_is_no_row_set_is_refused(op, rows):
    with pytest.raises(ValueError, match="one-dimensional int64"):
        op(*operands(CASES["2d"]), rows, *CASES["2d"].call)


@OP
def test_a_transposed_convolution_has_no_row_gradients(op):
    with pytest.raises(ValueError, match="no row gradients"):
        op(*operands(CASES["transposed"]), torch.tensor([1]), *CASES["transposed"].call, "rows", "rows")


@pytest.mark.parametrize(
    ("examples", "count", "message"),
    [
        (torch.tensor([0.5]), 4, "int64"),
        (torch.tensor([[0]]), 4, "one-dimensional"),
        (torch.tensor([0]), 3, "4 examples"),
    ],
)
def test_what_is_no_choice_of_examples_is_refused(examples, count, message):
    case = CASES["2d"]
    with pytest.raises(ValueError, match=message):
        row_conv(*operands(case), torch.tensor([1]), *case.call, examples=examples, num_examples=count)
