"""Convolutions in the weight graph, and walks through them."""

import copy

import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from torch.testing import assert_close

import rwfx
from rwfx.ops.walk import walk as walk_in_python
from rwfx.policies import RandomWalk
from rwfx.stations import Junction
from rwfx.walk import WalkSampler

WALKS = 20_000


def maps(model, example=None):
    return {use.name: use.feature_map for use in rwfx.weight_graph(model, example).uses}


def image(channels, side=8, batch=2):
    return torch.randn(batch, channels, side, side)


@pytest.mark.parametrize("example", [image(3), None], ids=["known", "guessed"])
def test_a_feature_is_an_input_channel_at_every_place(example):
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, groups=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    graph = rwfx.weight_graph(net, example)
    first, second, head = graph.uses
    assert (first.rows, first.kernel, first.groups, len(first.feature_map)) == (6, 9, 1, 3)
    assert (second.rows, second.kernel, second.groups) == (8, 9, 2)
    assert first.feature_map.tolist() == [-1] * 3
    assert_close(second.feature_map, first.base + torch.arange(6))
    assert_close(head.feature_map, second.base + torch.arange(8))
    assert graph.notes == ()


def test_a_flattened_map_has_a_feature_for_each_place_of_a_channel():
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 26 * 26, 4))
    for example in (image(1, 28), None):
        assert_close(maps(net, example)["3.weight"], torch.arange(5).repeat_interleave(26 * 26))


class Block(nn.Module):
    """A residual connection with a gate on it, a concatenation and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.squeeze, self.gate = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.up = nn.ConvTranspose2d(12, 4, 2, stride=2)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        h = self.conv(x)
        h = h * self.gate(self.squeeze(h.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(self.up(torch.cat([x, x + h], 1)))


@pytest.mark.parametrize("example", [image(3), None], ids=["known", "guessed"])
def test_channels_meet_one_by_one_where_maps_are_added_gated_and_concatenated(example):
    graph = rwfx.weight_graph(Block(), example)
    uses = {use.name.removesuffix(".weight"): use for use in graph.uses}
    into = uses["up"].feature_map
    assert_close(into[:6], uses["stem"].base + torch.arange(6))
    for channel, source in enumerate(into[6:]):
        behind = graph.leaves(source[None]).tolist()
        assert behind == sorted(uses[name].base + channel for name in ("stem", "conv", "gate"))
    assert uses["up"].transposed
    assert uses["up"].rows == 4
    assert_close(uses["head"].feature_map, uses["up"].base + torch.arange(4))


def test_a_statistic_of_the_features_is_no_way_to_them():
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            h = self.a(x)
            h = h - h.mean(1, keepdim=True)
            return self.b(h / (h.square().mean(1, keepdim=True) + 1e-5).sqrt())

    assert_close(maps(Normalized(), image(3))["b.weight"], torch.arange(6))


def test_where_no_size_fits_any_channel_may_feed_what_is_behind():
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(5 * 7 * 7, 4))
    graph = rwfx.weight_graph(net)
    assert "not known without example_inputs" in graph.notes[0]
    assert_close(graph.leaves(graph.uses[1].feature_map), torch.arange(5))


# --- Walks -----------------------------------------------------------------------------------------------------------


def sizes_of(weight, groups=1, transposed=False):
    """``sum over the kernel of |W|`` as a matrix from rows to all features, one entry after the other."""
    weight = weight.detach().double().abs().flatten(2).sum(2)
    per_group = weight.shape[1] if transposed else len(weight) // groups
    rows = per_group * groups
    width = (len(weight) if transposed else weight.shape[1] * groups) // groups
    sizes = torch.zeros(rows, width * groups, dtype=torch.float64)
    for i in range(rows):
        for j in range(width):
            group = i // per_group
            sizes[i, group * width + j] = weight[group * width + j, i % per_group] if transposed else weight[i, j]
    return sizes


def step(sizes, temperature=1.0, epsilon=0.0):
    p = sizes ** (1 / temperature)
    possible = (sizes > 0).double()
    return (1 - epsilon) * p / p.sum(1, keepdim=True) + epsilon * possible / possible.sum(1, keepdim=True)


CONVS = {
    "1d": (nn.Conv1d(6, 8, 3), (6, 9)),
    "2d": (nn.Conv2d(6, 8, (3, 2)), (6, 9, 9)),
    "channels-last": (nn.Conv2d(6, 8, (3, 2)).to(memory_format=torch.channels_last), (6, 9, 9)),
    "3d": (nn.Conv3d(6, 8, 2), (6, 4, 4, 4)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), (6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6), (6, 5, 5)),
    "transposed": (nn.ConvTranspose2d(6, 8, 3), (6, 5, 5)),
    "transposed-grouped": (nn.ConvTranspose1d(6, 8, 3, groups=2), (6, 5)),
}


def stack(name):
    """A convolution between two that are one place wide, and its place in the graph."""
    torch.manual_seed(1)
    conv, shape = CONVS[name]
    conv = copy.deepcopy(conv)
    kind = (
        type(conv)
        if not conv.transposed
        else {nn.ConvTranspose1d: nn.Conv1d, nn.ConvTranspose2d: nn.Conv2d}[type(conv)]
    )
    net = nn.Sequential(kind(2, shape[0], 1), conv, kind(conv.out_channels, 3, 1))
    nn.init.normal_(conv.weight)
    # Every other kernel has one large number and the rest nearly none: its sum is not what its maximum would say.
    even = (torch.arange(len(conv.weight))[:, None] + torch.arange(conv.weight.shape[1])) % 2 == 0
    first = torch.zeros(conv.weight.shape[2:]).flatten().index_fill(0, torch.tensor(0), 1).view(conv.weight.shape[2:])
    conv.weight.data[even] *= 0.01 + 3 * first
    return net, rwfx.weight_graph(net, torch.randn(2, 2, *shape[1:]))


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "epsilon": 0.2}], ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_walks_step_by_the_sums_over_the_kernel_within_the_group(name, options):
    net, graph = stack(name)
    walks = rwfx.random_walks(graph, dict(net.named_parameters()), WALKS, seed=4, **options)
    conv = net[1]
    at_conv = step(sizes_of(net[2].weight), **options).mean(0, keepdim=True)
    at_stem = at_conv @ step(sizes_of(conv.weight, conv.groups, conv.transposed), **options)
    for column, p in ((1, at_conv[0]), (0, at_stem[0])):
        counts = torch.bincount(walks[:, column], minlength=len(p))
        assert counts[p == 0].sum() == 0
        assert chisquare(counts[p > 0], p[p > 0] * WALKS).pvalue > 1e-4


def test_every_row_of_a_grouped_convolution_leads_into_its_group():
    net, graph = stack("grouped")
    walks = rwfx.random_walks(graph, dict(net.named_parameters()), 500, epsilon=1.0)
    assert torch.equal(walks[:, 0] // 3, walks[:, 1] // 4)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 2.5, "epsilon": 0.2}, {"num_paths": 200}, {"factors": True}, {"unbiased": True}],
    ids=str,
)
@pytest.mark.parametrize("name", CONVS)
def test_the_kernel_and_python_draw_the_same_rows_and_scales(name, options):
    net, graph = stack(name)
    options = {"num_paths": 7, **options}
    factors, unbiased = options.pop("factors", False), options.pop("unbiased", False)
    sampler = WalkSampler(graph, list(graph.names), 7, RandomWalk(**options))
    policy = sampler.policy
    weights = [net.get_parameter(name).detach() for name in sampler.crossed]
    new = {"unbiased": unbiased}
    if factors:
        new["factors"] = [torch.rand(len(use.feature_map)) for use in graph.uses]
    for number in range(6):
        arguments = (
            weights, sampler._kept, sampler._tables.tensors(), sampler._heads, sampler._starts.tensors(),
            sampler._layout, torch.tensor([7, number]), sampler.last, policy.num_paths, policy.temperature,
            policy.epsilon, policy.min_rows, [], 1,
        )  # fmt: skip
        ours, theirs = torch.ops.rwfx.walk.default(*arguments, **new), walk_in_python(*arguments, **new)
        assert len(ours) == len(theirs)
        for a, e in zip(ours, theirs, strict=True):
            assert_close(a, e)


@pytest.mark.parametrize("name", ["grouped", "transposed", "transposed-grouped"])
def test_the_product_of_scales_has_the_mean_one_wherever_a_row_reads_another(name):
    net, graph = stack(name)
    conv, steps = net[1], 1500
    sampler = WalkSampler(graph, list(graph.names), 7, RandomWalk(3, unbiased=True))
    weights = [net.get_parameter(name).detach() for name in sampler.crossed]
    reads = sizes_of(conv.weight, conv.groups, conv.transposed) > 0
    products = torch.zeros(steps, *reads.shape)
    for number in range(steps):
        stem, middle, _, *scales, _ = torch.ops.rwfx.walk.default(
            weights, sampler._kept, sampler._tables.tensors(), sampler._heads, sampler._starts.tensors(),
            sampler._layout, torch.tensor([3, number]), sampler.last, 3, 1.0, 0.0, 1, [], 1, unbiased=True,
        )  # fmt: skip
        products[number, middle[:, None], stem] = scales[1][:, None] * scales[0]
    error = products.std(0) / steps**0.5
    assert (abs(products.mean(0) - 1) <= 4.5 * error + 1e-6)[reads].all()


def test_a_junction_of_channels_is_as_large_as_the_channels():
    graph = rwfx.weight_graph(Block(), image(3, side=32))
    assert all(len(s.members) <= 12 for s in graph.stations if isinstance(s, Junction))
