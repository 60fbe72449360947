"""What a method of topology reads in the backward pass of a call with a sparse weight.

``rwfx::probe``   the identity of the call's output ``y``, whose backward runs
``rwfx::probe_``  which, when it is due, writes candidates and their gradients into buffers, by a *rule*:

    uniform, grabo, graest   candidates of GSE with their gradients; see ``EXPLORE``
    dense                    the candidates with the largest gradients, of all (RigL)
    momentum                 a running mean of all gradients (SNFS)
    given                    the gradients of keys that the buffer holds (Top-KAST)

So the operators of the call itself know nothing of it, and a training loop is what it was. When nothing is due
``probe_`` reads one number of the CPU and returns. A gradient as large as the dense weight exists for ``dense``, while
it runs, and for ``momentum``.

Of several backward passes before an update (accumulated gradients, a weight that is called twice) the first chooses
candidates, and their gradients are summed over all, also of a pass whose gradients of parameters were thrown away. A
pass with a gradient that is not finite is not looked at.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rwfx.extremes import largest
from rwfx.keys import distinct_keys, without
from rwfx.nonzeros import keys_of
from rwfx.ops.candidates import draw_places, random_signs
from rwfx.ops.weighted_call import WeightedCall

NOT_DUE, DUE, FOUND = range(3)
"""What ``state[0]`` says: look at nothing; choose candidates; add to the gradients of those chosen."""

DECAY = 0.9
"""Of the running mean of gradients: the momentum with which the papers train (Dettmers & Zettlemoyer 2019)."""

_library = torch.library.Library("rwfx", "FRAGMENT")
_call = "Tensor x, Tensor values, Tensor ccol_indices, Tensor row_indices, Tensor crow_indices, int[] options, str by"
_library.define(f"probe(Tensor(a) y, {_call}, str rule, Tensor state, Tensor keys, Tensor grads) -> Tensor(a)")
_library.define(f"probe_(Tensor g, {_call}, str rule, Tensor(a!) state, Tensor(b!) keys, Tensor(c!) grads) -> ()")


def probe(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    ccol_indices: Tensor,
    row_indices: Tensor,
    crow_indices: Tensor,
    options: Sequence[int],
    by: str,
    rule: str,
    state: Tensor,
    keys: Tensor,
    grads: Tensor,
) -> Tensor:
    """``y`` itself; the backward pass reads its gradient and writes ``state``, ``keys`` and ``grads`` when it is due.

    Args:
        y, x: output and input of the call.    values, ccol_indices, row_indices, crow_indices, by: its sparse weight.
        options: of a convolution, kernel, stride, padding, dilation and groups, one after the other; else empty.
        rule: a key of ``RULES``.
        state: ``(4,)`` int64 on the CPU: what is due, the key of random numbers, how many candidates to draw or to
            keep (0: all places are candidates), and how many there are.
        keys: ``(M,)`` int64, M at least as many as there can be: sorted, those behind the last candidate are to be
            ignored.
        grads: ``(M,)``, or for ``"momentum"`` as many as the dense weight has places.
    """
    return torch.ops.rwfx.probe.default(
        y, x, values, ccol_indices, row_indices, crow_indices, options, by, rule, state, keys, grads
    )


def _gather(g, x, values, ccol_indices, row_indices, crow_indices, options, by, rule, state, keys, grads):
    # A step whose gradients overflow is one that a GradScaler leaves out.
    if state[0] == NOT_DUE or not g.isfinite().all():
        return
    if options and x.dim() == 3:
        g, x = g.unsqueeze(0), x.unsqueeze(0)
    call = WeightedCall(g.to(x.dtype), x, values, ccol_indices, row_indices, crow_indices, options, by)
    if rule == "momentum":
        if state[0] == DUE:
            grads.mul_(DECAY)
        grads.add_(call.dense_gradient(), alpha=1 - DECAY)
    elif state[0] == DUE:
        found, gradients = RULES[rule](call, state, keys)
        state[3] = count = len(found)
        keys[:count] = found
        grads[:count] = gradients
    else:
        count = int(state[3])
        grads[:count] += call.gradients(keys[:count])
    state[0] = FOUND


# How GSE weighs inputs and rows for a draw, from the call and the key of random numbers.
EXPLORE: Mapping[str, Callable[[WeightedCall, Tensor], tuple[Tensor | None, Tensor | None]]] = {
    # Every place alike.
    "uniform": lambda call, key: (None, None),
    # |sum_i h_i d_i| <= (sum_i |h_i|) (sum_i |d_i|): by an upper bound of the gradient's magnitude.
    "grabo": lambda call, key: call.sums(None),
    # E[(sum_i s_i h_i) (sum_i s_i d_i)] = sum_i h_i d_i with random signs s_i, the same for inputs and rows.
    "graest": lambda call, key: _absolute(call.sums(random_signs(key, call.entries, call.x.device))),
}


def _absolute(sums: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return sums[0].abs(), sums[1].abs()


def _explored(distribution: str) -> Callable[[WeightedCall, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def candidates(call: WeightedCall, state: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        _, key, draws, _ = state
        if draws:
            weights = EXPLORE[distribution](call, key)
            drawn = distinct_keys(draw_places(*weights, call.rows, call.columns, int(draws), key, call.x.device))
        else:
            drawn = torch.arange(call.rows * call.columns, device=call.x.device)
        found = without(drawn, keys_of(call.ccol_indices, call.row_indices, call.rows))
        return found, call.gradients(found)

    return candidates


def _largest(call: WeightedCall, state: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    gradient = call.dense_gradient()
    taken = keys_of(call.ccol_indices, call.row_indices, call.rows)
    magnitude = gradient.abs().index_fill_(0, taken, -1)
    found = largest(magnitude, min(int(state[2]), len(gradient) - len(taken)))
    return found, gradient[found]


def _given(call: WeightedCall, state: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    found = keys[: int(state[3])]
    return found, call.gradients(found)


RULES: Mapping[str, Callable[[WeightedCall, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    **{distribution: _explored(distribution) for distribution in EXPLORE},
    "dense": _largest,
    "given": _given,
}
"""From the first call of a step, the state and the keys: candidates, sorted and distinct, and their gradients."""


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, *probed):
        *call, ctx.options, ctx.by, ctx.rule, state, keys, grads = probed
        ctx.save_for_backward(*call)
        # Not saved: autograd would refuse a buffer that another call's backward pass has written since.
        ctx.buffers = state, keys, grads
        return y.view_as(y)

    @staticmethod
    def backward(ctx, *gs):
        call = *ctx.saved_tensors, ctx.options, ctx.by, ctx.rule
        torch.ops.rwfx.probe_.default(*gs, *call, *ctx.buffers)
        return *gs, *[None] * (len(call) + len(ctx.buffers))


_library.impl("probe", _Probe.apply, "Autograd")
_library.impl("probe", lambda y, *probed: y.view_as(y), "CompositeExplicitAutograd")
_library.impl("probe_", _gather, "CompositeExplicitAutograd")
torch.library.register_fake("rwfx::probe", lambda y, *probed: y.view_as(y), lib=_library)
torch.library.register_fake("rwfx::probe_", lambda g, *probed: None, lib=_library)
