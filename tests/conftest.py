import os
import sys
from pathlib import Path

# A compiled artifact of an earlier version of an operator must not answer for this one.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
sys.path.insert(0, str(Path(__file__).parent))  # so that the tests can import oracles and zoo

import pytest
import torch

import rwfx
from rwfx.experiments.speed import turns
from rwfx.options import Options


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def small_models_are_sparse(monkeypatch):
    """The models of the tests are too small to pay; a test of the break-even gives a ``CostModel`` itself."""
    predicted = Options.costs_on
    monkeypatch.setattr(
        Options,
        "costs_on",
        lambda self, device: predicted(self, device) if isinstance(self.break_even, rwfx.CostModel) else None,
    )


@pytest.fixture(scope="module")
def one_thread():
    """Tensors of a few numbers: more threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def short_turns(monkeypatch):
    """Turns of two calls: a test looks at what is measured, not at how long it takes."""
    monkeypatch.setattr(turns, "MOST_CALLS", 2)
