"""The speed of always-sparse training is that of steps without a dense weight, and its figures are pairs of turns."""

import csv

import pytest
import torch

from rwfx.experiments import cli
from rwfx.experiments.speed import always_sparse, sparse_convs, sparse_scaling, sparse_steps
from rwfx.experiments.speed.plan import Plan
from rwfx.experiments.speed.sparse_convs import ConvTurn
from rwfx.experiments.speed.sparse_plan import AlwaysSparse, ConvLayer, check_always_sparse
from rwfx.experiments.speed.sparse_scaling import ScalingTurn
from rwfx.experiments.speed.sparse_steps import SparseTurn, sparse_mlp
from rwfx.experiments.speed.turns import Spread

pytestmark = pytest.mark.usefixtures("one_thread", "short_turns")

SMALL = AlwaysSparse(
    width=16,
    batch_size=4,
    densities=(0.5, 0.25),
    scaling_widths=(8, 16, 32),
    scaling_batch_sizes=(2, 4),
    row_nonzeros=2,
    dense_bytes=4 * 16**2,
    convs=(ConvLayer(2, 4, 6, batch_size=3), ConvLayer(4, 4, 6, 2, batch_size=3)),
    conv_densities=(0.5, 0.2),
)


def plan(out="", **changes):
    return Plan(**{"out": out, "rounds": 2, "compiled": False, "always_sparse": SMALL, **changes})


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_wide_network_never_has_a_dense_weight():
    width = 2**16  # dense, a weight would take 17 GB
    network = sparse_mlp(plan(), (width, width), 2 / width)
    assert network.nnz == 2 * width
    assert max(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()]) < 2**20


def test_steps_are_measured_for_every_density_beside_dense_and_masked(tmp_path):
    turns, held = sparse_steps.measure(plan(tmp_path), progress=False)
    kinds = [("dense", 1.0), *((kind, density) for density in SMALL.densities for kind in ("sparse", "masked"))]
    assert [(of.contender, of.density) for of in turns] == kinds * 2
    values = {row.density: (row.sparse, row.dense) for row in held if row.category == "values"}
    biases = 4 * 2 * 16
    assert values == {density: (4 * 512 * density + biases, 4 * 512 + biases) for density in SMALL.densities}


def turn(kind, compiled, number, milliseconds, density=0.5):
    return SparseTurn("16-16-16", 4, density, kind, compiled, number, milliseconds)


def test_the_better_of_eager_and_compiled_counts_by_its_median():
    eager, compiled = (3.0, 9.0, 3.0), (4.0, 4.0, 4.0)
    turns = [turn("sparse", how, k, ms) for how, of in ((False, eager), (True, compiled)) for k, ms in enumerate(of)]
    assert sparse_steps.best(turns, "sparse", 0.5) == list(eager)


def test_the_table_gives_ratios_of_the_same_round():
    turns = [
        turn(kind, False, number, milliseconds * (number + 1), 1.0 if kind == "dense" else density)
        for number in (0, 1)
        for density in SMALL.densities
        for kind, milliseconds in (("dense", 6.0), ("masked", 9.0), ("sparse", 3.0))
        if kind != "dense" or density == 0.5
    ]
    held = [
        sparse_steps.BytesRow(density, name, 25, 0 if name == "index" else 100)
        for density in SMALL.densities
        for name in sparse_steps.CATEGORIES
    ]
    text = sparse_steps.table(plan(), turns, held)
    line = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
    assert line[3:8] == ["9.00", "13.50", "4.50", "2.00 [2.00 - 2.00]", "3.00 [3.00 - 3.00]"]
    assert line[8:] == ["25.0", "25.0", "25.0", "25.0", "33.3"]


def test_an_update_is_what_a_step_with_one_takes_above_a_step_of_the_same_round():
    turns = [
        ScalingTurn(width, 2, 4, 10, method, kind, number, milliseconds)
        for method, start, widths in (("gse", 1, (8, 16)), ("rigl", 2, (8,)))
        for width in widths
        for number in (0, 1)
        for kind, milliseconds in (
            ("step", width / 8 * (start + number)),
            (method, width / 8 * (start + 2 + number)),
        )
    ]
    found = sparse_scaling.series(turns)
    assert found == {"step": {8: [1, 2], 16: [2, 4]}, "gse": {8: [2, 2], 16: [4, 4]}, "rigl": {8: [2, 2]}}
    last = sparse_scaling.table(plan(), found).splitlines()[3]
    assert last.count("2.00 [2.00 - 2.00]") == 2


def test_the_dense_gradient_of_rigl_is_no_larger_than_it_may_be():
    turns = sparse_scaling.measure(plan(), 4, progress=False)
    assert {of.width for of in turns if of.contender == "rigl"} == {8, 16}
    assert {of.width for of in turns if of.contender == "gse"} == {8, 16, 32}
    for method in ("gse", "rigl"):  # each has its own steps beside it
        assert {of.contender for of in turns if of.method == method} == {"step", method}
    assert {of.nonzeros / of.width for of in turns} == {4}


def test_the_non_zeros_move_after_every_step_that_counts_as_an_update():
    nonzeros, name, step = sparse_scaling._contender(plan(), 16, 4, "gse")
    network = step.__closure__[1].cell_contents.weights.values()  # of the topology
    before = [weight.keys() for weight in network]
    step()
    assert (nonzeros, name) == (64, "gse")
    assert all(not torch.equal(a, weight.keys()) for a, weight in zip(before, network, strict=True))
    assert sum(weight.nnz for weight in network) == 64


def test_a_convolution_is_compared_with_the_better_order_of_channels():
    times = {"dense, channels first": 8.0, "dense, channels last": 6.0, "sparse": 2.0}
    turns = [
        ConvTurn("a", 3, 0.5 if kind == "sparse" else 1.0, kind, number, ms)
        for number in (0, 1)
        for kind, ms in times.items()
    ]
    assert sparse_convs.speeds(turns) == {"a": (6.0, {0.5: Spread(3.0, 3.0, 3.0)})}


def test_the_step_of_a_convolution_gives_its_input_a_gradient_and_trains_its_weight():
    layer = SMALL.convs[1]
    conv = sparse_convs._conv(plan(), layer)
    before = conv.weight.clone()
    step = sparse_convs._step(plan(), layer, conv, torch.channels_last)
    step()
    (x,) = (of.cell_contents for of in step.__closure__ if isinstance(of.cell_contents, torch.Tensor) and
            of.cell_contents.requires_grad)  # fmt: skip
    assert x.grad is not None
    assert (conv.weight != before).all()
    assert conv(x).shape == (3, 4, 3, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"densities": (0.0,)}, "density"), ({"scaling_widths": (16,)}, "at least the 32 non-zeros")],
    ids=["no density", "a narrow network"],
)
def test_what_makes_no_measurement_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        check_always_sparse(AlwaysSparse(**changes))


def test_the_part_is_measured_from_the_command_line_with_its_widths(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "ALWAYS_SPARSE", SMALL)
    asked = "speed --only always-sparse --width 12 --scaling-widths 4,8 --rounds 1 --eager --quiet --out"
    assert cli.main([*asked.split(), str(tmp_path)]) == 0
    files = [f"always_sparse_{name}.{kind}" for name in ("convs", "scaling", "steps") for kind in ("csv", "png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["always_sparse_bytes.csv", *files, "speed.md"]
    assert {line["size"] for line in lines_of(tmp_path / "always_sparse_steps.csv")} == {"12-12-12"}
    assert {line["width"] for line in lines_of(tmp_path / "always_sparse_scaling.csv")} == {"4", "8"}
    assert {line["batch_size"] for line in lines_of(tmp_path / "always_sparse_scaling.csv")} == {"2", "4"}
    said = capsys.readouterr().out
    assert all(f"### {title}" in said for title in always_sparse.TITLES)
