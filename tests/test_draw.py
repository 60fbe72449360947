"""Pictures: the numbers behind them, what is drawn, and that nothing overlaps."""

import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import rwfx
from rwfx import draw
from rwfx.draw_layout import lay_out
from rwfx.labels import WeightUse

pytest.importorskip("matplotlib").use("Agg")
ROOT = Path(__file__).parents[1]


def mlp(*widths):
    layers = [nn.Linear(i, o) for i, o in pairwise(widths)]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])


MODELS = {
    "mlp": lambda: mlp(784, 256, 128, 10),
    "one layer": zoo.Single,
    "residual": zoo.Residual,
    "20 layers, residual": lambda: zoo.Residual(blocks=18),
    "20 layers, wide": lambda: mlp(*[5000] + [200] * 19, 10),
    "two heads": zoo.Heads,
    "a weight called three times": zoo.Twice,
    "concatenations": zoo.Concat,
    "gates": zoo.Gated,
}
every_model = pytest.mark.parametrize("model", MODELS)


def graph_and_walks(model, num_paths=40):
    torch.manual_seed(0)
    built = MODELS[model]()
    graph = rwfx.weight_graph(built)
    return graph, rwfx.random_walks(graph, dict(built.named_parameters()), num_paths)


def strips(ax) -> dict[str, Any]:
    """The strips of a picture, by the name of their call."""
    return {a.get_gid()[6:]: a for a in ax.collections if str(a.get_gid()).startswith("strip ")}


def texts(ax):
    """Every text of a picture, with its box in pixels."""
    figure = ax.figure
    figure.draw_without_rendering()
    bars = [text for child in ax.child_axes for text in child.get_xticklabels()]
    every = [*ax.texts, *ax.get_legend().get_texts(), *bars]
    return [(text.get_text(), text.get_window_extent()) for text in every if text.get_text()]


@every_model
def test_visits_are_a_count_of_the_walks(model):
    graph, walks = graph_and_walks(model)
    visits = draw.count_visits(graph, walks)
    assert list(visits) == [use.name for use in graph.uses]
    for column, use in enumerate(graph.uses):
        expected = [sum(row == i for row in walks[:, column].tolist()) for i in range(use.rows)]
        assert visits[use.name].tolist() == expected


def test_draws_count_the_steps_in_which_a_row_was_drawn():
    model = zoo.Twice()
    sparse_model = rwfx.transform(model, 3, seed=0)
    graph, steps = rwfx.weight_graph(model), []
    for _ in range(5):
        sparse_model(torch.randn(4, 12))
        steps.append(sparse_model.rows)
    draws = draw.count_draws(graph, iter(steps))
    assert list(draws) == list(sparse_model.rows)
    for weight, counts in draws.items():
        assert counts.tolist() == [sum(i in step[weight] for step in steps) for i in range(len(counts))]


@pytest.mark.parametrize(("rows", "per_cell"), [(10, 1), (10, 4), (12, 4), (3, 5), (256, 7)])
def test_cells_sum_to_their_rows(rows, per_cell):
    counts = torch.randint(9, (rows,))
    parts = [counts[i : i + per_cell].sum().item() for i in range(0, rows, per_cell)]
    assert draw.sum_cells(counts, per_cell).tolist() == parts


@every_model
def test_a_picture_has_a_strip_per_call_and_a_line_per_walk(model):
    graph, walks = graph_and_walks(model)
    ax = draw.draw_graph(graph, walks=walks, max_walks=30)
    assert list(strips(ax)) == [use.name for use in graph.uses]
    (lines,) = [a for a in ax.collections if a.get_gid() == "walks"]
    assert len(lines.get_paths()) == 30


@pytest.mark.parametrize("max_rows", [1, 7, 64, 300])
def test_a_cell_shows_the_mean_count_of_its_rows(max_rows):
    graph, walks = graph_and_walks("mlp")
    ax = draw.draw_graph(graph, walks=walks, max_rows=max_rows)
    visits = draw.count_visits(graph, walks)
    for name, strip in strips(ax).items():
        counts = visits[name].float()
        per_cell = -(-len(counts) // max_rows)
        shown = torch.as_tensor(strip.get_array().filled(0)).flatten()
        assert len(shown) <= max_rows
        torch.testing.assert_close(shown, torch.stack([c.mean() for c in counts.split(per_cell)]))


@pytest.mark.parametrize("max_walks", [0, 40])
@every_model
def test_no_text_overlaps_another_or_leaves_the_picture(model, max_walks):
    graph, walks = graph_and_walks(model)
    ax = draw.draw_graph(graph, walks=walks, max_walks=max_walks, title="A title")
    found = texts(ax)
    assert len(found) >= 2 * len(graph.uses)
    for (a, box), (b, other) in combinations(found, 2):
        assert not box.overlaps(other), f"{a!r} lies on {b!r}"
    for text, box in found:
        assert ax.figure.bbox.contains(box.x0, box.y0), text
        assert ax.figure.bbox.contains(box.x1, box.y1), text


@every_model
def test_strips_stand_apart_and_data_run_to_the_right(model):
    graph, _ = graph_and_walks(model)
    layout = lay_out(graph, 64)
    for a, b in combinations(layout.strips.values(), 2):
        assert a.right < b.x or b.right < a.x or a.bottom > b.y or b.bottom > a.y
    x = {station: thing.x for station, thing in {**layout.strips, **layout.places}.items()}
    assert all(x[producer] < x[consumer] for producer, consumer in layout.edges)


@every_model
def test_edges_feed_every_feature_once(model):
    graph, _ = graph_and_walks(model)
    layout = lay_out(graph, 64)
    for station, s in enumerate(graph.stations):
        if isinstance(s, WeightUse):
            into = [edge.features for (_, consumer), edge in layout.edges.items() if consumer == station]
            assert sum(into) == len(s.feature_map)


def test_branches_stand_in_one_column():
    graph, _ = graph_and_walks("concatenations")
    columns = {strip.name: strip.column for strip in lay_out(graph, 64).strips.values()}
    assert columns == {"input": 0, "a.weight": 1, "b.weight": 1, "c.weight": 2, "d.weight": 3}


def test_the_compact_form_is_for_more_than_ten_calls():
    assert not lay_out(graph_and_walks("residual")[0], 64).compact
    assert lay_out(graph_and_walks("20 layers, residual")[0], 64).compact


def test_draws_by_weight_colour_every_call_and_a_missing_weight_is_dense():
    graph, _ = graph_and_walks("a weight called three times")
    ax = draw.draw_graph(graph, visits={"shared.weight": torch.arange(8)})
    cells = {name: strip.get_array().filled(0).flatten().tolist() for name, strip in strips(ax).items()}
    assert cells["shared.weight"] == cells["shared.weight#2"] == cells["shared.weight#3"] == list(range(8))
    assert not any(cells["head.weight"])
    assert sum("dense" in text for text, _ in texts(ax)) == 2


@pytest.mark.parametrize("options", [{}, {"walks": torch.empty(0, 3, dtype=torch.int64)}], ids=["graph", "no walk"])
def test_a_graph_without_walks_can_be_drawn(options):
    graph = rwfx.weight_graph(mlp(6, 5, 4, 3))
    assert len(strips(draw.draw_graph(graph, **options))) == 3


def test_a_given_axes_is_drawn_on():
    figure_module = pytest.importorskip("matplotlib.figure")
    ax = figure_module.Figure().add_subplot()
    graph, walks = graph_and_walks("residual")
    assert draw.draw_graph(graph, walks=walks, ax=ax) is ax
    assert strips(ax)


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch, suffix, start):
    graph, walks = graph_and_walks("one layer")
    figure, path = draw.draw_graph(graph, walks=walks).figure, tmp_path / "new" / f"graph.{suffix}"
    draw.save(figure, path, dpi=40)
    whole = path.read_bytes()
    assert whole.startswith(start)

    def broken(file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", broken)
    with pytest.raises(KeyboardInterrupt):
        draw.save(figure, path)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"walks": torch.zeros(4, 2, dtype=torch.int64)}, r"walks must be int64 of shape \(num_paths, 3\)"),
        ({"walks": torch.zeros(3, dtype=torch.int64)}, "walks must be int64 of shape"),
        ({"walks": torch.zeros(4, 3)}, "got torch.float32"),
        ({"walks": torch.tensor([[0, 0, 3]])}, "walks pass row 3 of 4.weight, which has 3 rows"),
        ({"walks": torch.tensor([[0, 0, 0], [0, -2, 0]])}, "walks pass row -2 of 2.weight"),
        ({"visits": {"0.weight": torch.zeros(4)}}, r"visits of 0.weight must have shape \(5,\)"),
        ({"visits": {"fc.weight": torch.zeros(5)}}, r"visits name \['fc.weight'\]"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
    ],
)
def test_what_is_not_of_the_graph_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw.draw_graph(rwfx.weight_graph(mlp(6, 5, 4, 3)), **options)


def test_row_sets_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"'fc.weight' is of no weight of the graph"):
        draw.count_draws(rwfx.weight_graph(mlp(6, 5)), [{"fc.weight": torch.tensor([0])}])


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, rwfx, rwfx.draw; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "rwfx\[draw\]"'):
        draw.draw_graph(rwfx.weight_graph(mlp(6, 5)))


def test_the_example_draws_its_pictures(tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, "examples/draw_weight_graph.py", "--out", str(tmp_path), "--steps", "20"]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    pictures = sorted(tmp_path.iterdir())
    assert len(pictures) == 4
    assert all(str(path) in result.stdout and path.read_bytes().startswith(b"\x89PNG") for path in pictures)
