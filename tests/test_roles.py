"""The parts that weights play, and which of them are asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

import rwfx
from rwfx.capture import capture
from rwfx.passes.normalize import normalize
from rwfx.roles import roles_of, vocabularies_of
from rwfx.weight_graph import graph_of, shapes_of
from rwfx.where import asked_for, given_places, matches

B, T, WIDTH, WORDS = 2, 5, 8, 40


class Decoder(nn.Module):
    """A block with the attention written out or PyTorch's own, and an MLP with a gate."""

    def __init__(self, fused=False, packed=False, tied=False):
        super().__init__()
        self.fused, self.packed = fused, packed
        self.embed, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)
        self.up, self.gate, self.down = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        h = self.norm(x)
        q, k, v = self.qkv(h).chunk(3, -1) if self.packed else (self.q(h), self.k(h), self.v(h))
        if self.fused:
            mixed = F.scaled_dot_product_attention(*(z.unflatten(-1, (2, -1)).transpose(1, 2) for z in (q, k, v)))
            mixed = mixed.transpose(1, 2).flatten(2)
        else:
            mixed = self.dropout((q @ k.transpose(1, 2) / 3).softmax(-1)) @ v
        x = x + self.out(mixed)
        h = self.norm(x)
        return self.head(x + self.down(F.silu(self.gate(h)) * self.up(h)))


def graphs(model, inputs):
    captured = capture(model, inputs)
    gm = normalize(GraphModule(captured.host, captured.train))
    return gm, graph_of(gm, captured, shapes_of(gm, captured))


def roles(model, inputs):
    return {
        role: {name.removesuffix(".weight") for name in found}
        for role, found in roles_of(*graphs(model, inputs)).items()
    }


IDS = torch.randint(WORDS, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "fused"])
@pytest.mark.parametrize("packed", [False, True], ids=["three weights", "one weight"])
def test_roles_are_told_by_what_the_graph_does_with_a_weight(fused, packed):
    found = roles(Decoder(fused, packed), IDS)
    assert found["attention"] == ({"qkv", "out"} if packed else {"q", "k", "v", "out"})
    assert found["mlp"] == {"up", "gate", "down"}
    assert found["head"] == {"head"}


def test_without_an_attention_all_linear_weights_but_the_last_are_an_mlp():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    assert roles(model, torch.randn(2, 6)) == {"attention": set(), "mlp": {"0", "2"}, "head": {"4"}}


class Classifier(nn.Module):
    """A softmax that no product follows is no attention."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(self.a(x).relu()).softmax(-1)


def test_a_softmax_at_the_end_makes_no_attention():
    assert roles(Classifier(), torch.randn(2, 6)) == {"attention": set(), "mlp": {"a"}, "head": {"b"}}


def test_a_weight_that_gives_outputs_and_is_read_on_is_no_head():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = self.a(x)
            return h, self.b(h)

    assert roles(Both(), torch.randn(2, 6)) == {"attention": set(), "mlp": {"a"}, "head": {"b"}}


@pytest.mark.parametrize("tied", [False, True], ids=["of its own", "tied"])
def test_a_head_with_a_row_for_each_word_is_a_vocabulary(tied):
    model = Decoder(tied=tied)
    gm, graph = graphs(model, IDS)
    head = next(name for name, names in graph.names.items() if "head.weight" in names)
    assert vocabularies_of(gm, graph) == {head: "embed.weight"}


class Sentences(nn.Module):
    """As many classes as kinds of tokens, or as words."""

    def __init__(self, classes):
        super().__init__()
        self.words, self.kinds, self.head = nn.Embedding(9, 6), nn.Embedding(2, 6), nn.Linear(6, classes)

    def forward(self, ids):
        return self.head((self.words(ids) + self.kinds(torch.zeros_like(ids))).mean(1))


@pytest.mark.parametrize("classes", [2, 9])
def test_a_head_of_classes_is_no_vocabulary(classes):
    assert vocabularies_of(*graphs(Sentences(classes), IDS % 9)) == {}


def test_an_embedding_whose_weight_is_computed_is_no_vocabulary():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Embedding(WORDS, 6)), nn.Linear(6, 3))
    assert vocabularies_of(*graphs(model, IDS)) == {}


WEIGHTS = {name: [name] for name in ("body.0.weight", "body.2.weight", "head.weight")}


def host():
    body = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Conv1d(3, 3, 1))
    return nn.ModuleDict({"body": body, "head": nn.Linear(3, 3)})


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("all", ["body.0.weight", "body.2.weight", "head.weight"]),
        ("body", ["body.0.weight", "body.2.weight"]),
        ("body.*.weight", ["body.0.weight", "body.2.weight"]),
        ("head", ["body.2.weight", "head.weight"]),
        (nn.Linear, ["body.0.weight", "head.weight"]),
        (nn.Sequential, ["body.0.weight", "body.2.weight"]),
        (nn.ModuleDict, ["body.0.weight", "body.2.weight", "head.weight"]),
        (lambda name, module: isinstance(module, nn.Conv1d), ["body.2.weight"]),
        (["body.0", nn.Conv1d], ["body.0.weight", "body.2.weight"]),
    ],
    ids=[
        "all",
        "module",
        "pattern",
        "role and name",
        "class",
        "class around it",
        "class of the model",
        "function",
        "several",
    ],
)
def test_a_place_asks_for_weights(place, wanted):
    places = given_places("include", place)
    assert sorted(asked_for("include", places, WEIGHTS, host(), {"head": {"body.2.weight"}})) == wanted


def test_any_name_of_a_tied_weight_will_do():
    tied = {"embed.weight": ["embed.weight", "head.weight"]}
    parts = nn.ModuleDict({"embed": nn.Embedding(3, 3), "head": nn.Linear(3, 3)})
    assert asked_for("exclude", ("head",), tied, parts, {}) == {"embed.weight"}
    assert asked_for("exclude", (nn.Linear,), tied, parts, {}) == {"embed.weight"}
    assert matches(["a.b.weight", "c.weight"], "c")


def test_a_role_that_no_weight_plays_is_no_mistake_and_a_name_is():
    assert asked_for("include", ("attention",), WEIGHTS, host(), {}) == set()
    with pytest.raises(ValueError, match="exclude names 'boddy', which matches no weight or module; the weights are"):
        asked_for("exclude", ("boddy",), WEIGHTS, host(), {})
    with pytest.raises(ValueError, match="include names 'Conv2d'"):
        asked_for("include", (nn.Conv2d,), WEIGHTS, host(), {})


@pytest.mark.parametrize(
    ("given", "words"), [(3, "include must hold"), ([None], "include must hold"), (int, "class int")]
)
def test_what_asks_for_nothing_is_refused(given, words):
    with pytest.raises(TypeError, match=words):
        given_places("include", given)


def test_what_is_included_and_not_excluded_is_made_row_sparse_and_the_report_tells_why_not():
    model = Decoder(fused=True)
    sparse = rwfx.transform(
        model, 2, include=["mlp", "attention"], exclude=["up", "k"], example_inputs=IDS, break_even=False
    )
    assert set(sparse.report.sparse) == {f"{name}.weight" for name in ("q", "v", "out", "gate", "down")}
    assert sparse.report.dense["up.weight"] == "asked for with exclude="
    assert sparse.report.dense["head.weight"] == "include= does not ask for it"


def test_the_scores_of_a_vocabulary_are_row_sparse_only_where_they_are_asked_for():
    def report(**options):
        return rwfx.transform(Decoder(), example_inputs=IDS, break_even=False, **options).report

    assert "as many rows as embed.weight" in report(num_paths=2).dense["head.weight"]
    assert "head.weight" in report(num_paths=2, include=["all", "head"]).sparse
    assert "head.weight" in report(density={"*": 0.5}).sparse


@pytest.mark.parametrize("include", ["head", "2.weight", ["all", "2"], lambda name, module: name[0] == "2"], ids=str)
def test_a_density_confines_a_head_that_include_names(include):
    def sparse(**options):
        return rwfx.transform(mlp, density=0.5, break_even=False, **options).report.sparse

    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
    assert set(sparse()) == {"0.weight"}
    assert "2.weight" in sparse(include=include)


class WithLoss(Decoder):
    def forward(self, ids):
        logits = super().forward(ids)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), logits


def test_a_head_that_a_loss_in_the_model_reads_is_a_head():
    found = roles(WithLoss(), IDS)
    assert found["head"] == {"head"}
    assert "head.weight" in rwfx.transform(WithLoss(), 2, example_inputs=IDS, break_even=False).report.dense
