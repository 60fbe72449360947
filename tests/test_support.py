"""The weight graph of models as people build them says exactly what feeds what: see ``support``."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support import Frozen, captured_by_export, captured_by_tracing, fed_by_graph, fed_by_running
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

ROUTES = {"traced": captured_by_tracing, "exported": captured_by_export}


def mlp():
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 7), nn.Dropout(0.2), nn.ReLU(), nn.Linear(7, 3)
    )


class GPT(nn.Module):
    """Attention written out, with a causal mask, in one of two blocks, and by one operator in the other."""

    def __init__(self, width=8, heads=2, vocabulary=11):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(6, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.tokens.weight

    def attend(self, k, x):
        b, t, c = x.size()
        q, key, v = self.qkv[k](x).split(c, dim=2)
        q, key, v = (part.view(b, t, self.heads, c // self.heads).transpose(1, 2) for part in (q, key, v))
        if k:
            y = F.scaled_dot_product_attention(q, key, v, is_causal=True)
        else:
            scores = (q @ key.transpose(-2, -1)) * 0.3
            scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).tril().logical_not(), float("-inf"))
            y = F.softmax(scores, dim=-1) @ v
        return self.out[k](y.transpose(1, 2).contiguous().view(b, t, c))

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(6))
        for k in range(2):
            x = x + self.attend(k, self.norm(x))
        return self.lm_head(self.norm(x + self.down(F.gelu(self.up(self.norm(x))))))


class Squeezed(nn.Module):
    """A residual block as MobileNet has it: expand, depthwise, squeeze and excite, project."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 1)
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.squeeze, self.excite, self.project = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        h = F.hardswish(self.norm(self.depthwise(F.relu6(self.expand(x)))))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1))))
        h = h * F.hardsigmoid(gate)
        return self.head(F.adaptive_avg_pool2d(x + self.project(h), 1).flatten(1))


class Mixer(nn.Module):
    """Layers over the tokens and layers over the channels, in turn."""

    def __init__(self, tokens=4, channels=6):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 4, 4)
        self.tokens = nn.ModuleList(nn.Linear(*sizes) for sizes in ((tokens, 5), (5, tokens)))
        self.channels = nn.ModuleList(nn.Linear(*sizes) for sizes in ((channels, 7), (7, channels)))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.tokens[1](F.gelu(self.tokens[0](self.norm(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.channels[1](F.gelu(self.channels[0](self.norm(x))))
        return self.head(self.norm(x).mean(1))


class UNet(nn.Module):
    """Down, up again by a transposed convolution and by resampling, and across."""

    def __init__(self):
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.up, self.merge = nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(8, 5, 3, padding=1)
        self.side, self.head = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        down = self.down(x).relu()
        deep = self.deep(F.max_pool2d(down, 2)).relu()
        merged = self.merge(torch.cat([self.up(deep), down], 1))
        return self.head(merged + F.interpolate(self.side(deep), scale_factor=2.0, mode="bilinear"))


class Dense(nn.Module):
    """Every layer reads the maps of all layers before it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * k, 4, 3, padding=1) for k in range(3))
        self.norm, self.transition = nn.BatchNorm2d(15), nn.Conv2d(15, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return self.head(F.avg_pool2d(self.transition(self.norm(x)), 8).flatten(1))


class Written(nn.Module):
    """Tensors that are filled a slice at a time."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(5, 3), nn.Linear(9, 4)

    def forward(self, x):
        y = x.new_zeros(x.shape[0], 9)
        y[:, :4] = self.a(x)
        y[:, 5:8].copy_(self.b(x))
        y[:, 3:5].add_(self.a(x)[:, :2])
        y[:, 2] = 0.0
        return self.c(y)


class Gated(nn.Module):
    """A gated unit, a choice by an index, rotary halves and grouped queries."""

    def __init__(self):
        super().__init__()
        self.up, self.q, self.kv = nn.Linear(6, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        h = F.glu(self.up(x), -1)
        b, t, _ = h.shape
        q = self.q(h).view(b, t, 4, 2).transpose(1, 2)
        angle = torch.arange(t)[:, None] * torch.tensor([0.1])
        q = q * angle.cos() + torch.cat([-q[..., 1:], q[..., :1]], -1) * angle.sin()
        k, v = self.kv(h).view(b, t, 2, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, t, 8)[:, [0, 2]].amax(1))


class Views(nn.Module):
    """Weights that are used transposed, and some of their rows at a time."""

    def __init__(self):
        super().__init__()
        self.c_fc, self.bias = nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(10))
        self.packed, self.other = nn.Parameter(torch.randn(12, 10)), nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        h = torch.addmm(self.bias, x, self.c_fc).relu()
        first, last = self.packed[:4], self.packed.chunk(3)[2]
        return (F.linear(h, first) + F.linear(h.flip(1), last)) @ self.other


def resnet():
    return torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


def vgg():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def vit():
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 12, num_classes=3)


def convnext():
    return ConvNeXt([CNBlockConfig(4, 6, 1), CNBlockConfig(6, None, 1)], stochastic_depth_prob=0.0, num_classes=3)


def swin():
    return torchvision.models.SwinTransformer(
        [4, 4], 8, [2, 2], [2, 2], [2, 2], stochastic_depth_prob=0.0, num_classes=3
    )


IMAGE = 2, 3, 16, 16
MODELS = {
    "mlp": (mlp, (3, 6)),
    "resnet": (resnet, (2, 3, 32, 32)),
    "vgg": (vgg, IMAGE),
    "mobilenet": (Squeezed, IMAGE),
    "vit": (vit, IMAGE),
    "gpt": (GPT, None),
    "convnext": (convnext, (2, 3, 32, 32)),
    "mixer": (Mixer, (2, 3, 8, 8)),
    "unet": (UNet, (2, 3, 8, 8)),
    "densenet": (Dense, (2, 3, 8, 8)),
    "swin": (swin, (1, 3, 32, 32)),
    "written": (Written, (3, 5)),
    "views": (Views, (3, 6)),
    "gated": (Gated, (2, 3, 6)),
}
# Its branches depend on shapes; an assignment to a slice of a proxy.
EXPORTED_ALONE = {"swin", "written"}


@pytest.mark.parametrize(
    ("name", "route"),
    [(name, route) for name in MODELS for route in ROUTES if route == "exported" or name not in EXPORTED_ALONE],
)
def test_a_row_moves_the_features_that_the_graph_says_and_no_others(name, route):
    kind, shape = MODELS[name]
    model = kind().double()
    args = (torch.randn(shape, dtype=torch.float64) if shape else torch.arange(12).view(2, 6) % 11,)
    gm, graph = ROUTES[route](model, args)
    assert graph.notes == ()
    base = Frozen(gm, {})
    with torch.no_grad():
        base.run(*args)
    calls = {}
    for use in graph.uses:
        calls[use.name] = use.node if use.node not in calls.values() else f"{use.node}#2"
    assert list(calls.values()) == list(base.inputs)
    moved = 0
    for use in graph.uses:
        for row in sorted({0, use.rows // 2, use.rows - 1}):
            found = fed_by_running(gm, args, calls[use.name], row, base.outputs, base.inputs)
            for name, features in fed_by_graph(graph, use, row).items():
                assert torch.equal(features, found[calls[name]]), (use.name, row, name, features, found[calls[name]])
                moved += int(features.sum())
    assert moved
