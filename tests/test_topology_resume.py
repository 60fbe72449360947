"""A topology that goes on where it was stopped, and that is the same on every rank."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_topology import EXCHANGES, OPTIMIZERS, backward, sparsified
from torch.utils._pytree import tree_flatten

import rwfx

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = {**EXCHANGES, "topkast": {"method": "topkast"}, "gradual": {"method": "gradual", "density": 0.1}}


def start(method, optimizer, scope, seed):
    """A model with its optimizer and topology; which seed must not matter once a state is loaded."""
    model = sparsified(1.0 if method == "gradual" else 0.2, seed)
    optim = OPTIMIZERS[optimizer](model.parameters())
    topology = rwfx.Topology(model, optim, interval=3, end=11, scope=scope, seed=seed, **METHODS[method])
    return model, optim, topology


def train(model, optim, topology, steps):
    for step in steps:
        backward(model, step)
        optim.step()
        topology.step()
        optim.zero_grad()


def assert_equal(found, expected):
    (found, shape), (expected, expected_shape) = tree_flatten(found), tree_flatten(expected)
    assert shape == expected_shape
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("stop", [2, 3, 4], ids=["before", "at", "after"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_same_bit_for_bit(method, scope, stop, tmp_path):
    if method == "topkast" and scope == "global":
        return
    whole = start(method, "adam", scope, seed=0)
    train(*whole, range(stop))
    torch.save([part.state_dict() for part in whole], tmp_path / "run")
    train(*whole, range(stop, 12))
    resumed = start(method, "adam", scope, seed=1)
    for part, state in zip(resumed, torch.load(tmp_path / "run", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*resumed, range(stop, 12))
    for part, expected in zip(resumed, whole, strict=True):
        assert_equal(part.state_dict(), expected.state_dict())


def test_a_state_of_another_run_is_refused_and_changes_nothing():
    model, optim, topology = start("gse", "sgd", "layer", 0)
    train(model, optim, topology, range(4))
    before = topology.state_dict()
    for name, other in {"method": "rigl", "interval": 17, "alpha": 0.9, "scope": "global", "options": {}}.items():
        with pytest.raises(ValueError, match=f"the state is of a topology with {name}=.*: make it with what"):
            topology.load_state_dict({**before, "settings": {**before["settings"], name: other}})
    with pytest.raises(ValueError, match="Load the model's state_dict first"):
        topology.load_state_dict({**before, "weights": {n: [1, 2, 3] for n in before["weights"]}})
    for name in before:
        with pytest.raises(ValueError, match=f"no state_dict of a Topology: it has no '{name}'"):
            topology.load_state_dict({key: value for key, value in before.items() if key != name})
    with pytest.raises(ValueError, match="no state_dict of a Topology: it has no 'settings', 'weights', 'seed'"):
        topology.load_state_dict({})
    assert_equal(topology.state_dict(), before)


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for method in ("gse", "grabo", "rigl", "set", "snfs", "topkast"):
        torch.manual_seed(rank)
        model, optim, topology = start(method, "sgd", "layer", seed=0)
        for step in range(9):
            backward(model, 2 * step + rank)
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
            optim.step()
            topology.step()
            optim.zero_grad()
        found[method] = model.state_dict(), topology.state_dict()
    without_seed = rwfx.Topology(model, torch.optim.SGD(model.parameters(), 0.1), "gse", end=1000)
    torch.save((found, without_seed.seed), f"{folder}/rank{rank}")
    dist.destroy_process_group()


def test_ranks_with_batches_of_their_own_move_the_same_connections(tmp_path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert_equal(first, second)
    assert all(topology["history"] for _, topology in first[0].values())


def test_uniform_candidates_have_the_gradient_of_all_ranks(tmp_path):
    mp.spawn(sum_over_ranks, (str(tmp_path),), nprocs=2)
    summed = [torch.load(tmp_path / f"grads{rank}") for rank in (0, 1)]
    model, _, _ = probed_model()
    for step in (0, 1):
        backward(model, step)
    for (keys, grads), other, weight in zip(*summed, model.sparse_weights.values(), strict=True):
        assert torch.equal(keys, weight.probe.candidates()[0])
        torch.testing.assert_close(grads, weight.probe.candidates()[1], rtol=0, atol=1e-12)
        assert torch.equal(grads, other[1])


def probed_model():
    model = sparsified()
    optim = torch.optim.SGD(model.parameters(), 0.1)
    return model, optim, rwfx.Topology(model, optim, interval=1, schedule="constant", seed=1)


def sum_over_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, _, topology = probed_model()
    backward(model, rank)
    parts = [topology._part(weight) for weight in topology.weights.values()]
    torch.save([(part.candidates, part.scores) for part in parts], f"{folder}/grads{rank}")
    dist.destroy_process_group()
