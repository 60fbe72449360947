import math
from collections import defaultdict
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO, Gated, Heads, Residual, Twice, make

import rwfx
from rwfx.ops.walk import bits, draw_features, is_tree, mix, pack_stations, sweep, unpack_stations
from rwfx.ops.walk import uniform as uniform_numbers
from rwfx.ops.walk import walk as walk_op
from rwfx.walk import stations_of

WALKS = 40_000
SIGNIFICANCE = 1e-4


def step(weight, temperature=1.0, epsilon=0.0):
    """The transition matrix of one step, from rows to input features."""
    p = weight.detach().double().abs() ** (1 / temperature)
    p = p / p.sum(1, keepdim=True)
    return (1 - epsilon) * p + epsilon / p.shape[1]


def uniform(n):
    return torch.full((1, n), 1 / n, dtype=torch.float64)


def assert_drawn_from(walks, expected):
    """Chi-square of how often each row is passed, and of not passing, per linear call."""
    for column, p in zip(walks.t(), expected, strict=True):
        p = torch.cat([1 - p.sum(1), p[0]])
        counts = torch.bincount(column + 1, minlength=len(p)).double()
        assert counts[p < 1e-12].sum() == 0
        possible = p >= 1e-12
        if possible.sum() > 1:
            assert chisquare(counts[possible], p[possible] / p[possible].sum() * len(column)).pvalue > SIGNIFICANCE


def walk(model, **options):
    graph = rwfx.weight_graph(model)
    return rwfx.random_walks(graph, dict(model.named_parameters()), WALKS, seed=5, **options)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"temperature": 3.0}, {"epsilon": 0.3}, {"epsilon": 1.0}], ids=str
)
def test_a_chain_is_walked_by_the_powers_of_its_transition_matrix(options):
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4))
    a, b, c = (model[i].weight for i in (0, 2, 4))
    at_c = uniform(4)
    at_b = at_c @ step(c, **options)
    at_a = at_b @ step(b, **options)
    assert a.shape[0] == at_a.shape[1]
    assert_drawn_from(walk(model, **options), [at_a, at_b, at_c])


def test_where_rows_are_added_each_is_as_likely():
    model = make(Residual)
    stem, first, second, third, head = (p for p in model.parameters() if p.dim() == 2)
    # The stream is stem + first + second + third: at the head one of four, at the third block one of three, ...
    from_head = uniform(4) @ step(head)
    at_third = from_head / 4
    into_third = at_third @ step(third)
    at_second = from_head / 4 + into_third / 3
    into_second = at_second @ step(second)
    at_first = from_head / 4 + into_third / 3 + into_second / 2
    at_stem = from_head / 4 + into_third / 3 + into_second / 2 + at_first @ step(first)
    assert_drawn_from(walk(model), [at_stem, at_first, at_second, at_third, uniform(4)])
    assert stem.shape[0] == at_stem.shape[1]


def test_a_concatenation_leads_to_either_part_and_an_input_ends_a_walk():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 3), nn.Linear(5, 4), nn.Linear(3 + 4 + 5, 6)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), x, self.b(x)], 1))

    model = Model()
    with torch.no_grad():
        model.c.weight[:, 3:8] *= 3
    into = uniform(6) @ step(model.c.weight)
    walks = walk(model)
    assert_drawn_from(walks, [into[:, :3], into[:, 8:], uniform(6)])
    assert 0.3 < (walks[:, :2] < 0).all(1).float().mean() < 0.9


def test_several_heads_share_the_walks():
    model = make(Heads)
    class_head, box_head = model.class_head.weight, model.box_head.weight
    into = (uniform(3) @ step(class_head) + uniform(4) @ step(box_head)) / 2
    # The mean of the hidden layer is an output too, so its rows are where a quarter of the walks start.
    walks = walk(model)
    counts = (walks >= 0).double().mean(0)
    graph = rwfx.weight_graph(model)
    starts = len(graph.heads)
    column = {use.name: k for k, use in enumerate(graph.uses)}
    assert starts == 4
    assert counts[column["class_head.weight"]] == counts[column["box_head.weight"]] == 1 / 4
    assert_drawn_from(walks[:, [column["class_head.weight"]]][walks[:, column["class_head.weight"]] >= 0], [uniform(3)])
    hidden = (into * 2 / 4) / 2 + uniform(8) / 4
    assert_drawn_from(walks[:, [column["a.weight"]]], [hidden])


def test_a_gated_unit_leads_to_gate_and_value():
    model = make(Gated)
    into = uniform(3) @ step(model.out.weight)
    assert_drawn_from(walk(model), [into / 2, into / 2, uniform(3)])


def draw(weight, rows, temperature=1.0):
    u, v = uniform_numbers(mix(*torch.tensor([0, 0])), torch.tensor([[0], [1]]), torch.arange(len(rows)))
    return draw_features(weight, rows, temperature, 0.0, u, v)


@pytest.mark.parametrize(
    "row",
    [torch.zeros(6), torch.tensor([1.0, float("nan"), 0, 0, 0, 0]), torch.tensor([1.0, float("inf"), 0, 0, 0, 0])],
)
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_an_all_zero_or_non_finite_row_is_drawn_from_uniformly(row, temperature):
    weight = torch.stack([torch.arange(6.0), row])
    rows = torch.ones(WALKS, dtype=torch.int64)
    features = draw(weight, rows, temperature)
    assert chisquare(torch.bincount(features, minlength=6)).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_feature_of_weight_zero_is_never_drawn(dtype):
    weight = torch.zeros(3, 1000, dtype=dtype)
    weight[:, 7::100] = torch.linspace(0.01, 100, 10).to(dtype)
    weight[:, -1] = 0
    rows = torch.arange(3).repeat(20_000)
    features = draw(weight, rows)
    assert set((features % 100).tolist()) == {7}


def test_large_weights_do_not_overflow_at_low_temperature():
    weight = torch.tensor([[1e30, 2e30, 0.0]])
    features = draw(weight, torch.zeros(9000, dtype=torch.int64), 0.1)
    assert set(features.tolist()) == {0, 1}
    assert features.float().mean() > 0.99


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_row_sets_are_the_distinct_rows_of_the_walks(kind):
    model = make(kind)
    sparse = rwfx.transform(model, rows=rwfx.RandomWalk(4, min_rows=0), seed=9)
    args, kwargs = model.inputs()
    sparse(*args, **kwargs)
    graph = rwfx.weight_graph(model)
    walks = rwfx.random_walks(graph, dict(model.named_parameters()), 4, seed=9)
    for name, rows in sparse.rows.items():
        passed = torch.cat([walks[:, k] for k, use in enumerate(graph.uses) if use.weight == name])
        assert_close(rows, passed[passed >= 0].unique())


@pytest.mark.parametrize("min_rows", [0, 1, 5, 8, 100])
def test_min_rows_fills_up_uniformly_without_repeats(min_rows):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].weight.zero_()[:, 2] = 1  # every walk goes through row 2
    sparse = rwfx.transform(model, rows=rwfx.RandomWalk(1, min_rows=min_rows), seed=0)
    counts = torch.zeros(8)
    for _ in range(2000):
        sparse(torch.randn(1, 4))
        rows = sparse.rows["0.weight"]
        assert len(rows) == max(1, min(min_rows, 8))
        assert torch.equal(rows, rows.unique())
        counts[rows] += 1
    assert counts[2] == 2000
    others = torch.cat([counts[:2], counts[3:]])
    if 1 < min_rows < 8:
        assert chisquare(others).pvalue > SIGNIFICANCE
    elif min_rows <= 1:
        assert others.sum() == 0


def test_a_weight_that_no_walk_visits_has_no_row_without_min_rows():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    model = Model()
    with torch.no_grad():
        model.c.weight[:, 3:] = 0
    sparse = rwfx.transform(model, rows=rwfx.RandomWalk(5, min_rows=0))
    sparse(torch.randn(2, 4)).sum().backward()
    assert len(sparse.rows["b.weight"]) == 0
    assert model.b.weight.grad.count_nonzero() == 0


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_the_number_of_tensor_calls_does_not_grow_with_walks_or_rows():
    calls = []
    for width, paths in ((16, 10), (16, 5000), (512, 10)):
        model = nn.Sequential(nn.Linear(16, width), nn.Linear(width, width), nn.Linear(width, 4))
        graph = rwfx.weight_graph(model)
        with Count() as count:
            rwfx.random_walks(graph, dict(model.named_parameters()), paths)
        calls.append(count.calls)
    assert calls[0] == calls[1] == calls[2]


@pytest.mark.parametrize("options", [{"num_paths": 3}, {"density": 0.4}], ids=str)
def test_opcheck(options):
    sparse = rwfx.transform(make(Residual), **options)
    torch.library.opcheck(torch.ops.rwfx.walk.default, arguments_of_walk(sparse))


def test_stations_survive_packing():
    stations, _ = stations_of(
        rwfx.weight_graph(make(Residual)), ["stem.weight", "head.weight"] + [f"blocks.{k}.weight" for k in range(3)]
    )
    assert unpack_stations(tuple(pack_stations(stations))) == stations


def test_streams_of_neighbouring_seeds_and_steps_do_not_meet():
    seeds, steps = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    keys = mix(seeds, steps)
    assert len(keys.unique()) == 200 * 200
    assert (keys >= 0).all()
    first = uniform_numbers(keys[:40, :40].reshape(-1), torch.tensor(0), torch.tensor(0))
    assert chisquare(torch.histc(first, 10, 0, 1)).pvalue > SIGNIFICANCE


def test_random_numbers_are_uniform_and_those_of_a_published_generator():
    # The first numbers of SplitMix64 from state 0, as published with its reference implementation.
    assert bits(torch.tensor(0), 0, torch.arange(2)).tolist() == [0xE220A8397B1DCDAF - 2**64, 0x6E789E6AA1B965F4]
    numbers = uniform_numbers(torch.tensor(7), torch.arange(8)[:, None], torch.arange(5000))
    assert 0 <= numbers.min() < numbers.max() < 1
    for stream in numbers:
        assert chisquare(torch.histc(stream, 50, 0, 1)).pvalue > SIGNIFICANCE
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 5 / 5000**0.5


def test_equal_seeds_give_equal_walks():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    graph, weights = rwfx.weight_graph(model), dict(model.named_parameters())
    a, b, c = (rwfx.random_walks(graph, weights, 50, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert F.one_hot(a[:, 1] + 1, 4).sum() == 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_is_cast_keeps_its_graph(dtype):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Linear(4, 600), nn.Linear(600, 600), nn.Linear(600, 1)

        def forward(self, x):
            h = self.stem(x)
            return self.head(h + self.block(h).relu())

    model = Model()
    with torch.no_grad():
        model.head.weight.zero_()[0, 501] = 1
    sparse = rwfx.transform(model, rows=rwfx.RandomWalk(200, min_rows=0)).to(dtype)
    sparse(torch.randn(2, 4, dtype=dtype))
    assert sparse.rows["block.weight"].tolist() == [501]


class NothingReadBack(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a number, or a shape that depends on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "unique2"), func
        if func is torch.ops.aten.index.Tensor:
            assert all(i is None or i.dtype != torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


def arguments_of_walk(sparse):
    """The arguments that a transformed model's sampler calls its operator with."""
    seen = []

    class Catch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.rwfx.walk.default:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    sampler = sparse._sampler
    with Catch():
        sampler(*[sparse.get_parameter(name).detach() for name in sampler.crossed])
    return seen[0]


def reads(operation, arguments, monkeypatch):
    """How many times an operator reads from the device; those it cannot be seen to do fail here."""
    read, tolist = [], torch.Tensor.tolist
    with monkeypatch.context() as patch, NothingReadBack():
        patch.setattr(torch.Tensor, "tolist", lambda tensor: read.append(tensor) or tolist(tensor))
        operation(*arguments)
    return len(read)


@pytest.mark.parametrize("resample_every", [1, 3])
def test_with_a_density_nothing_is_read_back_from_the_device(resample_every, monkeypatch):
    sparse = rwfx.transform(
        make(Residual), rows=rwfx.RandomWalk(density=0.3, epsilon=0.1), seed=3, resample_every=resample_every
    )
    assert reads(walk_op, arguments_of_walk(sparse), monkeypatch) == 0


@pytest.mark.parametrize("min_rows", [1, 4])
def test_without_a_density_the_device_is_read_once_whatever_the_depth(min_rows, monkeypatch):
    for blocks in (1, 6):
        torch.manual_seed(0)
        sparse = rwfx.transform(Residual(blocks), rows=rwfx.RandomWalk(3, min_rows=min_rows), seed=3)
        assert reads(walk_op, arguments_of_walk(sparse), monkeypatch) == 1


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("num_paths", [None, 1, 500])
@pytest.mark.parametrize("kind", [Residual, Heads])
def test_with_a_density_every_row_set_has_its_share_of_distinct_sorted_rows(kind, density, num_paths):
    model = make(kind)
    sparse = rwfx.transform(model, num_paths, density=density, seed=2)
    args, kwargs = model.inputs()
    drawn = set()
    for _ in range(5):
        sparse(*args, **kwargs)
        for name, rows in sparse.rows.items():
            size = len(model.get_parameter(name))
            assert len(rows) == math.ceil(density * size)
            assert torch.equal(rows, rows.unique())
            assert 0 <= rows.min() <= rows.max() < size
        drawn.add(str(sparse.rows))
    assert len(drawn) > 1 or density == 1.0


def test_with_a_density_the_rows_are_those_that_the_first_walks_come_by():
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50))
    graph, weights = rwfx.weight_graph(model), dict(model.named_parameters())
    for seed in range(20):
        sparse = rwfx.transform(model, 60, density=0.25, seed=seed)
        sparse(torch.randn(2, 30))
        walks = rwfx.random_walks(graph, weights, 60, seed=seed)
        for column, (name, count) in enumerate({"0.weight": 10, "1.weight": 13}.items()):
            first = list(dict.fromkeys(walks[:, column].tolist()))[:count]
            assert sparse.rows[name].tolist() == sorted(first)


def test_with_a_density_a_compiled_model_has_fixed_shapes():
    seen = []

    def backend(gm, example_inputs):
        values = [node.meta.get("example_value") for node in gm.graph.nodes]
        shapes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
        seen.extend(type(size) for size in shapes)
        return gm.forward

    model = make(Residual)
    for options in ({"density": 0.3}, {"num_paths": 3}):
        torch._dynamo.reset()
        seen.clear()
        compiled = torch.compile(rwfx.transform(model, **options), backend=backend, fullgraph=True)
        compiled(*model.inputs()[0])
        assert (set(seen) == {int}) == ("density" in options)


def test_row_sets_are_kept_for_as_many_steps_as_asked_for():
    for options in ({"num_paths": 4}, {"density": 0.2}):
        sparse = rwfx.transform(make(Residual), resample_every=3, seed=1, **options)
        drawn = []
        for _ in range(12):
            sparse(torch.randn(2, 12, dtype=torch.float64))
            drawn.append(str(sparse.rows))
        assert all(drawn[k] == drawn[k - k % 3] for k in range(12))
        assert len(set(drawn)) == 4


def test_walks_cross_a_weight_of_integers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 3)
            self.fixed = nn.Parameter(torch.tensor([[0, 5, 0], [0, -2, 0]]), requires_grad=False)

        def forward(self, x):
            return F.linear(self.first(x).long(), self.fixed)

    sparse = rwfx.transform(Model(), rows=rwfx.RandomWalk(3, min_rows=0))
    sparse(torch.randn(2, 4))
    assert sparse.rows["first.weight"].tolist() == [1]


# --- What the walks follow beside the weights ------------------------------------------------------------------------


def chain(*sizes):
    torch.manual_seed(3)
    return nn.Sequential(*[nn.Linear(i, o) for i, o in pairwise(sizes)]).double()


class Concatenated(nn.Module):
    """A tree of two branches and an input at which walks end."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b, self.c = nn.Linear(5, 2), nn.Linear(5, 3), nn.Linear(2 + 5 + 3, 2)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), x, self.b(x)], 1))


class TwoHeads(nn.Module):
    """Two trees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b, self.c, self.d = nn.Linear(5, 3), nn.Linear(5, 2), nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, x):
        return self.c(self.a(x)), self.d(self.b(x))


class Flattened(nn.Module):
    """Two features for each row of the first weight, in another order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.a, self.b = nn.Linear(5, 3), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(self.a(x.unflatten(0, (-1, 2))).flatten(1).flip(1))


class Call:
    """``rwfx::walk`` of a model, by its stations."""

    def __init__(self, model, *args):
        graph = rwfx.weight_graph(model, args or None)
        self.names = list(graph.names)
        self.stations, self.tables = stations_of(graph, self.names)
        self.heads, self.starts = list(graph.heads), list(graph.heads.values())
        self.weights = [model.get_parameter(name).detach() for name in self.names]
        self.sizes = [len(w) for w in self.weights]
        self.last = torch.zeros(len(self.names) + 1 + sum(self.sizes), dtype=torch.int64)

    def arguments(
        self, step, num_paths, temperature=1.0, epsilon=0.0, min_rows=1, exactly=(), resample_every=1, seed=7
    ):
        kept, layout = list(range(len(self.names))), pack_stations(self.stations)
        graph = self.weights, kept, self.tables, self.heads, self.starts, layout
        numbers = num_paths, temperature, epsilon, min_rows, list(exactly), resample_every
        return *graph, torch.tensor([seed, step]), self.last, *numbers

    def rows(self, step, num_paths, *, op=torch.ops.rwfx.walk.default, **options):
        """The operator's answer, less the last: row sets, then scales where asked for."""
        new = {
            name: options.pop(name) for name in ("factors", "start_weights", "budget", "unbiased") if name in options
        }
        return op(*self.arguments(step, num_paths, **options), **new)[:-1]

    def visits(self, num_paths, step=0, temperature=1.0, epsilon=0.0, factors=(), start_weights=(), seed=7):
        """Where walks pass, by weight: ``(P,)``, -1 where they do not."""
        graph = self.stations, self.weights, self.tables, self.heads, self.starts
        key = mix(*torch.tensor([seed, step]))
        passes = sweep(*graph, num_paths, temperature, epsilon, key, factors, start_weights)
        return {self.names[self.stations[s].weight]: rows for s, rows in passes}

    def random_factors(self):
        """Factors for every station, and weights for every start."""
        torch.manual_seed(8)
        features = [0 if s.weight < 0 else self.weights[s.weight].shape[1] for s in self.stations]
        return [torch.rand(n) + 0.05 for n in features], [torch.rand(len(ids)) + 0.1 for ids in self.starts]


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"epsilon": 0.3}], ids=str)
def test_factors_multiply_the_weights(options):
    call = Call(chain(5, 6, 7, 4))
    factors, _ = call.random_factors()
    factors[1][2] = 0

    def step_by(k):
        p = call.weights[k].abs() ** (1 / options.get("temperature", 1.0)) * factors[k].double()
        return step(p, epsilon=options.get("epsilon", 0.0))

    at_b = uniform(4) @ step_by(2)
    walks = call.visits(WALKS, factors=factors, **options)
    assert_drawn_from(torch.stack([*walks.values()][::-1], 1), [at_b @ step_by(1), at_b, uniform(4)])


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize(
    "factor",
    [[0, 1, 0, 0], [float("nan"), 1, 1, 1], [1, 1, 1, float("inf")], [0, 0, 0, 0]],
    ids=["barred", "nan", "inf", "zero"],
)
def test_where_products_are_all_zero_or_not_finite_a_feature_is_drawn_uniformly(factor, temperature):
    weight = torch.tensor([[1.0, 0.0, 2.0, 3.0]])
    u, v = uniform_numbers(mix(*torch.tensor([0, 0])), torch.tensor([[0], [1]]), torch.arange(WALKS))
    rows, factor = torch.zeros(WALKS, dtype=torch.int64), torch.tensor(factor)
    features = draw_features(weight, rows, temperature, 0.0, u, v, factor)
    assert chisquare(torch.bincount(features, minlength=4)).pvalue > SIGNIFICANCE


def test_products_of_small_numbers_are_not_zero():
    weight, factor = torch.tensor([[1e-30, 3e-30]]), torch.tensor([1e-30, 1e-30])
    u, v = uniform_numbers(mix(*torch.tensor([0, 0])), torch.tensor([[0], [1]]), torch.arange(WALKS))
    features = draw_features(weight, torch.zeros(WALKS, dtype=torch.int64), 1.0, 0.0, u, v, factor)
    assert chisquare(torch.bincount(features), [WALKS / 4, WALKS * 3 / 4]).pvalue > SIGNIFICANCE


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1.0, 0.0, 3.0, 6.0], [0.1, 0.0, 0.3, 0.6]),
        ([2.0, 2.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]),
        ([0.0] * 4, [0.25] * 4),
        ([1.0, float("nan"), 1.0, 1.0], [0.25] * 4),
        ([1.0, float("inf"), 1.0, 1.0], [0.25] * 4),
    ],
    ids=["some", "without-the-last", "zero", "nan", "inf"],
)
def test_start_weights_are_what_starts_are_drawn_by(given, expected):
    walks = Call(chain(3, 4)).visits(WALKS, start_weights=[torch.tensor(given)])
    assert_drawn_from(walks["0.weight"][:, None], [torch.tensor([expected]).double()])


def test_each_head_has_its_own_start_weights():
    call = Call(TwoHeads())
    walks = call.visits(100, start_weights=[torch.eye(len(ids))[-1] for ids in call.starts])
    assert walks["c.weight"].unique().tolist() == [-1, 1]
    assert walks["d.weight"].unique().tolist() == [-1, 2]


# --- Budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 7, 2), (6, 7, 4), (6, 1, 4)], ids=str)
@pytest.mark.parametrize("num_paths", [0, 1, 30])
def test_a_budget_takes_the_place_of_num_paths_and_exactly(num_paths, counts):
    call = Call(chain(5, 6, 7, 4))
    for step in range(5):
        given = call.rows(step, 9, budget=torch.tensor([num_paths, *counts]), min_rows=5)
        assert [len(rows) for rows in given] == [*counts]
        assert all(torch.equal(a, e) for a, e in zip(given, call.rows(step, num_paths, exactly=counts), strict=True))


@pytest.mark.parametrize("op", [torch.ops.rwfx.walk.default, walk_op], ids=["operator", "python"])
def test_without_walks_rows_are_drawn_uniformly(op):
    call = Call(chain(5, 6, 7))
    counts = torch.zeros(6), torch.zeros(7)
    for step in range(1500):
        for count, rows in zip(counts, call.rows(step, 0, budget=torch.tensor([0, 2, 3]), op=op), strict=True):
            count[rows] += 1
    for count, share in zip(counts, (2 / 6, 3 / 7), strict=True):
        assert count.sum() == 1500 * share * len(count)
        assert (abs(count - 1500 * share) < 4 * (1500 * share * (1 - share)) ** 0.5).all()


def test_rows_are_kept_as_long_as_asked_for_whatever_the_budget():
    call = Call(chain(5, 6, 7))
    for step in range(9):
        *rows, call.last = torch.ops.rwfx.walk.default(
            *call.arguments(step, 1, resample_every=3), budget=torch.tensor([4, 1 + step % 6, 3])
        )
        assert len(rows[0]) == 1 + (step - step % 3) % 6


class Draw(nn.Module):
    """Some rows of two tensors, as many as its budget says."""

    def __init__(self, **new):
        super().__init__()
        self.call, self.new, self.step = Call(chain(5, 6, 7)), new, torch.tensor([7, 0])
        self.arguments = self.call.arguments(0, 9)

    def forward(self, x, y):
        before, after = self.arguments[:6], self.arguments[7:]
        first, second, *scales, _ = torch.ops.rwfx.walk.default(*before, self.step, *after, **self.new)
        self.step += torch.tensor([0, 1])
        return [x[first], y[second], *scales]


@pytest.mark.parametrize(("new", "backend"), [("budget", "inductor"), ("unbiased", "aot_eager")])
def test_one_graph_serves_every_budget_and_scale(new, backend):
    budget = torch.tensor([9, 2, 3])
    modules = [Draw(**({"budget": budget} if new == "budget" else {"unbiased": True})) for _ in range(2)]
    torch._dynamo.reset()
    counters.clear()
    x, y = torch.randn(6, 2), torch.randn(7, 2)
    sizes = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(modules[0], backend=backend, fullgraph=True)
        for given in ([9, 2, 3], [1, 6, 7], [0, 1, 1], [50, 4, 5], [2, 6, 1]):
            budget.copy_(torch.tensor(given))
            ours, theirs = compiled(x, y), modules[1](x, y)
            assert_close(ours, theirs)
            sizes.add(tuple(map(len, ours)))
            assert new == "unbiased" or [len(ours[0]), len(ours[1])] == given[1:]
    assert len(sizes) > 1
    assert counters["stats"]["unique_graphs"] == 1


# --- Scales ----------------------------------------------------------------------------------------------------------

CHANCES = [
    {},
    {"num_paths": 1},
    {"num_paths": 2, "temperature": 2.0, "epsilon": 0.2},
    {"num_paths": 2, "follow": True},
    {"num_paths": 4, "follow": True, "temperature": 0.5},
    {"epsilon": 1.0},
]
TREES = {"chain": lambda: chain(4, 3, 3, 2), "concatenated": Concatenated, "two heads": TwoHeads}


def options_of(call, options):
    options = {"num_paths": 3, **options}
    if options.pop("follow", False):
        options["factors"], options["start_weights"] = call.random_factors()
    return options


@pytest.mark.parametrize("options", CHANCES, ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_the_product_of_scales_along_each_path_has_the_mean_one(tree, options):
    call = Call(TREES[tree]())
    options = options_of(call, options)
    paths = [path for head in call.heads for path in ways(call.stations, (head,))]
    of = [call.stations[s].weight for s in range(len(call.stations))]
    steps = 3000
    products = {path: [] for path in paths}
    for step in range(steps):
        both = call.rows(step, unbiased=True, **options)
        rows, scales = both[: len(call.names)], both[len(call.names) :]
        inverse = [torch.zeros(n).index_put_((r,), s) for n, r, s in zip(call.sizes, rows, scales, strict=True)]
        for path in paths:
            total = inverse[of[path[0]]]
            for s in path[1:]:
                total = total[..., None] * inverse[of[s]]
            products[path].append(total)
    for drawn in products.values():
        drawn = torch.stack(drawn).double()
        assert drawn.dim() >= 3
        error = drawn.std(0) / steps**0.5
        assert (abs(drawn.mean(0) - 1) <= 4 * error + 1e-6).all(), (drawn.mean(0), error)


def ways(stations, path):
    """The ways on from a use to the last ones, as tuples of stations."""
    targets = stations[path[-1]].targets
    return [way for t in targets for way in ways(stations, (*path, t))] or [path]


@pytest.mark.parametrize("options", CHANCES, ids=str)
def test_a_scale_is_the_inverse_of_how_often_a_row_is_drawn_from_where_the_walks_stood(options):
    call = Call(chain(4, 3, 2))
    options = options_of(call, options)
    heads, steps, inverse = torch.zeros(2), 1500, {}
    times, below = defaultdict(int), defaultdict(lambda: torch.zeros(3))
    for step in range(steps):
        stood = tuple(call.visits(step=step, **options)["1.weight"].sort().values.tolist())
        lower, upper, lower_scale, upper_scale = call.rows(step, unbiased=True, **options)
        times[stood] += 1
        below[stood][lower] += 1
        heads[upper] += 1
        for where, rows, scales in ((stood, lower, lower_scale), ("head", upper, upper_scale)):
            for row, scale in zip(rows.tolist(), scales.tolist(), strict=True):
                assert inverse.setdefault((where, row), scale) == scale
    for (where, row), scale in inverse.items():
        count, n = (heads[row], steps) if where == "head" else (below[where][row], times[where])
        assert abs(count - n / scale) <= 4.5 * (n / scale * (1 - 1 / scale)) ** 0.5 + 1e-3, (where, row)


@pytest.mark.parametrize("op", [torch.ops.rwfx.walk.default, walk_op], ids=["operator", "python"])
@pytest.mark.parametrize("num_paths", [1, 2, 3])
def test_a_scale_is_the_inverse_of_the_sum_over_all_that_the_walks_can_do(num_paths, op):
    call = Call(Flattened(), torch.randn(4, 5))
    assert [s.targets for s in call.stations] == [(), (0,)]
    to = call.tables[1] - call.stations[0].base
    assert to.bincount().tolist() == [2, 2, 2]
    p = step(call.weights[1], epsilon=0.1)
    for number in range(20):
        stood = call.visits(num_paths, number, epsilon=0.1)["b.weight"].tolist()
        expected = torch.zeros(3, dtype=torch.float64)
        for features in product(range(6), repeat=num_paths):
            together = math.prod(p[i, j].item() for i, j in zip(stood, features, strict=True))
            expected[to[[*features]].unique()] += together
        lower, _, scale, _ = call.rows(number, num_paths, epsilon=0.1, unbiased=True, op=op)
        assert_close(scale, (1 / expected[lower]).float())


@pytest.mark.parametrize("tree", TREES)
def test_scales_leave_the_rows_as_they_are_and_have_no_gradient(tree):
    call = Call(TREES[tree]())
    call.weights = [w.requires_grad_() for w in call.weights]
    for step in range(10):
        both = call.rows(step, 4, unbiased=True)
        rows = call.rows(step, 4)
        assert all(torch.equal(a, e) for a, e in zip(both, rows, strict=False))
        for of, scale in zip(rows, both[len(rows) :], strict=True):
            assert scale.dtype == torch.float32
            assert scale.shape == of.shape
            assert not scale.requires_grad


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (lambda: chain(4, 3, 2), True),
        (Concatenated, True),
        (TwoHeads, True),
        (lambda: make(Residual), False),  # a junction
        (lambda: make(Twice), False),
        (lambda: make(Heads), False),  # two heads lead to one weight
    ],
    ids=["chain", "concatenated", "two heads", "residual", "twice", "shared"],
)
def test_a_tree_has_one_way_to_each_use(kind, expected):
    call = Call(kind())
    assert is_tree(call.stations, call.heads) == expected
    for op in (torch.ops.rwfx.walk.default, walk_op):
        if expected:
            assert len(call.rows(0, 9, unbiased=True, op=op)) == 2 * len(call.names)
        else:
            with pytest.raises(ValueError, match="tree of weight uses"):
                call.rows(0, 9, unbiased=True, op=op)


def test_a_head_that_another_use_leads_to_is_no_tree():
    call = Call(chain(4, 3, 2))
    assert is_tree(call.stations, [1])
    assert not is_tree(call.stations, [1, 0])
    assert not is_tree(call.stations, [1, 1])


@pytest.mark.parametrize("op", [torch.ops.rwfx.walk.default, walk_op], ids=["operator", "python"])
@pytest.mark.parametrize(
    ("options", "met"),
    [
        ({"unbiased": True, "exactly": (2, 2)}, r"\[2, 2\] rows"),
        ({"unbiased": True, "budget": torch.tensor([5, 2, 2])}, r"\[2, 2\] rows"),
        ({"unbiased": True, "resample_every": 2}, "resample_every is 2"),
        ({"unbiased": True, "min_rows": 3}, "min_rows of 0 or 1, not 3"),
        ({"unbiased": True, "min_rows": 0, "num_paths": 0}, "0 walks leave some of the 1 heads"),
        ({"budget": torch.tensor([5, 2])}, r"int64 \(3,\)"),
        ({"budget": torch.tensor([5.0, 2, 2])}, r"int64 \(3,\)"),
        ({"budget": torch.tensor([-1, 2, 2])}, r"\[-1, 2, 2\]"),
        ({"budget": torch.tensor([5, 0, 2])}, r"\[5, 0, 2\]"),
        ({"budget": torch.tensor([5, 2, 3])}, r"\[5, 2, 3\].*\[3, 2\]"),
        ({"factors": [torch.ones(4)]}, "1 factors for 2 stations"),
        ({"factors": [torch.ones(4), torch.ones(2)]}, r"factors\[1\] has the shape .2.*, the weight there has 3"),
        ({"start_weights": [torch.ones(2)] * 2}, "2 start_weights for 1 heads"),
        ({"start_weights": [torch.ones(3)]}, r"start_weights\[0\] has the shape .3.*, its head has 2 starts"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(options, met, op):
    with pytest.raises(ValueError, match=met):
        Call(chain(4, 3, 2)).rows(0, **{"num_paths": 5, **options}, op=op)


@pytest.mark.parametrize("new", ["factors", "budget", "unbiased", "all"])
def test_opcheck_of_what_walks_follow_and_of_budgets_and_scales(new):
    call = Call(chain(5, 6, 7))
    factors, start_weights = call.random_factors()
    options = {
        "factors": {"factors": factors, "start_weights": start_weights},
        "budget": {"budget": torch.tensor([5, 2, 6])},
        "unbiased": {"unbiased": True},
        "all": {"factors": factors, "start_weights": start_weights, "unbiased": True},
    }[new]
    if new == "all":
        call.weights = [w.requires_grad_() for w in call.weights]
    torch.library.opcheck(torch.ops.rwfx.walk.default, call.arguments(0, 5), options)


def test_with_a_budget_nothing_is_read_back_from_the_device():
    call = Call(Concatenated())
    factors, start_weights = call.random_factors()
    arguments = call.arguments(0, 5, temperature=2.0, epsilon=0.1)

    with NothingReadBack():
        walk_op(*arguments, factors, start_weights, torch.tensor([5, 1, 2, 1]))
