"""Weights that are views of parameters: a model has the gradients of its twin, whose weights are parameters."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

import rwfx
from rwfx.policies import AdaptiveWalk, LearnedWalk, Magnitude, RandomWalk, TopK, Uniform

pytestmark = pytest.mark.usefixtures("one_thread")

X = (6, 5, 8)


class Views(nn.Module):
    """Products with transposes, with parts of a packed weight and with one matrix of a stack; all in one model."""

    def __init__(self):
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(12))
        self.packed, self.packed_bias = nn.Parameter(torch.randn(15, 12)), nn.Parameter(torch.randn(15))
        self.stack, self.mix = nn.Parameter(torch.randn(3, 6, 9)), nn.Parameter(torch.randn(6, 14))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        h = torch.addmm(self.up_bias, x.view(-1, 8), self.up).view(-1, 5, 12).relu()  # Hugging Face's Conv1D
        q, k = self.packed.split([6, 9])
        q_bias, k_bias = self.packed_bias.split([6, 9])
        h = (F.linear(h, q, q_bias).tanh() @ self.stack[1]) * F.linear(h, k, k_bias)
        h = h.matmul(self.stack[2].t()).relu()
        return self.head((h @ self.mix[:, 2:7]).tanh())


class Plain(nn.Module):
    """The same with a parameter for each weight."""

    def __init__(self):
        super().__init__()
        self.up, self.q, self.k = nn.Linear(8, 12), nn.Linear(12, 6), nn.Linear(12, 9)
        self.one, self.two = nn.Linear(6, 9, bias=False), nn.Linear(9, 6, bias=False)
        self.mix, self.head = nn.Linear(6, 5, bias=False), nn.Linear(5, 4)

    def forward(self, x):
        h = self.up(x.view(-1, 8)).view(-1, 5, 12).relu()
        h = self.one(self.q(h).tanh()) * self.k(h)
        h = self.two(h).relu()
        return self.head(self.mix(h).tanh())


# The weights of the two, and where one's parameters are in the other's.
NAMES = {
    "up.weight": "up",
    "q.weight": "packed[0:6]",
    "k.weight": "packed[6:15]",
    "one.weight": "stack[1]",
    "two.weight": "stack[2]",
    "mix.weight": "mix[:, 2:7]",
    "head.weight": "head.weight",
}
PLACES = {
    "up.weight": lambda of: of["up"].t(),
    "up.bias": lambda of: of["up_bias"],
    "q.weight": lambda of: of["packed"][:6],
    "k.weight": lambda of: of["packed"][6:],
    "q.bias": lambda of: of["packed_bias"][:6],
    "k.bias": lambda of: of["packed_bias"][6:],
    "one.weight": lambda of: of["stack"][1].t(),
    "two.weight": lambda of: of["stack"][2],
    "mix.weight": lambda of: of["mix"][:, 2:7].t(),
    "head.weight": lambda of: of["head.weight"],
    "head.bias": lambda of: of["head.bias"],
}


def twins():
    """The two models, with equal weights."""
    views, plain = Views().double(), Plain().double()
    parameters = dict(views.named_parameters())
    plain.load_state_dict({name: place(parameters).detach() for name, place in PLACES.items()})
    return views, plain


def trained(model, steps=3, **options):
    """What three steps of a transformed model drew, and the gradients of the last."""
    torch.manual_seed(5)
    x = torch.randn(X, dtype=torch.float64)
    sparse = rwfx.transform(model, seed=7, break_even=False, example_inputs=x, **options)
    drawn = []
    for step in range(steps):
        model.zero_grad()
        (sparse(x + step) * torch.linspace(1, 2, 4, dtype=torch.float64)).square().sum().backward()
        drawn.append(sparse.rows)
    return sparse, drawn, {name: p.grad for name, p in model.named_parameters()}


EVERYWHERE = {"*": 0.4}
HOW = {
    "walks": {"num_paths": 3},
    "walks-full": {"num_paths": 3, "dx": "full"},
    "walks-density": {"density": EVERYWHERE},
    "adaptive": {"rows": AdaptiveWalk(3)},
    "learned": {"rows": LearnedWalk(3)},
    "uniform": {"rows": Uniform(EVERYWHERE, unbiased=True)},
    "magnitude": {"rows": Magnitude(EVERYWHERE)},
    "topk": {"rows": TopK(EVERYWHERE)},
    "masked": {"num_paths": 3, "mode": "masked"},
    "examples": {"num_paths": 3, "examples": 0.5},
    "examples-alone": {"examples": 0.5},
    "part-of-a-parameter-dense": {"num_paths": 3, "exclude": ["packed[0:6]", "stack[2]", "q.weight", "two.weight"]},
}


@pytest.mark.parametrize("options", HOW.values(), ids=HOW)
def test_weights_that_are_views_train_as_weights_that_are_parameters(options):
    views, plain = twins()
    known = {*(name for name, _ in views.named_parameters()), *NAMES.values()}
    by_model = [
        {**options, "exclude": [name for name in options["exclude"] if (name in known) == own]}
        if "exclude" in options
        else options
        for own in (True, False)
    ]
    (sparse, ours, gradients), (_, theirs, expected) = (
        trained(model, **given) for model, given in zip((views, plain), by_model, strict=True)
    )
    for own, other in zip(ours, theirs, strict=True):
        assert_close(own, {NAMES[name]: rows for name, rows in other.items()})
    for name, place in PLACES.items():
        assert_close(
            place(gradients), expected[name], rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert not gradients["stack"][0].count_nonzero()
    assert not gradients["mix"][:, [0, 1, *range(7, 14)]].count_nonzero()
    assert sparse.rows.keys() | sparse.report.dense.keys() >= set(NAMES.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forward_is_the_models_own_bit_for_bit(dtype):
    model, x = Views().to(dtype), torch.randn(X, dtype=dtype)
    sparse = rwfx.transform(model, 3, break_even=False)
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1).contiguous(), x[:1]):
        assert torch.equal(sparse(given), model(given))
    with torch.autocast("cpu"):
        assert torch.equal(sparse(x), model(x))
    sparse.eval()
    assert torch.equal(sparse(x), model(x))


@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_a_compiled_model_draws_rows_of_views_without_a_break_or_a_recompilation(grad):
    views, _ = twins()
    sparse = rwfx.transform(views, 3, break_even=False, seed=2, grad=grad)
    eager, x = copy.deepcopy(sparse), torch.randn(X, dtype=torch.float64)
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
        for _ in range(4):
            for module in (compiled, eager):
                module.zero_grad()
                module(x).square().sum().backward()
            assert_close(sparse.rows, eager.rows)
            for p, q in zip(sparse.parameters(), eager.parameters(), strict=True):
                assert p.grad.layout == q.grad.layout
                assert_close(p.grad.to_dense(), q.grad.to_dense(), rtol=0, atol=1e-10)
                assert p.grad.is_sparse or p.grad.stride() == q.grad.stride() == p.stride()
    assert counters["stats"]["unique_graphs"] == 1


def test_a_transformed_model_with_views_is_pickled_and_shares_its_parameters():
    views, _ = twins()
    sparse = rwfx.transform(views, 3, break_even=False, seed=2)
    assert list(sparse.state_dict()) == list(views.state_dict())
    assert all(p is q for p, q in zip(sparse.parameters(), views.parameters(), strict=True))
    again, x = pickle.loads(pickle.dumps(sparse)), torch.randn(X, dtype=torch.float64)
    for module in (sparse, again):
        module(x).sum().backward()
    assert_close(again.rows, sparse.rows)


def test_a_view_is_asked_for_by_its_own_name_and_by_its_parameters():
    views, _ = twins()
    sparse = rwfx.transform(views, 3, break_even=False, include=["packed", "stack[2]", "up"], exclude="packed[0:6]")
    assert set(sparse.rows) == {"packed[6:15]", "stack[2]", "up"}
    assert "include= does not ask for it" in sparse.report.dense["stack[1]"]
    sparse = rwfx.transform(views, density={"packed": 0.5, "mix[:, 2:7]": 0.2}, break_even=False)
    sparse(torch.randn(X, dtype=torch.float64)).sum().backward()
    assert {name: len(rows) for name, rows in sparse.rows.items()} == {
        "packed[0:6]": 3,
        "packed[6:15]": 5,
        "mix[:, 2:7]": 1,
    }


def test_walks_read_the_views_of_the_parameters_that_they_are_given():
    views, plain = twins()
    walks = [
        rwfx.random_walks(rwfx.weight_graph(model), dict(model.named_parameters()), 40, seed=3)
        for model in (views, plain)
    ]
    assert torch.equal(*walks)
    assert (walks[0] >= 0).any(0).all()


@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_parts_of_rows_have_one_row_gradient_and_other_views_none(mode):
    views, plain = twins()
    (sparse, ours, gradients), (_, theirs, expected) = (
        trained(model, steps=2, rows=RandomWalk(3), grad="rows", include=include, mode=mode)
        for model, include in ((views, ["packed", "head"]), (plain, ["q", "k", "head"]))
    )
    parts = "packed[0:6]", "packed[6:15]"
    assert set(sparse.rows) == {*parts, "head.weight"}
    assert_close(ours[-1], {NAMES[name]: rows for name, rows in theirs[-1].items()})
    both = torch.cat([ours[-1][parts[0]], ours[-1][parts[1]] + 6])
    for name in ("packed", "packed_bias"):
        assert torch.equal(gradients[name]._indices()[0], both)  # sorted and distinct
    gradients, expected = ({name: g.to_dense() for name, g in of.items()} for of in (gradients, expected))
    for name, place in PLACES.items():
        assert_close(place(gradients), expected[name], rtol=0, atol=1e-10, msg=lambda text, of=name: f"{of}: {text}")


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ({"num_paths": 3}, "up", 'grad="dense"'),
        ({"num_paths": 3}, "stack[2]", 'grad="dense"'),
        ({"num_paths": 3, "exclude": "packed[0:6]"}, "packed[6:15]", "packed[0:6], of the same parameter, is dense"),
        ({"rows": TopK({"*": 0.5})}, "packed[0:6]", "TopK"),
    ],
    ids=["transposed", "stack", "other-part-dense", "top-k"],
)
def test_a_view_without_a_row_gradient_says_why(options, name, reason):
    sparse = rwfx.transform(Views(), grad="rows", break_even=False, **options)
    assert "head.weight" in sparse.rows
    assert reason in sparse.report.dense[name]
    sparse(torch.randn(X)).sum().backward()


class Doubled(nn.Module):
    """Parts that overlap, and a parameter of whose parts one is penalised."""

    def __init__(self, overlap):
        super().__init__()
        self.w, self.overlap, self.head = nn.Parameter(torch.randn(9, 4)), overlap, nn.Linear(5, 3)

    def forward(self, x):
        h = F.linear(x, self.w[:5])
        h = h + (F.linear(x, self.w[4:]) if self.overlap else self.w[:2].square().sum())
        return self.head(h)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_part_has_no_row_gradient_where_other_gradients_reach_its_rows(overlap):
    sparse = rwfx.transform(Doubled(overlap), 3, grad="rows", break_even=False)
    assert ("same rows" if overlap else "square uses its weight") in sparse.report.dense["w[0:5]"]
    sparse = rwfx.transform(Doubled(overlap), 3, break_even=False)
    assert "w[0:5]" in sparse.rows


class Read(nn.Module):
    """``x @ weight.T + bias``, where both are what two functions make of parameters."""

    def __init__(self, weight, bias, shape=(10, 6), bias_shape=(10,)):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(bias_shape))
        self.weight, self.bias, self.head = weight, bias, nn.Linear(5, 3)

    def forward(self, x):
        return self.head(F.linear(x, self.weight(self.w), self.bias(self.b))[:, :5].tanh())


def whole(p):
    return p


NO_VIEWS = {
    "list": Read(lambda w: w[[7, 3, 9, 1, 5]], lambda b: None),
    "list-of-bools": Read(lambda w: w[[True] * 5 + [False] * 5], lambda b: None),
    "several-matrices": Read(lambda w: w.view(10, 6), whole, (2, 5, 6)),
    "across-matrices": Read(lambda w: w.view(10, 6)[3:8], lambda b: b[:5], (2, 5, 6)),
    "one-row-of-each-matrix": Read(lambda w: w[:, 0], lambda b: b[:5], (5, 1, 6)),
    "broadcast-bias": Read(whole, lambda b: b[3:4]),
    "bias-of-each-place": Read(whole, whole, bias_shape=(4, 10)),
}


@pytest.mark.parametrize("grad", ["dense", "rows"])
@pytest.mark.parametrize("model", NO_VIEWS.values(), ids=NO_VIEWS)
def test_a_weight_that_is_no_plain_view_keeps_its_own_gradient(model, grad):
    model, x = copy.deepcopy(model).double(), torch.randn(4, 6, dtype=torch.float64)
    sparse = rwfx.transform(model, 2, dx="full", grad=grad, break_even=False)
    sparse(x).square().sum().backward()
    ours = [model.w.grad, model.b.grad]
    assert set(sparse.rows) == {"head.weight"}
    assert "w" in sparse.report.dense
    model.zero_grad()
    model(x).square().sum().backward()
    assert_close(ours, [model.w.grad, model.b.grad], rtol=0, atol=1e-12)


BIASES = {
    "rows": lambda b: b[5:],
    "every-other": lambda b: b[::2],
    "column": lambda b: b.view(5, 2)[:, 1],
    "list": lambda b: b[[4, 3, 2, 1, 0]],
    "computed": lambda b: b[5:] * 2,
    "row-of-a-matrix": lambda b: b.view(2, 5)[1],
}


class Added(nn.Module):
    """Some rows of a weight, or all, and a bias that is a function of a parameter; the outputs are theirs."""

    def __init__(self, part, bias):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(10 if part else 5, 6)), nn.Parameter(torch.randn(10))
        self.part, self.bias = part, bias

    def forward(self, x):
        return F.linear(x, self.w[:5] if self.part else self.w, self.bias(self.b))


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_a_bias_beside_a_row_gradient_has_the_gradients_of_its_own_entries(part, bias):
    model = Added(part, bias).double()
    x, g = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    sparse = rwfx.transform(model, 3, grad="rows", seed=1, break_even=False)
    sparse(x).backward(g)
    assert model.w.grad.is_sparse
    ours = [p.grad.to_dense() for p in (model.w, model.b)]
    (drawn,) = sparse.rows.values()
    assert 0 < len(drawn) < 5
    model.zero_grad()
    model(x).backward(g * torch.zeros(5, dtype=g.dtype).index_fill(0, drawn, 1))
    assert_close(ours, [model.w.grad, model.b.grad], rtol=0, atol=1e-12)


class Beside(nn.Module):
    """Two parts of a weight, with two views of one bias."""

    def __init__(self, one, two):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(10, 6)), nn.Parameter(torch.randn(10))
        self.one, self.two, self.head = one, two, nn.Linear(5, 3)

    def forward(self, x):
        h = F.linear(x, self.w[:5], self.one(self.b)) + F.linear(x, self.w[5:], self.two(self.b))
        return self.head(h.tanh())


def test_a_weight_that_is_multiplied_with_itself_has_no_row_gradient():
    class Similar(nn.Module):
        def __init__(self):
            super().__init__()
            self.classes, self.head = nn.Parameter(torch.randn(5, 6)), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(F.linear(x, F.linear(self.classes, self.classes)))

    sparse = rwfx.transform(Similar(), 2, grad="rows", break_even=False)
    assert "uses its weight" in sparse.report.dense["classes"]


@pytest.mark.parametrize("two", [lambda b: b[2:7], lambda b: b[:5], lambda b: b[::2]], ids=["over", "same", "strided"])
def test_parts_have_no_row_gradients_where_their_biases_overlap(two):
    sparse = rwfx.transform(Beside(lambda b: b[:5], two), 3, grad="rows", break_even=False)
    assert set(sparse.rows) == {"head.weight"}
    assert all("others add rows of its bias" in sparse.report.dense[name] for name in ("w[0:5]", "w[5:10]"))
    apart = rwfx.transform(Beside(lambda b: b[5:], lambda b: b[:5]), 3, grad="rows", break_even=False)
    assert set(apart.rows) == {"w[0:5]", "w[5:10]", "head.weight"}


def test_a_weight_that_is_used_both_ways_has_a_row_set_for_each():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.head = nn.Linear(7, 5), nn.Linear(7, 3)

        def forward(self, x):
            return self.head(self.encode(x).relu() @ self.encode.weight)

    model, x = Tied().double(), torch.randn(4, 7, dtype=torch.float64)
    sparse = rwfx.transform(model, 2, break_even=False, seed=1)
    sparse(x).sum().backward()
    up, down = sparse.rows["encode.weight"], sparse.rows["encode.weight[:, 0:7]"]
    ours = model.encode.weight.grad.clone()

    def masked(y, rows):
        mask = torch.zeros(y.shape[-1], dtype=y.dtype).index_fill(0, rows, 1)
        return y * mask + (y * (1 - mask)).detach()

    model.zero_grad()
    h = masked(masked(model.encode(x), up).relu() @ model.encode.weight, down)
    masked(model.head(h), sparse.rows["head.weight"]).sum().backward()
    assert_close(ours, model.encode.weight.grad, rtol=0, atol=1e-12)


class Computed(nn.Module):
    """Weights that are computed from two, multiplied several at once, looked up and gone over again and again."""

    def __init__(self):
        super().__init__()
        self.table, self.more = nn.Embedding(9, 6), nn.Parameter(torch.randn(5, 6))
        self.raw, self.experts = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(3, 5, 4))
        self.left = nn.Parameter(torch.randn(4, 4))
        self.again, self.head = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)
        self.near = nn.Conv1d(4, 4, 3, groups=4)

    def forward(self, ids):
        h = F.linear(self.table(ids), self.raw + self.more)
        h = self.again(torch.einsum("bti,eio->bto", h, self.experts))[0]
        h = (self.left @ h.mT).mT
        near = self.near.weight.flip(2)
        return self.head(torch.ops.aten.conv1d.default(h.mT, near, None, [1], [1], [1], 4).mT)


def test_a_parameter_that_is_no_weight_stays_dense_with_the_reason():
    ids = torch.randint(9, (2, 4))
    sparse = rwfx.transform(Computed(), 3, break_even=False, example_inputs=ids)
    assert set(sparse.rows) == {"head.weight"}
    dense = sparse.report.dense
    for name, reason in {
        "table.weight": "looked up",
        "more": "computes a weight from it",
        "raw": "computes a weight from it",
        "experts": "einsum multiplies with it as several matrices",
        "left": "matmul multiplies with it otherwise than x @ w.t()",
        "again.weight_ih_l0": "recurrent layer",
        "near.weight": "computes a weight from it",
    }.items():
        assert reason in dense[name], (name, dense[name])


@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_attention_between_two_sequences_reads_its_packed_weight_in_parts(grad):
    model = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True).double()
    batch = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    ours, masked = (
        rwfx.transform(
            copy.deepcopy(model), 4, grad=grad, mode=mode, dx="rows", seed=3, break_even=False, example_inputs=batch
        )
        for mode in ("sparse", "masked")
    )
    assert {"multihead_attn.in_proj_weight[0:8]", "multihead_attn.in_proj_weight[8:24]"} <= set(ours.rows)
    for module in (ours, masked):
        y = module(*batch)
        assert torch.equal(y, model(*batch))
        y.square().sum().backward()
    assert_close(ours.rows, masked.rows)
    for (name, p), q in zip(ours.named_parameters(), masked.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert p.grad.layout == q.grad.layout, name
            assert_close(p.grad.to_dense(), q.grad.to_dense(), rtol=0, atol=1e-10)
    assert ours.get_parameter("multihead_attn.in_proj_weight").grad.is_sparse == (grad == "rows")
