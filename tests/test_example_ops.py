"""The operators behind ``transform(examples=...)``: the choice, and a linear call confined to what is chosen."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from oracles import chances_of, sizes_of_examples, to_dense
from torch.testing import assert_close

from rwfx import native
from rwfx.example_sampler import counted, kept_of
from rwfx.examples import AdaptiveExamples, example_policy
from rwfx.ops import keep_rows, row_linear
from rwfx.ops.examples import pick_examples
from rwfx.ops.linear import ACTIVATIONS, _RowLinear

# --- The choice ------------------------------------------------------------------------------------------------------


def picked(*gradients, count, state=None, **options):
    """The examples that are kept where these gradients arrive, and the gradients that are handed on."""
    kept = torch.full((count,), -1)
    inputs = [torch.zeros_like(g, requires_grad=True) for g in gradients]
    outputs = pick_examples([x * 1 for x in inputs], kept, len(gradients[0]), state, **options)
    torch.autograd.backward(outputs, gradients)
    return kept, [x.grad for x in inputs]


def state_of(step, seed=5):
    return torch.tensor([seed, step])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", [[(9,)], [(9, 4)], [(9, 5, 3)], [(9, 4), (9, 5, 3), (9,)]], ids=str)
def test_the_top_examples_have_the_largest_gradients_over_all_outputs(shapes, dtype):
    for seed in range(5):
        torch.manual_seed(seed)
        gradients = [torch.randn(shape).to(dtype) for shape in shapes]
        sizes = sizes_of_examples([g.double() for g in gradients])
        kept, passed_on = picked(*gradients, count=4)
        assert torch.equal(kept, sizes.topk(4).indices.sort().values)
        for ours, g in zip(passed_on, gradients, strict=True):
            assert torch.equal(ours[kept], g[kept])
            assert ours.count_nonzero() == g[kept].count_nonzero()


def test_of_equal_examples_the_first_are_kept():
    assert picked(torch.ones(9, 3), count=3)[0].tolist() == [0, 1, 2]
    assert picked(torch.zeros(9, 3), count=2)[0].tolist() == [0, 1]
    assert picked(torch.tensor([1.0, 2, 1, 2, 2, 1]), count=4)[0].tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_in_half_precision_are_those_of_float32(dtype):
    """Two that are one number in bfloat16, and that are infinite in float16."""
    g = torch.full((6, 100), 30000.0, dtype=dtype)
    g[4, 0] *= 1.2
    assert picked(g, count=1)[0].tolist() == [4]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("others", [0.0, 1.0, 1e6])
def test_an_example_that_is_not_finite_is_kept_so_that_the_weights_show_it(bad, floor, others):
    g = torch.full((10, 3), others)
    g[7, 1] = bad
    kept, (passed_on,) = picked(g, count=2)
    assert 7 in kept
    for step in range(20):
        kept, (passed_on,) = picked(g, count=2, state=state_of(step), floor=floor)
        assert 7 in kept
        assert not passed_on[7].isfinite().all()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_where_few_or_no_examples_have_a_gradient_others_take_part_with_zeros(floor, unbiased):
    for nonzero in ([], [2], [2, 5, 8]):
        g = torch.zeros(10, 3).index_fill(0, torch.tensor(nonzero, dtype=torch.int64), 2.0)
        kept, (passed_on,) = picked(g, count=6, state=state_of(0), floor=floor, unbiased=unbiased)
        assert len(kept.unique()) == 6
        assert passed_on.isfinite().all()
        assert passed_on.count_nonzero() == 3 * len(set(nonzero) & set(kept.tolist()))


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
def test_examples_are_drawn_with_their_probabilities(floor):
    g = torch.tensor([0.1, 3.0, 0.4, 1.0, 1.5, 0.2, 9.0, 0.7])[:, None].double() * torch.ones(2, dtype=torch.float64)
    expected, steps = chances_of(sizes_of_examples([g]), 4, floor), 600
    if floor == 1:
        assert_close(expected, torch.full((8,), 0.5, dtype=torch.float64))
    counts = torch.zeros(8)
    for step in range(steps):
        kept, (passed_on,) = picked(g, count=4, state=state_of(step), floor=floor, unbiased=True)
        counts[kept] += 1
        assert_close(passed_on[kept] / g[kept], (1 / expected[kept])[:, None].expand(-1, 2), rtol=1e-5, atol=0)
    error = (expected * (1 - expected) / steps).sqrt()
    assert ((counts / steps - expected).abs() <= 4 * error + 1e-9).all()


def test_equal_states_draw_equal_examples_and_another_seed_others():
    g = torch.rand(40, 3)
    first, again, other = (picked(g, count=9, state=state_of(2, seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_outputs_without_examples_are_handed_on_and_those_without_a_gradient_stay_so():
    x, scalar = torch.randn(6, 3, requires_grad=True), torch.ones((), requires_grad=True)
    number, fixed, kept = torch.arange(6), torch.randn(6), torch.full((2,), -1)
    outputs = pick_examples([x * 1, scalar * 1, number, fixed], kept, 6)
    assert [y.requires_grad for y in outputs] == [True, True, False, False]
    assert torch.equal(outputs[2], number)
    (outputs[0].sum() + 5 * outputs[1]).backward()
    assert scalar.grad == 5
    assert x.grad.count_nonzero() == 6


def test_a_loss_that_reads_no_output_with_examples_is_refused():
    scalar, x = torch.ones((), requires_grad=True), torch.ones(4, requires_grad=True)
    y, total = pick_examples([x * 1, scalar * 1], torch.full((2,), -1), 4)
    with pytest.raises(RuntimeError, match="gradient at the outputs that have an entry for each example"):
        total.backward()
    with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph=True"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(ValueError, match=r"for each of the 4 examples.*\(3, 4\)"):
        pick_examples([torch.ones(3, 4)], torch.full((2,), -1), 4)


def test_opcheck_of_the_choice():
    x, kept = torch.randn(6, 3, requires_grad=True), torch.arange(2)
    for options in (
        {},
        {"state": state_of(1), "floor": 0.2, "unbiased": True},
        {"needed": torch.ones(1), "share": 0.5},
    ):
        arguments = [x, x.detach().clone().requires_grad_()], kept, 6
        torch.library.opcheck(torch.ops.rwfx.pick_examples.default, arguments, options)
    torch.library.opcheck(torch.ops.rwfx.draw_by_size.default, (torch.rand(9), 4, state_of(3)))
    torch.library.opcheck(torch.ops.rwfx.note_needed_.default, (torch.ones(1), torch.rand(9), 0.9, 0.5))
    for needed in (0.1, 0.3, 1.0):
        torch.library.opcheck(torch.ops.rwfx.blank_examples.default, (torch.tensor([needed]), 9, 0, [0.2, 0.4, 0.8]))


def test_needed_is_the_mean_share_of_examples_that_hold_the_square():
    needed = torch.ones(1)
    note = torch.ops.rwfx.note_needed_.default
    sizes = torch.tensor([3.0, 1, 0, 2, 0, 0, 0, 0])  # squares 9, 4, 1
    for share, count in ((0.5, 1), (0.65, 2), (0.92, 2), (0.95, 3), (1.0, 3)):
        note(needed, sizes, share, 0.0)
        assert_close(needed, torch.tensor([count / 8]))
    note(needed, sizes, 0.5, 0.75)
    assert_close(needed, torch.tensor([0.75 * 3 / 8 + 0.25 / 8]))
    for unknown in (torch.zeros(8), torch.full((8,), torch.nan)):
        before = needed.clone()
        note(needed, unknown, 0.5, 0.5)
        assert_close(needed, before)


def test_a_fraction_is_rounded_up_and_a_number_is_at_most_all():
    for fraction, size, count in ((0.3, 10, 3), (0.3, 11, 4), (0.01, 5, 1), (1.0, 7, 7), (2, 5, 2), (9, 5, 5)):
        assert kept_of(*counted(fraction), size) == count
    for given in (pytest.importorskip("numpy").int64(2), 2):
        assert kept_of(*counted(example_policy(given).fraction), 5) == 2
    fractions = AdaptiveExamples(0.9, 0.1, 0.5).fractions
    assert fractions[0] == 0.1
    assert fractions[-1] == 0.5
    assert all(a < b <= 1.5 * a for a, b in pairwise(fractions))


# --- Linear calls ----------------------------------------------------------------------------------------------------


def in_python(*arguments, **named):
    """``row_linear`` without the CPU kernels."""
    names = [argument.name for argument in torch.ops.rwfx.row_linear.default._schema.arguments]
    defaults = {
        argument.name: argument.default_value for argument in torch.ops.rwfx.row_linear.default._schema.arguments
    }
    given = {**defaults, **dict(zip(names, arguments, strict=False)), **named}
    return _RowLinear.apply(*[given[name] for name in names])


@pytest.fixture(params=["fastest", "python"])
def op(request):
    native.ready()
    return row_linear if request.param == "fastest" else in_python


FUNCTIONS = {"": lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
FUNCTIONS["sigmoid"] = torch.sigmoid
KEPT = {"none": [], "one": [4], "some": [0, 3], "all": list(range(6))}
SHAPES = {"matrix": (6, 7), "sequence": (6, 3, 7), "grid": (3, 2, 2, 7), "flat": (12, 7)}
every_kept = pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
ROWS = ([], [2], [0, 3], [0, 1, 2, 3, 4])


def operands(shape=(6, 7), rows=5):
    shapes = shape, (rows, shape[-1]), (rows,)
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def gradients(y, *inputs):
    upstream = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad(y, inputs, upstream)


def oracle(x, w, b, rows, kept, activation="", dx="rows", scale=None):
    """Dense autograd of an output whose gradient is zero for the rows and the examples that are left out."""
    y = F.linear(FUNCTIONS[activation](x), w, b)
    of_rows = torch.zeros(len(w), dtype=y.dtype).index_copy(
        0, rows, torch.ones(len(rows)).double() if scale is None else scale
    )
    each = y.shape[:-1].numel() // 6
    of_places = torch.zeros(6, dtype=y.dtype).index_fill(0, kept, 1).repeat_interleave(each).view(*y.shape[:-1], 1)
    upstream = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape) * of_places
    masked = torch.autograd.grad(y, (x, w, b), upstream * of_rows, retain_graph=True)
    return (torch.autograd.grad(y, x, upstream)[0], *masked[1:]) if dx == "full" else masked


@every_kept
@every_shape
@pytest.mark.parametrize("activation", ["", *ACTIVATIONS], ids=lambda name: name or "none")
def test_the_backward_is_the_dense_one_on_rows_columns_and_examples(op, activation, shape, kept):
    kept, (x, w, b) = torch.tensor(kept, dtype=torch.int64), operands(shape)
    for rows in ROWS:
        rows = torch.tensor(rows, dtype=torch.int64)
        for grad, dx, columns in (("dense", "rows", None), ("rows", "rows", [1, 5]), ("rows", "full", None)):
            columns = None if columns is None else torch.tensor(columns)
            options = {"columns": columns, "activation": activation, "examples": kept, "num_examples": 6}
            y = op(x, w, b, rows, dx, grad, **options)
            assert_close(y, F.linear(FUNCTIONS[activation](x), w, b), rtol=0, atol=0)
            ours, theirs = gradients(y, x, w, b), oracle(x, w, b, rows, kept, activation, dx)
            read = slice(None) if columns is None else columns
            assert_close(ours[0][..., read], theirs[0][..., read], rtol=0, atol=1e-12)
            for a, e in zip(ours[1:], theirs[1:], strict=True):
                assert a.is_sparse == (grad == "rows")
                assert_close(to_dense(a), e, rtol=0, atol=1e-12)


OBSERVING = {
    "scale": {"scale": torch.linspace(0.5, 4, 9)},
    "seen": {"seen": torch.zeros(70)},
    "seen, rows": {"seen": torch.full((70,), -1.0), "seen_all": False},
    "chosen": {"chosen": torch.zeros(71, dtype=torch.int64)},
    "chosen and seen": {"chosen": torch.zeros(71, dtype=torch.int64), "seen": torch.zeros(70)},
}


@pytest.mark.parametrize("options", OBSERVING.values(), ids=OBSERVING)
@pytest.mark.parametrize("shape", [(10, 40), (10, 3, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_scaled_seen_and_chosen_is_as_in_python_and_of_kept_examples_alone(dtype, shape, options):
    native.ready()
    x, w, b = (torch.randn(s).to(dtype).requires_grad_() for s in (shape, (70, 40), (70,)))
    upstream, kept, rows = torch.randn(*shape[:-1], 70).to(dtype), torch.tensor([1, 2, 7]), torch.arange(2, 65, 7)
    runs = []
    for call in (row_linear, in_python):
        own = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        y = call(x, w, b, rows, "rows", "rows", examples=kept, num_examples=10, **own)
        runs.append((torch.autograd.grad(y, (x, w, b), upstream), own))
    (ours, observed), (theirs, expected) = runs
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-12, torch.bfloat16: 0.2}[dtype]
    for a, e in zip(ours, theirs, strict=True):
        assert_close(to_dense(a), to_dense(e), rtol=0.02 if dtype == torch.bfloat16 else 0, atol=tolerance)
    for name in options.keys() - {"seen_all"}:
        assert_close(observed[name], expected[name])
    if observed.get("seen_all", "seen" in observed):
        sizes = upstream[kept].reshape(-1, 70).float().abs().sum(0)
        assert_close(observed["seen"], sizes, rtol=1e-3, atol=1e-3)


def chain(op, kinds, rows, columns_of, packed, kept, shape):
    """Three calls in a row that hand their gradients straight to one another: as ``read_columns`` has them."""
    (x, w, b), more = operands(shape, 9), [operands((1, n), m)[1:] for n, m in ((9, 8), (8, 4))]
    told = {"examples": kept, "num_examples": 6}
    y = op(x, w, b, rows[0], "rows", "rows", packed=packed, **told)
    columns = (rows[0], rows[1]) if columns_of else (None, None)
    y = op(y, *more[0], rows[1], columns=columns[0], activation=kinds[0], direct=True, packed=packed, **told)
    y = op(y, *more[1], rows[2], columns=columns[1], activation=kinds[1], direct=True, **told)
    leaves = [x, w, b, *more[0], *more[1]]
    return gradients(y, *leaves)


@every_kept
@pytest.mark.parametrize("shape", [(6, 7), (6, 3, 7)], ids=str)
@pytest.mark.parametrize("packed", ["rows", "columns"])
@pytest.mark.parametrize("kinds", [("", "relu"), ("gelu", "tanh"), ("silu", "sigmoid"), ("relu", "")], ids=str)
def test_a_chain_that_packs_its_gradients_is_the_python_one(kinds, packed, shape, kept):
    native.ready()
    kept = torch.tensor(kept, dtype=torch.int64)
    for some in (
        [[1, 4, 8], [0, 7], [2]],
        [[], [3], [0, 1]],
        [list(range(9)), list(range(8)), list(range(4))],
        [[5]] * 3,
    ):
        rows = [
            torch.tensor([r for r in rs if r < n], dtype=torch.int64) for rs, n in zip(some, (9, 8, 4), strict=True)
        ]
        runs = []
        for op in (row_linear, in_python):
            torch.manual_seed(1)
            runs.append(chain(op, kinds, rows, packed == "columns", packed, kept, shape))
        for ours, theirs in zip(*runs, strict=True):
            assert_close(to_dense(ours), to_dense(theirs), rtol=0, atol=1e-12)


@every_kept
@pytest.mark.parametrize("packed", ["rows", "columns"])
def test_a_chain_that_computes_in_another_dtype_packs_gradients_of_the_dtype_of_its_inputs(packed, kept):
    native.ready()
    kept, rows = torch.tensor(kept, dtype=torch.int64), torch.tensor([1, 4, 8])
    told = {"examples": kept, "num_examples": 6}
    columns = rows if packed == "columns" else None
    runs = []
    for op in (row_linear, in_python):
        torch.manual_seed(1)
        x, w, b, _, w2, b2 = (t.detach().float().requires_grad_() for t in (*operands((6, 7), 9), *operands((1, 9), 8)))
        y = op(x, w, b, rows, "rows", "rows", packed=packed, **told)
        more = {"columns": columns, "activation": "relu", "direct": True}
        y = op(y, w2, b2, torch.tensor([0, 7]), "rows", "rows", torch.float64, **more, **told)
        assert y.dtype == torch.float64
        runs.append(gradients(y, x, w, b, w2, b2))
    for ours, theirs in zip(*runs, strict=True):
        assert_close(to_dense(ours), to_dense(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_opcheck_of_linear_calls(grad):
    native.ready()
    rows = torch.tensor([0, 3])
    for kept, shape in (([0, 3], (6, 7)), ([4], (6, 3, 7)), ([], (6, 7))):
        examples = torch.tensor(kept, dtype=torch.int64)
        for activation, dx in (("gelu", "rows"), ("", "full")):
            options = {"activation": activation, "examples": examples, "num_examples": 6}
            torch.library.opcheck(torch.ops.rwfx.row_linear.default, (*operands(shape), rows, dx, grad), options)


def test_gradcheck_of_what_is_kept(op):
    (x, w, b), rows, kept = operands((6, 2, 7)), torch.tensor([1, 3]), torch.tensor([0, 2, 5])

    def of_kept(x_kept, w_kept, b_kept):
        tensors = (
            x.detach().index_copy(0, kept, x_kept),
            *(t.detach().index_copy(0, rows, part) for t, part in ((w, w_kept), (b, b_kept))),
        )
        y = op(*tensors, rows, "rows", "dense", activation="tanh", examples=kept, num_examples=6)
        return y[kept][..., rows]

    parts = x.detach()[kept], w.detach()[rows], b.detach()[rows]
    assert torch.autograd.gradcheck(of_kept, tuple(part.requires_grad_() for part in parts))


def test_calls_that_share_a_weight_add_up_on_its_kept_rows(op):
    (x, w, b), rows, kept = operands(), torch.tensor([1, 3]), torch.tensor([0, 2, 5])
    shared = keep_rows(w, rows), keep_rows(b, rows)
    told = {"examples": kept, "num_examples": 6}
    y = sum(op(f * x, w, b, rows, "rows", "rows", None, *shared, **told) for f in (1, 2))
    ours, theirs = gradients(y, x, w, b), oracle(x, w, b, rows, kept)
    for a, e, times in zip(ours, theirs, (3, 3, 2), strict=True):
        assert_close(to_dense(a), times * e, rtol=0, atol=1e-12)


def test_what_is_left_out_may_be_nan(op):
    (x, w, b), rows, kept = operands(), torch.tensor([1, 3]), torch.tensor([0, 2])
    y = op(x, w, b, rows, examples=kept, num_examples=6)
    g = torch.full_like(y, torch.nan).index_fill(0, kept, 1.0)
    assert all(to_dense(t).isfinite().all() for t in torch.autograd.grad(y, (x, w, b), g))


def test_examples_that_cannot_be_are_refused(op):
    x, w, b = operands()
    rows, kept = torch.tensor([1]), torch.tensor([0])
    for wrong in (torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([0], dtype=torch.int32)):
        with pytest.raises(ValueError, match="examples must be a one-dimensional int64 tensor"):
            op(x, w, b, rows, examples=wrong, num_examples=6)
    for wrong in (4, 0, 12):
        with pytest.raises(ValueError, match=f"the 6 places of x .* cannot be dealt to {wrong} examples"):
            op(x, w, b, rows, examples=kept, num_examples=wrong)


def test_a_gradient_that_comes_before_the_examples_are_known_is_an_error(op):
    y = op(*operands(), torch.tensor([1]), examples=torch.full((2,), -1), num_examples=6)
    with pytest.raises((IndexError, RuntimeError), match=r"without passing the model's outputs|out of range"):
        y.sum().backward()
