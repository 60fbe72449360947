import itertools

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from zoo import ZOO, Heads, Residual, Sequence, Twice, make

import rwfx
from rwfx.stations import Junction


def maps(model, **options):
    return {use.name: use.feature_map for use in rwfx.weight_graph(model, **options).uses}


class Between(nn.Module):
    """A given function between two linear layers of 12 rows and ``features`` features."""

    def __init__(self, function, features):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(5, 12), nn.Linear(features, 3), function

    def forward(self, x):
        return self.b(self.function(self.a(x)))


ROWS = torch.arange(12)
STRUCTURES = {
    "elementwise": (lambda h: F.gelu(h).mul(2).add(1).clamp(min=0) / 3, ROWS),
    "norms": (lambda h: F.layer_norm(F.normalize(h), (12,)), ROWS),
    "slice": (lambda h: h[:, 2:8], ROWS[2:8]),
    "step": (lambda h: h[..., ::3], ROWS[::3]),
    "flip": (lambda h: h.flip(-1), ROWS.flip(0)),
    "roll": (lambda h: torch.roll(h, 2, -1), ROWS.roll(2)),
    "index": (lambda h: h[:, [4, 1, 1]], torch.tensor([4, 1, 1])),
    "shuffle": (lambda h: h.view(h.size(0), 3, 4).transpose(1, 2).flatten(1), ROWS.view(3, 4).t().reshape(-1)),
    "reshape": (lambda h: h.reshape(-1, 2, 6).permute(0, 2, 1).reshape(-1, 12), ROWS.view(2, 6).t().reshape(-1)),
    "cat-self": (lambda h: torch.cat([h, h], 1), torch.cat([ROWS, ROWS])),
    "split": (lambda h: h.split([5, 7], 1)[1], ROWS[5:]),
    "chunk": (lambda h: torch.cat((h.chunk(3, 1)[2], h.chunk(3, 1)[0]), 1), torch.cat([ROWS[8:], ROWS[:4]])),
    "unbind": (lambda h: h.view(-1, 2, 6).unbind(1)[1], ROWS[6:]),
    "stack": (lambda h: torch.stack([h, h], 2).flatten(1), ROWS.repeat_interleave(2)),
    "pad": (lambda h: F.pad(h, (1, 2)), torch.cat([torch.tensor([-1]), ROWS, torch.tensor([-1, -1])])),
    "pad-value": (lambda h: F.pad(h, (2, 0), value=1.0), torch.cat([torch.tensor([-1, -1]), ROWS])),
    "repeat": (lambda h: h.repeat(1, 2), torch.cat([ROWS, ROWS])),
    "interleave": (lambda h: h.repeat_interleave(2, 1), ROWS.repeat_interleave(2)),
    "add-self": (lambda h: h + h, ROWS),
    "gate": (lambda h: h * h.mean(1, keepdim=True), ROWS),
    "where": (lambda h: torch.where(h > 0, h, 0.1 * h), ROWS),
    "zeros": (lambda h: torch.cat([h, torch.zeros_like(h)], 1), torch.cat([ROWS, torch.full((12,), -1)])),
    "inplace": (lambda h: F.relu_(h).add_(1), ROWS),
    "cast": (lambda h: h.double().float().contiguous().clone(), ROWS),
    "unsqueeze": (lambda h: h.unsqueeze(1).squeeze(1), ROWS),
    "einops-free-tokens": (lambda h: h.view(-1, 3, 4).mean(1), None),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_feature_map_is_the_structure_between_two_weights(name):
    function, expected = STRUCTURES[name]
    model = Between(function, 4 if expected is None else len(expected))
    if expected is not None:
        for example in (None, torch.randn(7, 5)):
            assert_close(maps(model, example_inputs=example)["b.weight"], expected)
    else:
        graph = rwfx.weight_graph(model)
        junction = next(s for s in graph.stations if isinstance(s, Junction))
        assert_close(junction.members, ROWS.view(3, 4).t())
        assert_close(junction.ways, torch.tensor([[1.0, 2, 3]] * 4, dtype=torch.float64))


def test_residual_additions_count_every_row_once():
    graph = rwfx.weight_graph(make(Residual))
    into_head = graph.stations[-2]
    assert isinstance(into_head, Junction)
    # Four rows in the stream: the older three behind one member, the newest by itself.
    assert_close(into_head.ways, torch.tensor([[3.0, 4.0]] * 8, dtype=torch.float64))
    assert len(graph.leaves(graph.uses[-1].feature_map[:1])) == 4


def test_deep_residual_networks_stay_linear_in_size():
    sizes = []
    for blocks in (10, 20, 40):
        graph = rwfx.weight_graph(make(lambda blocks=blocks: Residual(blocks)))
        sizes.append(sum(s.members.numel() if isinstance(s, Junction) else len(s.feature_map) for s in graph.stations))
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


def test_heads_are_the_weights_whose_rows_reach_an_output():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x):
            h = self.a(x)
            return (self.b(h) + self.c(h))[:, 1:], h[:, :2]

    with pytest.raises(ValueError, match=r"differ in what reaches what.*Give example_inputs"):
        rwfx.weight_graph(Model())
    graph = rwfx.weight_graph(Model(), torch.randn(3, 4))
    named = {graph.stations[s].name: (ids - graph.stations[s].base).tolist() for s, ids in graph.heads.items()}
    assert named == {"a.weight": [0, 1], "b.weight": [1, 2, 3, 4], "c.weight": [1, 2, 3, 4]}


def test_a_module_called_twice_and_tied_weights_have_a_use_per_call():
    graph = rwfx.weight_graph(make(Twice))
    assert [use.name for use in graph.uses] == [
        "stem.weight",
        "shared.weight",
        "shared.weight#2",
        "shared.weight#3",
        "head.weight",
    ]
    assert graph.names["shared.weight"] == ("shared.weight", "tied.weight")


def test_inputs_joined_to_features_need_no_example():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(3 + 6 + 4, 5), nn.Linear(2 + 5 + 2, 3)

        def forward(self, x, z, v):
            h = self.b(torch.cat([z, self.a(x), x], 1))
            return self.c(torch.cat([v, h, v], -1))

    found = maps(Model())
    assert_close(found["b.weight"], torch.tensor([-1] * 3 + [0, 1, 2, 3, 4, 5] + [-1] * 4))
    assert_close(found["c.weight"], torch.tensor([-1] * 2 + [6, 7, 8, 9, 10] + [-1] * 2))


def test_sequences_are_told_from_batches_by_the_features_that_fit():
    for example in (None, make(Sequence).inputs()[0]):
        feature_map = maps(make(Sequence), example_inputs=example)["c.weight"]
        assert len(feature_map.unique()) == 12


def test_where_no_guess_fits_example_inputs_are_asked_for():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6 * 7, 5)

        def forward(self, x):
            return self.b(self.a(x).flatten(1))

    with pytest.raises(ValueError, match="Give example_inputs"):
        rwfx.weight_graph(Model())
    feature_map = maps(Model(), example_inputs=torch.randn(2, 7, 4))["b.weight"]
    assert_close(feature_map, torch.arange(6).repeat(7))


def test_to_networkx_by_layer():
    graph = rwfx.weight_graph(make(Residual)).to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    assert graph.nodes["stem.weight"] == {"weight": "stem.weight", "rows": 8, "head": False}
    assert graph.nodes["head.weight"]["head"]
    assert set(graph.predecessors("head.weight")) == {"stem.weight", *(f"blocks.{k}.weight" for k in range(3))}
    assert graph.edges["stem.weight", "head.weight"] == {"features": 8}


def test_to_networkx_by_row_has_an_edge_per_pair_that_a_walk_can_cross():
    model = make(Heads)
    weight_graph = rwfx.weight_graph(model)
    graph = weight_graph.to_networkx("row")
    assert graph.number_of_nodes() == sum(use.rows for use in weight_graph.uses)
    assert graph.edges[("a.weight", 2), ("box_head.weight", 0)] == {"features": (2,)}
    walks = rwfx.random_walks(weight_graph, dict(model.named_parameters()), 200)
    for walk in walks.tolist():
        passed = [(use.name, row) for use, row in zip(weight_graph.uses, walk, strict=True) if row >= 0]
        assert all(graph.has_edge(a, b) for a, b in itertools.pairwise(passed))
    with pytest.raises(ValueError, match="level must be"):
        weight_graph.to_networkx("rows")


class Freeze(TorchFunctionMode):
    """Gives every linear call a fixed output, and notes its input."""

    def __init__(self, outputs=None):
        super().__init__()
        self.inputs, self.outputs, self.calls = [], outputs or {}, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if func is F.linear or name in ("matmul", "__matmul__", "addmm"):
            self.inputs.append(args[1] if name == "addmm" else args[0])
            out = self.outputs.setdefault(self.calls, torch.rand_like(out) + 1)
            self.calls += 1
        return out


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_perturbing_a_row_changes_the_features_that_the_graph_says(kind):
    """Every other call's output held fixed, a row is moved; what its consumers see tells who it feeds."""
    model = make(kind).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):  # its mean mixes all features
            model.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = nn.Identity()
    args, kwargs = model.inputs()
    graph = rwfx.weight_graph(model)
    with torch.no_grad(), Freeze() as base:
        model(*args, **kwargs)
    assert len(base.inputs) == len(graph.uses)
    moved = 0
    for producer, use in enumerate(graph.uses):
        for row in range(0, use.rows, 3):
            outputs = {call: out.clone() for call, out in base.outputs.items()}
            outputs[producer][..., row] += 0.5
            with torch.no_grad(), Freeze(outputs) as changed:
                model(*args, **kwargs)
            for consumer, (was, now) in enumerate(zip(base.inputs, changed.inputs, strict=True)):
                differs = (was != now).reshape(-1, was.shape[-1]).any(0)
                leads = torch.stack(
                    [
                        (graph.leaves(source[None]) == use.base + row).any()
                        for source in graph.uses[consumer].feature_map
                    ]
                )
                assert torch.equal(differs, leads), (use.name, row, graph.uses[consumer].name)
                moved += int(differs.sum())
    assert moved > 0 or len(graph.uses) == 1


def test_a_model_without_a_weight_with_rows_is_refused():
    with pytest.raises(ValueError, match="no weight with rows"):
        rwfx.weight_graph(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))


def test_a_model_whose_rows_reach_no_output_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            self.a(x)
            return x

    with pytest.raises(ValueError, match="no row of a weight reaches an output"):
        rwfx.weight_graph(Model())


def test_where_a_rule_does_not_fit_the_walk_may_go_to_any_row_before():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x):
            h = self.a(x)
            return self.b(torch.linalg.qr(h)[0] @ torch.linalg.qr(h)[1])

    graph = rwfx.weight_graph(Model(), example_inputs=torch.randn(8, 4))
    assert "linalg_qr" in graph.notes[0]
    assert_close(graph.leaves(graph.uses[1].feature_map), torch.arange(6))


class WithLoss(nn.Module):
    """A model that computes its loss itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x, target):
        y = self.b(self.a(x).relu())
        return F.cross_entropy(y, target), y


def test_walks_start_at_what_a_loss_compares_with_the_targets():
    graph = rwfx.weight_graph(WithLoss(), (torch.randn(4, 6), torch.arange(4) % 3))
    assert [graph.stations[head].weight for head in graph.heads] == ["b.weight"]
    assert graph.notes == ()
