"""``rwfx::pick_examples``: an identity on a model's outputs, whose backward decides which examples take part in the
rest.

In: the outputs, and a blank tensor ``kept`` of a step. Out: the outputs. Its backward is the first of a step's: from
the gradient that arrives it chooses ``E`` of ``B`` examples, writes them into ``kept``, where the weighted calls find
them (``examples`` of ``rwfx.ops.row_linear``), and hands the gradient on with zeros for the others.

``rwfx::draw_by_size``   draws a fixed number of examples in proportion to a size.
``rwfx::blank_examples`` makes a ``kept`` whose length follows what the last steps needed.
``rwfx::note_needed_``   notes what this one needs.

Axes: B examples, E examples kept.
"""

import math

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

from rwfx.ops.magnitude import inclusion_probabilities, systematic
from rwfx.ops.observe import top_rows
from rwfx.ops.walk import bits, filled, mix, uniform

_library = torch.library.Library("rwfx", "FRAGMENT")
_library.define(
    "pick_examples(Tensor[] outputs, Tensor kept, SymInt num_examples, Tensor? state=None, float floor=0., bool "
    "unbiased=False, Tensor? needed=None, float share=1., float memory=0., bool whole=False, int[] without=[]) -> "
    "Tensor[]"
)
_library.define("draw_by_size(Tensor size, SymInt count, Tensor state, float floor=0.) -> (Tensor, Tensor)")
_library.define(
    "blank_examples(Tensor needed, SymInt num_examples, SymInt count, float[] fractions) -> (Tensor, Tensor)"
)
_library.define("note_needed_(Tensor(a!) needed, Tensor size, float share, float memory) -> ()")


def pick_examples(
    outputs: list[Tensor],
    kept: Tensor,
    num_examples: int,
    state: Tensor | None = None,
    floor: float = 0.0,
    unbiased: bool = False,
    needed: Tensor | None = None,
    share: float = 1.0,
    memory: float = 0.0,
    whole: bool = False,
    without: tuple[int, ...] = (),
) -> list[Tensor]:
    """The outputs; their backward chooses the examples of ``kept``.

    With ``g`` the gradients of all outputs and ``s[b] = |g[b]|``, the Euclidean norm over everything that belongs to
    example ``b``, the examples are the E with the largest ``s``; or, with ``state``, drawn without replacement, ``b``
    with probability

        p[b] = min(1, c * ((1 - floor) * s[b] / sum(s) + floor / B))        c such that the p add up to E.

    Args:
        outputs: ``(B, ...)``, at least one; others are not looked at, and their gradients are handed on.
        kept: ``(E,)`` int64, which the backward pass overwrites: sorted, no repeats.
        state: ``(2,)`` int64, the seed and the step of the draw.
        unbiased: with ``state``, divide a kept example's gradient by its ``p``.
        needed: ``(1,)`` float32: noted is by ``rwfx::note_needed_`` what share of the examples this step would have
            needed.    share, memory: of that.
        whole: a promise that the outputs are those of ``row_linear`` with ``examples=kept`` and nothing else reads
        them:
            then the gradients of dropped examples need not be zero.
        without: the positions of outputs that have no entry for each example, even where their shape looks like it.

    Raises:
        ValueError: no output has an entry for each of the ``num_examples``.
        RuntimeError: in the backward pass: no gradient arrives at such an output.
    """
    return torch.ops.rwfx.pick_examples.default(
        outputs, kept, num_examples, state, floor, unbiased, needed, share, memory, whole, without
    )


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kept, num_examples, state, floor, unbiased, needed, share, memory, whole, without, *outputs):
        ctx.of_examples = [
            k not in without and output.dim() > 0 and output.shape[0] == num_examples
            for k, output in enumerate(outputs)
        ]
        if not any(ctx.of_examples):
            raise ValueError(
                f"examples= needs an output with an entry for each of the {num_examples} examples, first dimension; "
                f"the outputs have the shapes {', '.join(str(tuple(output.shape)) for output in outputs)}."
            )
        # Not saved: it is written in the backward pass, and so are what others hold of it.
        ctx.kept, ctx.state, ctx.needed = kept, state, needed
        ctx.options = floor, unbiased, share, memory, whole
        ctx.set_materialize_grads(False)
        given = tuple(output.clone() for output in outputs)
        ctx.mark_non_differentiable(*[y for y, output in zip(given, outputs, strict=True) if not output.requires_grad])
        return given

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError("rwfx::pick_examples has no second derivative: leave create_graph=True out.")
        floor, unbiased, share, memory, whole = ctx.options
        kept = ctx.kept
        looked_at = [g for g, has in zip(gradients, ctx.of_examples, strict=True) if has and g is not None]
        if not looked_at:
            raise RuntimeError(
                "examples= decides by the gradient at the outputs that have an entry for each example, and the loss "
                "has none there."
            )
        size_B = sizes_of(looked_at)
        chance_E = None
        if ctx.needed is not None:
            torch.ops.rwfx.note_needed_.default(ctx.needed, size_B, share, memory)
        if ctx.state is None:
            chosen = top_rows(size_B, kept.shape[0])
        else:
            chosen, chance_E = torch.ops.rwfx.draw_by_size.default(size_B, kept.shape[0], ctx.state, floor)
        kept.copy_(chosen)
        scale_E = 1 / chance_E if unbiased and chance_E is not None else None

        def confined(g, has):
            if g is None or not has or (whole and scale_E is None):
                return g
            g_E = g.index_select(0, chosen)
            if scale_E is not None:
                g_E = g_E * scale_E.to(g.dtype).view(-1, *[1] * (g.dim() - 1))
            return torch.zeros_like(g).index_copy(0, chosen, g_E)

        return (*[None] * 10, *map(confined, gradients, ctx.of_examples))


def sizes_of(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of each example's gradient, over all of ``gradients`` ``(B, ...)``: ``(B,)`` float32."""
    norms = [
        # In half precision a norm may be no number any more, and many are equal.
        torch.linalg.vector_norm(g.reshape(g.shape[0], -1), dim=1, dtype=torch.promote_types(g.dtype, torch.float32))
        for g in gradients
    ]
    if len(norms) == 1:
        return norms[0].float()
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]), dim=0)


def _pick(
    outputs,
    kept,
    num_examples,
    state=None,
    floor=0.0,
    unbiased=False,
    needed=None,
    share=1.0,
    memory=0.0,
    whole=False,
    without=(),
):
    options = kept, num_examples, state, floor, unbiased, needed, share, memory, whole, tuple(without)
    return list(_Pick.apply(*options, *outputs))


def _pick_without_gradient(outputs, *_):
    return [output.clone() for output in outputs]


_library.impl("pick_examples", _pick, "Autograd")
_library.impl("pick_examples", _pick_without_gradient, "CompositeExplicitAutograd")


def _draw_by_size(size: Tensor, count: int, state: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    key = mix(state[0], state[1]).to(size.device)
    size_B = size.double()
    finite = size_B.isfinite()
    total = torch.where(finite, size_B, 0.0).sum()
    mixed = (1 - floor) * torch.where(total > 0, size_B / total, 1 / len(size_B)) + floor / len(size_B)
    # One that is not finite comes first, so that a gradient that is nan reaches the weights.
    size_B = torch.where(finite, mixed, 1e9)
    chance_B = inclusion_probabilities(size_B, count)
    places = torch.arange(len(size_B), device=size.device)
    order_B = bits(key, _ORDER, places).argsort()
    u = uniform(key, places.new_full((), _ORDER + 1), places[:1]).squeeze(0)
    drawn = systematic(chance_B, order_B, u, count)
    return drawn, chance_B[drawn].float()


_ORDER = 1 << 20  # a stream that no walk uses

_library.impl("draw_by_size", _draw_by_size, "CompositeExplicitAutograd")


@torch.library.register_fake("rwfx::draw_by_size", lib=_library)
def _(size, count, state, floor=0.0):
    return size.new_empty((count,), dtype=torch.int64), size.new_empty((count,), dtype=torch.float32)


def _blank_examples(needed: Tensor, num_examples: int, count: int, fractions: list[float]) -> tuple[Tensor, Tensor]:
    """``(count,)`` of -1; or, with ``fractions``, rising, as many as the smallest that is not below ``needed``.

    And their number and that of the examples, ``(2,)`` int64.
    """
    if fractions:
        wanted = float(needed)
        fraction = next((f for f in fractions if f >= wanted), fractions[-1])
        count = max(1, math.ceil(fraction * num_examples * (1 - 1e-9)))
    blank = torch.full((count,), -1, dtype=torch.int64, device=needed.device)
    return blank, filled((count, num_examples), blank)


_library.impl("blank_examples", _blank_examples, "CompositeExplicitAutograd")


@torch.library.register_fake("rwfx::blank_examples", lib=_library)
def _(needed, num_examples, count, fractions):
    if fractions:
        most = num_examples if isinstance(num_examples, int) else None  # a bound cannot be a symbol
        count = allocate_size(torch.library.get_ctx()._shape_env, 1, most)
    return tuple(needed.new_empty((n,), dtype=torch.int64) for n in (count, 2))


def _note_needed(needed: Tensor, size: Tensor, share: float, memory: float) -> None:
    """``needed = memory * needed + (1 - memory) * n / B``: the n largest sizes hold ``share`` of the sum of squares."""
    squares = size.double().square().sort(descending=True).values.cumsum(0)
    enough = (squares < share * squares[-1]).sum() + 1
    # Where nothing is left to learn, or nothing can be said, as before.
    fraction = torch.where(squares[-1].isfinite() & (squares[-1] > 0), enough / squares.shape[0], needed)
    needed.copy_(memory * needed + (1 - memory) * fraction)


_library.impl("note_needed_", _note_needed, "CompositeExplicitAutograd")
torch.library.register_fake("rwfx::note_needed_", lambda needed, size, share, memory: None, lib=_library)
