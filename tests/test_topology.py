"""Connections that move while a model trains, against dense models with masks and against rules spelled out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import rwfx
from rwfx.extremes import smallest_magnitudes
from rwfx.nonzeros import draw_keys
from rwfx.topology.exchange import at_random, exchanged, tails
from rwfx.topology.methods import METHODS
from rwfx.topology.parts import Part, together

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.02, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
}
EXCHANGES = {
    "gse": {"method": "gse"},
    "grabo": {"method": "gse", "distribution": "grabo", "gamma": 2.0},
    "graest": {"method": "gse", "distribution": "graest"},
    "rigl": {"method": "rigl"},
    "set": {"method": "set"},
    "tails": {"method": "set", "prune": "tails"},
    "snfs": {"method": "snfs"},
}
"""The methods that prune as many connections as they grow."""


def network():
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Unflatten(1, (4, 2, 2))]
    return nn.Sequential(*layers, nn.Conv2d(4, 6, 2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))


def sparsified(density=0.2, seed=0, **options):
    torch.manual_seed(seed)
    return rwfx.sparsify(network().double(), density, seed=seed, **options)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 8, generator=generator, dtype=torch.float64), torch.arange(5) % 3


def backward(model, step):
    x, target = batch(step)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    return loss.detach()


def snapshot(model, optimizer):
    """For every weight its numbers by their keys: values, gradients and what the optimizer holds."""
    found = {}
    for name, weight in model.sparse_weights.items():
        state = {k: v for k, v in optimizer.state[weight.values].items() if v.shape == weight.values.shape}
        tensors = {"value": weight.values, "grad": weight.values.grad, **state}
        columns = {k: dict(zip(weight.keys().tolist(), v.tolist(), strict=True)) for k, v in tensors.items()}
        found[name] = columns
    return found


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", EXCHANGES)
def test_an_update_moves_numbers_with_their_connections_and_new_ones_are_zero(method, optimizer, scope):
    model = sparsified()
    optim = OPTIMIZERS[optimizer](model.parameters())
    topology = rwfx.Topology(model, optim, interval=2, end=9, scope=scope, seed=3, **EXCHANGES[method])
    total = model.nnz
    for step in range(12):
        backward(model, step)
        optim.step()
        before = snapshot(model, optim)
        topology.step()
        after = snapshot(model, optim)
        changed = False
        for name, weight in model.sparse_weights.items():
            weight._check(weight.keys(), weight.values)
            old, new = before[name]["value"].keys(), after[name]["value"].keys()
            if scope == "layer":
                assert len(old) == len(new)
            for column, numbers in after[name].items():
                assert all(number == before[name][column].get(key, 0.0) for key, number in numbers.items())
            if step % 2 and step < 9:
                update = topology.history[-1]
                assert (len(old - new), len(new - old)) == (update.pruned[name], update.grown[name])
                changed = changed or bool(new - old)
        assert changed == (step % 2 == 1 and step < 9)
        assert model.nnz == total
        optim.zero_grad()
    assert topology.updates == 4
    assert [update.step for update in topology.history] == [2, 4, 6, 8]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["gse", "rigl", "set"])
def test_training_is_that_of_a_dense_model_with_the_same_connections(method, optimizer):
    model = sparsified()
    dense = rwfx.densify(model)
    optim, dense_optim = (OPTIMIZERS[optimizer](m.parameters()) for m in (model, dense))
    topology = rwfx.Topology(model, optim, interval=3, end=18, seed=3, **EXCHANGES[method])
    weights = {name: dense.get_parameter(name) for name in model.sparse_weights}

    def mask(name):
        weight = model.sparse_weights[name]
        flat = torch.zeros(weight.columns * weight.rows, dtype=torch.bool).index_fill(0, weight.keys(), True)
        return flat.view(weight.columns, weight.rows).t().reshape(weight.shape)

    for step in range(20):
        masks = {name: mask(name) for name in weights}
        losses = [backward(m, step) for m in (model, dense)]
        assert_close(*losses, rtol=0, atol=1e-12)
        for name, parameter in weights.items():
            parameter.grad *= masks[name]
        optim.step()
        dense_optim.step()
        topology.step()
        for name, parameter in weights.items():
            kept = masks[name] & mask(name)
            parameter.data *= kept
            for part in dense_optim.state[parameter].values():
                if part.shape == parameter.shape:
                    part *= kept
            assert_close(model.sparse_weights[name].to_dense(), parameter, rtol=0, atol=1e-12)
        optim.zero_grad()
        dense_optim.zero_grad()
    assert topology.updates == 6


def dense_gradients(model, step):
    """Of every weight, in the order of keys."""
    dense = rwfx.densify(model)
    backward(dense, step)
    return {name: dense.get_parameter(name).grad.flatten(1).t().flatten() for name in model.sparse_weights}


def one_update(method, alpha=0.3, **options):
    """The keys before and after an update, its dense gradients and the values that it pruned by, for each weight."""
    model = sparsified()
    optim = torch.optim.SGD(model.parameters(), 0.05)
    topology = rwfx.Topology(model, optim, method, alpha, interval=1, schedule="constant", seed=3, **options)
    gradients = dense_gradients(model, 0)
    before = {name: weight.keys().tolist() for name, weight in model.sparse_weights.items()}
    backward(model, 0)
    optim.step()
    values = {name: weight.values.tolist() for name, weight in model.sparse_weights.items()}
    topology.step()
    after = {name: weight.keys().tolist() for name, weight in model.sparse_weights.items()}
    return topology.history[0], before, after, values, gradients


def by_rigl(before, values, gradient, share):
    """RigL, spelled out."""
    count = min(math.ceil(share * len(before)), len(gradient) - len(before))
    pruned = sorted(range(len(before)), key=lambda n: abs(values[n]))[:count]
    free = set(range(len(gradient))) - set(before)
    grown = sorted(free, key=lambda key: -abs(gradient[key]))[:count]
    return sorted({*before, *grown} - {before[n] for n in pruned})


@pytest.mark.parametrize("method", ["rigl", "snfs", "gse"])
def test_the_smallest_are_pruned_and_the_largest_gradients_grown(method):
    # With so many draws GSE finds every free place. The first mean gradient of SNFS is a share of the gradient.
    options = {"gamma": 300.0} if method == "gse" else {}
    _, before, after, values, gradients = one_update(method, **options)
    for name in before:
        assert after[name] == by_rigl(before[name], values[name], gradients[name], 0.3)


@pytest.mark.parametrize("distribution", ["uniform", "grabo", "graest"])
def test_few_candidates_limit_how_much_is_exchanged(distribution):
    update, before, after, _, _ = one_update("gse", 1.0, gamma=0.1, distribution=distribution)
    for name in before:
        assert 0 < update.candidates[name] <= max(1, 0.1 * len(before[name])) or update.candidates[name] == 0
        assert len(set(after[name]) - set(before[name])) == update.candidates[name]


def test_candidates_are_others_in_every_update_and_for_every_seed():
    candidates, streams = set(), set()
    for seed in (0, 1):
        model = sparsified()
        optim = torch.optim.SGD(model.parameters(), 0.05)
        topology = rwfx.Topology(model, optim, "gse", interval=1, schedule="constant", seed=seed)
        for step in range(3):
            backward(model, step)
            for weight in model.sparse_weights.values():
                candidates.add(tuple(weight.probe.candidates()[0].tolist()))
                streams.add(int(weight.probe.state[1]))
            topology.step()
    # The same draw would give other candidates too, where the connections have moved.
    assert len(candidates) == len(streams) == 2 * 3 * 4


def test_accumulated_gradients_are_those_of_all_batches():
    model = sparsified()
    optim = torch.optim.SGD(model.parameters(), 0.05)
    rwfx.Topology(model, optim, "gse", interval=1, schedule="constant")
    expected = [dense_gradients(model, step) for step in range(3)]
    for step in range(3):
        backward(model, step)
    for name, weight in model.sparse_weights.items():
        keys, grads = weight.probe.candidates()
        assert_close(grads, sum(of[name] for of in expected)[keys], rtol=0, atol=1e-12)


def test_a_step_without_a_backward_pass_moves_nothing():
    model = sparsified()
    topology = rwfx.Topology(model, torch.optim.SGD(model.parameters(), 0.05), interval=1, schedule="constant")
    backward(model, 0)
    topology.step()
    before = {name: weight.keys() for name, weight in model.sparse_weights.items()}
    topology.step()
    assert topology.history[1].candidates == dict.fromkeys(before, 0)
    for name, weight in model.sparse_weights.items():
        assert torch.equal(weight.keys(), before[name])


def test_the_share_decays_from_alpha_to_nothing():
    for schedule, at_third in (
        ("cosine", 0.4 * (1 + math.cos(math.pi / 3)) / 2),
        ("linear", 0.4 * 2 / 3),
        ("constant", 0.4),
    ):
        model = sparsified()
        topology = rwfx.Topology(
            model, torch.optim.SGD(model.parameters(), 0.1), "set", 0.4, interval=1, end=3, schedule=schedule
        )
        shares = []
        for _ in range(5):
            shares.append(topology._share())
            topology.step()
        assert_close(shares[:2], [0.4, at_third])
        assert_close(shares[3], 0.4 if schedule == "constant" else 0.0)
        assert topology.updates == 3


# --- SET -------------------------------------------------------------------------------------------------------------


def test_a_random_exchange_takes_every_set_of_free_places_alike():
    keys = torch.tensor([0, 3, 4, 7])
    part = Part(8, keys, torch.ones(4), keys[:0], torch.empty(0))
    grow = at_random(torch.Generator().manual_seed(1))
    counts = {}
    for _ in range(3000):
        grown = tuple(grow(part, 2).tolist())
        counts[grown] = counts.get(grown, 0) + 1
    assert counts.keys() == {(1, 2), (1, 5), (1, 6), (2, 5), (2, 6), (5, 6)}
    assert all(abs(count - 500) < 6 * math.sqrt(500) for count in counts.values())


def test_tails_are_the_smallest_positive_and_the_largest_negative_values():
    values = torch.tensor([5.0, -1, 6, -2, 7, -3, 8, -4, 9, 10])
    assert smallest_magnitudes(values, 5).tolist() == [0, 1, 3, 5, 7]
    assert tails(values, 5).tolist() == [0, 1, 2, 3, 4]
    for count in range(11):
        assert len(set(tails(values, count).tolist())) == count
        assert len(set(tails(-values.abs(), count).tolist())) == count


def test_together_no_weight_loses_all_to_tails():
    values = torch.tensor([5.0, -1, -2, -3]), torch.tensor([-1.0, -2, -3, 4])
    parts = [Part(20, torch.arange(len(v)), v, torch.empty(0, dtype=torch.int64), torch.empty(0)) for v in values]
    grow = at_random(torch.Generator().manual_seed(0))
    found = together(parts, lambda part: exchanged(part, 1.0, tails, grow))
    assert 0 in found[0]
    assert 3 in found[1]


# --- All weights together --------------------------------------------------------------------------------------------


def test_together_the_smallest_of_all_weights_are_pruned_and_the_best_grown_and_none_loses_all():
    small = Part(
        20, torch.tensor([1, 5, 9]), torch.tensor([0.1, 0.3, -0.2]), torch.tensor([0, 2]), torch.tensor([9.0, 1])
    )
    large = Part(10, torch.tensor([0, 4]), torch.tensor([5.0, -4]), torch.tensor([1, 9]), torch.tensor([-8.0, 7]))
    found = together(
        [small, large], lambda part: exchanged(part, 0.6, smallest_magnitudes, lambda p, k: _largest(p, k))
    )
    assert [keys.tolist() for keys in found] == [[0, 5], [0, 1, 9]]


def _largest(part, count):
    return part.candidates[part.scores.abs().argsort(descending=True)[:count]]


def test_what_snfs_frees_in_all_weights_goes_to_those_with_the_largest_momentum():
    model = sparsified()
    optim = torch.optim.SGD(model.parameters(), 0.0)
    topology = rwfx.Topology(model, optim, "snfs", 0.5, interval=1, schedule="constant", scope="global")
    gradients = dense_gradients(model, 0)
    weights = model.sparse_weights
    sizes = {name: weight.nnz for name, weight in weights.items()}
    wanted = {name: float(gradients[name][weight.keys()].abs().mean()) for name, weight in weights.items()}
    backward(model, 0)
    topology.step()
    update = topology.history[0]
    assert update.pruned == {name: math.ceil(size / 2) for name, size in sizes.items()}
    total = sum(update.pruned.values())
    for name in sizes:
        assert abs(update.grown[name] - total * wanted[name] / sum(wanted.values())) < 1


# --- Gradual pruning and Top-KAST ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gradual_pruning_goes_from_dense_to_the_density(scope):
    model = sparsified(1.0)
    optim = torch.optim.Adam(model.parameters(), 0.02)
    topology = rwfx.Topology(model, optim, "gradual", interval=2, end=11, density=0.1, scope=scope)
    places = model.nnz
    for step in range(14):
        backward(model, step)
        optim.step()
        largest = {
            name: weight.values.abs().sort(descending=True).values for name, weight in model.sparse_weights.items()
        }
        topology.step()
        for name, weight in model.sparse_weights.items():
            assert_close(weight.values.abs().sort(descending=True).values, largest[name][: weight.nnz])
        optim.zero_grad()
    expected = [1 - 0.9 * (1 - (1 + math.cos(math.pi * t / 11)) / 2) for t in (1, 3, 5, 7)]
    assert_close([update.share for update in topology.history], [*expected, 0.1])
    assert abs(model.nnz - 0.1 * places) <= 2
    assert sum(sum(update.pruned.values()) for update in topology.history) == places - model.nnz


def test_topkast_is_a_dense_model_that_computes_with_its_largest_weights():
    model = sparsified()
    optim = torch.optim.SGD(model.parameters(), 0.5, weight_decay=0.01)
    topology = rwfx.Topology(model, optim, "topkast", interval=3, end=12, gamma=0.5)
    dense = rwfx.densify(model)
    explored = topology._exploration._all
    theta, A, B = {}, {}, {}

    def choose(name):
        order = theta[name].abs().argsort(descending=True)
        size = model.sparse_weights[name].nnz
        A[name] = order[:size].sort().values if step else model.sparse_weights[name].keys()
        rest = [key for key in order.tolist() if key not in set(A[name].tolist())]
        B[name] = torch.tensor(sorted(rest[: int(0.5 * size)]))

    step, density = 0, model.nnz / sum(w.rows * w.columns for w in model.sparse_weights.values())
    for name in explored:
        theta[name] = explored[name].theta.clone()
        choose(name)
    for step in range(1, 12):
        for name, weight in model.sparse_weights.items():
            assert torch.equal(weight.keys(), A[name])
            assert torch.equal(explored[name].probe.keys, B[name])
            shown = torch.zeros_like(theta[name]).index_copy(0, A[name], theta[name][A[name]])
            full = shown.view(weight.columns, weight.rows).t().reshape(weight.shape)
            dense.get_parameter(name).data.copy_(full)
            assert_close(weight.to_dense(), full, rtol=0, atol=1e-12)
        for name, parameter in dense.named_parameters():
            if name not in theta:
                parameter.data.copy_(model.get_parameter(name))
        gradients = dense_gradients(model, step)
        backward(model, step)
        optim.step()
        topology.step()
        optim.zero_grad()
        for name in theta:
            for keys, decay in ((A[name], 0.01), (B[name], 0.01 / density)):
                theta[name][keys] -= 0.5 * (gradients[name][keys] + decay * theta[name][keys])
            if step % 3 == 0:
                choose(name)
    assert topology.updates == 3
    assert any(any(update.grown.values()) for update in topology.history[1:])


# --- Compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["gse", "grabo", "graest", "rigl", "set", "snfs", "topkast"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_model_is_never_compiled_anew_and_trains_as_it_does_otherwise(method, backend):
    options = EXCHANGES.get(method, {"method": method})
    runs = []
    for compiled in (False, True):
        model = sparsified()
        optim = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        topology = rwfx.Topology(model, optim, interval=2, end=8, seed=3, **options)
        stepped = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        for step in range(8):
            backward(stepped, step)
            optim.step()
            topology.step()
            optim.zero_grad()
        runs.append((model, topology))
    (plain, _), (compiled, topology) = runs
    assert topology.updates == 4
    for name, weight in plain.sparse_weights.items():
        assert torch.equal(weight.keys(), compiled.sparse_weights[name].keys())
        assert_close(weight.values, compiled.sparse_weights[name].values)


# --- What is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    "no such method": ({"method": "prune"}, ValueError, "method must be one of 'gse', 'rigl'"),
    "alpha 0": ({"alpha": 0.0}, ValueError, "alpha must be a number above 0 and at most 1, got 0.0"),
    "alpha above 1": ({"alpha": 1.1}, ValueError, "alpha must be a number above 0 and at most 1, got 1.1"),
    "alpha of a method without": ({"method": "static", "alpha": 0.1}, ValueError, "exchanges no share: leave it out"),
    "interval 0": ({"interval": 0}, ValueError, "interval must be a whole number at least 1, got 0"),
    "end before the first update": ({"end": 9}, ValueError, "end must be a whole number at least 10, got 9"),
    "no end": ({"end": None}, ValueError, "decays towards the step of the last update: give end="),
    "schedule": ({"schedule": "step"}, ValueError, "schedule must be one of 'cosine', 'linear', 'constant'"),
    "scope": ({"scope": "all"}, ValueError, "scope must be one of 'layer', 'global'"),
    "scope of topkast": ({"method": "topkast", "scope": "global"}, ValueError, 'use scope="layer"'),
    "distribution": (
        {"distribution": "normal"},
        ValueError,
        "distribution must be one of 'uniform', 'grabo', 'graest'",
    ),
    "gamma": ({"gamma": 0}, ValueError, "gamma must be a number above 0, got 0"),
    "gamma of rigl": ({"method": "rigl", "gamma": 1.0}, ValueError, "gamma=1.0 is an option of 'gse', 'topkast'"),
    "prune of gse": ({"prune": "tails"}, ValueError, "is an option of 'set', and the method is 'gse': leave it out"),
    "prune": ({"method": "set", "prune": "random"}, ValueError, "prune must be one of 'magnitude', 'tails'"),
    "density": ({"method": "gradual"}, ValueError, "method='gradual' needs density="),
    "seed": ({"seed": -1}, ValueError, "seed must be a whole number"),
}


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_allowed_is_named(options, kind, message):
    model = sparsified()
    given = {"method": "gse", "interval": 10, "end": 20, **options}
    with pytest.raises(kind, match=message):
        rwfx.Topology(model, torch.optim.SGD(model.parameters(), 0.1), **given)
    assert all(weight.probe is None for weight in model.sparse_weights.values())


def test_a_model_and_an_optimizer_that_do_not_belong_together_are_refused():
    dense, model = network(), sparsified()
    of_dense, of_model = (torch.optim.SGD(m.parameters(), 0.1) for m in (dense, model))
    with pytest.raises(
        ValueError, match=r"the optimizer does not have the values of '0.weight', .* after rwfx.sparsify"
    ):
        rwfx.Topology(model, of_dense, end=2000)
    with pytest.raises(ValueError, match=r"is not from rwfx.sparsify, which records a method: give method="):
        rwfx.Topology(dense, of_dense, end=2000)
    with pytest.raises(ValueError, match="Sequential has no sparse weights"):
        rwfx.Topology(dense, of_dense, "gse", end=2000)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got generator"):
        rwfx.Topology(model, model.parameters(), end=2000)
    for weight in model.sparse_weights.values():
        weight.values.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the sparse weights requires a gradient"):
        rwfx.Topology(model, of_model, end=2000)


def test_the_method_is_the_one_that_the_model_was_made_for():
    for method in METHODS:
        model = sparsified(growth=method)
        options = {"density": 0.1} if method == "gradual" else {}
        topology = rwfx.Topology(model, torch.optim.SGD(model.parameters(), 0.1), end=2000, **options)
        assert topology.method == method
        assert topology.alpha == {"gse": 0.2, "rigl": 0.3, "set": 0.3, "snfs": 0.5}.get(method)


def test_a_frozen_weight_stays_where_it_is():
    model = sparsified()
    frozen = model.sparse_weights["2.weight"]
    frozen.values.requires_grad_(False)
    before = frozen.keys()
    topology = rwfx.Topology(model, torch.optim.SGD(model.parameters(), 0.1), interval=1, schedule="constant")
    backward(model, 0)
    topology.step()
    assert torch.equal(frozen.keys(), before)
    assert set(topology.weights) == {"0.weight", "5.weight", "8.weight"}


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_frozen_later_stays_where_it_is_until_it_is_trained_again(method):
    model = sparsified(growth=method)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    options = {"density": 0.01, "end": 3} if method == "gradual" else {"schedule": "constant"}
    topology = rwfx.Topology(model, optimizer, interval=1, **options)
    frozen = model.sparse_weights["2.weight"]
    frozen.values.requires_grad_(False)
    before, values = frozen.keys(), frozen.values.clone()
    for step in range(3):
        backward(model, step)
        topology.step()
        assert torch.equal(frozen.keys(), before)
        assert torch.equal(frozen.values, values)
        if method != "static":
            assert "2.weight" not in topology.history[-1].grown
    if method in ("gse", "rigl", "set"):
        frozen.values.requires_grad_(True)
        for step in range(2):  # in the first nothing is looked for yet
            backward(model, step)
            topology.step()
        assert topology.history[-1].grown["2.weight"] > 0


@pytest.mark.parametrize("method", ["gse", "set", "snfs", "topkast"])
def test_the_default_device_is_that_of_the_model_alone(method):
    def trained(device):
        torch.manual_seed(0)
        dense = network()
        with torch.device(device):  # tensors of ours that were made there would have no numbers
            model = rwfx.sparsify(dense, 0.2, seed=1)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            topology = rwfx.Topology(model, optimizer, method, interval=1, schedule="constant", seed=2)
        for step in range(2):
            backward(model, step)
            optimizer.step()
            with torch.device(device):
                topology.step()
        return model.state_dict()

    assert_close(trained("meta"), trained("cpu"), rtol=0, atol=0)


def test_a_second_topology_with_topkast_wants_an_optimizer_of_its_own():
    model = sparsified()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = rwfx.Topology(model, optimizer, "topkast", interval=10)
    probes = [weight.probe for weight in first.weights.values()]
    with pytest.raises(ValueError, match=r"groups of another Topology .* an optimizer of its own"):
        rwfx.Topology(model, optimizer, "topkast", interval=10)
    assert [weight.probe for weight in first.weights.values()] == probes
    anew = torch.optim.SGD(model.parameters(), 0.1)
    rwfx.Topology(model, anew, "topkast", interval=10)
    backward(model, 0)
    first_explored, explored = (o.param_groups[1]["params"] for o in (optimizer, anew))
    assert all(values.grad is None for values in first_explored)
    assert all(values.grad is not None for values in explored)


def test_draws_of_a_large_weight_are_those_of_its_free_places():
    keys = draw_keys(1000, 1000, 5000)
    part = Part(10**6, keys, torch.ones(5000), keys[:0], torch.empty(0))
    grown = at_random(torch.Generator().manual_seed(1))(part, 2000)
    assert not torch.isin(grown, keys).any()
    assert bool((grown.diff() > 0).all())
    assert 0 <= int(grown[0]) <= int(grown[-1]) < 10**6
