"""The global random streams, from which a forward pass may draw in Python, where no graph sees it."""

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undrawn(complaint: Exception) -> Iterator[None]:
    """Put the streams back, and raise ``complaint`` if any was drawn from."""
    before = torch.get_rng_state()
    with put_back() as others:
        try:
            yield
        finally:
            is_drawn = not (torch.equal(torch.get_rng_state(), before) and _others() == others)
            torch.set_rng_state(before)
    if is_drawn:
        raise complaint


@contextmanager
def put_back() -> Iterator[bytes]:
    """Put the streams of Python and of numpy back; gives what they are."""
    before = _others()
    try:
        yield before
    finally:
        of_python, of_numpy = pickle.loads(before)
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002  the global stream is what a model may read


def _others() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state()))  # noqa: NPY002
