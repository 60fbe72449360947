"""Mixtures of experts whose weights are stacks: they have the gradients of experts that are multiplied one by one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import sizes_of_examples
from torch import nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule, symbolic_trace
from torch.testing import assert_close

import rwfx
from rwfx.passes.normalize import normalize
from rwfx.passes.sample_rows import RowNodes
from rwfx.passes.sparse_backward import sparse_backward
from rwfx.policies import AdaptiveWalk, LearnedWalk, Magnitude, RandomWalk, TopK, Uniform

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS, EACH, WIDTH, INNER = 4, 2, 8, 16
X = (15, WIDTH)


class Experts(nn.Module):
    """Every token goes to two of four experts; ``up`` is stored ``(E, O, I)`` and ``down`` ``(E, I, O)``."""

    def __init__(self):
        super().__init__()
        self.encode, self.router, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 6)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 3)

    def forward(self, x):
        h = self.encode(x).relu()
        share, expert = self.router(h).softmax(-1).topk(EACH)
        order = expert.flatten().argsort(stable=True)
        offsets = F.one_hot(expert.flatten(), EXPERTS).sum(0).cumsum(0).to(torch.int32)
        gate, up = self.product(h[order // EACH], self.up.transpose(1, 2), offsets, "up").chunk(2, -1)
        out = self.product(F.silu(gate) * up, self.down, offsets, "down") * share.flatten()[order].unsqueeze(-1)
        return self.head(h + out[order.argsort()].view(-1, EACH, WIDTH).sum(1))

    def product(self, x, weight, offsets, name):
        return F.grouped_mm(x, weight, offs=offsets)


class OneByOne(Experts):
    """The same in any type, with the gradient of each weight's output masked by its row set."""

    masks = None  # by weight; None: no calls are masked

    def product(self, x, weight, offsets, name):
        ends = offsets.tolist()
        parts = [x[start:end] @ w for start, end, w in zip([0, *ends], ends, weight, strict=False)]
        return self.masked(torch.cat(parts), name)

    def forward(self, x):
        hooks = [
            module.register_forward_hook(lambda _, __, y, name=name: self.masked(y, f"{name}.weight"))
            for name, module in self.named_children()
        ]
        y = super().forward(x)
        for hook in hooks:
            hook.remove()
        return y

    def masked(self, y, weight):
        if self.masks is None:
            return y
        kept = y * self.masks[weight]
        return kept + (y - kept).detach()


def reference(model, x, rows=None, scales=None):
    """The gradients of ``loss_of``, in float64."""
    twin = OneByOne().double()
    twin.load_state_dict(model.state_dict())
    if rows is not None:
        sizes = {"up": 2 * INNER, "down": WIDTH, "encode.weight": WIDTH, "router.weight": EXPERTS, "head.weight": 6}
        ones = {name: torch.ones(len(rows[name])) for name in rows} if scales is None else scales
        twin.masks = {
            name: torch.zeros(size).index_copy(0, rows[name], ones[name]).double()
            if name in rows
            else torch.ones(size).double()
            for name, size in sizes.items()
        }
    loss_of(twin(x.double())).backward()
    return {name: p.grad for name, p in twin.named_parameters()}


def loss_of(y):
    return (y * torch.linspace(1, 2, 6, dtype=y.dtype)).square().sum()


def experts(seed=0):
    torch.manual_seed(seed)
    return Experts(), torch.randn(X)


def check(model, expected, where="", **tolerance):
    for name, p in model.named_parameters():
        assert_close(p.grad.double(), expected[name], **tolerance, msg=lambda text, name=name: f"{where}{name}: {text}")


CLOSE = {"rtol": 1e-4, "atol": 1e-5}
EVERYWHERE = {"*": 0.4}
HOW = {
    "walks": {"num_paths": 3},
    "walks-density": {"density": EVERYWHERE},
    "adaptive": {"rows": AdaptiveWalk(3)},
    "learned": {"rows": LearnedWalk(3)},
    "uniform": {"rows": Uniform(EVERYWHERE)},
    "magnitude": {"rows": Magnitude(EVERYWHERE)},
    "topk": {"rows": TopK(EVERYWHERE)},
    "masked": {"num_paths": 3, "mode": "masked", "dx": "rows"},
    "alone": {"rows": RandomWalk(3), "include": ["up", "down"]},
}


@pytest.mark.parametrize("shown", [False, True], ids=["shapes-guessed", "shapes-shown"])
@pytest.mark.parametrize("options", HOW.values(), ids=HOW)
def test_gradients_are_those_of_experts_one_by_one_with_masks(options, shown):
    model, x = experts()
    more = {"example_inputs": x} if shown else {}
    sparse = rwfx.transform(model, seed=7, break_even=False, **more, **options)
    assert {"up", "down"} <= set(sparse.report.sparse)
    for step in range(3):
        model.zero_grad()
        loss_of(sparse(x + step)).backward()
        rows = sparse.rows
        assert len(rows["up"]) < 2 * INNER
        check(model, reference(model, x + step, rows), f"step {step}, ", **CLOSE)


def test_dx_of_all_rows_gives_plain_gradients_masked_afterwards():
    model, x = experts()
    sparse = rwfx.transform(model, 3, dx="full", seed=7, break_even=False)
    loss_of(sparse(x)).backward()
    plain = reference(model, x)
    for name, dim in (("up", 1), ("down", 2)):
        rows, grad = sparse.rows[name], getattr(model, name).grad
        others = torch.ones(grad.shape[dim]).index_fill(0, rows, 0).nonzero().squeeze(1)
        assert_close(grad.index_select(dim, rows).double(), plain[name].index_select(dim, rows), **CLOSE)
        assert not grad.index_select(dim, others).count_nonzero()


def test_unbiased_rows_are_weighed_by_their_inverse_probabilities():
    model, x = experts()
    policy = Uniform({"up": 0.25, "down": 0.5}, unbiased=True)
    sparse = rwfx.transform(model, rows=policy, seed=7, break_even=False)
    loss_of(sparse(x)).backward()
    scales = {"up": torch.full((8,), 4.0), "down": torch.full((4,), 2.0)}
    check(model, reference(model, x, sparse.rows, scales), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_forward_is_the_models_own_bit_for_bit(dtype):
    model, x = experts()
    model, x = model.to(dtype), x.to(dtype)
    sparse = rwfx.transform(model, 3, break_even=False)
    for given in (x, x[:1], torch.cat([x, x + 1])):
        assert torch.equal(sparse(given), model(given))
    sparse.eval()
    assert torch.equal(sparse(x), model(x))


@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_an_expert_without_tokens_has_no_gradient(mode):
    model, x = experts()
    with torch.no_grad():
        model.router.bias[1] = -100.0
    sparse = rwfx.transform(model, 3, seed=7, break_even=False, mode=mode, dx="rows")
    loss_of(sparse(x)).backward()
    check(model, reference(model, x, sparse.rows), **CLOSE)
    for p in (model.up, model.down):
        assert not p.grad[1].count_nonzero()
        assert all(p.grad[other].count_nonzero() for other in (0, 2, 3))


@pytest.mark.parametrize("options", [HOW["walks"], HOW["topk"]], ids=["walks", "topk"])
def test_a_compiled_model_is_one_graph_whatever_the_rows_and_the_routing(options):
    model, x = experts()
    sparse = rwfx.transform(model, seed=2, break_even=False, **options)
    eager = copy.deepcopy(sparse)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
        for step in range(4):
            for module in (compiled, eager):
                module.zero_grad()
                loss_of(module(x * (step + 1))).backward()
            assert_close(sparse.rows, eager.rows)
            for p, q in zip(sparse.parameters(), eager.parameters(), strict=True):
                assert_close(p.grad, q.grad)
                assert p.grad.stride() == p.stride()
    assert counters["stats"]["unique_graphs"] == 1


def test_the_graph_before_and_after():
    model, _ = experts()
    gm = symbolic_trace(model)
    before = gm.code
    normalized = normalize(gm)
    assert gm.code == before
    assert calls_of(normalized) == [
        "torch.ops.rwfx.grouped_mm.default(getitem_2, transpose, to, 'grouped_mm')",
        "torch.ops.rwfx.grouped_mm.default(mul, down, to, 'grouped_mm')",
    ]
    with normalized.graph.inserting_before(next(iter(normalized.graph.nodes))):
        drawn = normalized.graph.placeholder("drawn")
    rewritten = sparse_backward(normalized, {"up": RowNodes(drawn.name)}, dx="full")
    assert calls_of(rewritten) == [
        "torch.ops.rwfx.row_grouped_mm.default(getitem_2, transpose, to, drawn, 'grouped_mm', 'full', 'dense')",
        "torch.ops.rwfx.grouped_mm.default(mul, down, to, 'grouped_mm')",
    ]


def calls_of(gm: GraphModule) -> list[str]:
    """The grouped products in a graph, as code."""
    lines = [line for line in gm.code.splitlines() if "grouped_mm.default" in line]
    return [line.partition(" = ")[2].partition(";")[0] for line in lines]


def test_walks_step_by_the_sum_over_all_experts():
    model, _ = experts()
    with torch.no_grad():
        model.up.zero_()
        for row in range(2 * INNER):  # of the third expert one feature, of the first one that is half as likely
            model.up[2, row, row % WIDTH] = -4.0
            model.up[0, row, (row + 1) % WIDTH] = 2.0
    graph = rwfx.weight_graph(model)
    walks = rwfx.random_walks(graph, dict(model.named_parameters()), 3000, seed=1)
    order = [use.name for use in graph.uses]
    up, encode = walks[:, order.index("up")], walks[:, order.index("encode.weight")]
    came = up >= 0
    same = (encode == up % WIDTH)[came]
    assert ((encode == (up + 1) % WIDTH)[came] | same).all()
    assert_close(same.float().mean().item(), 2 / 3, rtol=0, atol=0.05)


def test_rows_are_those_of_all_experts_and_the_report_counts_a_tokens_own():
    model, x = experts()
    sparse = rwfx.transform(model, 3, seed=7, break_even=False, include=["up", "down"], example_inputs=x)
    loss_of(sparse(x)).backward()
    lines = {line.weight: line for line in sparse.report.lines}
    assert (lines["up"].rows, lines["up"].features) == (2 * INNER, EXPERTS * WIDTH)
    assert (lines["down"].rows, lines["down"].features) == (WIDTH, EXPERTS * INNER)
    assert lines["up"].places == lines["down"].places == EACH / EXPERTS
    encode, others = WIDTH * WIDTH, WIDTH * EXPERTS + WIDTH * 6  # the input of the first has no gradient
    flops, kept = sparse.report.flops(), {name: len(rows) for name, rows in sparse.rows.items()}
    assert flops.forward == 2 * (encode + others + EACH * (2 * INNER * WIDTH + INNER * WIDTH))
    assert flops.backward == 2 * (encode + 2 * others + 2 * EACH * (kept["up"] * WIDTH + kept["down"] * INNER))


def test_the_cost_is_that_of_the_tokens_of_each_expert():
    model, x = experts()
    costs = rwfx.CostModel(flop=1.0, update=0, gather=0, pass_=0, read=0, call=0, conv=0)
    sparse = rwfx.transform(model, 3, seed=7, break_even=costs, example_inputs=x)
    lines = {line.weight: line for line in sparse.report.lines}
    tokens = len(x) * EACH // EXPERTS * EXPERTS  # as if all experts had as many
    assert lines["up"].costs.forward == 2 * tokens * 2 * INNER * WIDTH
    assert lines["down"].costs.dense == 2 * 2 * tokens * INNER * WIDTH


def test_a_row_in_every_expert_has_no_row_gradient_and_the_report_says_so():
    model, x = experts()
    sparse = rwfx.transform(model, 3, grad="rows", seed=7, break_even=False)
    assert {"up", "down"} == {name for name, why in sparse.report.dense.items() if "no row gradient" in why}
    loss_of(sparse(x)).backward()
    assert model.encode.weight.grad.is_sparse
    assert all(model.up.grad[expert].count_nonzero() for expert in range(EXPERTS))


def test_rows_that_walks_from_the_loss_choose_are_those_of_the_backward_pass():
    model, x = experts()
    policy = RandomWalk(6, 0.3, start="loss")
    sparse = rwfx.transform(model, rows=policy, examples=len(x), seed=7, break_even=False, example_inputs=x)
    loss_of(sparse(x)).backward()
    assert {"up", "down"} <= sparse.rows.keys()
    check(model, reference(model, x, sparse.rows), **CLOSE)


def test_experts_compute_with_all_examples_of_which_the_dropped_ones_have_no_gradient():
    model, x = experts()
    sparse = rwfx.transform(model, examples=0.4, seed=7, break_even=False, example_inputs=x)
    notes = [note for note in sparse.report.notes if "sorted by expert" in note]
    assert [note.split()[0] for note in notes] == ["up", "down"]
    assert not any(line.leaves_examples for line in sparse.report.lines if line.weight in ("up", "down"))
    y = sparse(x)
    (g,) = torch.autograd.grad(loss_of(y), y, retain_graph=True)
    loss_of(y).backward()
    kept = torch.zeros(len(x), 1).index_fill(0, sizes_of_examples([g]).topk(6).indices, 1)
    twin = OneByOne().double()
    twin.load_state_dict(model.state_dict())
    of_kept = twin(x.double())
    loss_of(of_kept * kept + (of_kept * (1 - kept)).detach()).backward()
    check(model, {name: p.grad for name, p in twin.named_parameters()}, **CLOSE)


class Otherwise(Experts):
    """Products that are no call on all matrices of a parameter."""

    def product(self, x, weight, offsets, name):
        if name == "up":
            return F.grouped_mm(x, (2 * self.up).transpose(1, 2), offs=offsets)
        return F.grouped_mm(x, weight[:, :, :WIDTH], offs=offsets)


# PyTorch multiplies groups in float32, but not where it looks at shapes alone.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_no_call_on_a_whole_stack_stays_dense_with_the_reason(dtype):
    model, x = Otherwise(), torch.randn(X, dtype=dtype)
    model.down = nn.Parameter(torch.randn(EXPERTS, INNER, 2 * WIDTH))
    sparse = rwfx.transform(model.to(dtype), 3, break_even=False, example_inputs=x)
    assert {"encode.weight", "head.weight"} <= set(sparse.rows)
    assert "grouped_mm multiplies with it as several matrices" in sparse.report.dense["down"]
    assert "grouped_mm multiplies with it" in sparse.report.dense["down"]
    assert "computes a weight from it" in sparse.report.dense["up"]
