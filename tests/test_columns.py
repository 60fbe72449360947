"""Gradients confined to the columns that are read: the operator's part of it, and the pass that finds where."""

import copy
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from test_passes import captured, code
from torch import nn
from torch.testing import assert_close
from zoo import ZOO, make

import rwfx
from rwfx import native
from rwfx.ops import row_linear
from rwfx.ops.linear import ACTIVATIONS, _RowLinear
from rwfx.passes.normalize import normalize
from rwfx.passes.read_columns import ACTIVATION_MODULES, ROW_LINEAR, read_columns
from rwfx.passes.sample_rows import sample_rows
from rwfx.passes.sparse_backward import sparse_backward
from rwfx.policies import RandomWalk
from rwfx.walk import WalkSampler
from rwfx.weight_graph import graph_of

# --- The operator ----------------------------------------------------------------------------------------------------

FUNCTIONS = {"": lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
FUNCTIONS["sigmoid"] = torch.sigmoid
SHAPES = [(7,), (6, 7), (2, 3, 7), (0, 7)]
ROWS = {"none": [], "some": [0, 3], "all": [0, 1, 2, 3, 4]}
COLUMNS = {"none": [], "one": [4], "some": [1, 2, 6], "most": [0, 1, 2, 4, 5, 6], "all": list(range(7))}
FEW = 0.5  # of the columns: so few are always worth confining the gradient to


def in_python(x, weight, bias, rows, dx="rows", grad="dense", columns=None, activation="", direct=False):
    """``row_linear`` without the CPU kernels."""
    return _RowLinear.apply(x, weight, bias, rows, dx, grad, None, None, None, columns, activation, direct)


@pytest.fixture(params=["fastest", "python"])
def op(request):
    native.ready()
    return row_linear if request.param == "fastest" else in_python


every_activation = pytest.mark.parametrize("activation", FUNCTIONS, ids=lambda name: name or "none")
every_direct = pytest.mark.parametrize("direct", [False, True], ids=["alone", "direct"])


def operands(shape=(6, 7), dtype=torch.float64, rows=5):
    features = shape[-1]
    shapes = shape, (rows, features), (rows,)
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def gradients(call, x, w, b):
    y = call(x, w, b)
    upstream = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, (x, w, b), upstream)]


def dense(activation, rows=None):
    """Plain autograd, the gradient of the output masked to the rows."""

    def call(x, w, b):
        y = F.linear(FUNCTIONS[activation](x), w, b)
        if rows is not None:
            mask = torch.zeros(len(w), dtype=y.dtype).index_fill(0, rows, 1)
            y.register_hook(lambda g: g * mask)
        return y

    return call


def test_the_pass_knows_the_activations_of_the_operator():
    assert set(FUNCTIONS) - {""} == set(ACTIVATIONS) == set(ACTIVATION_MODULES.values())


@every_activation
@every_direct
@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_the_backward_is_the_dense_one_on_rows_and_columns(op, activation, direct, rows, columns):
    rows, columns = (torch.tensor(t, dtype=torch.int64) for t in (rows, columns))
    for shape, grad in product(SHAPES, ("dense", "rows")):
        x, w, b = operands(shape)
        options = {"grad": grad, "columns": columns, "activation": activation, "direct": direct}
        ours = gradients(lambda *t, options=options: op(*t, rows, **options), x, w, b)
        theirs = gradients(dense(activation, rows), x, w, b)
        assert_close(ours[0], theirs[0], rtol=0, atol=0)
        assert ours[1].shape == x.shape
        assert_close(ours[1][..., columns], theirs[1][..., columns], rtol=0, atol=1e-12)
        for a, c in zip(ours[2:], theirs[2:], strict=True):
            assert a.is_sparse == (grad == "rows")
            assert_close(a.to_dense(), c, rtol=0, atol=1e-12)
        if not direct:
            others = [c for c in range(7) if c not in columns.tolist()]
            left_out = len(columns) < FEW * 7 or ours[1][..., others].count_nonzero() == 0
            assert_close(ours[1][..., others], theirs[1][..., others] * (not left_out), rtol=0, atol=1e-12)


@every_activation
@every_direct
def test_a_full_input_gradient_has_every_column(op, activation, direct):
    x, w, b = operands()
    rows, columns = torch.tensor([1, 4]), torch.tensor([2])
    options = {"columns": columns, "activation": activation, "direct": direct}
    ours = gradients(lambda *t: op(*t, rows, "full", **options), x, w, b)
    theirs = gradients(dense(activation), x, w, b)
    assert_close(ours[1], theirs[1], rtol=0, atol=1e-12)
    for a, c in zip(ours[2:], theirs[2:], strict=True):
        assert_close(a[rows], c[rows], rtol=0, atol=1e-12)
        assert a[[0, 2, 3]].count_nonzero() == 0


@every_activation
@every_direct
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_no_less_exact_than_the_dense_call(op, activation, direct, dtype):
    assert_no_less_exact(op, activation, direct, dtype, autocast=False)


@every_activation
@every_direct
def test_autocast_is_no_less_exact_than_the_dense_call(activation, direct):
    assert_no_less_exact(row_linear, activation, direct, torch.float32, autocast=True)


def assert_no_less_exact(op, activation, direct, dtype, autocast):
    tensors = operands((64, 96), dtype, rows=48)
    rows, columns = torch.arange(0, 48, 3), torch.arange(0, 96, 4)
    exact = gradients(dense(activation, rows), *[t.detach().double().requires_grad_() for t in tensors])

    def errors(call):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y, dx, dw, db = gradients(call, *tensors)
        assert y.dtype == (torch.bfloat16 if autocast else dtype)
        assert {dx.dtype, dw.dtype, db.dtype} == {dtype}
        found, wanted = (y, dx[:, columns], dw, db), (exact[0], exact[1][:, columns], *exact[2:])
        return [((a.double() - e).norm() / e.norm()).item() for a, e in zip(found, wanted, strict=True)]

    ours = errors(lambda *t: op(*t, rows, columns=columns, activation=activation, direct=direct))
    theirs = errors(dense(activation, rows))
    # Sums in another order: in float32 and float64 a rounding more or less.
    slack = 4 * torch.finfo(dtype).eps
    assert all(a <= 1.05 * c + slack for a, c in zip(ours, theirs, strict=True)), (ours, theirs)


@every_activation
@pytest.mark.parametrize("grad", ["dense", "rows"])
@pytest.mark.parametrize("columns", [None, [1, 2], list(range(7))], ids=["no-columns", "some", "all"])
@pytest.mark.parametrize("rows", [[], [0, 3]], ids=["no-rows", "some-rows"])
def test_opcheck(activation, grad, columns, rows):
    native.ready()
    columns = None if columns is None else torch.tensor(columns)
    arguments = (*operands(), torch.tensor(rows, dtype=torch.int64), "rows", grad, None, None, None)
    # What lies in other columns is anything where the gradient goes to a row_linear: there is nothing to compare.
    for direct in [False, True] if columns is not None and len(columns) == 7 else [False]:
        torch.library.opcheck(torch.ops.rwfx.row_linear.default, (*arguments, columns, activation, direct))


def test_no_column_is_read_beside_those_that_are_promised(op):
    """A chain of two calls: what lies in the other columns between them reaches no gradient, also where it is nan."""
    x, w, b = operands()
    v, c = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (3,)))
    rows, columns = torch.tensor([0, 2]), torch.tensor([1, 3])

    def chain(first, second):
        return torch.autograd.grad(second(first(x, w, b), v, c).sum(), (x, w, b, v, c))

    ours = chain(lambda *t: op(*t, columns), lambda *t: op(*t, rows, columns=columns, activation="tanh", direct=True))
    for a, e in zip(ours, chain(dense("", columns), dense("tanh", rows)), strict=True):
        assert_close(a, e, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_finds_no_nan_in_columns_that_nothing_reads(op):
    for _ in range(20):  # what is not written holds whatever was there before
        torch.full((400, 300), float("nan"), dtype=torch.float64)
        x, w, b = operands((300, 400))
        with torch.autograd.detect_anomaly(check_nan=True):
            y = op(x, w, b, torch.tensor([1]), columns=torch.tensor([2, 5]), activation="relu", direct=True)
            y.sum().backward()
        assert x.grad.isfinite().all()


def test_an_unknown_activation_is_refused_by_name(op):
    with pytest.raises(ValueError, match="relu, gelu, silu, tanh, sigmoid or empty, got mish"):
        op(*operands(), torch.tensor([1]), activation="mish")


# --- The pass --------------------------------------------------------------------------------------------------------


class Between(nn.Module):
    """Two linear layers, ``first`` and ``second``, and something in between."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        for name, module in modules.items():
            self.add_module(name, module)
        self.rule = forward

    def forward(self, x):
        return self.rule(self, x)


def rewritten(model, dx="rows"):
    """The graph module before ``read_columns``: every weight row-sparse."""
    model = model.double()
    found, gm = captured(model)
    gm = normalize(gm)
    graph = graph_of(gm, found)
    sampled, rows = sample_rows(gm, WalkSampler(graph, list(graph.names), 0, RandomWalk(3)))
    return sparse_backward(sampled, rows, dx=dx)


def calls(gm):
    """The named arguments of each row-sparse call, by the call's weight."""
    found = {}
    for node in gm.graph.nodes:
        if node.target is torch.ops.rwfx.row_linear.default:
            found[node.args[1].target] = {name: str(value) for name, value in node.kwargs.items()}
    return found


def test_read_columns_before_and_after():
    before = rewritten(Between(lambda m, x: m.second(m.act(m.first(x))), act=nn.ReLU()))
    start = code(before)[:-6]
    assert code(before)[-6:] == [
        "linear_2 = torch.ops.rwfx.row_linear.default(x, first_weight, first_bias, rows_first_weight, 'rows', 'dense')",
        "act = self.act(linear_2)",
        "second_weight = self.second.weight",
        "second_bias = self.second.bias",
        "linear_3 = torch.ops.rwfx.row_linear.default(act, second_weight, second_bias, rows_second_weight, "
        "'rows', 'dense')",
        "return linear_3",
    ]
    assert code(read_columns(before)) == [
        *start,
        "linear_2 = torch.ops.rwfx.row_linear.default(x, first_weight, first_bias, rows_first_weight, 'rows', 'dense')",
        "second_weight = self.second.weight",
        "second_bias = self.second.bias",
        "linear_3 = torch.ops.rwfx.row_linear.default(linear_2, second_weight, second_bias, rows_second_weight, "
        "'rows', 'dense', columns = rows_first_weight, activation = 'relu', direct = True)",
        "return linear_3",
    ]


def scaled_in_place(m, x):
    h = m.first(x)
    t = torch.tanh(h)
    h.mul_(2)
    return m.second(t) + h.sum()


def centred_in_place(m, x):
    h = m.first(x)
    h.sub_(h.mean(1, keepdim=True))
    return m.second(h)


def two_readers_in_place(m, x):
    h = m.first(x)
    g = h * 2
    return m.second(torch.relu_(h)) + g.sum()


def alias_in_place(m, x):
    h = m.first(x)
    return m.second(torch.relu_(m.same(h))) + h.sum()


def activation_with_two_readers(m, x):
    h = torch.relu(m.first(x))
    return m.second(h) + h.sum()


def source_with_two_readers(m, x):
    h = m.first(x)
    return m.second(torch.relu(h)) + h.sum()


def hooked(m, x):
    return m.second(m.act(m.first(x)))


def with_a_hook():
    model = Between(hooked, act=nn.ReLU())
    model.act.register_forward_hook(lambda module, args, y: y.flip(-1))
    return model


CONFINED = {"columns": "rows_first_weight"}
DIRECT = {"direct": "True"}
CASES = {  # a model, and what its second call is told
    "nothing": (lambda: Between(lambda m, x: m.second(m.first(x))), CONFINED | DIRECT),
    **{
        name: (
            lambda f=f: Between(lambda m, x: m.second(f(m.first(x)))),
            CONFINED | DIRECT | {"activation": name},
        )
        for name, f in FUNCTIONS.items()
        if name
    },
    "method": (
        lambda: Between(lambda m, x: m.second(m.first(x).sigmoid())),
        CONFINED | DIRECT | {"activation": "sigmoid"},
    ),
    "dropout": (lambda: Between(lambda m, x: m.second(F.dropout(m.first(x), 0.5, m.training))), CONFINED),
    "dropout, relu": (
        lambda: Between(lambda m, x: m.second(m.drop(m.first(x)).relu()), drop=nn.Dropout(0.5)),
        CONFINED | {"activation": "relu"},
    ),
    "relu, dropout": (
        lambda: Between(lambda m, x: m.second(m.drop(m.first(x).relu())), drop=nn.Dropout(0.5)),
        CONFINED,
    ),
    "times two": (lambda: Between(lambda m, x: m.second(m.first(x) * 2)), CONFINED),
    "tanh-gelu": (lambda: Between(lambda m, x: m.second(F.gelu(m.first(x), approximate="tanh"))), CONFINED),
    "tanh-GELU": (lambda: Between(hooked, act=nn.GELU(approximate="tanh")), CONFINED),
    "in place": (lambda: Between(hooked, act=nn.ReLU(inplace=True)), CONFINED | DIRECT | {"activation": "relu"}),
    "in place, two readers": (lambda: Between(two_readers_in_place), CONFINED),
    "in place, of another name": (lambda: Between(alias_in_place, same=nn.Identity()), CONFINED),
    "source changed afterwards": (lambda: Between(scaled_in_place), CONFINED),
    "source with two readers": (lambda: Between(source_with_two_readers), CONFINED | {"activation": "relu"}),
    "activation with two readers": (lambda: Between(activation_with_two_readers), CONFINED),
    "residual": (lambda: Between(lambda m, x: m.second(m.first(x) + F.pad(x, (0, 2)))), {}),
    "layernorm": (lambda: Between(hooked, act=nn.LayerNorm(6)), {}),
    "softmax": (lambda: Between(lambda m, x: m.second(m.first(x).softmax(-1))), {}),
    "transposed": (lambda: Between(lambda m, x: m.second(m.first(x).view(2, 3, 6).mean(1))), {}),
    "centred in place": (lambda: Between(centred_in_place), {}),
    "forward hook": (with_a_hook, {}),
}
every_case = pytest.mark.parametrize(("make_model", "told"), CASES.values(), ids=CASES)


@every_case
def test_a_call_is_told_its_columns_where_only_pointwise_operations_lie_before_it(make_model, told):
    assert calls(read_columns(rewritten(make_model()))) == {"first.weight": {}, "second.weight": told}


@every_case
def test_a_full_input_gradient_is_left_as_it_is(make_model, told):
    before = rewritten(make_model(), dx="full")
    assert code(read_columns(before)) == code(before)


def step_of(gm, x):
    """Outputs and gradients of a training step from fixed seeds."""
    torch.manual_seed(3)
    gm = copy.deepcopy(gm)
    for p in gm.parameters():
        p.grad = None
    y = gm(x)
    y.sin().sum().backward()
    return y.detach(), {name: p.grad for name, p in gm.named_parameters()}


@every_case
def test_outputs_stay_bit_for_bit_and_gradients_of_parameters_as_they_were(make_model, told):
    before = rewritten(make_model())
    printed = before.code
    after = read_columns(before)
    before.recompile()
    assert before.code == printed
    assert after.graph is not before.graph
    assert {id(p) for p in before.parameters()} == {id(p) for p in after.parameters()}
    x = torch.randn(6, 4, dtype=torch.float64)
    (y, grads), (y_after, grads_after) = step_of(before, x), step_of(after, x)
    assert torch.equal(y, y_after)
    assert all(grad.count_nonzero() for grad in grads.values())
    for name, grad in grads.items():
        assert_close(grads_after[name], grad, rtol=0, atol=1e-12)


def told(gm, weight, by_name, **options):
    """The graph module with the call on ``weight`` given these arguments as well, by name or in their places.

    A tensor becomes a buffer; ``scale`` is made of the call's rows.
    """
    gm = copy.deepcopy(gm)
    (call,) = [node for node in gm.graph.nodes if node.target is ROW_LINEAR and node.args[1].target == weight]
    with gm.graph.inserting_before(call):
        for name, value in options.items():
            if name == "scale":
                options[name] = gm.graph.call_function(torch.add, (call.args[3], 0.5))
            elif isinstance(value, torch.Tensor):
                gm.register_buffer(f"{name}_of_{call.name}", value.clone())
                options[name] = gm.graph.get_attr(f"{name}_of_{call.name}")
    if by_name:
        call.kwargs = options
    else:
        rest = ROW_LINEAR._schema.arguments[len(call.args) :]
        call.args += tuple(options.get(argument.name, argument.default_value) for argument in rest)
    gm.graph.lint()
    gm.recompile()
    return gm


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.third(torch.tanh(self.second(F.dropout(torch.relu(self.first(x)), 0.0))))


READS = {  # what a call is told, and whether it reads its rows alone
    "nothing": ({}, True),
    "scale": ({"scale": True}, True),
    "seen, its rows": ({"seen": torch.full((6,), -1.0), "seen_all": False}, True),
    "scale and seen, its rows": ({"scale": True, "seen": torch.full((6,), -1.0), "seen_all": False}, True),
    "seen": ({"seen": torch.zeros(6)}, False),
    "seen, all rows": ({"seen": torch.zeros(6), "seen_all": True}, False),
    "scale and seen": ({"scale": True, "seen": torch.zeros(6)}, False),
    "chosen": ({"chosen": torch.zeros(7, dtype=torch.int64)}, False),
    "chosen and seen, its rows": (
        {"chosen": torch.zeros(7, dtype=torch.int64), "seen": torch.full((6,), -1.0), "seen_all": False},
        False,
    ),
}


@pytest.mark.parametrize("by_name", [True, False], ids=["by-name", "in-place"])
@pytest.mark.parametrize("second", READS.values(), ids=READS)
@pytest.mark.parametrize("first", READS.values(), ids=READS)
def test_a_call_is_confined_where_the_one_before_it_reads_its_rows_alone(first, second, by_name):
    """And all gradients, and all that is seen and chosen, are those of calls that are not confined."""
    before = told(told(rewritten(Three()), "first.weight", by_name, **first[0]), "second.weight", by_name, **second[0])
    after = read_columns(before)
    names = [argument.name for argument in ROW_LINEAR._schema.arguments]
    nodes = [node for node in after.graph.nodes if node.target is ROW_LINEAR]
    found = {n.args[1].target: dict(zip(names, n.args, strict=False)) | n.kwargs for n in nodes}
    for weight, producer, confined in (("second", "first", first[1]), ("third", "second", second[1])):
        columns = found[f"{weight}.weight"].get("columns")
        assert str(columns) == (f"rows_{producer}_weight" if confined else "None")
    assert not found["second.weight"].get("direct")  # a dropout lies in between
    assert bool(found["third.weight"].get("direct")) == second[1]

    def step(gm):
        torch.manual_seed(3)
        gm = copy.deepcopy(gm)
        gm(x).sin().sum().backward()
        return {name: p.grad for name, p in gm.named_parameters()} | dict(gm.named_buffers())

    x = torch.randn(9, 4, dtype=torch.float64)
    ours, theirs = step(after), step(before)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.count_nonzero(), name
        assert_close(ours[name], tensor, rtol=1e-6 if tensor.dtype == torch.float32 else 0, atol=1e-12)


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_every_model_has_the_gradients_of_the_dense_columns(kind, monkeypatch):
    def gradients_of(model):
        args, kwargs = torch.utils._pytree.tree_map(lambda t: t.clone(), inputs)
        torch.manual_seed(3)
        output = model(*args, **kwargs)
        leaves = torch.utils._pytree.tree_leaves(output)
        sum(leaf.sin().sum() for leaf in leaves).backward()
        return leaves, {name: p.grad for name, p in model.named_parameters()}

    inputs = make(kind).inputs()
    example = inputs[0] if not inputs[1] else {"x": inputs[0][0], **inputs[1]}
    confined = gradients_of(rwfx.transform(make(kind), 3, seed=0, example_inputs=example))
    monkeypatch.setattr(sys.modules["rwfx.transform"], "read_columns", lambda gm: gm)
    plain = gradients_of(rwfx.transform(make(kind), 3, seed=0, example_inputs=example))
    assert all(torch.equal(a, b) for a, b in zip(confined[0], plain[0], strict=True))
    assert confined[1].keys() == plain[1].keys()
    for name, grad in plain[1].items():
        assert (grad is None) == (confined[1][name] is None)
        if grad is not None:
            assert_close(confined[1][name], grad, rtol=0, atol=1e-12)
