"""``unit="token"``: places of sequences are kept or dropped, where tokens are told apart."""

import pytest
import torch
import torch.nn.functional as F
from oracles import chances_of
from torch import nn
from torch.testing import assert_close

import rwfx
from rwfx import AdaptiveExamples, RandomWalk, SampledExamples, TopExamples, TopK, Uniform

EXACT = {"rtol": 0, "atol": 1e-12}
B, T, WIDTH, WORDS = 3, 5, 8, 11


class Decoder(nn.Module):
    """A language model of one block; its logits are ``(B, T, WORDS)`` or, flat, ``(B * T, WORDS)``."""

    def __init__(self, flat=False):
        super().__init__()
        self.flat = flat
        self.embed, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down, self.head = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids):
        x = self.embed(ids)
        h = self.norm(x)
        score = self.q(h) @ self.k(h).transpose(1, 2)
        score = score.masked_fill(torch.ones_like(score).triu(1) > 0, -1e9)
        x = x + score.softmax(-1) @ self.v(h)
        x = x + self.down(self.up(self.norm(x)).relu())
        logits = self.head(x)
        return logits.reshape(-1, WORDS) if self.flat else logits


def batch(sequences=B, length=T):
    return torch.randint(WORDS, (sequences, length))


def loss_of(logits, ids):
    return F.cross_entropy(logits.reshape(-1, WORDS), ids.roll(-1, 1).flatten())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def transformed(model, **options):
    return rwfx.transform(model, example_inputs=batch(), break_even=False, **options)


def assert_exact(sparse, model, ids):
    """Against the model whose output gradient is zero for the tokens dropped; gives those kept, and that gradient."""
    heard = []
    sparse.example_sampler.register_forward_hook(lambda _, __, made: heard.append(made[0]))
    loss_of(sparse(ids), ids).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids)
    (g,) = torch.autograd.grad(loss_of(logits, ids), logits)
    kept = heard[0]
    of_token = torch.zeros(ids.numel(), 1, dtype=g.dtype).index_fill(0, kept, 1.0)
    model(ids).backward((g.reshape(ids.numel(), -1) * of_token).view_as(g))
    for name, p in model.named_parameters():
        assert_close(found[name], p.grad, **EXACT, msg=name)
    model.zero_grad()
    return kept, g.reshape(ids.numel(), -1)


@pytest.mark.parametrize("flat", [False, True], ids=["(B, T, V)", "(B * T, V)"])
def test_the_tokens_with_the_largest_gradient_are_kept_and_the_others_count_as_zero(flat):
    model = Decoder(flat).double()
    sparse = transformed(model, examples=TopExamples(0.3, unit="token"))
    kept, g = assert_exact(sparse, model, batch())
    assert torch.equal(kept, g.norm(dim=1).topk(5).indices.sort().values)
    assert sparse.examples == (5, 15)


@pytest.mark.parametrize("flat", [False, True], ids=["(B, T, V)", "(B * T, V)"])
def test_compiled_as_one_graph_the_gradients_are_the_same(flat):
    model, ids = Decoder(flat).double(), batch()
    sparse = transformed(model, examples=TopExamples(0.3, unit="token"))
    eager = torch.autograd.grad(loss_of(sparse(ids), ids), list(model.parameters()))
    step = torch.compile(sparse, fullgraph=True)
    compiled = torch.autograd.grad(loss_of(step(ids), ids), list(model.parameters()))
    for one, other in zip(compiled, eager, strict=True):
        assert_close(one, other, **EXACT)


def test_another_batch_and_another_length_will_do():
    model = Decoder().double()
    sparse = transformed(model, examples=TopExamples(0.3, unit="token"))
    assert_exact(sparse, model, batch(7, 4))
    assert sparse.examples == (9, 28)


def test_only_what_lies_between_the_outputs_and_the_last_mixing_of_tokens_leaves_them_out():
    sparse = transformed(Decoder(), examples=TopExamples(0.3, unit="token"))
    left = {line.weight for line in sparse.report.lines if line.leaves_examples}
    # A token's query is used for that token alone; its key and its value are used for others.
    assert left == {"q.weight", "up.weight", "down.weight", "head.weight"}
    assert any("k.weight computes with all tokens" in note for note in sparse.notes)


def test_of_whole_sequences_everything_in_the_model_leaves_them_out():
    sparse = transformed(Decoder(), examples=TopExamples(0.3))
    assert all(line.leaves_examples for line in sparse.report.lines if line.weight != "embed.weight")


def test_rows_are_left_out_of_the_kept_tokens():
    """With every row in the set, what is left is the choice of tokens."""
    model = Decoder().double()
    sparse = transformed(model, examples=TopExamples(0.4, unit="token"), rows=Uniform(0.999))
    kept, _ = assert_exact(sparse, model, batch())
    assert len(kept) == 6
    few = transformed(model, examples=TopExamples(0.4, unit="token"), rows=TopK({"up": 0.25}))
    ids = batch()
    loss_of(few(ids), ids).backward()
    assert model.up.weight.grad.abs().sum(1).count_nonzero() == 4


def test_as_many_tokens_as_hold_a_share_of_the_gradient():
    model = Decoder().double()
    sparse = transformed(model, examples=AdaptiveExamples(0.5, at_least=0.2, memory=0.0, unit="token"))
    ids = batch()
    assert_exact(sparse, model, ids)
    assert sparse.examples == (15, 15)
    _, g = assert_exact(sparse, model, ids)
    squares = g.square().sum(1).sort(descending=True).values.cumsum(0)
    needed = (squares < 0.5 * squares[-1]).sum() + 1
    assert needed <= sparse.examples[0] < 15


def test_drawn_tokens_weighed_by_their_chances_give_the_dense_gradient_on_average():
    model = Decoder().double()
    sparse = transformed(model, examples=SampledExamples(0.4, floor=0.5, unbiased=True, unit="token"))
    ids, weight = batch(), model.up.weight
    loss_of(model(ids), ids).backward()
    dense, total = weight.grad.clone(), 0.0
    logits = model(ids)
    (g,) = torch.autograd.grad(loss_of(logits, ids), logits)
    chances = chances_of(g.reshape(15, -1).norm(dim=1), 6, 0.5)
    assert_close(chances.sum(), torch.tensor(6.0, dtype=torch.float64))
    for _ in range(1500):
        weight.grad = None
        loss_of(sparse(ids), ids).backward()
        total += weight.grad / 1500
    assert (total - dense).norm() < 0.1 * dense.norm()


def test_walks_start_at_pairs_of_a_token_and_a_word():
    model = Decoder().double()
    walks = RandomWalk(density={"*": 0.5}, start="loss")
    sparse = transformed(model, examples=TopExamples(0.4, unit="token"), rows=walks)
    ids = batch()
    loss_of(sparse(ids), ids).backward()
    assert sparse.examples == (6, 15)
    touched = model.head.weight.grad.abs().sum(1).count_nonzero()
    assert touched == len(sparse.rows["head.weight"]) == 6


def test_without_sequences_to_tell_tokens_apart_it_is_refused():
    for inputs in (None, batch(1, 4), batch(4, 1)):
        with pytest.raises(ValueError, match=r'unit="token".*two sequences of two tokens'):
            rwfx.transform(Decoder(), examples=TopExamples(0.5, unit="token"), example_inputs=inputs)


class Pooled(Decoder):
    def forward(self, ids):
        return super().forward(ids).mean(1)


def test_a_model_without_an_output_for_each_token_is_refused():
    with pytest.raises(ValueError, match="finds no linear call"):
        transformed(Pooled(), examples=TopExamples(0.5, unit="token"))


@pytest.mark.parametrize("policy", [TopExamples, SampledExamples, AdaptiveExamples])
def test_another_unit_is_refused(policy):
    with pytest.raises(ValueError, match="unit must be 'example' or 'token', got 'word'"):
        policy(unit="word")
