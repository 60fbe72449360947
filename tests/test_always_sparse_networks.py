"""The networks of the papers have their sizes, can be made sparse, and are trained by their settings."""

import pytest
import torch
from torch import nn

import rwfx
from rwfx.experiments.always_sparse.networks import FLAT, MODELS, Image, scaled, wide_resnet
from rwfx.experiments.always_sparse.plan import Plan, check_plan
from rwfx.experiments.always_sparse.presets import PRESETS
from rwfx.experiments.always_sparse.runs import learning_rate
from rwfx.experiments.always_sparse.tasks import SHIFT, augmented
from rwfx.experiments.always_sparse.vit import sines

pytestmark = pytest.mark.usefixtures("one_thread")

CIFAR = Image(3, 32, 10)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("make", "millions"),
    [
        (MODELS["resnet56"], 0.85),
        (lambda image, width, seed: wide_resnet(image, width, seed, 40, 2), 2.2),
        (lambda image, width, seed: wide_resnet(image, width, seed, 22, 8), 17.2),
    ],
    ids=["ResNet-56", "WRN-40-2", "WRN-22-8"],
)
def test_a_network_has_the_published_number_of_parameters(make, millions):
    with torch.device("meta"):
        network = make(CIFAR, 1.0, 0)
    digits = 2 if millions < 1 else 1
    assert round(count(network) / 1e6, digits) == millions


def test_vgg_and_vit_have_the_parameters_that_their_widths_give():
    with torch.device("meta"):
        vgg, vit = (MODELS[name](CIFAR, 1.0, 0) for name in ("vgg16", "vit"))
    pairs = [(3, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 64), (64, 128), *[(128, 128)] * 5]
    convolutions = sum(9 * i * o + 3 * o for i, o in pairs)  # with a bias, and a scale and a shift of the norm
    assert count(vgg) == convolutions + (128 * 512 + 512) + (512 * 512 + 512) + (512 * 10 + 10)
    block = 2 * 512 + 512 * 3 * 384 + 384 * 512 + 2 * 512 + (512 * 256 + 256) + (256 * 512 + 512)
    assert count(vit) == 2 * 48 + (48 * 512 + 512) + 2 * 512 + 4 * block + 2 * 512 + (512 * 10 + 10)


@pytest.mark.parametrize(
    ("name", "image"),
    [*((name, Image(3, 16, 10)) for name in MODELS), *((name, Image(1, 28, 5)) for name in ("vgg16", "vit"))],
    ids=lambda of: of if isinstance(of, str) else str(of.side),
)
def test_a_sparse_network_gives_what_its_dense_form_gives(name, image):
    network = MODELS[name](image, 0.2, 0)
    x = torch.randn(2, image.channels, image.side, image.side)
    x = x.flatten(1) if name in FLAT else x
    sparse = rwfx.sparsify(network, 0.3, seed=0, example_inputs=(x,)).eval()
    assert not [line for line in sparse.report.lines if line.dense_because]
    dense = rwfx.densify(sparse).eval()
    assert sparse(x).shape == (2, image.classes)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)
    weights = {n: module for n, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert len(sparse.sparse_weights) == len(weights)


def test_equal_seeds_give_equal_networks_and_leave_the_stream_alone():
    before = torch.get_rng_state()
    first, second = (MODELS["resnet56"](Image(1, 8, 10), 0.2, 3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_width_is_scaled_to_the_nearest_and_never_to_none():
    assert [scaled(10, factor) for factor in (0.01, 0.5, 0.26, 2)] == [1, 5, 3, 20]


def test_patches_at_other_places_have_other_sines():
    places_LW = sines(4, 16)
    assert places_LW.shape == (16, 16)
    assert len(places_LW.unique(dim=0)) == 16
    assert torch.equal(places_LW[1, 8:], places_LW[0, 8:])  # the same row


def test_a_side_that_patches_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="cannot be cut"):
        MODELS["vit"](Image(1, 10, 10), 1.0, 0)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_plan(name):
    plan = Plan(**PRESETS[name].settings())
    check_plan(plan)
    assert plan.steps_of(50_000) == {"rigl-wrn22-2": 97_500, "set-mlp": 500_000}.get(name, 78_000)


def test_the_rate_of_gse_rises_for_five_epochs_and_falls_after_80_and_120():
    plan = Plan(**PRESETS["gse-resnet56"].settings())
    rates = [learning_rate(plan, 0.1, 390 * epoch, 390 * 200) for epoch in (0, 2.5, 5, 79, 80, 119, 120, 199)]
    assert rates == pytest.approx([1e-5, 0.050005, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert round(plan.end * 78_000) == 46_800


def test_the_rate_of_rigl_falls_by_five_every_30_000_steps():
    plan = Plan(**PRESETS["rigl-wrn22-2"].settings())
    rates = [learning_rate(plan, 0.1, step, 97_656) for step in (0, 29_999, 30_001, 60_001, 90_001)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.004, 0.0008])


def test_an_augmented_image_is_a_window_of_the_padded_one_or_its_mirror_image():
    image = Image(2, 6, 10)
    x = torch.randn(5, 2, 6, 6)
    moved = augmented(x, image, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(x, [SHIFT] * 4)
    windows = padded.unfold(2, 6, 1).unfold(3, 6, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    for k in range(5):
        found = [bool((windows[k] == of).flatten(1).all(1).any()) for of in (moved[k], moved[k].flip(2))]
        assert any(found)
    flat = x.permute(0, 2, 3, 1).flatten(1)  # channels last, as data sets are flattened
    same = augmented(flat, image, torch.Generator().manual_seed(0))
    assert torch.equal(same, moved.permute(0, 2, 3, 1).flatten(1))
    assert not torch.equal(moved, x)
