"""The promises of ``transform``, kept for models that nobody wrote."""

import copy

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import masked_gradients, to_dense
from torch import nn
from torch.testing import assert_close
from zoo import loss_of

import rwfx

WIDTHS = st.integers(1, 9)
OPERATIONS = ("linear", "elementwise", "norm", "residual", "concat", "slice", "shuffle", "branch", "again", "input")


class Random(nn.Module):
    """Follows a program: a list of operations on a stack of activations."""

    def __init__(self, features, program):
        super().__init__()
        self.features, self.program = features, program
        self.layers = nn.ModuleList()
        with torch.no_grad():
            self.outputs = 0
            self.planning = True
            self(torch.randn(2, features))
            self.planning = False

    def layer(self, k, make):
        if self.planning and k == len(self.layers):
            self.layers.append(make())
        return self.layers[k]

    def forward(self, x):
        h, k, last, ends = x, 0, None, []
        widths = [self.features]
        for operation, width in self.program:
            n = widths[-1]
            if operation == "linear" or (last is None and operation in ("again", "residual", "branch")):
                h, k, last = self.layer(k, lambda n=n, w=width: nn.Linear(n, w, bias=w % 2 == 0))(h), k + 1, k
                widths.append(width)
            elif operation == "elementwise":
                h = [torch.tanh, torch.sigmoid, torch.sin][width % 3](h) * 1.5
            elif operation == "norm":
                h, k = self.layer(k, lambda n=n: nn.LayerNorm(n))(h), k + 1
            elif operation == "residual":
                h, k = h + self.layer(k, lambda n=n: nn.Linear(n, n))(h), k + 1
            elif operation == "concat":
                h = torch.cat([h, torch.cos(h)], 1)
                widths.append(2 * n)
            elif operation == "input":
                h = torch.cat([x, h], -1)
                widths.append(n + self.features)
            elif operation == "slice":
                h = h[:, : max(1, n - width)]
                widths.append(max(1, n - width))
            elif operation == "shuffle" and n % 2 == 0:
                h = h.view(h.size(0), 2, n // 2).transpose(1, 2).reshape(h.size(0), n)
            elif operation == "branch":
                ends.append(h)
            elif operation == "again" and self.layers[last].in_features == n:
                h = self.layers[last](h)
                widths.append(self.layers[last].out_features)
        n = widths[-1]
        return [self.layer(k, lambda n=n: nn.Linear(n, 3))(h), *ends]


def transformed(model, x, num_paths, **options):
    """The transformed model and its graph; with an example where the library asks for one, and only there."""
    try:
        rwfx.weight_graph(model)
        example = None
    except ValueError as error:
        if "Give example_inputs" not in str(error):
            raise
        example = x
    sparse = rwfx.transform(model, num_paths, seed=0, example_inputs=example, **options)
    return sparse, rwfx.weight_graph(model, example)


programs = st.lists(st.tuples(st.sampled_from(OPERATIONS), WIDTHS), max_size=9)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(1, 8), programs, st.integers(1, 12), st.sampled_from(["sparse", "masked"]), st.booleans())
def test_random_models(features, program, num_paths, mode, rows_only):
    torch.manual_seed(0)
    model = Random(features, program).double()
    x = torch.randn(3, features, dtype=torch.float64)
    sparse, graph = transformed(model, x, num_paths, mode=mode, dx="rows", grad="rows" if rows_only else "dense")
    assert list(sparse.state_dict()) == list(model.state_dict())
    walks = rwfx.random_walks(graph, dict(model.named_parameters()), num_paths, seed=0)
    copied = copy.deepcopy(sparse)

    y = sparse(x)
    assert_close(y, model(x), rtol=0, atol=0)
    loss_of(y).backward()
    ours = {name: to_dense(p.grad) for name, p in model.named_parameters()}
    for name, rows in sparse.rows.items():
        assert torch.equal(rows, rows.unique())
        assert 1 <= len(rows) <= model.get_parameter(name).shape[0]
        passed = torch.cat([walks[:, k] for k, use in enumerate(graph.uses) if use.weight == name])
        assert len(passed[passed >= 0].unique()) in (0, len(rows))
    oracle = masked_gradients(model, lambda m: loss_of(m(x)), sparse.rows, "rows")
    for name, theirs in oracle.items():
        assert (ours[name] is None) == (theirs is None)
        if theirs is not None:
            assert_close(ours[name], theirs, rtol=0, atol=1e-12)

    copied(x)
    assert_close(copied.rows, sparse.rows)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(1, 8), programs.filter(lambda p: len(p) > 3))
def test_random_models_compile_whole(features, program):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Random(features, program).double()
    x = torch.randn(3, features, dtype=torch.float64)
    sparse, _ = transformed(model, x, 3, grad="rows")
    eager = copy.deepcopy(sparse)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            for module in (compiled, eager):
                module.zero_grad()
                loss_of(module(x)).backward()
            for a, b in zip(sparse.parameters(), eager.parameters(), strict=True):
                assert_close(to_dense(a.grad), to_dense(b.grad), rtol=0, atol=1e-10)
