import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from oracles import to_dense
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.testing import assert_close
from zoo import ZOO, Heads, Modules, Residual, loss_of, make

import rwfx
from rwfx import native


def assert_compiles(model, backend, steps, grad="rows", **options):
    """One graph, no break, no recompilation over steps with changing row sets; gradients are eager's."""
    sparse = rwfx.transform(model, num_paths=3, grad=grad, seed=1, **options)
    eager = copy.deepcopy(sparse)
    torch._dynamo.reset()
    counters.clear()
    args, kwargs = model.inputs()
    counts = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(sparse, backend=backend, fullgraph=True)
        for step in range(steps):
            for module in (compiled, eager):
                torch.manual_seed(step)
                module.zero_grad()
                loss_of(module(*args, **kwargs)).backward()
            assert_close(sparse.rows, eager.rows)
            counts.add(tuple(map(len, sparse.rows.values())))
            for (name, ours), theirs in zip(sparse.named_parameters(), eager.parameters(), strict=True):
                assert (ours.grad is None) == (theirs.grad is None), name
                if ours.grad is not None:
                    assert ours.grad.layout == theirs.grad.layout, name
                    assert_close(to_dense(ours.grad), to_dense(theirs.grad), rtol=0, atol=1e-10)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert len(counts) > 1 or steps < 10


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_the_zoo_is_captured_whole(kind):
    model = make(kind)
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0  # a compiled model draws its masks from another stream
    assert_compiles(model, "aot_eager", 4)


@pytest.mark.parametrize("mode", ["sparse", "masked"])
@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_inductor_compiles_once_for_fifty_steps_in_which_row_counts_change(mode, grad):
    assert_compiles(make(Residual), "inductor", 50, grad, mode=mode)


def test_inductor_takes_several_inputs_and_heads_and_kept_row_sets():
    assert_compiles(make(Heads), "inductor", 10, resample_every=2)


def test_switching_between_training_and_evaluation():
    model = make(Modules)
    model.net[4].p = 0.0
    sparse = rwfx.transform(model, num_paths=3, seed=1)
    args, _ = model.inputs()
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=3):
        compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
        for _ in range(4):
            compiled.train(), model.train()
            loss_of(compiled(*args)).backward()
            drawn = copy.deepcopy(sparse.rows)
            compiled.eval(), model.eval()
            with torch.no_grad():
                assert_close(compiled(*args), model(*args), rtol=0, atol=1e-12)
            assert_close(sparse.rows, drawn)
    assert counters["stats"]["unique_graphs"] == 2


def test_two_transformed_models_do_not_share_compiled_code():
    for width in range(3, 14):
        model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        compiled = torch.compile(rwfx.transform(model), backend="aot_eager", fullgraph=True)
        compiled(torch.randn(2, 4)).sum().backward()


def test_autocast_compiles():
    model = make(Residual).float()
    sparse = rwfx.transform(model, num_paths=3, grad="rows", seed=1)
    eager = copy.deepcopy(sparse)
    compiled = torch.compile(sparse, backend="inductor", fullgraph=True)
    x = torch.randn(8, 12)
    for _ in range(3):
        for module in (compiled, eager):
            module.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = module(x)
            assert y.dtype == torch.bfloat16
            y.float().square().sum().backward()
        for ours, theirs in zip(sparse.parameters(), eager.parameters(), strict=True):
            assert ours.grad.dtype == torch.float32
            assert_close(to_dense(ours.grad), to_dense(theirs.grad), rtol=0.1, atol=0.3)


def test_without_fullgraph_it_is_one_graph_too():
    model = make(Residual)
    counters.clear()
    compiled = torch.compile(rwfx.transform(model, num_paths=3), backend="aot_eager")
    for _ in range(3):
        loss_of(compiled(*model.inputs()[0])).backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_the_compiler_sees_the_forward_products_and_one_operator_a_backward_call():
    forward, backward = [], []

    def collect(into):
        def compiler(gm, example_inputs):
            into.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
            return make_boxed_func(gm.forward)

        return compiler

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    backend = aot_autograd(fw_compiler=collect(forward), bw_compiler=collect(backward))
    compiled = torch.compile(rwfx.transform(model, num_paths=3, grad="rows"), backend=backend, fullgraph=True)
    compiled(torch.randn(5, 8)).sum().backward()
    assert forward.count("aten.addmm.default") == 3
    assert [target for target in forward if "rwfx" in target] == ["rwfx.walk.default"]
    if native.ready():
        assert backward.count("rwfx.row_linear_backward.default") == 3
        assert not [target for target in backward if "mm" in target or "threshold" in target]
    assert all(p.grad.is_sparse for p in model.parameters())
