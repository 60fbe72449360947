"""Every spelling of a convolution on a parameter becomes one, and the outputs stay the same bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from rwfx.passes.normalize import CONVOLUTIONS, normalize, weight_of

MODULES = {
    "1d": (nn.Conv1d(4, 6, 3), (5, 4, 9)),
    "2d": (nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(2, 1), padding=(2, 1), groups=2), (5, 4, 9, 8)),
    "3d": (nn.Conv3d(2, 3, 2, bias=False), (5, 2, 4, 4, 3)),
    "unbatched": (nn.Conv2d(4, 6, 3, padding=1), (4, 9, 8)),
    "same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (5, 4, 9, 8)),
    "same, one more on the right": (nn.Conv2d(4, 6, (2, 4), padding="same"), (5, 4, 9, 8)),
    "same, unbatched": (nn.Conv1d(4, 6, 4, padding="same"), (4, 9)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (5, 4, 9, 8)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (5, 4, 9, 8)),
    "replicate": (nn.Conv1d(4, 6, 3, padding=2, stride=2, padding_mode="replicate"), (5, 4, 9)),
    "circular": (nn.Conv3d(4, 6, 3, padding="same", padding_mode="circular"), (5, 4, 4, 5, 3)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (5, 4, 9)),
    "transposed 2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=(3, 2), padding=1, output_padding=(2, 0), dilation=2, groups=2),
        (5, 4, 5, 4),
    ),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, bias=False), (5, 2, 4, 4, 3)),
}


def calls(gm):
    return [node for node in gm.graph.nodes if node.target in CONVOLUTIONS]


def captured(model, x, exported):
    """The model's graph by ``symbolic_trace``, or that of ``torch.export`` over the model's own parameters."""
    if not exported:
        return symbolic_trace(model)
    graph = torch.export.export(model, (x,), strict=False).module().graph
    for node in list(graph.nodes):
        if node.target == "_guards_fn":
            graph.erase_node(node)
    graph.set_codegen(torch.fx.graph.CodeGen())
    return GraphModule(model, graph)


def same(a, b):
    """Whether they are equal; a graph of torch.export gives its output in a tuple."""
    return torch.equal(*[y[0] if isinstance(y, tuple) else y for y in (a, b)])


@pytest.mark.parametrize("exported", [False, True], ids=["traced", "exported"])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_becomes_the_call_that_it_is(name, exported):
    module, shape = MODULES[name]
    model, x = nn.Sequential(module), torch.randn(shape)
    normalized = normalize(captured(model, x, exported))
    (call,) = calls(normalized)
    assert weight_of(normalized, call) is module.weight
    spatial = CONVOLUTIONS[call.target]
    lists = [option for option in call.args[3:] if not isinstance(option, int)]
    assert len(call.args) == (8 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 7)
    assert not call.kwargs
    assert all(len(option) == spatial and all(type(n) is int for n in option) for option in lists)
    assert same(normalized(x), model(x))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = F.conv2d(x, self.w)
        x = torch.conv2d(x, self.w, bias=self.b, stride=1, padding="same")
        x = F.conv2d(x, weight=self.w, padding=(1, 2), groups=1)
        x = torch.convolution(x, self.w, self.b, [2, 2], [1, 1], [1, 1], False, [0, 0], 1)
        x = torch.ops.aten.convolution.default(x, self.w, None, [2], [1], [1], True, [1], 1)
        x = torch.ops.aten.conv2d.padding(x, self.w, None, [1, 1], "same")
        return F.conv_transpose2d(x, self.w, self.b, 2, output_padding=1)


def test_every_function_becomes_that_call():
    model, x = Functional(), torch.randn(2, 4, 11, 12)
    normalized = normalize(symbolic_trace(model))
    assert [node.target for node in calls(normalized)] == [
        *[F.conv2d] * 4, F.conv_transpose2d, F.conv2d, F.conv_transpose2d,
    ]  # fmt: skip
    assert torch.equal(normalized(x), model(x))


def test_what_is_more_than_its_class_or_no_parameter_is_left_alone():
    class Own(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight.flip(0), bias)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.hooked, self.normed = Own(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.sized = nn.ConvTranspose2d(4, 4, 2, stride=2)
            self.hooked.register_forward_hook(lambda module, args, output: 2 * output)
            nn.utils.parametrizations.weight_norm(self.normed)
            self.w = nn.Parameter(torch.randn(4, 4, 1, 1))

        def forward(self, x):
            y = self.sized(self.normed(self.hooked(self.own(x))), output_size=(11, 11))
            return F.conv2d(y, self.w.flip(0)) + F.conv2d(y, self.w, padding=x.shape[0] - 2)

    model, x = Model(), torch.randn(2, 4, 5, 5)
    normalized = normalize(symbolic_trace(model))
    assert all(weight_of(normalized, node) is None for node in normalized.graph.nodes)
    assert torch.equal(normalized(x), model(x))


def test_products_of_an_exported_graph_become_linear_calls():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.w, self.b = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x):
            x = self.fc(x) @ self.w.t() @ self.w.T @ self.w.mT @ self.w.transpose(0, 1) @ self.w.permute(1, 0)
            x = torch.addmm(self.b, torch.mm(x, self.w.t()), self.w.t())
            return x @ self.w @ self.w.permute(0, 1)

    model, x = Products(), torch.randn(3, 4)
    for exported in (False, True):
        normalized = normalize(captured(model, x, exported))
        assert sum(node.target is F.linear for node in normalized.graph.nodes) == 10
        assert same(normalized(x), model(x))
