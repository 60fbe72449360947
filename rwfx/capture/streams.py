"""The global random streams, from which a forward pass may draw in Python, where no graph sees it."""

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def undrawn(complaint: Exception) -> Iterator[None]:
    """Put torch's stream back, and raise ``complaint`` if any stream was drawn from."""
    before, others = _streams()
    try:
        yield
    finally:
        after, others_after = _streams()
        torch.set_rng_state(before)
    if not (torch.equal(after, before) and others_after == others):
        raise complaint


def _streams() -> tuple[Tensor, bytes]:
    others = random.getstate(), np.random.get_state()  # noqa: NPY002  the global stream is what a model may read
    return torch.get_rng_state(), pickle.dumps(others)
