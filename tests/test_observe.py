"""Row magnitudes, and row sets that are chosen by them in the backward pass."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracles import to_dense
from test_ops import DX, GRAD, OP, gradients, operands, overload, products
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


# --- What a backward pass notes and chooses --------------------------------------------------------------------------


def in_python(
    x, w, b, rows, dx="rows", grad="dense", columns=None, activation="", scale=None, seen=None, seen_all=True,
    chosen=None,
):  # fmt: skip
    """``row_linear`` without the CPU kernels."""
    return _RowLinear.apply(
        x, w, b, rows, dx, grad, None, None, None, columns, activation, False, scale, seen, seen_all, chosen
    )


CALLS = {"row": row_linear, "row-in-python": in_python, "masked": masked_linear}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
choosing = pytest.mark.parametrize("call", [row_linear, in_python], ids=["fastest", "python"])
SHAPES = {"vector": (7,), "matrix": (6, 7), "sequence": (2, 3, 7), "empty": (0, 7)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def kernels():
    native.ready()


def magnitudes(y):
    """What ``gradients`` sends back to a ``y`` of five rows, summed in size."""
    return torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(-1, 5).sum(0)


def scaled_oracle(x, w, b, rows, scale, dx):
    """Dense autograd of a network in which each kept row's output is multiplied, and the others are constants."""
    factor = torch.zeros(5, dtype=x.dtype).index_copy(0, rows, scale.to(x.dtype))
    inputs = [t for t in (x, w, b) if t is not None]
    scaled = gradients(F.linear(x, w, b) * factor, *inputs)
    return scaled if dx == "rows" else (*gradients(F.linear(x, w, b), x), *scaled[1:])


@every_call
@DX
@GRAD
@every_shape
@pytest.mark.parametrize("rows", [[], [2], [0, 3], [0, 1, 2, 3, 4]], ids=["none", "one", "some", "all"])
def test_scale_multiplies_the_output_gradient_of_the_kept_rows(call, dx, grad, shape, rows):
    rows = torch.tensor(rows, dtype=torch.int64)
    scale = torch.linspace(0.5, 3, 5)[: len(rows)]
    for bias in (True, False):
        x, w, b = operands(shape, bias)
        inputs = [t for t in (x, w, b) if t is not None]
        y = call(x, w, b, rows, dx, grad, scale=scale)
        assert torch.equal(y, F.linear(x, w, b))
        ours, theirs = gradients(y, *inputs), scaled_oracle(x, w, b, rows, scale, dx)
        for ours_, theirs_ in zip(ours, theirs, strict=True):
            assert_close(to_dense(ours_), theirs_, rtol=0, atol=1e-12)
        assert all(g.is_sparse == (grad == "rows") for g in ours[1:])


@OP
@DX
def test_kept_rows_are_scaled_too_and_scale_has_no_gradient(op, dx):
    x, w, b = operands()
    rows, scale = torch.tensor([0, 3]), torch.tensor([2.0, 5.0], dtype=torch.float64, requires_grad=True)
    kept = ops.keep_rows(w, rows), ops.keep_rows(b, rows)
    y = op(x, w, b, rows, dx, "rows", None, *kept, scale=scale)
    *ours, of_scale = torch.autograd.grad(y.sum(), (x, w, b, scale), allow_unused=True)
    assert of_scale is None
    y = F.linear(x, w, b) * torch.tensor([2.0, 0, 0, 5, 0], dtype=torch.float64)
    theirs = [*torch.autograd.grad(y.sum(), (x, w, b))]
    if dx == "full":
        theirs[0] = torch.autograd.grad(F.linear(x, w, b).sum(), x)[0]
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert_close(to_dense(ours_), theirs_, rtol=0, atol=1e-12)


@every_call
@GRAD
def test_what_is_masked_is_zero_and_seen_where_the_dense_gradient_is_not_finite(call, grad):
    x, w, b = operands()
    seen = torch.zeros(5)
    y = call(x, w, b, torch.tensor([1]), "rows", grad, scale=torch.tensor([3.0]), seen=seen)
    g = torch.zeros_like(y)
    g[0, 3], g[1, 4] = float("nan"), float("inf")
    for out in torch.autograd.grad(y, (x, w, b), g):
        assert to_dense(out).count_nonzero() == 0
    assert_close(seen, torch.tensor([0, 0, 0, float("nan"), float("inf")]), equal_nan=True)


@every_call
@DX
@GRAD
@every_shape
@pytest.mark.parametrize("scale", [None, torch.tensor([0.5, 4.0])], ids=["plain", "scaled"])
def test_seen_holds_the_magnitudes_as_they_arrive_and_changes_no_gradient(call, dx, grad, shape, scale):
    x, w, b = operands(shape)
    rows = torch.tensor([0, 3])
    plain = gradients(call(x, w, b, rows, dx, grad, scale=scale), x, w, b)
    for seen_all, read in ((True, [0, 1, 2, 3, 4]), (False, [0, 3])):
        seen = torch.full((5,), -1.0)
        y = call(x, w, b, rows, dx, grad, scale=scale, seen=seen, seen_all=seen_all)
        assert (seen == -1).all()
        ours = gradients(y, x, w, b)
        expected = torch.full((5,), -1.0)
        expected[read] = magnitudes(y)[read].float()
        assert_close(seen, expected)
        assert all(torch.equal(to_dense(a), to_dense(e)) for a, e in zip(ours, plain, strict=True))


@every_call
def test_calls_may_share_what_is_seen_and_be_differentiated_again(call):
    x, w, b = operands()
    seen = torch.zeros(5)
    first, second = (call(factor * x, w, b, torch.tensor([1]), seen=seen) for factor in (1, 2))
    gradients(first, w)
    gradients(2 * second, w)
    assert_close(seen, 2 * magnitudes(second).float())
    y = call(x, w, b, torch.tensor([1]), seen=seen)
    for factor in (1, 3):
        torch.autograd.grad(y, w, torch.full_like(y, factor), retain_graph=True)
        assert_close(seen, torch.full((5,), 6.0 * factor))


def largest(size_O, count):
    return size_O.topk(count).indices.sort().values


def written(rows, num_rows=5):
    return [len(rows), *rows.tolist(), *[0] * (num_rows - len(rows))]


@choosing
@DX
@GRAD
@every_shape
@pytest.mark.parametrize("count", [1, 2, 5], ids=["one", "some", "all"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_the_rows_with_the_largest_output_gradient_are_kept(call, dx, grad, shape, count, bias):
    x, w, b = operands(shape, bias)
    inputs = [t for t in (x, w, b) if t is not None]
    chosen, rows = torch.full((6,), -1), torch.full((count,), -(2**60))  # no row numbers: only their count matters
    y = call(x, w, b, rows, dx, grad, chosen=chosen)
    assert torch.equal(y, F.linear(x, w, b))
    assert (chosen == -1).all()
    upstream = torch.randn_like(y)
    ours = torch.autograd.grad(y, inputs, upstream)
    expected = torch.arange(count)  # with nothing to tell them apart, the lower
    if y.numel():
        expected = largest(upstream.abs().reshape(-1, 5).sum(0), count)
    assert chosen.tolist() == written(expected)
    masked = masked_linear(x, w, b, expected, dx)
    for ours_, theirs in zip(ours, torch.autograd.grad(masked, inputs, upstream), strict=True):
        assert_close(to_dense(ours_), theirs, rtol=0, atol=1e-12)
    if grad == "rows":
        assert all(torch.equal(g.indices()[0], expected) for g in ours[1:])


@choosing
@pytest.mark.parametrize("seen_all", [True, False])
def test_what_is_seen_beside_a_choice_is_all_rows_or_those_chosen(call, seen_all):
    x, w, b = operands()
    seen, chosen = torch.full((5,), -1.0), torch.zeros(6, dtype=torch.int64)
    y = call(x, w, b, torch.empty(2, dtype=torch.int64), seen=seen, seen_all=seen_all, chosen=chosen)
    g = torch.randn_like(y)
    torch.autograd.grad(y, w, g)
    sizes = g.abs().sum(0).float()
    rows = largest(sizes, 2)
    assert chosen.tolist() == written(rows)
    assert_close(seen, sizes if seen_all else torch.full((5,), -1.0).index_copy(0, rows, sizes[rows]))


@choosing
@GRAD
@pytest.mark.parametrize("confined", [False, True], ids=["all-columns", "columns"])
def test_the_choice_of_an_upper_layer_confines_what_the_lower_one_sees(call, grad, confined):
    """Against backpropagation by hand, in which each layer's output gradient is masked to its largest columns."""
    x, w1, b1 = operands((30, 7))
    w2, b2 = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (4,)))
    lower, upper = torch.zeros(6, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    # Where the lower layer's rows are given, it reads no others.
    given = torch.tensor([0, 2, 3])
    columns, below = (given, {}) if confined else (None, {"chosen": lower})
    h = call(x, w1, b1, given, "rows", grad, **below)
    y = call(
        h, w2, b2, torch.empty(2, dtype=torch.int64), "rows", grad, columns=columns, activation="tanh", chosen=upper
    )
    g2 = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, w1, b1, w2, b2), g2)

    rows2 = largest(g2.abs().sum(0), 2)
    a = h.detach().tanh()
    g1 = (g2[:, rows2] @ w2[rows2]) * (1 - a**2)
    rows1 = given if confined else largest(g1.abs().sum(0), 3)
    theirs = [
        g1[:, rows1] @ w1[rows1],
        torch.zeros(5, 7).double().index_copy(0, rows1, g1[:, rows1].T @ x),
        torch.zeros(5).double().index_copy(0, rows1, g1[:, rows1].sum(0)),
        torch.zeros(4, 5).double().index_copy(0, rows2, g2[:, rows2].T @ a),
        torch.zeros(4).double().index_copy(0, rows2, g2[:, rows2].sum(0)),
    ]
    assert upper.tolist() == written(rows2, 4)
    assert confined or lower.tolist() == written(rows1)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert_close(to_dense(ours_), theirs_, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("needs", "expected"), [("xw", [(6, 2, 7), (2, 6, 7)]), ("x", [(6, 2, 7)]), ("b", [])], ids=str
)
@GRAD
@choosing
def test_only_products_on_the_chosen_rows_are_run_and_none_for_what_is_frozen(call, needs, expected, grad):
    x, w, b = operands()
    for name, tensor in {"x": x, "w": w, "b": b}.items():
        tensor.requires_grad_(name in needs)
    chosen, seen = torch.zeros(6, dtype=torch.int64), torch.zeros(5)
    y = call(x, w, b, torch.empty(2, dtype=torch.int64), "rows", grad, seen=seen, chosen=chosen)
    assert sorted(products(y.sum().backward)) == sorted(expected)
    assert chosen.tolist() == [2, 0, 1, 0, 0, 0]
    assert seen.tolist() == [6.0] * 5
    assert [t.grad is not None for t in (x, w, b)] == [name in needs for name in "xwb"]


@choosing
@DX
def test_gradcheck_where_all_rows_are_chosen(call, dx):
    def all_chosen(x, w, b):
        return call(x, w, b, torch.empty(5, dtype=torch.int64), dx, chosen=torch.zeros(6, dtype=torch.int64))

    assert torch.autograd.gradcheck(all_chosen, operands())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_sees_chooses_and_scales_in_its_type(dtype):
    x, w, b = (torch.randn(s).requires_grad_() for s in ((64, 96), (48, 96), (48,)))
    seen, chosen, rows = torch.zeros(48), torch.zeros(49, dtype=torch.int64), torch.arange(0, 48, 3)
    scale = torch.rand(16) + 0.5
    g = torch.randn(64, 48).to(dtype)

    def gradients_of(**options):
        with torch.autocast("cpu", dtype=dtype):
            y = row_linear(x, w, b, rows, **options)
        assert y.dtype == dtype
        return torch.autograd.grad(y, (x, w, b), g)

    by_choice = gradients_of(seen=seen, chosen=chosen)
    sizes = g.double().abs().sum(0)
    assert_close(seen.double(), sizes, rtol=1e-6, atol=0)
    assert chosen.tolist() == written(largest(sizes, 16), 48)
    scaled = gradients_of(scale=scale)
    for ours, kept, factors in (
        (by_choice, largest(sizes, 16), torch.ones(16)),
        (scaled, rows, scale),
    ):
        h = g.double()[:, kept] * factors
        exact = h @ w[kept].double(), h.T @ x.double(), h.sum(0)
        for ours_, exact_ in zip((ours[0], ours[1][kept], ours[2][kept]), exact, strict=True):
            assert ours_.dtype == torch.float32
            assert (ours_ - exact_).norm() / exact_.norm() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [None, torch.tensor([2.0, 3.0])], ids=["plain", "scaled"])
@GRAD
@OP
def test_opcheck_of_calls_that_observe(op, grad, scale):
    options = {"scale": scale, "seen": torch.zeros(5)}
    for seen_all in (True, False):
        arguments = *operands(), torch.tensor([1, 3]), "rows", grad
        torch.library.opcheck(overload(op), arguments, options | {"seen_all": seen_all})


@GRAD
def test_opcheck_of_calls_that_choose(grad):
    arguments = *operands(), torch.tensor([1, 3]), "rows", grad
    torch.library.opcheck(overload(row_linear), arguments, {"chosen": torch.zeros(6, dtype=torch.int64)})


long = {"dtype": torch.int64}
REFUSED = {
    "scale of another length": ({"scale": torch.ones(3)}, "a number for each of the 2 rows, got 3"),
    "scale of a number": ({"scale": torch.tensor(1.0)}, "scale must be a one-dimensional floating-point tensor"),
    "scale of integers": ({"scale": torch.ones(2, **long)}, "scale must be a one-dimensional floating-point tensor"),
    "seen in double": ({"seen": torch.zeros(5).double()}, r"seen must be a .* tensor of shape \(5,\), got"),
    "seen too short": ({"seen": torch.zeros(2)}, r"seen must be a .* tensor of shape \(5,\), got"),
    "chosen too short": ({"chosen": torch.zeros(5, **long)}, r"chosen must be a .* tensor of shape \(6,\), got"),
    "chosen in float": ({"chosen": torch.zeros(6)}, r"chosen must be a .* tensor of shape \(6,\), got"),
    "scale with chosen": (
        {"scale": torch.ones(2), "chosen": torch.zeros(6, **long)},
        "scale cannot be given with chosen: they belong to rows that are known in the forward pass",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@every_call
def test_what_does_not_fit_is_refused_before_anything_is_computed(call, options, message):
    if call is masked_linear and "chosen" in options:
        pytest.skip("masked_linear does not choose")
    with pytest.raises(ValueError, match=message):
        call(*operands(), torch.tensor([0, 1]), **options)


@pytest.mark.parametrize("kept", ["kept_weight", "kept_bias"])
def test_kept_rows_are_refused_beside_a_choice(kept):
    kept = {"kept_weight": None, "kept_bias": None} | {
        kept: torch.ones(2, 7) if kept == "kept_weight" else torch.ones(2)
    }
    chosen = torch.zeros(6, **long)
    for call in (
        lambda *a: row_linear(*a, **kept, chosen=chosen),
        lambda *a: _RowLinear.apply(
            *a, "rows", "rows", None, *kept.values(), None, "", False, None, None, True, chosen
        ),
    ):
        with pytest.raises(ValueError, match="kept_weight and kept_bias cannot be given with chosen"):
            call(*operands(), torch.tensor([0, 1]))


# --- Compiled --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("rwfx_tests::draw", mutates_args=())
def draw(x: torch.Tensor, seed: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and factors, as many as the seed says."""
    count = int(seed) % most + 1
    generator = torch.Generator().manual_seed(int(seed))
    rows = torch.randperm(most, generator=generator)[:count].sort().values
    return rows, torch.rand(count, generator=generator, dtype=x.dtype) + 0.5


@draw.register_fake
def _(x, seed, most):
    count, same = (torch.library.get_ctx().new_dynamic_size(min=1, max=most) for _ in range(2))
    return seed.new_empty(count), x.new_empty(same)


class Observing(nn.Module):
    """Two layers side by side that share what they see, one that sees its rows, one that sees all and chooses."""

    def __init__(self, grad, masked=False):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(i, o, dtype=torch.float64) for i, o in ((7, 11), (7, 11), (11, 9), (9, 8))
        )
        self.grad, self.call = grad, masked_linear if masked else row_linear
        self.masked = masked
        for name, size in (("seen_rows", 9), ("seen_all", 8), ("shared", 11)):
            self.register_buffer(name, torch.zeros(size))
        self.register_buffer("chosen", torch.zeros(9, dtype=torch.int64))

    def forward(self, x, seed):
        first, beside, second, third = self.layers
        rows1, scale1 = draw(x, seed, 11)
        rows2, scale2 = draw(x, seed + 5, 9)
        rows3, _ = draw(x, seed + 8, 8)
        called = "rows", self.grad
        h = self.call(x, first.weight, first.bias, rows1, *called, scale=scale1, seen=self.shared)
        h = h + self.call(x, beside.weight, beside.bias, rows1, *called, seen=self.shared)
        h = self.call(
            h.tanh(), second.weight, second.bias, rows2, *called, scale=scale2, seen=self.seen_rows, seen_all=False
        )
        chosen = {} if self.masked else {"chosen": self.chosen}
        return self.call(h.relu(), third.weight, third.bias, rows3, *called, seen=self.seen_all, **chosen)


@pytest.mark.parametrize("masked", [False, True], ids=["row", "masked"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@GRAD
def test_compiled_it_is_one_graph_that_does_what_eager_does(backend, grad, masked):
    compiled_model = Observing(grad, masked)
    eager = copy.deepcopy(compiled_model)
    counters.clear()
    x = torch.randn(6, 7, dtype=torch.float64)
    counts = set()
    with torch._dynamo.config.patch(error_on_recompile=True, capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(compiled_model, backend=backend, fullgraph=True)
        for step in range(8):
            for model in (compiled, eager):
                model.zero_grad()
                model(x, torch.tensor(step)).square().sum().backward()
            assert {*compiled_model.state_dict()} == {*eager.state_dict()}
            for (name, ours), theirs in zip(compiled_model.named_buffers(), eager.buffers(), strict=True):
                assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
            for (name, ours), theirs in zip(compiled_model.named_parameters(), eager.parameters(), strict=True):
                assert ours.grad.layout == theirs.grad.layout, name
                assert_close(to_dense(ours.grad), to_dense(theirs.grad), rtol=0, atol=1e-10)
            counts.add(eager.chosen[0].item())
    assert all(seen.count_nonzero() for seen in (eager.shared, eager.seen_rows, eager.seen_all))
    assert len(counts) > 3 or masked
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
