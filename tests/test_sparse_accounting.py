"""What an always-sparse step costs is what counting by hand gives."""

import pytest
import torch
from torch import nn

import rwfx
from rwfx.sparse_flops import PUBLISHED

pytestmark = pytest.mark.usefixtures("one_thread")


def perceptron():
    return nn.Sequential(nn.Linear(20, 40, bias=False), nn.ReLU(), nn.Linear(40, 10))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2, bias=False), nn.Flatten()
    )


def test_the_flops_of_a_perceptron_are_two_for_each_number_and_product():
    model = rwfx.sparsify(perceptron(), 0.1, init="uniform", by="nonzeros")
    flops = model.report.flops
    first, second = 80, 40  # of 800 and 400 places
    assert flops.sparse_forward == flops.executed_inference == 2 * (first + second)
    assert flops.dense_forward == 2 * 1200
    # The first weight's input needs no gradient: two products of it, and three of the second.
    assert flops.executed("static") == 2 * (2 * first + 3 * second)
    assert flops.executed_dense == flops.executed("dense") == 2 * (2 * 800 + 3 * 400)


# With f_S = 2 * 120, f_D = 2 * 1200, T = 3 and gamma = 0.5.
BY_HAND = {
    "static": 720,
    "set": 720,
    "gradual": 720,
    "rigl": (720 * 3 + 480 + 2400) / 4,
    "gse": (720 * 3 + 600) / 4,
    "snfs": 480 + 2400,
    "topkast": 480 + 360,
    "dense": 7200,
}
# Gradients of candidates: 60 in all with gamma = 0.5; RigL's and SNFS's are dense.
EXTRA = {"rigl": 2400 / 3, "gse": 120 / 3, "snfs": 2400, "topkast": 120}


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_step_of_each_method_takes_what_its_formula_says(method):
    flops = rwfx.sparsify(perceptron(), 0.1, init="uniform", by="nonzeros").report.flops
    assert flops.published(method, interval=3, gamma=0.5) == pytest.approx(BY_HAND[method])
    if method != "dense":
        extra = flops.executed(method, interval=3, gamma=0.5) - flops.executed("static")
        assert extra == pytest.approx(EXTRA.get(method, 0))


def test_a_method_without_a_formula_is_refused():
    with pytest.raises(ValueError, match="method must be one of"):
        rwfx.sparsify(perceptron(), 0.1).report.flops.published("lottery")


@pytest.mark.parametrize("method", ["gse", "rigl", "snfs", "topkast"])
def test_what_a_topology_keeps_counts_too(method):
    model = rwfx.sparsify(perceptron(), 0.1, init="uniform")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {} if method == "topkast" else {"alpha": 0.5}
    topology = rwfx.Topology(model, optimizer, method, interval=1, schedule="constant", **options)
    model(torch.randn(2, 20)).sum().backward()
    optimizer.step()
    state = 2 * 4 * 8  # four int64 of each probe
    kept = {
        "gse": (8 + 4) * 120,  # a key and a gradient of each candidate
        "rigl": (8 + 4) * 60,  # of the best, as many as may be grown
        "snfs": 4 * 1200,  # a mean gradient of each place
        # All weights; and of as many as there are non-zeros a key, a gradient in the probe, and value, gradient and
        # momentum.
        "topkast": 4 * 1200 + (8 + 4 + 4 + 4 + 4) * 120,
    }
    memory = rwfx.memory_of(model, optimizer, topology)
    assert memory.sparse.topology == state + kept[method]
    assert memory.dense.topology == 0


def test_gse_with_hardly_any_place_left_has_no_more_candidates_than_places():
    flops = rwfx.sparsify(perceptron(), 0.9, init="uniform", by="nonzeros").report.flops
    assert flops.candidates("gse", gamma=1.0) == 2 * 120


def test_a_weight_whose_products_are_dense_takes_dense_products():
    flops = rwfx.sparsify(perceptron(), 0.1, init="uniform", by="dense").report.flops
    assert flops.sparse_forward == 2 * 120
    assert flops.executed("static") == flops.executed_dense


def test_a_weight_that_stays_dense_counts_in_full():
    flops = rwfx.sparsify(perceptron(), 0.1, by="nonzeros", dense="2").report.flops
    assert flops.sparse_forward == 2 * (80 + 400)
    assert flops.candidates("rigl") == 2 * 800


def test_a_convolution_multiplies_at_each_place_of_its_output():
    x = torch.randn(3, 2, 7, 7)
    model = rwfx.sparsify(convolutions(), 0.25, init="uniform", by="dense", example_inputs=(x,))
    flops = model.report.flops
    first, second = 7 * 7 * 4 * 2 * 9, 3 * 3 * 8 * 4 * 9
    assert flops.dense_forward == 2 * (first + second)
    assert flops.sparse_forward == 2 * (first + second) / 4
    assert flops.executed_dense == 2 * (2 * first + 3 * second)


def test_a_convolution_whose_places_nobody_told_has_no_known_flops():
    report = rwfx.sparsify(convolutions(), 0.25).report
    assert report.flops is None
    assert "not known" in str(report)


def test_tokens_are_places_of_an_example():
    x = torch.randn(3, 5, 20)
    flops = rwfx.sparsify(perceptron(), 0.1, init="uniform", example_inputs=(x,)).report.flops
    assert flops.dense_forward == 5 * 2 * 1200


def test_the_bytes_are_those_of_the_tensors_there_are():
    model = rwfx.sparsify(perceptron(), 0.1, init="uniform")
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 20)).sum().backward()
    optimizer.step()
    memory = rwfx.memory_of(model, optimizer)
    trained = 80 + 40 + 10  # non-zeros and a bias
    steps = 4 * 3  # Adam's counter of each tensor
    assert (memory.sparse.values, memory.sparse.gradients) == (4 * trained, 4 * trained)
    assert memory.sparse.optimizer_state == 2 * 4 * trained + steps
    shapes = 8 * 2 * 2
    assert memory.sparse.index == 4 * (3 * 120 + (20 + 1) + (40 + 1) + (40 + 1) + (10 + 1)) + shapes
    assert (memory.dense.values, memory.dense.gradients, memory.dense.index) == (4 * 1210, 4 * 1210, 0)
    assert memory.dense.optimizer_state == 2 * 4 * 1210 + steps
    held = [*model.parameters(), *(p.grad for p in model.parameters())]
    assert sum(tensor.nbytes for tensor in held) == memory.sparse.values + memory.sparse.gradients
    assert f"{memory.share:.1%}" in str(memory)


def test_a_dense_model_of_the_same_optimizer_has_the_bytes_that_are_said_of_it():
    model, dense = rwfx.sparsify(perceptron(), 0.1), perceptron()
    optimizers = [torch.optim.SGD(of.parameters(), lr=0.1, momentum=0.9) for of in (model, dense)]
    for of, optimizer in zip((model, dense), optimizers, strict=True):
        of(torch.randn(2, 20)).sum().backward()
        optimizer.step()
    state = [state["momentum_buffer"].nbytes for state in optimizers[1].state.values()]
    assert rwfx.memory_of(model, optimizers[0]).dense.optimizer_state == sum(state)


def test_the_bytes_of_another_model_are_refused():
    with pytest.raises(TypeError, match=r"rwfx\.sparsify"):
        rwfx.memory_of(perceptron())  # pyright: ignore[reportArgumentType]
