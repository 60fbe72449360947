"""Products of two activations on labels: matrix products, ``einsum`` and attention.

In ``out[n, m] = sum_k a[n, k] b[k, m]`` every row that feeds line ``n`` of ``a`` and column ``m`` of ``b`` has a part.
Where only one of the two differs along its own dimension of the output, it is what the output is made of, the *value*,
and the other one holds *coefficients*, as attention's probabilities do: a walk goes on at the value or, with
probability ``COEFFICIENTS``, at the coefficients. Those come from ``q @ k.t()``, where neither differs: all the rows of
a head of the queries and of the keys, one as likely as another. So a walk at an output of attention follows its value
row with probability 1/2 and the query rows and the key rows of its head with 1/4 each. A bias that is added before
the softmax, as one of relative positions, is one more of those rows. Otherwise both sides count as added.
"""

import torch
from torch import Tensor

from rwfx.label_values import Labels, core, has_rows, operands_of, with_shapes

COEFFICIENTS = 0.5


def matmul(run, function, args, kwargs):
    """``a @ b``, of any numbers of dimensions."""
    operands = with_shapes(operands_of(args, kwargs))
    if len(operands) != 2:
        return run.anything(run.operation, operands_of(args, kwargs))
    a, b = operands
    x = a.ids[None, :] if a.ids.dim() == 1 else a.ids
    y = b.ids[:, None] if b.ids.dim() == 1 else b.ids
    out = _product(run, x, y)
    out = out.squeeze(-2) if a.ids.dim() == 1 else out
    return Labels(out.squeeze(-1) if b.ids.dim() == 1 else out)


def add_matmul(run, function, args, kwargs):
    """``c + a @ b``."""
    c, *factors = args[:3]
    return run.meet_operands(operands_of([c, matmul(run, function, factors, {})]))


def attention(run, function, args, kwargs):
    """``softmax(q @ k.transpose(-1, -2) + bias) @ v``, by heads."""
    operands = with_shapes(operands_of(args, kwargs))
    if not operands:
        return run.anything(run.operation, operands_of(args, kwargs))
    q, k, v = operands[:3]
    heads = q.ids.shape[-3] if q.ids.dim() > 2 else 1
    keys, values = (_repeated(x.ids, heads) for x in (k, v))
    bias = next((x.ids for x in operands[3:] if has_rows(x)), None)
    return Labels(attend(run, q.ids, keys, values, bias))


def attend(run, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The ids of the attention of queries, keys and values ``(..., tokens, numbers of a head)``.

    ``bias``: of what is added before the softmax, as a learned bias of relative positions.
    """
    scores = _product(run, q, k.transpose(-1, -2))
    return _product(run, scores if bias is None else run.meet([*torch.broadcast_tensors(scores, bias)]), v)


def einsum(run, function, args, kwargs):
    """``torch.einsum`` of one or two tensors."""
    equation, operands = args[0].replace(" ", ""), with_shapes(operands_of(args[1:]))
    if "." in equation or "->" not in equation or not 1 <= len(operands) <= 2:
        return run.anything(run.operation, operands_of(args[1:]))
    terms, out = equation.split("->")
    sides = [
        _as_output(run, x.ids, term, out) for x, term in zip(operands, terms.split(","), strict=True) if has_rows(x)
    ]
    sizes = {
        letter: n
        for x, term in zip(operands, terms.split(","), strict=True)
        for letter, n in zip(term, x.ids.shape, strict=True)
    }
    shape = [sizes[letter] for letter in out]
    if len(sides) < 2:
        return Labels(sides[0].expand(shape) if sides else torch.tensor(-1).expand(shape))
    own = [
        [out.index(letter) for letter in term if letter in out and letter not in other]
        for term, other in (terms.split(","), terms.split(",")[::-1])
    ]
    a, b = (side.expand(shape) for side in sides)
    return Labels(_combined(run, a, b, *own))


def glu(run, function, args, kwargs):
    """Half of the features, each times one of the other half."""
    (x,) = operands_of(args, kwargs)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    return Labels(run.meet([*x.ids.chunk(2, dim)])) if isinstance(x, Labels) else x


def _product(run, a: Tensor, b: Tensor) -> Tensor:
    """The ids of ``a @ b``, both of two dimensions or more."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*batch, a.shape[-2], b.shape[-1])
    lines = run.reduce(a, [a.dim() - 1]).expand(shape)
    columns = run.reduce(b, [b.dim() - 2]).expand(shape)
    return _combined(run, lines, columns, [len(shape) - 2], [len(shape) - 1])


def _combined(run, a: Tensor, b: Tensor, own_a: list[int], own_b: list[int]) -> Tensor:
    """Two sides of one shape, that of the output; each could differ along the dimensions that are its own."""
    if not bool((core(a) >= 0).any()):
        return b
    if not bool((core(b) >= 0).any()):
        return a
    differs_a, differs_b = _differs(a, own_a), _differs(b, own_b)
    if differs_a == differs_b:
        return run.meet([a, b])
    return run.choose(b, a, COEFFICIENTS) if differs_b else run.choose(a, b, COEFFICIENTS)


def _differs(ids: Tensor, dims: list[int]) -> bool:
    ids = core(ids)
    return any(bool((ids != ids.narrow(d, 0, 1)).any()) for d in dims if ids.shape[d] > 1)


def _as_output(run, ids: Tensor, term: str, out: str) -> Tensor:
    """An operand of an ``einsum`` in the dimensions of its output, of size 1 where it has none."""
    ids = run.reduce(ids, [k for k, letter in enumerate(term) if letter not in out])
    kept = [letter for letter in term if letter in out]
    ids = ids.reshape([n for n, letter in zip(ids.shape, term, strict=True) if letter in out])
    ids = ids.permute([kept.index(letter) for letter in out if letter in kept])
    for k, letter in enumerate(out):
        ids = ids if letter in kept else ids.unsqueeze(k)
    return ids


def _repeated(ids: Tensor, heads: int) -> Tensor:
    """Keys or values of fewer heads than the queries have: each serves several."""
    fewer = ids.dim() > 2 and 1 < ids.shape[-3] < heads
    return ids.repeat_interleave(heads // ids.shape[-3], -3) if fewer else ids
