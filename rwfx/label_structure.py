"""Rules for what moves numbers without changing them (``rwfx.label_rules`` has the table).

Most such operations are executed on the ids, so that no rule has to know which dimension holds the features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from rwfx.label_pools import respaced
from rwfx.label_values import Everywhere, Labels, UnknownShape, core, lean, nowhere, operands_of, with_shapes


def structural(run, function, args, kwargs):
    """Reshape, permute, split and the like: executed on the ids."""
    operands = with_shapes(operands_of(args, kwargs))
    if not operands and all(isinstance(x, Everywhere) for x in operands_of(args, kwargs)):
        return Everywhere(run.any_of(operands_of(args, kwargs)))
    if not operands:
        raise UnknownShape(f"{run.node.name} needs the shape of an input")

    operation = run.operation

    def by(*ids: Tensor) -> Any:
        given = iter(ids)
        arguments, named = tree_map(lambda x: next(given) if isinstance(x, Labels) else x, (args, kwargs))
        return _executed(operation, function, arguments, named)

    sources = [x.ids for x in operands]
    result = by(*sources)
    (first, *others), memory = operands, {ids.untyped_storage().data_ptr() for ids in sources}

    def labels(ids: Any, path: tuple[int, ...] = ()) -> Any:
        if isinstance(ids, (tuple, list)):
            return type(ids)(labels(part, (*path, k)) for k, part in enumerate(ids))
        if not isinstance(ids, Tensor):
            return ids
        if others or ids.untyped_storage().data_ptr() not in memory:
            return Labels(lean(ids))
        return Labels(ids, first, lambda whole: _at(by(whole), path))

    return labels(result)


def _at(tree: Any, path: tuple[int, ...]) -> Any:
    for k in path:
        tree = tree[k]
    return tree


def _executed(operation: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except RuntimeError:
        if operation not in ("view", "unsafe_view"):
            raise
        # The labels of a contiguous tensor need not be contiguous.
        shape = args[1:] if len(args) > 1 else tuple(kwargs.values())
        return args[0].reshape(*shape)


def view(run, function, args, kwargs):
    """``x.view`` of a shape, or of a dtype."""
    if len(args) > 1 and isinstance(args[1], torch.dtype):
        return same(run, function, args, kwargs)
    return structural(run, function, args, kwargs)


def same(run, function, args, kwargs):
    """The same tensor under another name."""
    x = operands_of(args, kwargs)[0]
    return Labels(x.ids, x, lambda ids: ids) if isinstance(x, Labels) else x


def cat(run, function, args, kwargs):
    """Concatenation, also with inputs whose width is not known yet."""
    parts = list(args[0] if args else kwargs["tensors"])
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    known = [part.ids.shape for part in parts if isinstance(part, Labels)]
    if not known:
        return structural(run, torch.cat, (parts, dim), {})
    nodes = run.node.args[0] if run.node.args else run.node.kwargs["tensors"]
    parts = [
        nowhere(part.shape) if isinstance(part, Tensor)
        else part if isinstance(part, Labels)
        else run.widen(part, node.name, known[0], dim)
        for part, node in zip(parts, nodes, strict=True)
    ]  # fmt: skip
    # An old ``torch.cat`` leaves out tensors of one dimension without numbers.
    parts = [part for part in parts if part.ids.numel() or part.ids.dim() == len(known[0])]
    return Labels(_joined([part.ids for part in parts], dim))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """``torch.cat``, with the dimensions that no part differs along stored once."""
    dim %= parts[0].dim()
    alike = [d for d in range(parts[0].dim()) if d != dim and all(core(p).shape[d] == 1 for p in parts)]
    shape = [n if d in alike else -1 for d, n in enumerate(parts[0].shape)]
    for d in alike:
        parts = [p.narrow(d, 0, 1) for p in parts]
    return torch.cat(parts, dim).expand(shape)


def stack(run, function, args, kwargs):
    """The same along a new dimension."""
    parts = args[0] if args else kwargs["tensors"]
    known = [part.ids.shape for part in parts if isinstance(part, Labels)]
    if known:
        parts = [
            part if isinstance(part, Labels) else nowhere(known[0], part.id if isinstance(part, Everywhere) else -1)
            for part in parts
        ]
    return structural(run, function, (parts, *args[1:]), {k: v for k, v in kwargs.items() if k != "tensors"})


def pad(run, function, args, kwargs):
    """Padding: with a number, which comes from no row, or with the neighbourhood's."""
    x = operands_of(args, kwargs)[0]
    if isinstance(x, Everywhere):
        return x
    sizes = args[1] if len(args) > 1 else kwargs["pad"]
    mode = args[2] if len(args) > 2 and isinstance(args[2], str) else kwargs.get("mode", "constant")
    if mode != "constant":  # it repeats numbers of the neighbourhood
        dims = [x.ids.dim() - 1 - k for k in range(len(sizes) // 2)]
        if all(core(x.ids).shape[d] == 1 for d in dims):
            return respaced(
                run, x.ids, dims, [x.ids.shape[d] + sum(sizes[2 * k : 2 * k + 2]) for k, d in enumerate(dims)]
            )
        return Labels(lean(torch.nn.functional.pad(x.ids.double(), sizes, mode).long()))
    # Ids are shifted by one, so that what is filled with zero means "no row".
    return Labels(lean(torch.nn.functional.pad(x.ids + 1, sizes) - 1))


def pad_module(run, module, args, kwargs):
    """A module of ``torch.nn.modules.padding``."""
    kinds = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}
    mode = next((kinds[word] for word in kinds if type(module).__name__.startswith(word)), "constant")
    return pad(run, torch.nn.functional.pad, (*args, list(module.padding), mode), {})


def unfold(run, function, args, kwargs):
    """``Tensor.unfold``, and ``F.unfold``, which is called im2col elsewhere."""
    if run.operation == "unfold" and function is not torch.nn.functional.unfold:
        return structural(run, function, args, kwargs)
    x, *sizes = args  # im2col, which is not made for whole numbers
    return x if isinstance(x, Everywhere) else Labels(lean(function(x.ids.double() + 1, *sizes, **kwargs).long() - 1))


def getitem(run, function, args, kwargs):
    """An item of a tensor or of a container."""
    if isinstance(args[0], Labels) or operands_of(args[1]):
        return index(run, function, args, kwargs)
    return args[0] if isinstance(args[0], Everywhere) else args[0][args[1]]


def index(run, function, args, kwargs):
    """Indexing; where the index is computed from data, any place along the dimension may be meant."""
    x, index = args[0], args[1:]
    unknown = operands_of(index, kwargs)
    if not unknown or isinstance(x, Everywhere):
        return structural(run, function, args, kwargs)
    if isinstance(x, Tensor):
        return Everywhere(-1)
    if any(isinstance(i, Everywhere) for i in unknown):
        raise UnknownShape(f"{run.node.name} needs the shape of an index")
    entries = index[0] if isinstance(index[0], (tuple, list)) else index
    named = run.operation in ("gather", "index_select", "take_along_dim")
    dims = [d for d, i in enumerate(entries) if isinstance(i, Labels)] if not named else [
        next(i for i in index if isinstance(i, int)) % x.ids.dim()
    ]  # fmt: skip
    spread = run.reduce(x.ids, dims).expand(x.ids.shape)
    anywhere = tree_map(lambda i: torch.zeros(i.ids.shape, dtype=torch.int64) if isinstance(i, Labels) else i, index)
    return Labels(lean(function(spread, *anywhere)))


def copied(run, function, args, kwargs):
    """``x.copy_(y)``."""
    into, source = args[:2]
    if isinstance(into, Everywhere):
        return source
    ids = (
        source.ids if isinstance(source, Labels) else torch.tensor(source.id if isinstance(source, Everywhere) else -1)
    )
    return Labels(ids.expand(into.ids.shape))


def written(run, function, args, kwargs):
    """``x[index] = value``, and ``index_put``."""
    x, index, value = args[:3]
    if not isinstance(x, Labels) or operands_of(index):
        return run.anything("an index computed from data", operands_of(args))
    ids = x.ids.clone(memory_format=torch.contiguous_format)
    index = tuple(index) if isinstance(index, list) else index
    index = tuple(slice(None) if i is None else i for i in index) if run.operation == "index_put" else index
    ids[index] = value.ids if isinstance(value, Labels) else value.id if isinstance(value, Everywhere) else -1
    return Labels(lean(ids))
