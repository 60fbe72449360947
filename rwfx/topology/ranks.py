"""Equal candidates on all ranks of a data-parallel run, whose models are equal and whose batches are not.

Where a draw depends on the seed alone, every rank has found the same candidates, and their gradients are summed. Where
it depends on the batch, all take what rank 0 has found: others have no gradients of those places, and to exchange them
in the backward pass would get in the way of what exchanges gradients there.
"""

import torch
from torch import Tensor, distributed

from rwfx.probe import Probe


def agreed(probe: Probe) -> tuple[Tensor, Tensor]:
    """Candidates and gradients of a probe, the same on every rank."""
    keys, grads = probe.candidates()
    if not several():
        return keys, grads
    count = torch.tensor([len(keys)], device=keys.device)
    distributed.broadcast(count, 0)
    own, keys = keys, keys if len(keys) == count else keys.new_empty(int(count))
    keys = keys.clone()
    distributed.broadcast(keys, 0)
    same = torch.equal(own, keys)
    if probe.rule in ("uniform", "given"):
        grads = grads.clone() if same else grads.new_zeros(len(keys))
        distributed.all_reduce(grads)
    else:
        grads = grads.clone() if len(grads) == len(keys) else grads.new_empty(len(keys))
        distributed.broadcast(grads, 0)
    return keys, grads


def agree_on_mean(grads: Tensor) -> None:
    """In place, the mean over all ranks."""
    if several():
        distributed.all_reduce(grads)
        grads /= distributed.get_world_size()


def several() -> bool:
    """Whether this is one of several ranks."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
