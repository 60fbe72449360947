"""Products with non-zeros: equal to dense products with the masked weight, whichever implementation runs."""

import itertools
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.testing import assert_close

from rwfx import native
from rwfx.nonzeros import draw_keys, index_of
from rwfx.ops import sparse_conv, sparse_linear
from rwfx.sparse_weight import SparseWeight

ops = torch.ops.rwfx
linear, conv = (import_module(f"rwfx.ops.{name}") for name in ("sparse_linear", "sparse_conv"))
native.ready()
# The operators, which are the kernels on a CPU that has a compiler, and what Python defines for every device.
LINEAR = {
    "operator": (ops.sparse_linear.default, ops.sparse_linear_backward.default),
    "python": (linear._forward, linear._backward),
}
CONV = {
    "operator": (ops.sparse_conv.default, ops.sparse_conv_backward.default),
    "python": (conv._forward, conv._backward),
}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def make_weight(*shape, nnz, dtype=torch.float64, by="nonzeros"):
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    return SparseWeight(shape, draw_keys(rows, columns, nnz), torch.randn(nnz, dtype=dtype), by=by)


def at_places(weight, full):
    """The entries of a dense gradient where the weight has its numbers."""
    return full.flatten(1).t().reshape(-1)[weight.keys()]


# Shapes of the input before its features: one tile or several, full or not, and an empty batch.
BATCHES = [(1,), (3, 4), (16,), (64,), (130,), (300,), (0,)]
SIZES = {"some": (7, 5, 12), "none": (7, 5, 0), "all": (7, 5, 35), "one row": (1, 40, 9), "pieces": (150, 170, 2000)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("by", ["nonzeros", "dense"])
@pytest.mark.parametrize("implementation", LINEAR)
def test_a_linear_call_is_the_dense_one_with_the_masked_weight(implementation, by, size, threads):
    rows, columns, nnz = SIZES[size]
    forward, backward = LINEAR[implementation]
    weight, bias = make_weight(rows, columns, nnz=nnz, by=by), torch.randn(rows, dtype=torch.float64)
    for batch in BATCHES:
        for features_first in (False, True) if len(batch) == 1 else (False,):
            x = torch.randn(*batch, columns, dtype=torch.float64)
            x = x.t().contiguous().t() if features_first else x
            x.requires_grad_()
            W = weight.to_dense().detach().requires_grad_()
            y = F.linear(x, W, bias)
            g = torch.randn_like(y)
            dx, dW = torch.autograd.grad(y, (x, W), g)
            values = weight.values.detach()
            found = forward(x.detach(), values, bias, *weight.index, by)
            assert_close(found, y.detach(), **EXACT)
            assert found.is_contiguous()
            for needs in itertools.product((False, True), repeat=2):
                ours = backward(g, x.detach(), values, *weight.index[:3], *needs, by)
                assert_close(ours[0], dx if needs[0] else dx.new_empty(0), **EXACT)
                assert_close(ours[1], at_places(weight, dW) if needs[1] else dx.new_empty(0), **EXACT)
                assert ours[0].is_contiguous()


CONVOLUTIONS = {
    "plain": ((6, 4, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    "one by one": ((6, 4, 1, 1), [1, 1], [0, 0], [1, 1], 1),
    "stride": ((6, 4, 3, 3), [2, 3], [1, 1], [1, 1], 1),
    "one by one, stride": ((6, 4, 1, 1), [2, 2], [0, 0], [1, 1], 1),
    "dilation, uneven": ((6, 4, 3, 2), [1, 2], [2, 0], [2, 1], 1),
    "groups": ((6, 2, 3, 3), [1, 1], [1, 1], [1, 1], 2),
    "groups, stride, dilation": ((6, 2, 3, 3), [2, 1], [1, 2], [1, 2], 2),
    "depthwise": ((4, 1, 3, 3), [1, 1], [1, 1], [1, 1], 4),
    "depthwise, multiplied": ((8, 1, 3, 3), [1, 2], [1, 1], [1, 1], 4),
}


@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("by", ["nonzeros", "dense"])
@pytest.mark.parametrize("implementation", CONV)
def test_a_convolution_is_the_dense_one_with_the_masked_weight(implementation, by, case, density, threads):
    shape, *options = CONVOLUTIONS[case]
    forward, backward = CONV[implementation]
    weight = make_weight(*shape, nnz=round(density * torch.Size(shape).numel()), by=by)
    bias, values = torch.randn(shape[0], dtype=torch.float64), weight.values.detach()
    for batch, layout in itertools.product((1, 5, 40), (torch.contiguous_format, torch.channels_last)):
        x = torch.randn(batch, 4, 9, 8, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        W = weight.to_dense().detach().requires_grad_()
        y = F.conv2d(x, W, bias, *options)
        g = torch.randn_like(y)
        dx, dW = torch.autograd.grad(y, (x, W), g)
        found = forward(x.detach(), values, bias, *weight.index, list(shape[2:]), *options, by)
        assert_close(found, y.detach(), **EXACT)
        for needs in itertools.product((False, True), repeat=2):
            ours = backward(g, x.detach(), values, *weight.index[:3], list(shape[2:]), *options, *needs, by)
            assert_close(ours[0], dx if needs[0] else dx.new_empty(0), **EXACT)
            assert_close(ours[1], at_places(weight, dW) if needs[1] else dx.new_empty(0), **EXACT)


@pytest.mark.parametrize("by", ["nonzeros", "dense"])
def test_operators_are_what_torch_library_asks_of_them(by):
    weight, bias = make_weight(7, 5, nnz=12, by=by), torch.randn(7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    opcheck(ops.sparse_linear.default, (x, weight.values, bias, *weight.index, by))
    backward = torch.randn(3, 4, 7, dtype=torch.float64), x.detach(), weight.values.detach(), *weight.index[:3]
    opcheck(ops.sparse_linear_backward.default, (*backward, True, True, by))
    weight, bias = make_weight(6, 2, 3, 3, nnz=40, by=by), torch.randn(6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    options = [3, 3], [2, 1], [1, 2], [1, 2], 2
    opcheck(ops.sparse_conv.default, (x, weight.values, bias, *weight.index, *options, by))
    y = ops.sparse_conv.default(x.detach(), weight.values.detach(), None, *weight.index, *options, by)
    backward = torch.randn_like(y), x.detach(), weight.values.detach(), *weight.index[:3], *options
    opcheck(ops.sparse_conv_backward.default, (*backward, True, True, by))


def test_gradients_of_input_values_and_bias_pass_gradcheck():
    weight, bias = make_weight(4, 3, nnz=6), torch.randn(4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    values = weight.values.detach().requires_grad_()
    assert gradcheck(lambda *of: sparse_linear(*of, weight.index), (x, values, bias))
    weight, bias = make_weight(4, 2, 2, 2, nnz=9), torch.randn(4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    values = weight.values.detach().requires_grad_()
    assert gradcheck(lambda *of: sparse_conv(*of, weight.index, (2, 2), (2, 1), (1, 0)), (x, values, bias))


@pytest.mark.parametrize("by", ["nonzeros", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_under_autocast_the_error_is_no_larger_than_the_dense_calls(kind, dtype, by):
    shape, size = ((40, 30), (64, 30)) if kind == "linear" else ((16, 8, 3, 3), (8, 8, 9, 9))
    weight = make_weight(*shape, nnz=200, dtype=torch.float32, by=by)
    x, bias = torch.randn(size), torch.randn(shape[0])

    def step(call, x, weight, bias):
        x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
        y = call(x, weight, bias)
        return y, *torch.autograd.grad(y.double().square().sum(), (x, weight, bias))

    dense = F.linear if kind == "linear" else F.conv2d
    W = weight.to_dense().detach()
    exact = step(dense, x.double(), W.double().requires_grad_(), bias.double())
    with torch.autocast("cpu", dtype):
        theirs = step(dense, x, W.requires_grad_(), bias)

        def ours_(x, values, bias):
            weight.values = nn.Parameter(values) if not isinstance(values, nn.Parameter) else values
            return weight(x, bias)

        ours = step(ours_, x, weight.values, bias)
    assert ours[0].dtype == dtype
    assert [t.dtype for t in ours[1:]] == [torch.float32] * 3
    for name, a, b, e in zip(("y", "dx", "dW", "db"), ours, theirs, exact, strict=True):
        if name == "dW":
            b, e = at_places(weight, b), at_places(weight, e)
        error, allowed = (a.double() - e).norm(), (b.double() - e).norm()
        assert error <= 1.05 * allowed + 1e-6, name


def test_what_does_not_fit_is_an_error_that_says_so():
    weight = make_weight(7, 5, nnz=12)
    with pytest.raises(ValueError, match=r"x has 6 features and the sparse weight has 5 columns"):
        weight(torch.randn(2, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"values has the shape .* for 12 places"):
        sparse_linear(torch.randn(2, 5).double(), torch.randn(11).double(), None, weight.index)
    weight = make_weight(6, 4, 3, 3, nnz=12)
    with pytest.raises(ValueError, match="x has 18 features and the sparse weight has 36 columns"):
        weight(torch.randn(2, 2, 5, 5, dtype=torch.float64))


@pytest.mark.parametrize("by", ["nonzeros", "dense"])
def test_integers_are_not_taken_for_numbers_of_the_weights_type(by):
    with pytest.raises(TypeError, match=r"x must be of floating point, got torch.int64: convert it"):
        make_weight(7, 5, nnz=12, by=by)(torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x must be of floating point, got torch.uint8"):
        make_weight(6, 4, 3, 3, nnz=12, by=by)(torch.ones(2, 4, 5, 5, dtype=torch.uint8))


@pytest.mark.parametrize("options", [(2,), ((2, 1), 1), (1, (0, 2), 2), ([2, 2], [1], (1, 1), 2)], ids=str)
def test_options_of_a_convolution_are_spelled_as_in_pytorch(options):
    groups = options[3] if len(options) > 3 else 1
    weight, x = make_weight(6, 4 // groups, 3, 3, nnz=20), torch.randn(2, 4, 9, 8, dtype=torch.float64)
    assert_close(weight(x, None, *options), F.conv2d(x, weight.to_dense(), None, *options), **EXACT)


@pytest.mark.parametrize("options", [(), (2,), ((2,), 1), (1, [2], 2, 2)], ids=str)
@pytest.mark.parametrize("leading", [(3,), ()], ids=["batch", "single"])
def test_a_convolution_in_one_dimension_is_the_dense_one(options, leading):
    groups = options[3] if len(options) > 3 else 1
    weight, bias = make_weight(6, 4 // groups, 3, nnz=20), torch.randn(6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(*leading, 4, 9, dtype=torch.float64, requires_grad=True)
    W = weight.to_dense().detach().requires_grad_()
    y, expected = weight(x, bias, *options), F.conv1d(x, W, bias, *options)
    assert_close(y, expected, **EXACT)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight.values, bias), g)
    dx, dW, db = torch.autograd.grad(expected, (x, W, bias), g)
    for one, other in zip(found, (dx, at_places(weight, dW), db), strict=True):
        assert_close(one, other, **EXACT)


def test_options_and_inputs_of_another_dimension_are_refused():
    weight = make_weight(6, 4, 3, nnz=20)
    with pytest.raises(TypeError, match=r"stride must be a number, or 1 of them, got \(2, 2\)"):
        weight(torch.ones(2, 4, 9), None, (2, 2))
    with pytest.raises(TypeError, match="padding must be a number, or 1 of them, got 'same'"):
        weight(torch.ones(2, 4, 9), None, 1, "same")
    with pytest.raises(ValueError, match=r"x must be \(B, C, L\) or \(C, L\), got the shape \[2, 4, 9, 9\]"):
        weight(torch.ones(2, 4, 9, 9))
    with pytest.raises(ValueError, match=r"in 1-d or 2-d, got \(2, 2, 2, 2, 2\)"):
        make_weight(2, 2, 2, 2, 2, nnz=3)


REFUSED = {
    "padding below zero": ((4, 4, 3, 3), (2, 4, 9, 9), {"padding": (-1, -1)}, "padding not below"),
    "a kernel beyond the input": ((4, 4, 3, 3), (2, 4, 2, 2), {"stride": (2, 2)}, "reaches over 3 places .* has 2"),
    "no stride": ((4, 4, 3, 3), (2, 4, 9, 9), {"stride": (0, 0)}, "stride and dilation must be above 0"),
    "groups": ((4, 2, 3, 3), (2, 5, 9, 9), {"groups": 2}, "5 channels and 4 rows cannot be dealt to groups=2"),
    "channels": ((4, 4, 3, 3), (2, 5, 9, 9), {}, "x has 45 features and the sparse weight has 36 columns"),
    "bias": ((4, 4, 3, 3), (2, 4, 9, 9), {"bias": torch.ones(3)}, r"bias has the shape \[3\] .* has 4 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_convolutions_that_pytorch_refuses_are_refused(case, device):
    shape, size, options, message = REFUSED[case]
    weight = make_weight(*shape, nnz=20, dtype=torch.float32)
    given = {"bias": None, **options}
    if device == "meta" and case in ("channels", "bias"):
        pytest.skip("what depends on the index is looked at where it is")
    index = type(weight.index)(*(part.to(device) for part in weight.index))
    with pytest.raises(ValueError, match=message):
        sparse_conv(torch.ones(size, device=device), weight.values.to(device), index=index, kernel=shape[2:], **given)


def test_a_bias_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"bias has the shape \[2\] and the sparse weight has 8 rows"):
        sparse_linear(torch.ones(1, 1), torch.ones(8), torch.ones(2), index_of(torch.arange(8), 8, 1))


def test_a_second_derivative_is_an_error():
    weight = make_weight(7, 5, nnz=12)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(weight(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: leave create_graph=True out"):
        dx.square().sum().backward()


def test_an_index_holds_the_same_places_by_columns_and_by_rows():
    keys = draw_keys(9, 6, 20)
    index = index_of(keys, 9, 6)
    by_columns = torch.sparse_csc_tensor(index.ccol_indices, index.row_indices, keys.double(), (9, 6)).to_dense()
    by_rows = torch.sparse_csr_tensor(index.crow_indices, index.col_indices, keys[index.order].double(), (9, 6))
    assert torch.equal(by_columns, by_rows.to_dense())
    assert torch.equal(by_columns.t().flatten()[keys], keys.double())
