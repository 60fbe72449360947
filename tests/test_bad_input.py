import numpy as np
import pytest
import torch
from torch import nn

import rwfx

BAD = [
    ({"num_paths": 0}, ValueError, "num_paths must be a whole number at least 1, got 0"),
    ({"num_paths": "50"}, TypeError, "num_paths must be a whole number at least 1, got '50' \\(str\\)"),
    ({"num_paths": 2.5}, TypeError, "num_paths"),
    ({"num_paths": True}, TypeError, "num_paths"),
    ({"density": 0}, ValueError, "density must be a number above 0 and at most 1, got 0"),
    ({"density": 1.1}, ValueError, "density must be a number above 0 and at most 1, got 1.1"),
    ({"resample_every": 0}, ValueError, "resample_every"),
    ({"mode": "rw_sparse"}, ValueError, "mode must be one of 'sparse', 'masked', got 'rw_sparse'"),
    ({"dx": "row"}, ValueError, "dx must be one of 'rows', 'full', None, got 'row'"),
    ({"grad": []}, ValueError, "grad must be one of"),
    ({"seed": -1}, ValueError, "seed"),
    ({"seed": "a"}, TypeError, "seed"),
    ({"exclude": [["0"]]}, TypeError, "exclude must hold names of weights or modules .*, got \\['0'\\]"),
    ({"include": 3}, TypeError, "include must hold names"),
    ({"exclude": "body"}, ValueError, "exclude names 'body', which matches no weight or module; the weights are 0.we"),
    ({"exclude": "*"}, ValueError, "no weight is left to make sparse"),
    ({"include": "attention"}, ValueError, "no weight is left to make sparse"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=[str(options) for options, _, _ in BAD])
def test_bad_arguments_are_refused_and_nothing_is_changed(options, error, match):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before, state = {**model.__dict__}, torch.get_rng_state()
    with pytest.raises(error, match=match):
        rwfx.transform(model, **options)
    assert {**model.__dict__} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_of_other_libraries_are_numbers():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    sparse = rwfx.transform(
        model, rows=rwfx.RandomWalk(np.int64(3), temperature=np.float32(0.5), epsilon=0), seed=np.int32(1)
    )
    sparse(torch.randn(2, 3)).sum().backward()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_all_zero_or_non_finite_weights_do_not_stop_a_step(value, mode):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model[2].weight, value)
    sparse = rwfx.transform(model, num_paths=3, mode=mode)
    for _ in range(3):
        sparse(torch.randn(2, 3)).sum().backward()
    assert all(len(rows) for rows in sparse.rows.values())
