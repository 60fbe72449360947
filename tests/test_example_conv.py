"""Networks of convolutions that leave out examples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import rwfx

EXACT = {"rtol": 0, "atol": 1e-12}


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
