"""Where a forward pass is computed again (torch.utils.checkpoint), its draws are those of the first time."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import rwfx

POLICIES = (
    *(rwfx.RandomWalk(7), rwfx.RandomWalk(density=0.3), rwfx.RandomWalk(5, start="gradient")),
    *(rwfx.AdaptiveWalk(5), rwfx.LearnedWalk(5), rwfx.Uniform(0.3), rwfx.Magnitude(0.3), rwfx.TopK(0.3)),
)


def transformed(policy, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5)).double()
    return rwfx.transform(model, rows=policy, break_even=False, seed=3, **options)


def steps(model, call, number=3):
    """The gradients, rows and sampler state of each step; the weights move."""
    found = []
    for k in range(number):
        model.zero_grad()
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        call(x.requires_grad_()).square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append((gradients, model.rows, model.sampler_state()))
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-3 * p.grad
    return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_recomputed_forward_draws_what_the_forward_drew(policy, reentrant):
    plain = transformed(policy)
    again = copy.deepcopy(plain)
    expected = steps(plain, plain)
    assert_close(steps(again, lambda x: checkpoint(again, x, use_reentrant=reentrant)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("policy", [rwfx.RandomWalk(7), rwfx.Magnitude(0.3)], ids=str)
def test_so_does_a_compiled_one(policy):
    plain = transformed(policy)
    again = copy.deepcopy(plain)
    expected = steps(plain, plain, 2)
    compiled = torch.compile(again, backend="aot_eager")
    assert_close(steps(again, lambda x: checkpoint(compiled, x, use_reentrant=False), 2), expected)


def test_a_forward_in_a_backward_pass_that_is_no_recomputation_draws_anew():
    model = transformed(rwfx.RandomWalk(7))
    x = torch.zeros(2, 6, dtype=torch.float64)

    def again(gradient):
        with torch.enable_grad():
            model(x)

    y = model(x)
    y.register_hook(again)
    y.sum().backward()
    assert int(model.row_sampler.state[1]) == 2


@pytest.mark.parametrize("operator", ["rewind_", "tick_"])
def test_the_operators_are_what_torch_library_asks_for(operator):
    state, tick = torch.tensor([3, 4]), torch.tensor([0, 1])
    arguments = (state, tick) if operator == "rewind_" else (state,)
    torch.library.opcheck(getattr(torch.ops.rwfx, operator).default, arguments)
