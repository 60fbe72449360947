"""Attention, token mixing and depth: what the rules for several rows at a place come to."""

import pytest
import torch
import torch.nn.functional as F
from support import captured_by_tracing
from torch import nn

import rwfx
from rwfx import junctions
from rwfx.stations import Junction, leaves

WIDTH, HEADS, TOKENS = 6, 2, 5


class Attention(nn.Module):
    """Attention by one operator or by products, and a projection of its output."""

    def __init__(self, spelling):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.spelling = spelling

    def forward(self, x):
        q, k, v = (f(x).view(2, TOKENS, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.spelling == "operator":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.spelling == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
            y = torch.einsum("bhqk,bhkd->bhqd", scores, v)
        else:
            y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(2, TOKENS, WIDTH))


@pytest.mark.parametrize("spelling", ["operator", "products", "einsum"])
def test_a_walk_follows_the_value_half_of_the_time_and_the_queries_and_keys_of_its_head_else(spelling):
    model = Attention(spelling)
    graph = rwfx.weight_graph(model, torch.randn(2, TOKENS, WIDTH))
    named = {use.name[0]: use for use in graph.uses}
    with torch.no_grad():
        model.out.weight.copy_(torch.eye(WIDTH))  # at row i of it a walk leaves by feature i
    walks = rwfx.random_walks(graph, dict(model.named_parameters()), 12_000)
    column = {use.name[0]: walks[:, k] for k, use in enumerate(graph.uses)}
    for name, share in (("v", 0.5), ("q", 0.25), ("k", 0.25)):
        passed = column[name] >= 0
        assert abs(float(passed.float().mean()) - share) < 0.02
        assert named[name].rows == WIDTH
        if name == "v":
            assert torch.equal(column["v"][passed], column["o"][passed])
        else:
            head = WIDTH // HEADS
            assert torch.equal(column[name][passed] // head, column["o"][passed] // head)
            assert len(column[name][passed].unique()) == WIDTH


class Positions(Attention):
    """The same with a bias for each head and pair of places, computed from how far they are apart."""

    def __init__(self, spelling):
        super().__init__(spelling)
        self.bias = nn.Linear(1, HEADS)

    def forward(self, x):
        q, k, v = (f(x).view(2, TOKENS, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        places = torch.arange(TOKENS, dtype=x.dtype)
        bias = self.bias((places[:, None] - places)[..., None]).permute(2, 0, 1)
        if self.spelling == "operator":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            y = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(2, TOKENS, WIDTH))


@pytest.mark.parametrize("spelling", ["operator", "products"])
def test_a_walk_follows_the_bias_of_its_head_as_often_as_one_row_of_its_queries(spelling):
    model = Positions(spelling)
    graph = rwfx.weight_graph(model, torch.randn(2, TOKENS, WIDTH))
    with torch.no_grad():
        model.out.weight.copy_(torch.eye(WIDTH))
    walks = rwfx.random_walks(graph, dict(model.named_parameters()), 12_000)
    column = {use.name.partition(".")[0]: walks[:, k] for k, use in enumerate(graph.uses)}
    for name, share in (("v", 1 / 2), ("q", 3 / 14), ("k", 3 / 14), ("bias", 1 / 14)):
        assert abs(float((column[name] >= 0).float().mean()) - share) < 0.02
    passed = column["bias"] >= 0
    assert torch.equal(column["bias"][passed], column["out"][passed] // (WIDTH // HEADS))


class Stack(nn.Module):
    """Blocks of attention and a layer, each added to what comes in, with a token of its own before the others."""

    def __init__(self, blocks):
        super().__init__()
        self.token, self.stem = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Linear(3, WIDTH)
        self.attention = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(blocks))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(blocks))

    def forward(self, x):
        x = torch.cat([self.token.expand(2, -1, -1), self.stem(x)], 1)
        for attention, layer in zip(self.attention, self.layers, strict=True):
            x = x + attention(x, x, x)[0]
            x = x + layer(x)
        return x


def test_the_graph_of_a_transformer_grows_with_its_depth_alone():
    sizes = []
    for blocks in (4, 8, 16):
        graph = rwfx.weight_graph(Stack(blocks), torch.randn(2, 4, 3))
        assert graph.notes == ()
        sizes.append(sum(s.members.numel() if isinstance(s, Junction) else len(s.feature_map) for s in graph.stations))
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


class Mixing(nn.Module):
    """A layer over the tokens and a layer over the channels, added."""

    def __init__(self, tokens, channels):
        super().__init__()
        self.a, self.b = nn.Linear(tokens, tokens), nn.Linear(channels, channels)
        self.c = nn.Linear(channels, 2)

    def forward(self, x):
        return self.c(self.b(x) + self.a(x.transpose(1, 2)).transpose(1, 2))


def test_where_too_many_pairs_meet_one_side_counts_as_any_of_its_rows(monkeypatch):
    exact = rwfx.weight_graph(Mixing(7, 9), torch.randn(2, 7, 9))
    assert any(len(s.members) == 7 * 9 for s in exact.stations if isinstance(s, Junction))
    monkeypatch.setattr(junctions, "MOST_PLACES", 60)
    coarse = rwfx.weight_graph(Mixing(7, 9), torch.randn(2, 7, 9))
    assert all(len(s.members) <= 9 for s in coarse.stations if isinstance(s, Junction))
    assert "too many pairs" in coarse.notes[0]
    for a, b in zip(exact.uses[-1].feature_map, coarse.uses[-1].feature_map, strict=True):
        behind = {graph.uses[k].name for graph in (exact,) for k in range(2)}
        assert len(exact.leaves(a[None])) == len(coarse.leaves(b[None])) == 7 + 1
        assert behind == {"a.weight", "b.weight"}


def test_a_row_that_meets_too_many_others_meets_any_of_them(monkeypatch):
    monkeypatch.setattr(junctions, "MOST_PLACES", 5)
    register = junctions.Register()
    one, many = (register.use(name, rows, torch.tensor([-1])) for name, rows in (("a", 1), ("b", 8)))
    column = torch.tensor([[-1], [int(one)]]).expand(2, 8)
    ids = register.meet([column, many.expand(2, 8)])
    assert all(len(row.unique()) == 1 for row in ids)
    assert torch.equal(leaves(register.stations, ids[1]), torch.arange(9))


def test_places_that_very_many_rows_lead_to_are_one_place(monkeypatch):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 40), nn.Linear(2, 3)

        def forward(self, x):
            return self.b(self.a(x).unflatten(1, (2, 20)).sum(2))

    assert len(rwfx.weight_graph(Pooled(), torch.randn(4, 3)).uses[1].feature_map.unique()) == 2
    monkeypatch.setattr(junctions, "MOST_MEMBERS", 10)
    graph = rwfx.weight_graph(Pooled(), torch.randn(4, 3))
    assert len(graph.uses[1].feature_map.unique()) == 1
    assert len(graph.leaves(graph.uses[1].feature_map)) == 40
    assert "more than 10 rows" in graph.notes[0]


def test_a_weight_whose_rows_are_features_elsewhere_is_two_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(self.a(x).relu() @ self.a.weight)

    _, graph = captured_by_tracing(Tied(), (torch.randn(3, 4),))
    assert [(use.name, use.rows) for use in graph.uses] == [("a.weight", 6), ("a.weight[:, 0:4]", 4), ("b.weight", 2)]
    assert graph.parameter("a.weight[:, 0:4]") == "a.weight"
    assert not graph.notes
    for use, fed in zip(graph.uses, graph.uses[1:], strict=False):
        assert torch.equal(graph.leaves(fed.feature_map), torch.arange(use.base, use.base + use.rows))


def test_weights_in_calls_without_a_row_sparse_backward_are_walked_and_stay_dense():
    model, x = Stack(1), torch.randn(2, 4, 3)
    sparse = rwfx.transform(model, 5)  # with example inputs torch.export would show the weights inside the module
    assert torch.equal(sparse(x), model(x))
    dense, among = sparse.report.dense, {"attention.0.in_proj_weight", "attention.0.out_proj.weight"}
    assert among <= set(dense)
    assert all("no row-sparse backward" in dense[name] for name in among)
    assert "stem.weight" in sparse.rows
    sparse(x).sum().backward()
    assert model.get_parameter(min(among)).grad.count_nonzero()


def test_the_parts_of_a_parameter_that_calls_read_are_weights():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed, self.head = nn.Parameter(torch.randn(12, 5)), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(F.linear(x, self.packed[:4]) + F.linear(x, self.packed.chunk(3)[2]))

    _, graph = captured_by_tracing(Sliced(), (torch.randn(3, 5),))
    first, last, head = graph.uses
    assert (first.name, last.name, first.rows, last.rows) == ("packed[0:4]", "packed[8:12]", 4, 4)
    for k, source in enumerate(head.feature_map):
        assert graph.leaves(source[None]).tolist() == [first.base + k, last.base + k]
