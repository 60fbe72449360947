import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule
from zoo import ZOO, Products, make

from rwfx.capture import capture
from rwfx.passes.normalize import normalize
from rwfx.passes.sample_rows import RowNodes, sample_rows
from rwfx.passes.sparse_backward import MASKED, SPARSE, sparse_backward
from rwfx.passes.verify import verify
from rwfx.passes.weights import weights_of
from rwfx.policies import RandomWalk
from rwfx.walk import WalkSampler
from rwfx.weight_graph import graph_of
from rwfx.weight_views import View


def code(gm):
    """The generated forward, without the lines that free variables."""
    return [line.split(";")[0].strip() for line in gm.code.splitlines() if line.strip()][1:]


def captured(model):
    found = capture(model)
    return found, GraphModule(found.host, found.train)


def two_layers():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))


def test_normalize_before_and_after():
    _, gm = captured(two_layers())
    assert code(gm) == [
        "input_1 = input",
        '_0 = getattr(self, "0")(input_1)',
        '_1 = getattr(self, "1")(_0)',
        '_2 = getattr(self, "2")(_1)',
        "return _2",
    ]
    assert code(normalize(gm)) == [
        "input_1 = input",
        '_0_weight = getattr(self, "0").weight',
        '_0_bias = getattr(self, "0").bias',
        "linear = torch._C._nn.linear(input_1, _0_weight, _0_bias)",
        '_1 = getattr(self, "1")(linear)',
        '_2_weight = getattr(self, "2").weight',
        "linear_1 = torch._C._nn.linear(_1, _2_weight, None)",
        "return linear_1",
    ]


@pytest.mark.parametrize("rules", [SPARSE, MASKED], ids=["sparse", "masked"])
def test_sample_rows_and_sparse_backward_before_and_after(rules):
    found, gm = captured(two_layers())
    gm = normalize(gm)
    sampler = WalkSampler(graph_of(gm, found), ["2.weight"], 0, RandomWalk(2))
    sampled, rows = sample_rows(gm, sampler)
    assert rows == {"2.weight": RowNodes("rows_2_weight")}
    drawn = [
        "input_1 = input",
        '_0_weight_1 = getattr(self, "0").weight',
        '_2_weight_1 = getattr(self, "2").weight',
        "row_sampler = self.row_sampler(_0_weight_1, _2_weight_1)",
        "rows_2_weight = row_sampler[0]",
    ]
    assert code(sampled) == drawn + code(gm)[1:]
    op = rules[F.linear]._schema.name.removeprefix("rwfx::")
    expected = code(sampled)
    expected[expected.index("linear_1 = torch._C._nn.linear(_1, _2_weight, None)")] = (
        f"linear_2 = torch.ops.rwfx.{op}.default(_1, _2_weight, None, rows_2_weight, 'full', 'rows')"
    )
    expected[-1] = "return linear_2"
    rewritten = sparse_backward(sampled, rows, rules, dx="full", grad="rows")
    assert code(rewritten) == expected
    assert verify(rewritten, found.host, rows) is rewritten


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_passes_leave_their_input_and_share_its_parameters(kind):
    model = make(kind)
    found, gm = captured(model)
    sampler = None

    def all_passes():
        nonlocal sampler
        yield gm, (normalized := normalize(gm))
        sampler = WalkSampler(graph_of(normalized, found), [found_weight(normalized, found)], 0, RandomWalk(2))
        sampled, rows = sample_rows(normalized, sampler)
        yield normalized, sampled
        yield sampled, sparse_backward(sampled, rows)

    for before, after in all_passes():
        printed, names = before.code, set(dict(before.named_modules()))
        before.recompile()
        assert before.code == printed
        assert set(dict(before.named_modules())) == names
        originals = {id(p) for p in model.parameters()}
        assert {id(p) for p in after.parameters()} <= originals
        assert after.graph is not before.graph


def found_weight(gm, found):
    return next(iter(graph_of(gm, found).names))


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_normalize_keeps_the_outputs_bit_for_bit(kind):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = make(kind).to(dtype).eval()
        found = capture(model)
        gm = GraphModule(found.host, found.eval)
        args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t, d=dtype: t.to(d), model.inputs())
        torch.testing.assert_close(normalize(gm)(*args, **kwargs), model(*args, **kwargs), rtol=0, atol=0)


def test_every_spelling_of_a_product_becomes_a_linear_call():
    _, gm = captured(make(Products))
    calls = [node for node in normalize(gm).graph.nodes if node.op.startswith("call")]
    assert sum(node.target is F.linear for node in calls) == 5
    assert not any(node.target in ("t", "transpose", getattr) for node in calls)


def test_a_product_with_rows_as_columns_is_a_call_on_the_transpose():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.w @ self.w.t().t()

    _, gm = captured(Model())
    gm = normalize(gm)
    assert [of.view for of in weights_of(gm).values()] == [View(transposed=True), View(transposed=True)]
    assert all(node.target is F.linear for node in weights_of(gm))


def test_verify_notices_a_row_set_that_no_call_uses():
    found, gm = captured(two_layers())
    gm = normalize(gm)
    sampled, rows = sample_rows(gm, WalkSampler(graph_of(gm, found), ["2.weight"], 0, RandomWalk(2)))
    with pytest.raises(AssertionError, match="rows_2_weight"):
        verify(sampled, found.host, rows)
    foreign = copy.deepcopy(found.host)
    with pytest.raises(AssertionError, match="not the model's own"):
        verify(sparse_backward(sampled, rows), foreign, rows)
