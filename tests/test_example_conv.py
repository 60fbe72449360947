"""Convolutions confined to some examples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import rwfx
from rwfx.ops import example_conv

EXACT = {"rtol": 0, "atol": 1e-12}
CASES = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (5, 4, 9)),
    "2d": (nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=(2, 1)), (5, 4, 9, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (5, 4, 6, 6)),
    "3d": (nn.Conv3d(2, 3, 2, groups=1), (5, 2, 4, 4, 3)),
}


def arguments_of(conv):
    return list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups


@pytest.mark.parametrize("kept", [[], [0], [1, 3, 4], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_examples(name, kept):
    conv, shape = CASES[name]
    conv = conv.double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    examples = torch.tensor(kept, dtype=torch.int64)
    parameters = [x, *conv.parameters()]
    dense = conv(x)
    upstream = torch.randn_like(dense)
    mask = torch.zeros(5, dtype=torch.float64).index_fill(0, examples, 1.0).view(-1, *[1] * (dense.dim() - 1))
    expected = torch.autograd.grad(dense, parameters, upstream * mask)
    ours = example_conv(x, conv.weight, conv.bias, examples, 5, *arguments_of(conv))
    assert torch.equal(ours, dense)
    for a, e in zip(torch.autograd.grad(ours, parameters, upstream), expected, strict=True):
        assert_close(a, e, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    conv, shape = CASES[name]
    conv = conv.double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    arguments = x, conv.weight, conv.bias, torch.tensor([1, 4]), 5, *arguments_of(conv)
    torch.library.opcheck(torch.ops.rwfx.example_conv.default, arguments)


def test_frozen_parts_and_half_precision():
    x, conv = torch.randn(5, 4, 6, 6), nn.Conv2d(4, 3, 3)
    conv.weight.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = example_conv(x, conv.weight, conv.bias, torch.tensor([2]), 5, *arguments_of(conv))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert conv.weight.grad is None
    assert conv.bias.grad.dtype == torch.float32
    assert_close(conv.bias.grad, torch.full((3,), 16.0))


@pytest.mark.parametrize(
    ("examples", "count", "message"),
    [
        (torch.tensor([0.5]), 5, "int64"),
        (torch.tensor([[0]]), 5, "one-dimensional"),
        (torch.tensor([0]), 4, "5 examples"),
    ],
)
def test_bad_input_is_refused(examples, count, message):
    conv = nn.Conv2d(4, 3, 3)
    with pytest.raises(ValueError, match=message):
        example_conv(torch.randn(5, 4, 6, 6), conv.weight, conv.bias, examples, count, *arguments_of(conv))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(72, 5),
    ).double()  # fmt: skip


@pytest.mark.parametrize("told", [False, True], ids=["known", "tried"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_network_of_convolutions_leaves_out_examples_everywhere(compiled, told):
    model = network()
    x, y = torch.randn(20, 3, 16, 16, dtype=torch.float64), torch.randint(5, (20,))
    output = model(x)
    output.register_hook(lambda g: g * g.norm(dim=1, keepdim=True).ge(g.norm(dim=1).topk(6).values[-1]))
    F.cross_entropy(output, y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sparse = rwfx.transform(model, examples=0.3, example_inputs=(x,) if told else None)
    assert sparse.notes == ()
    calls = [node for node in sparse.graph.nodes if "examples" in node.kwargs]
    assert len(calls) == 3
    run = torch.compile(sparse, fullgraph=True) if compiled else sparse
    assert torch.equal(run(x), model(x)) or compiled
    F.cross_entropy(run(x), y).backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        assert_close(p.grad, e, **EXACT)


def test_a_convolution_that_is_more_than_its_class_computes_with_all_examples():
    model = network()
    model[0].register_forward_hook(lambda module, args, output: output)
    sparse = rwfx.transform(model, examples=0.3)
    assert len([node for node in sparse.graph.nodes if "examples" in node.kwargs]) == 2


def test_padding_that_is_no_zeros_is_within_an_example():
    model = network()
    model[0] = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular").double()
    model[3] = nn.Conv2d(8, 8, 4, padding="same", padding_mode="reflect").double()
    model[6] = nn.Linear(512, 5).double()
    sparse = rwfx.transform(model, examples=0.3)
    assert len([node for node in sparse.graph.nodes if "examples" in node.kwargs]) == 3
