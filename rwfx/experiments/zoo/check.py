"""The check of one model: it is transformed and compared with itself, in train mode.

In: an ``Entry``. Out: a ``Record``. A third of the rows of every weight are drawn; the model's own forward pass, under
the same seed and with the output gradients masked (``oracle``), says what outputs, buffers and gradients should be.
"""

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map

import rwfx
from rwfx.experiments.zoo.catalogue import Entry, build
from rwfx.experiments.zoo.oracle import masked_calls
from rwfx.experiments.zoo.records import SKIPPED, Record
from rwfx.transformed import Transformed

SEED = 1
ROWS = rwfx.Uniform({"*": 0.3})
"""Of every weight, also of those that give outputs."""
MULTIPLIED = re.compile(
    "several matrices at once|multiplies with it otherwise|computes a weight from it|its module has hooks"
)
"""What the report says of parameters that take part in a product which is no linear call on them."""


def check(entry: Entry) -> Record:
    """Build a model, transform it and compare."""
    record = Record(entry.suite, entry.model)
    try:
        _seed()
        model, inputs = build(entry)
        record = replace(record, parameters=sum(p.numel() for p in model.parameters()))
        model, inputs, dtype = in_double(model, inputs)
        record = replace(record, dtype=dtype)
        start = time.perf_counter()
        sparse = rwfx.transform(model, rows=ROWS, dx="rows", seed=SEED, break_even=False, example_inputs=inputs)
        record = replace(record, seconds=time.perf_counter() - start, **account(model, sparse))
        if any(p.is_meta for p in model.parameters()):
            return replace(record, forward=SKIPPED, dtype="meta")
        record = replace(record, **compare(model, sparse, inputs, dtype))
        return replace(record, graphs=graphs_of(sparse, inputs))
    except Exception as error:  # whatever a model raises is what there is to say about it
        return replace(record, error=said(error))


def said(error: BaseException) -> str:
    """The kind of an error and what its message says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


def in_double(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any, str]:
    """The model and the inputs in float64, where the model then runs."""
    if any(p.is_meta for p in model.parameters()):
        return model, inputs, "meta"
    double = tree_map(lambda x: x.double() if _is_float(x) else x, inputs)
    try:
        _seed()
        with torch.no_grad():
            call(model.double(), double)
    except (RuntimeError, TypeError):  # numbers of float32 that it makes itself meet those of float64
        return model.float(), inputs, "float32"
    return model, double, "float64"


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model with example inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs)


def account(model: nn.Module, sparse: Transformed) -> dict[str, Any]:
    """Count the linear and convolution weights, and say why those are dense that are."""
    report = sparse.report
    # A weight by its first name, as the report has it.
    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    weights = {line.weight for line in report.lines if line.calls or MULTIPLIED.search(line.dense_because)}
    there = {weight.partition("[")[0] for weight in weights}  # parts of a parameter are weights of their own
    weights |= {names[id(weight)] for module in model.modules() for weight in _weights_of(module)} - there
    reasons = {name: reason for name, reason in report.dense.items() if name in weights}
    counted = Counter(_shortened(reason) for reason in reasons.values())
    return {
        "route": report.route,
        "weights": len(weights),
        "sparse": len(weights.intersection(report.sparse)),
        "dense": len(reasons),
        "reasons": "; ".join(f"{count} {reason}" for reason, count in counted.most_common()),
        "notes": "; ".join(report.notes),
        "state_dict": _same(list(model.state_dict()), list(sparse.state_dict())),
    }


def compare(model: nn.Module, sparse: Transformed, inputs: Any, dtype: str) -> dict[str, Any]:
    """Compare a training step of both: outputs, buffers and gradients."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ours = _step(sparse, inputs)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    rows = sparse.rows
    with masked_calls(model, rows) as oracle:
        theirs = _step(model, inputs)
    unequal = [name for name, buffer in model.named_buffers() if not _equal(buffer, buffers[name])]
    forward = f"buffer {unequal[0]} differs" if unequal else "equal"
    if len(ours) != len(theirs) or not all(map(_equal, ours, theirs)):
        forward = "outputs differ"
    if oracle.met != rows.keys():
        raise LookupError(f"the oracle met no call on {', '.join(sorted(rows.keys() - oracle.met))}")
    expected = {name: p.grad for name, p in model.named_parameters()}
    worst, gradient = _difference(gradients, expected, 1e-6 if dtype == "float64" else 1e-4)
    rounded = dtype == "float64" and oracle.rounded
    return {
        "forward": forward,
        "gradient": gradient,
        "worst": worst,
        "dtype": f"{dtype}, rounded within" if rounded else dtype,
    }


def graphs_of(sparse: Transformed, inputs: Any) -> int:
    """How many graphs ``torch.compile`` makes of a training forward."""
    torch._dynamo.reset()
    try:
        call(torch.compile(sparse, fullgraph=True, backend="eager"), inputs)
    except TorchDynamoException:
        torch._dynamo.reset()
        explained: Any = torch._dynamo.explain(lambda: call(sparse, inputs))()
        return explained.graph_count
    return 1


def _step(model: nn.Module, inputs: Any) -> list[Tensor]:
    """A forward and backward pass under the seed of all; the output's tensors."""
    model.zero_grad()
    _seed()
    outputs = [x for x in tree_leaves(call(model, inputs)) if isinstance(x, Tensor)]
    _seed()
    losses = [(x * torch.randn_like(x)).sum() for x in outputs if x.requires_grad]
    torch.stack([loss.double() for loss in losses]).sum().backward()
    return [x.detach() for x in outputs]


def _seed() -> None:
    """All that a model may draw from."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002
    torch.manual_seed(SEED)


def _difference(
    ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None], cancels: float
) -> tuple[str, float]:
    """The parameter whose gradients differ most, and by how much of the largest number in it.

    Numbers below ``cancels`` times the largest of all are taken for sums that cancel, as before a batch norm: what is
    left of them is rounding.
    """
    sizes = {name: float(g.abs().max()) for name, g in theirs.items() if g is not None and g.numel()}
    least = cancels * max(sizes.values()) or 1.0
    found = {
        name: float(_minus(ours[name], theirs[name]).abs().max()) / max(size, least) for name, size in sizes.items()
    }
    # What only one of the two has a gradient of.
    found |= {name: float(g.abs().max()) for name, g in ours.items() if g is not None and theirs[name] is None}
    # Not a number is the worst there is.
    worst = max(found, key=lambda name: (found[name] != found[name], found[name]))
    return worst, found[worst]


def _minus(ours: Tensor | None, theirs: Tensor | None) -> Tensor:
    assert theirs is not None
    return -theirs if ours is None else ours - theirs


def _weights_of(module: nn.Module) -> list[nn.Parameter]:
    """The weights of a linear or convolution module, in whatever way it is called."""
    if isinstance(module, nn.Linear | _ConvNd) or type(module).__name__ == "Conv1D":  # the latter of transformers
        named = [module._parameters.get("weight")]
    elif isinstance(module, nn.MultiheadAttention):
        named = [module.in_proj_weight]
    else:
        named = []
    return [weight for weight in named if weight is not None]


def _shortened(reason: str) -> str:
    """A reason without what is different for every weight."""
    own = re.sub(r"^no plain .*\): |, at .*:\d+$", "", reason)
    return re.sub(r"\(\d.*\)|(?<= )\d+ (?=calls)", "", own).split(", and a row left out")[0].strip()


def _same(ours: list[str], theirs: list[str]) -> str:
    if ours == theirs:
        return "equal"
    return "another order" if set(ours) == set(theirs) else f"{len(set(ours) ^ set(theirs))} keys differ"


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
