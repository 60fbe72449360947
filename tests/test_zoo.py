"""Models of torchvision, timm and Hugging Face train with the gradients of plain autograd with masks."""

import math
import os
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import rwfx
from rwfx.experiments.cli import main
from rwfx.experiments.tables import read_csv
from rwfx.experiments.zoo import check, run
from rwfx.experiments.zoo.apart import Lost, call_apart
from rwfx.experiments.zoo.catalogue import SUITES, Entry, entries
from rwfx.experiments.zoo.expected import EXPECTED, surprise_of
from rwfx.experiments.zoo.oracle import masked_calls
from rwfx.experiments.zoo.plan import Plan
from rwfx.experiments.zoo.records import Record, problem_of
from rwfx.experiments.zoo.report import report

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = {
    "hugging_face": (
        *("bert", "albert", "deberta_v2", "fnet", "longformer"),
        *("gpt2", "gpt_neox", "llama", "qwen3_moe", "mamba", "t5"),
        *("vit", "convnext", "resnet", "clip"),
    ),
    "timm": ("beit", "byobnet", "mobilenetv3", "resnet", "vision_transformer"),
    "torchvision": ("squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet18", "mnasnet0_5"),
}


@pytest.mark.parametrize("entry", [Entry(s, name) for s, names in FAST.items() for name in names], ids=str)
def test_a_model_of_the_zoo_is_as_it_should_be(entry):
    pytest.importorskip({"hugging_face": "transformers"}.get(entry.suite, entry.suite))
    assert surprise_of(check.check(entry)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("entry", entries(tuple(SUITES)), ids=str)
def test_every_model_of_the_zoo_is_as_it_should_be(entry):
    pytest.importorskip({"hugging_face": "transformers"}.get(entry.suite, entry.suite))
    assert surprise_of(run.checked(entry, limit=Plan.limit)) == ""


def test_what_is_expected_is_in_the_zoo():
    known = {str(entry) for entry in entries(tuple(SUITES))}
    assert EXPECTED.keys() <= known


def test_every_module_of_timm_has_a_model():
    timm = pytest.importorskip("timm")
    assert set(SUITES["timm"].names()) == set(timm.list_modules())


class Spelled(nn.Module):
    """A call on a weight with five rows, or as many as are said, by ``call(weight, x)``."""

    def __init__(self, call, shape=(5, 4), inputs=(7, 4), dim=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.call, self.dim, self.x = call, dim, torch.randn(inputs, dtype=torch.float64)

    def forward(self):
        return self.call(self.weight, self.x)


def attention(w, x):
    out = torch.eye(4, dtype=torch.float64)
    return F.multi_head_attention_forward(x, x, x, 4, 2, w, None, None, None, False, 0.0, out, None)[0]


SPELLINGS = {
    "linear": (F.linear, {}),
    "products": (lambda x, w: torch.cat([F.linear(x, w), x @ w.t()], -1), {}),
    "product": (lambda x, w: x @ w.t(), {}),
    "transposed": (lambda x, w: x @ w, {"shape": (4, 5), "dim": 1}),
    "addmm": (lambda x, w: torch.addmm(x[:, :1], x, w), {"shape": (4, 5), "dim": 1}),
    "attention": (lambda x, w: attention(w, x), {"shape": (12, 4), "inputs": (3, 2, 4)}),
    "experts": (
        lambda x, w: F.grouped_mm(x.float(), w.float(), offs=torch.tensor([3, 7], dtype=torch.int32)),
        {"shape": (2, 4, 8), "dim": 2},
    ),
    "conv2d": (F.conv2d, {"shape": (5, 4, 2, 2), "inputs": (2, 4, 3, 3)}),
    "grouped": (lambda x, w: F.conv1d(x, w, groups=2), {"shape": (6, 2, 2), "inputs": (2, 4, 3)}),
    "conv_transpose2d": (F.conv_transpose2d, {"shape": (4, 5, 2, 2), "inputs": (2, 4, 3, 3), "dim": 1}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_oracle_masks_the_rows_of_a_weight_however_its_call_is_spelled(spelling):
    call, options = SPELLINGS[spelling]
    module, rows = Spelled(lambda w, x: call(x, w), **options), torch.tensor([1, 3])
    module().square().sum().backward()
    dense, module.weight.grad = module.weight.grad, None
    with masked_calls(module, {"weight": rows}) as oracle:
        module().square().sum().backward()
    assert oracle.met == {"weight"}
    kept = torch.zeros_like(dense).index_copy(module.dim, rows, dense.index_select(module.dim, rows))
    assert_close(module.weight.grad, kept)


def test_the_oracle_masks_parts_of_a_parameter_by_their_names():
    module, x = nn.Linear(4, 7, bias=False).double(), torch.randn(3, 4).double()
    rows = {"weight[0:3]": torch.tensor([1]), "weight[3:7]": torch.tensor([0, 2])}
    with masked_calls(module, rows) as oracle:
        (F.linear(x, module.weight[:3]).sum() + F.linear(x, module.weight[3:]).sum()).backward()
    assert oracle.met == rows.keys()
    kept = torch.zeros(7, 1).double()
    kept[[1, 3, 5]] = 1
    assert_close(module.weight.grad, kept * x.sum(0))


def test_the_oracle_hands_the_masked_gradient_to_what_is_before():
    first, second, x = nn.Linear(3, 4).double(), nn.Linear(4, 5).double(), torch.randn(2, 3).double()
    model = nn.Sequential(first, nn.ReLU(inplace=True), second)
    rows = {"0.weight": torch.tensor([0, 2]), "2.weight": torch.tensor([1])}
    with masked_calls(model, rows):
        model(x).sum().backward()
    g = torch.zeros(2, 5).double()
    g[:, 1] = 1
    h = first(x)
    g = (g @ second.weight) * (h > 0)
    g[:, [1, 3]] = 0
    assert_close(first.weight.grad, g.T @ x)
    assert_close(first.bias.grad, g.sum(0))


class Toy(nn.Module):
    """A network with dropout and batch statistics, and a part that nothing uses."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.net(x)


def toy():
    torch.manual_seed(0)
    model = Toy().double()
    return model, (torch.randn(5, 6).double(),)


def sparse_of(model, inputs, **options):
    return rwfx.transform(
        model, rows=check.ROWS, seed=1, break_even=False, example_inputs=inputs, **{"dx": "rows", **options}
    )


def toys(monkeypatch):
    monkeypatch.setitem(
        SUITES, "toys", replace(SUITES["timm"], title="Toys", names=lambda: ("toy",), build=lambda _: toy())
    )


def test_a_sound_model_has_no_problem(monkeypatch):
    toys(monkeypatch)
    record = check.check(Entry("toys", "toy"))
    assert problem_of(record) == ""
    assert (record.weights, record.sparse, record.dense) == (3, 2, 1)
    assert record.reasons == "1 the forward pass does not read it"
    assert (record.forward, record.state_dict, record.graphs, record.dtype) == ("equal", "equal", 1, "float64")
    assert record.seconds > 0
    assert record.gradient < 1e-12


def fields_of(model, sparse, inputs):
    return check.account(model, sparse) | check.compare(model, sparse, inputs, "float64") | {"graphs": 1}


def other_dx(model, inputs):
    return sparse_of(model, inputs, dx="full")


def other_mode(model, inputs):
    sparse = sparse_of(model, inputs)
    sparse.eval()
    return sparse


def other_keys(model, inputs):
    sparse = sparse_of(model, inputs)
    sparse.add_module("more", nn.Linear(1, 1))
    return sparse


FAULTS = {
    "gradients": (other_dx, "the gradient of net.0"),
    "outputs": (other_mode, "forward: outputs differ"),
    "keys": (other_keys, "state_dict: 2 keys differ"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_a_problem_and_says_so(fault):
    break_it, said = FAULTS[fault]
    model, inputs = toy()
    record = Record("toys", "toy", **fields_of(model, break_it(model, inputs), inputs))
    assert said in problem_of(record)
    assert surprise_of(record).startswith("a new problem")


def test_a_model_that_cannot_be_built_is_a_line_with_its_error(monkeypatch):
    toys(monkeypatch)
    monkeypatch.setitem(SUITES, "toys", replace(SUITES["toys"], build=lambda _: 1 / 0))
    assert problem_of(check.check(Entry("toys", "toy"))) == "ZeroDivisionError: division by zero"


class Branching(nn.Module):
    """Its forward is two graphs to ``torch.compile``."""

    def forward(self, x):
        h = x * 2
        return h + 1 if h.sum() > 0 else h - 1


def test_graphs_are_counted():
    model, inputs = toy()
    assert check.graphs_of(sparse_of(model, inputs), inputs) == 1
    assert check.graphs_of(Branching(), (torch.ones(3),)) == 2


SOUND = Record("timm", "resnet", 10, "symbolic_trace", 4, 4, 0, "", "float64", "equal", 1e-16, "w", "equal", 1, 0.5)


def test_a_visit_checks_only_what_is_not_written_down_and_problems_again_where_asked(tmp_path, monkeypatch, capsys):
    checked = []

    def pretend(entry, limit):
        checked.append(entry.model)
        broken = entry.model == "levit" and len(checked) == 1
        return replace(SOUND, model=entry.model, error="ValueError: no | way" if broken else "")

    monkeypatch.setattr(run, "checked", pretend)
    command = ["zoo", "--suites", "timm", "--out", str(tmp_path), "--quiet", "--models"]
    assert main([*command, "levit"]) == 0
    assert "0 of 1 models" in capsys.readouterr().out
    assert "no \\| way" in (tmp_path / "zoo.md").read_text()
    assert main([*command, "levit,resnet"]) == 0
    assert checked == ["levit", "resnet"]
    assert main([*command, "levit,resnet", "--again"]) == 0
    assert checked == ["levit", "resnet", "levit"]
    assert "2 of 2 models are as they should be" in capsys.readouterr().out
    assert [record.model for record in read_csv(tmp_path / "zoo.csv", Record)] == ["levit", "resnet"]
    assert "| 2 of 2 " in (tmp_path / "zoo.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--suites", "keras"], "the suites are"),
        (["--models", "nothing"], "no model of"),
        (["--limit", "0"], "must be more than 0"),
    ],
    ids=["suite", "model", "limit"],
)
def test_a_plan_that_checks_nothing_is_refused(options, said, tmp_path, capsys):
    assert main(["zoo", "--out", str(tmp_path), *options]) == 2
    assert said in capsys.readouterr().err


def test_the_report_counts_what_is_exact_and_names_what_is_wrong():
    wrong = replace(SOUND, model="levit", gradient=math.nan)
    text = report([SOUND, wrong])
    assert "| 1 of 2 " in text
    assert "- `timm/levit`: the gradient of w is off by nan" in text


def test_a_known_problem_that_is_gone_is_a_surprise_and_so_is_another_one(monkeypatch):
    wrong = replace(SOUND, error="ValueError: cannot trace ResNet")
    assert surprise_of(SOUND) == ""
    assert surprise_of(wrong).startswith("a new problem")
    monkeypatch.setitem(EXPECTED, "timm/resnet", "cannot trace")
    assert surprise_of(wrong) == ""
    assert surprise_of(SOUND).startswith("no problem any more")
    assert surprise_of(replace(wrong, error="ValueError: other")).startswith("another problem")


@pytest.mark.slow
def test_a_check_that_dies_or_takes_too_long_is_lost_and_the_next_one_runs():
    with pytest.raises(Lost, match="longer than 2 seconds"):
        call_apart(time.sleep, 600, limit=2)
    with pytest.raises(Lost, match="status 3"):
        call_apart(os._exit, 3, limit=600)
    assert call_apart(math.sqrt, 4.0, limit=600) == 2
