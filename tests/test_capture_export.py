"""Capture by torch.export: models that no symbolic tracer follows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule
from torch.testing import assert_close

import rwfx
from rwfx.capture import capture


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).split(width, -1)
        q, k, v = (part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Decoder(nn.Module):
    """A language model with tied embeddings and control flow on shapes."""

    def __init__(self, words=20, width=16, longest=12):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, ids, targets=None, *, scale: float = 1.0):
        if ids.shape[1] > self.places.num_embeddings:
            raise ValueError("too long")
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(x) * scale
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return {"logits": logits, "loss": loss}


class Pictures(nn.Module):
    """A convolutional network with batch statistics, dropout and a branch on the size of the batch."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.head = nn.Dropout(0.4), nn.Linear(4, 2)

    def forward(self, x):
        h = F.relu(self.norm(self.stem(x)), inplace=True)
        if x.shape[0] > 1:
            h = h - h.mean(0, keepdim=True)
        return self.head(self.dropout(h).mean((2, 3)))


def tokens(batch=2, length=5):
    return torch.randint(20, (batch, length))


def pictures(batch=4, size=8):
    return torch.randn(batch, 3, size, size)


MODELS = {
    "decoder": (Decoder, lambda *sizes: (tokens(*sizes), tokens(*sizes)), [(1, 1), (3, 12), (2, 5)]),
    "pictures": (Pictures, lambda *sizes: (pictures(*sizes),), [(2, 8), (7, 11)]),
}


@pytest.fixture(params=MODELS, scope="module")
def case(request):
    make, inputs, sizes = MODELS[request.param]
    torch.manual_seed(0)
    model = make()
    return model, capture(model, inputs()), inputs, sizes


def graph_of(found, train=True):
    return GraphModule(found.host, found.train if train else found.eval)


def leaves(output):
    return [x for x in (output.values() if isinstance(output, dict) else [output]) if x is not None]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_at_every_size_the_graph_gives_the_model_s_outputs_gradients_and_buffers_bit_for_bit(case, train):
    model, found, inputs, sizes = case
    assert found.route == "torch.export"
    twin = copy.deepcopy(model).train(train)
    graph = graph_of(found, train)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for size in sizes:
        given = inputs(*size)
        outputs = []
        for module in (twin, graph):
            torch.manual_seed(7)
            module.zero_grad()
            outputs.append(leaves(module(*given)))
            sum(x.square().sum() for x in outputs[-1]).backward()
        for theirs, ours in zip(*outputs, strict=True):
            assert_close(ours, theirs, rtol=0, atol=0)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert_close(p.grad, q.grad, rtol=0, atol=0, msg=name)
        for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert_close(b, c, rtol=0, atol=0, msg=name)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def test_the_host_has_the_model_s_parameters_names_ties_and_unused_parts(case):
    model, found, _, _ = case
    assert list(found.host.state_dict()) == list(model.state_dict())
    mine = list(found.host.named_parameters(remove_duplicate=False))
    theirs = list(model.named_parameters(remove_duplicate=False))
    assert [name for name, _ in mine] == [name for name, _ in theirs]
    assert all(p is q for (_, p), (_, q) in zip(mine, theirs, strict=True))


def test_the_graph_is_plain_atens_named_by_their_modules(case):
    _, found, _, _ = case
    for graph in (found.train, found.eval):
        assert {node.op for node in graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}
    names = {node.name: node for node in found.train.nodes}
    node = names["blocks_0_qkv"] if "blocks_0_qkv" in names else names["stem"]
    assert node.target in (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
    assert next(reversed(node.meta["nn_module_stack"].values()))[0] in ("blocks.0.qkv", "stem")
    assert "test_capture_export.py" in node.meta["stack_trace"]


def test_a_size_for_which_the_model_does_something_else_is_refused():
    found = capture(Pictures(), pictures())
    with pytest.raises(AssertionError, match=r"x\.shape\[0\] >= 2"):
        graph_of(found)(pictures(1))
    found = capture(Decoder(), tokens())
    with pytest.raises(AssertionError, match=r"ids\.shape\[1\] <= 12"):
        graph_of(found)(tokens(2, 13))


def test_an_example_of_one_stands_for_batches_of_any_size():
    model = Pictures()
    x = pictures(1)
    alone = capture(model.eval(), x)
    assert_close(graph_of(alone, train=False)(x), model(x), rtol=0, atol=0)
    with pytest.raises(AssertionError, match=r"x\.shape\[0\]"):
        graph_of(alone, train=False)(pictures(2))
    found = capture(Decoder().eval(), tokens(1, 1))
    twin = copy.deepcopy(found.host)
    ids = tokens(3, 4)
    assert_close(graph_of(found, train=False)(ids)["logits"], twin(ids)["logits"], rtol=0, atol=0)


def test_arguments_that_are_not_given_stay_at_their_defaults_and_others_must_be_given():
    model = Decoder().eval()
    ids, targets = tokens(), tokens()
    plain = graph_of(capture(model, ids), train=False)
    assert plain(ids)["loss"] is None
    for other in ({"targets": targets}, {"scale": 2.0}):
        with pytest.raises(AssertionError, match="specialized"):
            plain(ids, **other)
    both = graph_of(capture(model, {"ids": ids, "targets": targets, "scale": 2.0}), train=False)
    assert_close(both(ids, targets=targets, scale=2.0), model(ids, targets, scale=2.0), rtol=0, atol=0)
    with pytest.raises(TypeError, match="targets"):
        both(ids)


def test_one_tensor_given_twice_is_two_inputs():
    model = Decoder().eval()
    ids = tokens()
    both = graph_of(capture(model, (ids, ids)), train=False)
    targets = tokens()
    assert_close(both(ids, targets), model(ids, targets), rtol=0, atol=0)


class Encoder(nn.Module):
    """Layers that the symbolic tracer calls as a whole."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.layer(self.embed(x))
        return self.head(self.mix(h, h, h, need_weights=False)[0])


def test_weights_inside_layers_of_attention_are_shown_by_torch_export():
    model, x = Encoder().double(), torch.randn(4, 5, 6, dtype=torch.float64)
    assert rwfx.transform(model, 9, example_inputs=x).report.route == "torch.export"
    gradients = []
    for mode in ("sparse", "masked"):
        sparse = rwfx.transform(model, 9, mode=mode, dx="rows", seed=3, example_inputs=x, break_even=False)
        inside = {"layer.self_attn.in_proj_weight", "layer.self_attn.out_proj.weight", "layer.linear1.weight"}
        assert inside | {"mix.in_proj_weight", "mix.out_proj.weight"} <= set(sparse.report.sparse)
        model.zero_grad()
        sparse(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_without_example_inputs_they_stay_dense_and_the_report_says_so():
    report = rwfx.transform(Encoder(), 9, break_even=False).report
    assert "layer.self_attn.in_proj_weight" in report.dense


def test_a_model_without_data_is_transformed_and_reported():
    with torch.device("meta"):
        model, x = Encoder(), torch.randn(4, 5, 6)
    report = rwfx.transform(model, density=0.5, example_inputs=x).report
    assert report.route == "torch.export"
    assert "layer.linear1.weight" in report.sparse
    assert any("meta device" in note for note in report.notes)


class CountedDown(nn.Module):
    """The ceiling of a quotient says how many places there are, and the table is cut at a tensor's number."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(12, 4), nn.Linear(4, 2)

    def forward(self, x):
        places = torch.arange(x.shape[1], 0, -1.0, dtype=x.dtype)
        longest = torch.tensor(x.shape[1])
        near = self.table.weight[6 - longest : 6 + longest].sum(0)
        return self.head(x * places[None, :, None] + near)


@pytest.mark.parametrize("length", [5, 3])
def test_lengths_that_are_computed_in_floating_point_or_in_tensors_stay_free(length):
    model = CountedDown()
    sparse = rwfx.transform(model, rows=rwfx.Uniform({"*": 0.5}), break_even=False, example_inputs=torch.randn(2, 5, 4))
    x = torch.randn(3, length, 4)
    assert_close(sparse(x), model(x), rtol=0, atol=0)
