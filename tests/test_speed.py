"""A speed measurement takes turns, counts what it says it counts, and writes what it found."""

import csv
import dataclasses
import itertools
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from rwfx.experiments.cli import main
from rwfx.experiments.fresh import call_fresh
from rwfx.experiments.machine import cuda_conditions
from rwfx.experiments.models import encoder, residual_cnn
from rwfx.experiments.speed import building, memory, sampler, steps, turns
from rwfx.experiments.speed.building import Build
from rwfx.experiments.speed.contenders import build, contenders
from rwfx.experiments.speed.memory import Memory
from rwfx.experiments.speed.plan import PARTS, SIZES, Draws, Network, Plan, Size, Thin, read_parts, read_size
from rwfx.experiments.speed.run import run
from rwfx.experiments.speed.sampler import Timing
from rwfx.experiments.speed.sparse_plan import AlwaysSparse, ConvLayer
from rwfx.experiments.speed.steps import Turn

pytestmark = pytest.mark.usefixtures("one_thread", "short_turns")

SMALL = Size((8, 16, 4), 6, (2, 3))
DRAWS = Draws(layers=2, width=8, num_paths=20, series_paths=(5, 10, 20), series_widths=(4, 8, 16))
SPARSE = AlwaysSparse(
    width=16,
    batch_size=4,
    densities=(0.5, 0.2),
    scaling_widths=(8, 16, 32),
    scaling_batch_sizes=(2, 4),
    row_nonzeros=2,
    dense_bytes=2 * 16**2,
    convs=(ConvLayer(2, 4, 6, batch_size=3), ConvLayer(4, 4, 6, 2, batch_size=3)),
    conv_densities=(0.5, 0.2),
)


def plan(out, **changes):
    return Plan(
        **{
            "out": out,
            "sizes": (SMALL, Size((4, 6, 3), 5, (1,))),
            "rounds": 2,
            "compiled": False,
            "draws": DRAWS,
            "always_sparse": SPARSE,
            "deep_layers": 3,
            "repeats": 2,
            **changes,
        }
    )


def lines_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def cells_of(table, line=0):
    """The cells of a line of the first Markdown table in a text, by column."""
    header, _, *lines = [row for row in table.splitlines() if row.startswith("|")]
    names, values = ([cell.strip() for cell in row.strip("|").split("|")] for row in (header, lines[line]))
    return dict(zip(names, values, strict=True))


@pytest.fixture
def bar():
    with tqdm(disable=True) as bar:
        yield bar


@pytest.mark.parametrize("text", [str(size) for sizes in SIZES.values() for size in sizes])
def test_a_size_is_read_as_it_is_spelled(text):
    assert str(read_size(text)) == text


def test_a_size_holds_widths_batch_and_paths():
    assert read_size("784-256-10@64:10,200") == Size((784, 256, 10), 64, (10, 200))


@pytest.mark.parametrize(
    "text", ["784", "784-10", "784-10@8", "784@8:5", "784-10@0:5", "784-0@8:5", "8-4@8:5,0", "8-4@8:5,5", "8-4@8:x", ""]
)
def test_another_spelling_of_a_size_is_an_error_with_an_example(text):
    with pytest.raises(ValueError, match="WIDTHS@BATCH:PATHS, such as 784-256-128-10@128:10,50,200"):
        read_size(text)


def test_parts_are_taken_in_their_own_order():
    assert read_parts("build,steps") == ("steps", "build")
    assert read_parts(",".join(PARTS)) == tuple(PARTS)
    with pytest.raises(ValueError, match=f"the parts are {', '.join(PARTS)}; given 'stepps'"):
        read_parts("memory,stepps")


def test_calls_take_turns_of_as_many_calls_as_take_about_as_long(bar, monkeypatch):
    made = []
    calls = [lambda name=name: made.append(name) for name in "ABC"]
    counts = iter([2, 1, 4])
    monkeypatch.setattr(turns, "calls_a_turn", lambda each: next(counts))
    seen = []
    for number, place, _ in turns.take_turns(calls, 3, "cpu", bar):
        if not seen:
            warm_up, made[:] = list(made), made[-3:]
        seen.append((number, place))
    assert seen == [(number, place) for number in range(3) for place in range(3)]
    assert "".join(made) == "AAABBCCCCC" * 3  # one that is not timed and those that are
    assert "".join(name for name, _ in itertools.groupby(warm_up)) == "ABCA"  # the last is the first turn


@pytest.mark.parametrize(("each", "calls"), [(0.01, 100), (30.0, 5), (140.0, 1), (400.0, 1)])
def test_a_turn_takes_about_150_milliseconds(each, calls, monkeypatch):
    monkeypatch.setattr(turns, "MOST_CALLS", 100)
    assert turns.calls_a_turn(each) == calls


def test_the_time_of_a_turn_is_that_of_one_call(monkeypatch):
    clock = itertools.count(step=3)
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
    assert turns.milliseconds(lambda: None, 6, "cpu") == 500.0


def test_every_contender_begins_with_the_same_weights_and_they_step_in_the_order_of_the_table(tmp_path):
    entered = contenders(plan(tmp_path, masked=True), SMALL)
    per_paths = ["masked", "sparse", "sampler", "optimizer"]
    assert [one.kind for one in entered] == ["forward", "dense"] + 2 * per_paths
    assert [one.num_paths for one in entered] == [None, None] + 4 * [2] + 4 * [3]
    weights = [torch.cat([value.flatten() for value in one.network.state_dict().values()]) for one in entered]
    assert all(torch.equal(each, weights[0]) for each in weights)


def test_a_sparse_step_trains_its_rows_alone_and_a_forward_nothing(tmp_path):
    for one in contenders(plan(tmp_path), SMALL):
        before = {name: value.clone() for name, value in one.network.state_dict().items()}
        one.call()
        changed = {name: (value != before[name]).flatten(1).any(1) for name, value in moved(one, before)}
        if one.kind in ("forward", "sampler"):
            assert not any(rows.any() for rows in changed.values())
        elif one.kind == "dense":
            assert all(rows.any() for rows in changed.values())
        else:
            rows = one.network.rows
            assert all(
                set(hit.nonzero().flatten().tolist()) <= set(rows[name].tolist()) for name, hit in changed.items()
            )
            assert any(hit.any() for hit in changed.values())


def moved(one, before):
    return [(name, value) for name, value in one.network.state_dict().items() if value.dim() == 2 and name in before]


def test_the_sampler_alone_draws_anew_and_a_sparse_turn_tells_what_it_kept(tmp_path):
    entered = {one.kind: one for one in contenders(plan(tmp_path), dataclasses.replace(SMALL, num_paths=(2,)))}
    sparse, alone = entered["sparse"], entered["sampler"]
    assert alone.network is sparse.network
    assert len({tuple(alone.call()[0].tolist()) for _ in range(20)}) > 1
    sparse.call()
    first, last = (len(sparse.network.rows[name]) for name in ("0.weight", "2.weight"))
    # 16 x 8 gives no gradient to its input, 4 x 16 does: one product of the first, two of the last.
    assert sparse.kept() == (8 * first + 2 * 16 * last) / (8 * 16 + 2 * 16 * 4)
    assert all(one.kept() is None for kind, one in entered.items() if kind != "sparse")


def test_options_of_transform_reach_every_sparse_contender(tmp_path):
    asked = plan(tmp_path, walk_options={"min_rows": 3}, masked=True)
    networks = [one.network for one in contenders(asked, SMALL) if one.num_paths is not None]
    assert {network.settings["rows"].min_rows for network in networks} == {3}


def turns_of(kind, times, num_paths=None, compiled=False, kept=None, batch_size=8):
    return [Turn("4-2", batch_size, num_paths, kind, compiled, n, time, kept) for n, time in enumerate(times)]


HAND = [
    *turns_of("forward", [2.0, 2.0, 4.0]),
    *turns_of("dense", [9.0, 9.0, 9.0]),
    *turns_of("dense", [6.0, 6.0, 12.0], compiled=True),
    *turns_of("sparse", [2.0, 6.0, 3.0], 7, kept=0.25),
    *turns_of("sparse", [6.0, 6.0, 6.0], 7, compiled=True, kept=0.75),
    *turns_of("sampler", [1.0, 1.5, 1.5], 7),
    *turns_of("optimizer", [1.0, 0.6, 0.6], 7),
]


def test_ratios_are_those_of_the_same_round_to_the_better_dense_step():
    (line,) = steps.summarise(HAND)
    assert (line.dense_ms, line.dense_compiled, line.limit) == (6.0, True, 3.0)
    eager, compiled = line.times_dense["sparse", False], line.times_dense["sparse", True]
    assert (eager.median, eager.least, eager.greatest) == (3.0, 1.0, 4.0)
    assert (compiled.median, compiled.least, compiled.greatest) == (1.0, 1.0, 2.0)
    assert line.best == ("sparse", False)  # 3 ms by median, and 6 ms compiled
    assert line.share_of_limit == 1.0
    assert line.kept == 0.5
    # The ideal, forward + (dense - forward) / 2: 4, 4 and 8 ms.
    assert dataclasses.astuple(line.times_ideal) == (0.5, 0.375, 1.5)
    assert (line.sampler_ms, line.sampler_share) == (1.5, 0.5)
    assert (line.optimizer_ms, line.optimizer_share) == (0.6, pytest.approx(0.2))


def test_the_table_of_steps_shows_these_numbers_and_explains_each_column():
    text = steps.table(steps.summarise(HAND))
    assert cells_of(text) == {
        "MLP": "4-2",
        "batch": "8",
        "paths": "7",
        "dense ms": "6.00 (compiled)",
        "limit": "3.00",
        "times dense: sparse, eager": "3.00 [1.00 - 4.00]",
        "times dense: sparse, compiled": "1.00 [1.00 - 2.00]",
        "share of the limit": "1.00",
        "times the ideal": "0.50 [0.38 - 1.50]",
        "sampler ms": "1.50 (50%)",
        "optimizer ms": "0.60 (20%)",
        "kept": "50.0%",
    }
    assert all(f"- *{name}*: " in text for name in steps.COLUMNS)
    assert all(name.startswith(("MLP", "batch", "paths", *steps.COLUMNS)) for name in cells_of(text))


def test_equal_widths_with_another_batch_are_another_line():
    other = [dataclasses.replace(turn, batch_size=64, milliseconds=2 * turn.milliseconds) for turn in HAND]
    first, second = steps.summarise([*HAND, *other])
    assert (second.dense_ms, second.batch_size) == (2 * first.dense_ms, 64)
    assert second.limit == first.limit


def test_every_contender_has_a_turn_in_every_round_and_the_csv_holds_them(tmp_path):
    steps.run(plan(tmp_path), progress=False)
    lines = lines_of(tmp_path / "steps.csv")
    assert list(lines[0]) == [column.name for column in dataclasses.fields(Turn)]
    assert len(lines) == 2 * (8 + 5)
    order = [("forward", ""), ("dense", "")]
    order += [(kind, paths) for paths in "23" for kind in ("sparse", "sampler", "optimizer")]
    first = [one for one in lines if one["size"] == "8-16-4"]
    assert [(one["contender"], one["num_paths"]) for one in first] == 2 * order
    assert [one["round"] for one in first] == 8 * ["0"] + 8 * ["1"]
    assert all(float(one["milliseconds"]) > 0 for one in lines)
    assert all(bool(one["kept"]) == (one["contender"] == "sparse") for one in lines)
    assert all(0 < float(one["kept"]) < 1 for one in first if one["kept"])


def stepped(kind, tmp_path, num_paths=5):
    """A network of 8-16-4 after a step, with its optimizer."""
    network, optimizer = build(plan(tmp_path), SMALL, kind, num_paths)
    F.cross_entropy(network(torch.randn(6, 8)), torch.randint(4, (6,))).backward()
    optimizer.step()
    return network, optimizer


def test_row_gradients_are_counted_with_their_indices(tmp_path):
    network, _ = stepped("sparse", tmp_path)
    first, last = (len(network.rows[name]) for name in ("0.weight", "2.weight"))
    # Of each row kept its number, 8 bytes, and its values, 4 bytes each; of the weight and of the bias.
    expected = first * (8 + 8 * 4) + first * (8 + 4) + last * (8 + 16 * 4) + last * (8 + 4)
    assert 0 < first < 16
    assert memory.gradient_bytes(network) == expected


def test_dense_gradients_are_counted_whole_and_absent_ones_as_nothing(tmp_path):
    network, optimizer = stepped("dense", tmp_path)
    numbers = 16 * 8 + 16 + 4 * 16 + 4
    assert memory.gradient_bytes(network) == 4 * numbers
    assert memory.state_bytes(optimizer) == 2 * 4 * numbers + 4 * 4  # two moments, and a step for each parameter
    optimizer.zero_grad()
    assert memory.gradient_bytes(network) == 0


def test_the_row_optimizer_counts_a_step_for_each_row(tmp_path):
    _, optimizer = stepped("sparse", tmp_path)
    numbers = 16 * 8 + 16 + 4 * 16 + 4
    assert memory.state_bytes(optimizer) == 2 * 4 * numbers + 4 * 2 * (16 + 4)


def test_saved_activations_are_counted_once_and_without_the_parameters():
    linear = nn.Linear(8, 16, bias=False)
    x = torch.randn(6, 8)

    def loss():
        y = linear(x)  # saves x
        return (y.exp() * y.view(16, 6).t().reshape(6, 16)).sum()  # saves exp(y), once, and a copy of y

    assert memory.saved_bytes(linear, loss) == 4 * (6 * 8 + 6 * 16 + 6 * 16)
    two = nn.Sequential(linear, nn.Linear(16, 4))  # saves x, the hidden features, and the second weight
    assert memory.saved_bytes(two, lambda: two(x)) == 4 * (6 * 8 + 6 * 16)


@pytest.mark.skipif(not memory.PROC.exists(), reason="reads /proc")
def test_the_peak_of_a_process_is_what_its_steps_take_and_not_what_was_there_before():
    megabytes = 2**20
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    first, second = (call_fresh(peak_after, before, 64, **environment) for before in (8, 256))
    for peak in (first, second):
        assert 60 * megabytes < peak < 96 * megabytes  # the kernel adds up its count now and then


def peak_after(before, step):
    kept, _ = torch.ones(before * 2**18), torch.ones(200 * 2**18).sum()  # 200 MB that are free again
    found = memory.peak_of(lambda: torch.ones(step * 2**18).sum(), "cpu")
    assert len(kept)
    return found


@pytest.mark.skipif(not memory.PROC.exists(), reason="reads /proc")
def test_memory_is_measured_for_every_contender_and_told_beside_the_dense_one(tmp_path):
    sizes = (dataclasses.replace(SMALL, num_paths=(2,)),)
    options = {"transform_options": {"break_even": False}}
    text = memory.run(plan(tmp_path, sizes=sizes, **options), progress=False)
    dense, sparse = lines_of(tmp_path / "memory.csv")
    assert list(dense) == [column.name for column in dataclasses.fields(Memory)]
    assert (dense["contender"], sparse["contender"], sparse["num_paths"]) == ("dense", "sparse", "2")
    assert int(dense["gradients"]) == 4 * (16 * 8 + 16 + 4 * 16 + 4)
    assert 0 < int(sparse["gradients"]) < int(dense["gradients"])
    assert int(dense["sampler"]) == 0 < int(sparse["sampler"])
    assert all(f"- *{name}*: " in text for name in memory.COLUMNS)


def test_the_table_of_memory_gives_shares_of_the_eager_dense_step_of_the_same_size():
    def found(kind, size, peak, compiled=False):
        paths = None if kind == "dense" else 7
        return Memory(size, 8, paths, kind, compiled, peak, 3 * peak, 0, 10**6, 0)

    measured = [found("dense", "9-2", 10**6), found("dense", "4-2", 8 * 10**6), found("sparse", "4-2", 2 * 10**6, True)]
    cells = cells_of(memory.table(measured), line=2)
    assert cells["step"] == "sparse, compiled"
    assert (cells["peak"], cells["gradients"]) == ("2.00 (25%)", "6.00 (25%)")
    assert (cells["optimizer state"], cells["saved activations"]) == ("0.00", "1.00 (100%)")


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_power_is_found_by_its_exponent(exponent):
    x = [1, 2, 5, 10, 30]
    found = sampler.fit(x, [3 * number**exponent for number in x])
    assert found.exponent == pytest.approx(exponent)
    assert found.coefficient == pytest.approx(3)


def test_a_line_is_found_with_all_of_the_variance_and_a_miss_with_less():
    found = sampler.fit([1, 2, 4], [5.0, 7.0, 11.0])
    assert (found.intercept, found.slope, found.r_squared) == pytest.approx((3, 2, 1))
    # Through (0, 0), (1, 1), (2, 0), shifted: the best line is flat, and explains nothing.
    assert sampler.fit([1, 2, 3], [1.0, 2.0, 1.0]).r_squared == pytest.approx(0)


def test_each_series_grows_in_its_own_number_by_medians():
    timings = [Timing("paths", 3, 64, paths, n, paths * t) for paths in (1, 10) for n, t in enumerate([1.0, 2.0, 9.0])]
    timings += [Timing("width", 3, width, 10, 0, 5.0) for width in (32, 64)] + [Timing("draw", 3, 64, 10, 0, 7.0)]
    found = sampler.series(timings)
    assert {x: spread.median for x, spread in found["paths"].items()} == {1: 2.0, 10: 20.0}
    assert {x: spread.greatest for x, spread in found["width"].items()} == {32: 5.0, 64: 5.0}


def test_the_sampler_is_timed_beside_a_read_of_its_weights_and_along_both_series(tmp_path):
    text = sampler.run(plan(tmp_path), progress=False)
    lines = lines_of(tmp_path / "sampler.csv")
    assert list(lines[0]) == [column.name for column in dataclasses.fields(Timing)]
    seen = [(one["measurement"], one["width"], one["num_paths"]) for one in lines]
    assert seen[:4] == 2 * [("draw", "8", "20"), ("read", "8", "")]
    assert seen[4:10] == 2 * [("paths", "8", paths) for paths in ("5", "10", "20")]
    assert seen[10:] == 2 * [("width", width, "10") for width in ("4", "8", "16")]
    assert (tmp_path / "sampler.png").read_bytes().startswith(b"\x89PNG")
    assert cells_of(text)["layers"] == "2"


def test_transforming_takes_turns_with_tracing(tmp_path):
    text = building.run(plan(tmp_path), progress=False)
    lines = lines_of(tmp_path / "build.csv")
    assert list(lines[0]) == [column.name for column in dataclasses.fields(Build)]
    assert [one["contender"] for one in lines] == 2 * ["dense", "sparse"]
    assert cells_of(text)["network"] == "3 layers, 256 wide"
    assert "Compiling was left out" in text


def test_the_ratio_of_building_is_taken_pair_by_pair():
    times = {"sparse": [2.0, 9.0, 4.0], "dense": [1.0, 3.0, 4.0]}
    found = [Build("compile", "8-4@2:1", kind, n, t) for kind in times for n, t in enumerate(times[kind])]
    cells = cells_of(building.table(found))
    assert (cells["sparse, s"], cells["dense, s"]) == ("4.00 [2.00 - 9.00]", "3.00 [1.00 - 4.00]")
    assert cells["sparse / dense"] == "2.00 [1.00 - 3.00]"


def fail(why):
    raise ValueError(why)


def test_a_fresh_process_has_this_ones_threads_and_an_empty_cache_of_its_own():
    first, second = (call_fresh(look_around, "x", SPEED_TEST="yes") for _ in range(2))
    assert first[:3] == second[:3] == ("x", torch.get_num_threads(), "yes")
    assert first[3] != second[3]
    assert "SPEED_TEST" not in os.environ


def look_around(given):
    return given, torch.get_num_threads(), os.environ["SPEED_TEST"], os.environ["TORCHINDUCTOR_CACHE_DIR"]


def test_a_failure_in_a_fresh_process_is_told_with_its_last_line():
    with pytest.raises(ChildProcessError, match=r"fail failed in its process \(status 1\): ValueError: too bad"):
        call_fresh(fail, "too bad")


@pytest.mark.skipif(not memory.PROC.exists(), reason="the part memory reads /proc")
def test_every_part_is_measured_and_written_with_the_conditions(tmp_path, capsys):
    thin = (Thin((8, 6, 6, 3), 5, 0.4, 0.5),)
    networks = (
        Network("images", partial(residual_cnn, (4, 6), 2, 10), (3, 8, 8), 3, 0.5, "SGD"),
        Network("tokens", partial(encoder, 8, 2, 1, 10), (5, 8), 3, 0.5, "AdamW"),
    )
    text = run(plan(tmp_path, sizes=(SMALL,), thin=thin, networks=networks, dtype=torch.bfloat16), progress=False)
    found = {(one["network"], one["contender"], one["channels"]) for one in lines_of(tmp_path / "networks.csv")}
    places = (("images", "first"), ("images", "last"), ("tokens", "first"))
    assert found == {(name, kind, where) for kind in ("forward", "dense", "sparse") for name, where in places}
    found = {(one["contender"], one["examples"], one["rows"]) for one in lines_of(tmp_path / "examples.csv")}
    assert found == {(kind, "0.4", "0.5") for kind in ("forward", "dense", "thin")}
    sparse = [f"always_sparse_{name}.{kind}" for name in ("convs", "scaling", "steps") for kind in ("csv", "png")]
    names = ["always_sparse_bytes.csv", *sparse, "build.csv", "examples.csv", "memory.csv", "networks.csv"]
    names += ["sampler.csv", "sampler.png", "speed.md", "steps.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    document = (tmp_path / "speed.md").read_text()
    assert text in document
    assert text in capsys.readouterr().out
    assert [line for line in document.splitlines() if line.startswith("## ")] == [
        *(f"## {title}" for title in PARTS.values()),
        "## Conditions",
    ]
    assert all(f"- {name}: " in document for name in ("run", "hardware", "threads", "versions", "command", "CUDA"))
    assert "bfloat16, eager" in document
    assert "- CUDA: not measured" in document


def test_one_part_alone_is_measured_from_the_command_line(tmp_path, capsys):
    arguments = ["--only", "steps", "--sizes", "8-4@5:2", "4-3@5:1,2", "--rounds", "2", "--eager", "--masked"]
    assert main(["speed", *arguments, "--min-rows", "2", "--out", str(tmp_path), "--quiet"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.md", "steps.csv"]
    found = {
        (one["size"], one["num_paths"]) for one in lines_of(tmp_path / "steps.csv") if one["contender"] == "masked"
    }
    assert found == {("8-4", "2"), ("4-3", "1"), ("4-3", "2")}
    assert "min_rows 2" in capsys.readouterr().out


def test_a_measurement_that_ends_early_leaves_the_parts_that_are_done(tmp_path, monkeypatch):
    monkeypatch.setitem(run.__globals__["MEASURES"], "build", lambda *_: fail("too bad"))
    with pytest.raises(ValueError, match="too bad"):
        run(plan(tmp_path, parts=("sampler", "build")), progress=False)
    assert "## The row sampler by itself" in (tmp_path / "speed.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--only", "steps,memry"],
            "the parts are steps, examples, networks, memory, sampler, build, always-sparse; given 'memry'",
        ),
        (["--sizes", "784"], "a size is WIDTHS@BATCH:PATHS"),
        (["--sizes", "8-4@8:5", "8-4@8:6"], "a size is there twice: 8-4@8"),
        (["--rounds", "0"], "rounds must be at least 1; given 0"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--device", "toaster"], "device 'toaster' cannot be used here"),
        (["--temperature", "-1"], "temperature must be a number above 0"),
        (["--dx", "some"], "dx must be one of"),
    ],
)
def test_a_wrong_argument_ends_with_two_before_any_work(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(run.__globals__, "MEASURES", {})
    try:
        status = main(["speed", *arguments, "--out", str(tmp_path / "new"), "--quiet"])
    except SystemExit as leaving:  # argparse's own
        status = leaving.code
    assert status == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["a file", "/proc"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(out, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(run.__globals__, "MEASURES", {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    assert main(["speed", "--out", out, "--quiet"]) == 2
    assert f"folder '{out}' cannot be written to: " in capsys.readouterr().err


def test_a_series_of_one_point_is_refused(tmp_path):
    with pytest.raises(ValueError, match="series_paths must hold at least two different numbers"):
        run(plan(tmp_path, draws=dataclasses.replace(DRAWS, series_paths=(5,))), progress=False)


def test_a_cuda_device_is_described_by_its_precision_settings():
    found = cuda_conditions("cuda")
    assert list(found) == ["CUDA", "TF32", "bfloat16"]
    assert "not allowed" in found["TF32"]
    assert "highest" in found["TF32"]


@pytest.mark.slow
def test_compiled_contenders_are_measured_in_every_part(tmp_path):
    size = dataclasses.replace(SMALL, num_paths=(2,))
    document = run(plan(tmp_path, sizes=(size,), compiled=True, masked=True, repeats=1), progress=False)
    kinds = {(one["contender"], one["compiled"]) for one in lines_of(tmp_path / "steps.csv")}
    assert kinds >= {(kind, compiled) for kind in ("dense", "masked", "sparse") for compiled in ("True", "False")}
    found = lines_of(tmp_path / "memory.csv")
    assert [(one["contender"], one["compiled"]) for one in found] == [
        (kind, compiled) for kind in ("dense", "masked", "sparse") for compiled in ("False", "True")
    ]
    eager, compiled = ([one["gradients"] for one in found if one["compiled"] == how] for how in ("False", "True"))
    assert eager[0] == compiled[0]
    compiling = [one for one in lines_of(tmp_path / "build.csv") if one["measurement"] == "compile"]
    assert [one["contender"] for one in compiling] == ["dense", "sparse"]
    assert "times dense: sparse, compiled" in document
