"""``nn.MultiheadAttention`` as a graph holds it, in one call: two uses of weights with attention between them.

Its packed weight has the rows of the queries, then those of the keys and of the values; row ``j`` of the values feeds
feature ``j`` of ``out_proj``.
"""

from torch import nn

from rwfx.label_products import attend
from rwfx.label_values import Everywhere, Labels, UnknownShape


def attention_module(run, module: nn.MultiheadAttention, query, key, value, *_, **__):
    """The output of the module, and its attention weights, which count as computed from nothing."""
    inputs = query, key, value
    if not all(isinstance(x, Labels) for x in inputs):
        raise UnknownShape(f"{run.node.name} needs the shape of an input")
    maps = [run.features_of(x.ids, x.ids.dim() - 1) for x in inputs]
    width = module.embed_dim
    if module.in_proj_weight is not None:
        rows = run.use(module.in_proj_weight, 3 * width, run.meet(maps))
        q, k, v = rows.chunk(3)
    else:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        q, k, v = (run.use(weight, width, of) for weight, of in zip(weights, maps, strict=True))
    # (heads, 1 token, numbers of a head): no token differs from another here.
    q, k, v = (rows.view(module.num_heads, 1, -1) for rows in (q, k, v))
    heads = attend(run, q, k, v)
    out = run.use(module.out_proj.weight, width, heads.reshape(-1))
    return Labels(out.expand(query.ids.shape)), Everywhere(-1)
