"""Rules for what reads many places together: pools, means, norms, orders (``rwfx.label_rules`` has the table)."""

from torch import Tensor

from rwfx.label_values import Everywhere, Extremes, Labels, nowhere, operands_of


def pool(run, function, args, kwargs):
    """Pooling and resampling: places of space are read together, channels are not."""
    x = operands_of(args, kwargs)[0]
    if isinstance(x, Everywhere):
        return x
    out = run.shape_of(function, args, kwargs)
    spatial = next((int(c) for c in run.operation if c.isdigit()), x.ids.dim() - 2)
    dims = [x.ids.dim() - 1 - k for k in range(spatial)]
    pooled = respaced(run, x.ids, dims, [out[d] for d in dims])
    return Extremes(pooled, nowhere(out)) if "indices" in run.operation else pooled


def regions(run, function, args, kwargs):
    """Regions of interest cut out of feature maps: any place of any image may be in them, channels are not mixed."""
    x = operands_of(args, kwargs)[0]
    if isinstance(x, Everywhere):
        return x
    found = run.reduce(x.ids, [d for d in range(x.ids.dim()) if d != 1])
    return Labels(found.expand(run.shape_of(function, args, kwargs)))


def respaced(run, ids: Tensor, dims: list[int], sizes: list[int]) -> Labels:
    """The ids, pooled over ``dims``, of a tensor with other sizes there."""
    shape = list(ids.shape)
    for d, size in zip(dims, sizes, strict=True):
        shape[d] = size
    return Labels(run.reduce(ids, dims).expand(shape))


def reduce(run, function, args, kwargs):
    """A mean, a sum: the places of the dimensions that go are read together."""
    x = operands_of(args, kwargs)[0]
    if isinstance(x, Everywhere):
        return x
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    every = range(x.ids.dim())
    dims = every if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    gone = sorted(d % max(x.ids.dim(), 1) for d in dims)
    shape = [1 if d in gone else x.ids.shape[d] for d in every if keepdim is True or d not in gone]
    return Labels(run.reduce(x.ids, gone).reshape(shape))


def loss(run, function, args, kwargs):
    """All of what is compared with the targets, whether or not every entry has a loss of its own."""
    return reduce(run, function, operands_of(args[:1], kwargs)[:1], {})


def extreme(run, function, args, kwargs):
    """``max`` and ``min``: of two tensors, of one, or along a dimension."""
    if len(operands_of(args, kwargs)) > 1:
        return run.meet_operands(operands_of(args, kwargs))
    reduced = reduce(run, function, args, kwargs)
    return reduced if len(args) == 1 and not kwargs else Extremes(reduced, Everywhere(-1))


def variance(run, function, args, kwargs):
    """``var`` and ``std``."""
    # The third argument is a correction, the fourth says whether to keep the dimension.
    return reduce(run, function, (*args[:2], *args[3:4]), kwargs)


def variance_and_mean(run, function, args, kwargs):
    """Both."""
    both = variance(run, function, args, kwargs)
    return both, both


def norm(run, function, args, kwargs):
    """A norm along dimensions."""
    # A norm has its order before its dimensions.
    return reduce(run, function, (args[0], *args[2:]), kwargs)


def along(run, function, args, kwargs):
    """Each place may hold any of its line: a running sum, an order."""
    x = operands_of(args, kwargs)[0]
    if isinstance(x, Everywhere):
        return x
    dim = next((a for a in args[1:] if isinstance(a, int)), kwargs.get("dim", -1)) % x.ids.dim()
    return Labels(run.reduce(x.ids, [dim]).expand(x.ids.shape))


def in_order(run, function, args, kwargs):
    """``sort``."""
    values = along(run, function, args, kwargs)
    return Extremes(values, nowhere(values.ids.shape) if isinstance(values, Labels) else values)


def topk(run, function, args, kwargs):
    """The largest numbers along a dimension, and where they are."""
    x, k = args[0], args[1]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
    if isinstance(x, Everywhere):
        return Extremes(x, Everywhere(-1))
    dim %= x.ids.dim()
    values = respaced(run, x.ids, [dim], [k])
    return Extremes(values, nowhere(values.ids.shape))
