"""What reads a parameter decides why it is dense; finding it takes time linear in the depth of a model."""

import pytest
import torch
from torch import nn

import rwfx
from rwfx import weight_views


class Normed(nn.Module):
    """A weight that a module is also called on: it has a second gradient, which knows no rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 8), nn.Linear(8, 4), nn.LayerNorm(6)

    def forward(self, x):
        return self.second(self.first(x).relu()), self.norm(self.first.weight)


def test_a_weight_that_a_module_is_called_on_has_no_row_gradient():
    sparse = rwfx.transform(Normed(), num_paths=3, grad="rows", break_even=False)
    assert "norm uses its weight or bias too" in sparse.report.dense["first.weight"]
    assert sparse.report.sparse == ("second.weight",)
    out, normed = sparse(torch.randn(5, 6))
    (out.sum() + normed.square().sum()).backward()
    assert sparse.get_parameter("second.weight").grad.is_sparse
    assert sparse.get_parameter("first.weight").grad.count_nonzero() == 48


class Started(nn.Module):
    """A recurrent layer that starts from a parameter."""

    def __init__(self):
        super().__init__()
        self.start, self.lstm, self.head = nn.Parameter(torch.zeros(1, 1, 8)), nn.LSTM(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lstm(x, (self.start, self.start))[0])


def test_a_parameter_that_a_module_is_called_on_is_none_of_its_weights():
    dense = rwfx.transform(Started(), num_paths=3, break_even=False).report.dense
    assert dense["lstm.weight_hh_l0"].endswith("each time with what it gave before")
    assert dense["start"] == "no plain linear call or convolution uses it (it belongs to Started)"


class Scaled(nn.Sequential):
    """A parameter that does not lie in memory row by row."""

    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.Linear(8, 4))
        self.scale = nn.Parameter(torch.ones(8, 2).t())

    def forward(self, x):
        return self[1](self[0](x).relu() * self.scale.sum(0))


def test_a_parameter_that_is_not_contiguous_is_read_too():
    dense = rwfx.transform(Scaled(), num_paths=3, break_even=False).report.dense
    assert dense["scale"] == "no plain linear call or convolution uses it (it belongs to Scaled)"


class Layer(nn.Module):
    """A weight, and a parameter that is none."""

    def __init__(self):
        super().__init__()
        self.weighted, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(2, 4))

    def forward(self, x):
        return self.weighted(x) * self.scale.sum(0)


@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_the_views_that_are_looked_for_grow_with_the_depth_and_no_faster(grad, monkeypatch):
    looked, find = [], weight_views.views_of

    def counted(*arguments):
        looked.append(1)
        return find(*arguments)

    monkeypatch.setattr(weight_views, "views_of", counted)
    counts = []
    for depth in (10, 20, 40):
        looked.clear()
        rwfx.transform(nn.Sequential(*(Layer() for _ in range(depth))), num_paths=3, grad=grad, break_even=False)
        counts.append(len(looked))
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0]) > 0
