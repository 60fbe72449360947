"""Random streams in steps, which a recomputation of a forward pass (``torch.utils.checkpoint``) does not move on.

A *state* is ``[seed, step]`` int64; what is drawn is a function of it. In a recomputation the step of the forward pass
that is computed again is given once more, so that its draws are the same.

``rwfx::rewind_``  a state, before a draw: in a recomputation it is taken back to where the forward pass found it.
``rwfx::tick_``    the state, for a draw in the backward pass, and the stream one step on: in one, or a compiler would
                   copy the state where it is used, when it has stepped on already.
"""

import torch
from torch import Tensor
from torch.utils import checkpoint

torch.library.define("rwfx::rewind_", "(Tensor(a!) state, Tensor tick) -> ()")


@torch.library.impl("rwfx::rewind_", "default")
def _(state: Tensor, tick: Tensor) -> None:
    if recomputes():
        state.sub_(tick)


@torch.library.register_fake("rwfx::rewind_")
def _(state: Tensor, tick: Tensor) -> None:
    pass


torch.library.define("rwfx::tick_", "(Tensor(a!) state) -> Tensor")


@torch.library.impl("rwfx::tick_", "default")
def _(state: Tensor) -> Tensor:
    before = state.clone()
    if recomputes():
        before[1:].sub_(1)
    else:
        state[1:].add_(1)
    return before


torch.library.register_fake("rwfx::tick_", torch.empty_like)


def recomputes() -> bool:
    """Whether this forward pass is one that ``torch.utils.checkpoint`` runs a second time, in a backward pass.

    With ``use_reentrant=True`` the first one had no gradients and drew nothing: that is no second time here.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    return hooks is not None and hooks[0].__module__ == checkpoint.__name__
