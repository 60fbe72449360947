import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO, Gated, Heads, Residual, make

import rwfx
from rwfx.ops.walk import bits, draw_features, mix, pack_stations, unpack_stations
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


@pytest.mark.parametrize("resample_every", [1, 3])
def test_with_a_density_nothing_is_read_back_from_the_device(resample_every):
    sparse = rwfx.transform(
        make(Residual), rows=rwfx.RandomWalk(density=0.3, epsilon=0.1), seed=3, resample_every=resample_every
    )
    arguments = arguments_of_walk(sparse)
    with NothingReadBack():
        walk_op(*arguments)
    arguments = arguments_of_walk(rwfx.transform(make(Residual), num_paths=3, seed=3))
    with pytest.raises(AssertionError), NothingReadBack():
        walk_op(*arguments)


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
