"""The transformed model where no graph holds the forward pass: the model's own code, with row-sparse calls in it.

In: a model, and a row sampler for some of its weights. Out: a copy of its tree of modules, which shares every tensor
with it, and in which the modules that hold those weights are row-sparse. What the forward pass does beside calling
them (branches, loops, hooks, draws, assignments) it does as before, on the copy.
"""

from collections.abc import Mapping
from inspect import get_annotations
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from rwfx.capture import shared_copy
from rwfx.capture.tape import MODULE, PLACE
from rwfx.derived import Derived, derive
from rwfx.draws import TopKSampler
from rwfx.passes.sample_rows import SAMPLER, observed
from rwfx.row_calls import RowSparse, StepRows, can_be_row_sparse, is_transposed
from rwfx.sampler import RowSampler
from rwfx.transformed import Transformed
from rwfx.weight_graph import WeightGraph
from rwfx.weight_views import View


class SubstitutedModule(Transformed, Derived):
    """What ``rwfx.transform`` returns where no graph holds the forward pass; also a module of the model's own class.

    Row sets are drawn at the start of every forward in train mode with gradients, once where it calls itself; the calls
    of a step, as many as there are on a weight, share them. Otherwise it is the dense model, and so are its parts and
    methods where they are called by themselves. What the backward pass computes again of the forward
    (``torch.utils.checkpoint``) has the row sets of the last forward with gradients.
    """

    _rwfx_crossed: tuple[tuple[str, View], ...]  # the parameters that the sampler looks at, and as what
    _rwfx_steps: dict[str, StepRows]  # by weight, in the sampler's order
    _rwfx_seen: dict[str, list[str]]  # for each use of a weight the buffer that its call is to write; empty: none
    _rwfx_seen_all: bool
    _rwfx_is_running: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        if self._rwfx_is_running:  # it calls itself
            return super().forward(*args, **kwargs)
        self._rwfx_is_running = True
        try:
            self._rwfx_begin_step()
            return super().forward(*args, **kwargs)
        finally:
            self._rwfx_is_running = False
            for step in self._rwfx_steps.values():
                step.is_running = False

    def _rwfx_begin_step(self) -> None:
        """Draw row sets, or let every call be the model's own."""
        if not torch.is_grad_enabled():  # a backward pass of the last step may be to come
            return
        sampler = self._sampler
        if not (sampler.kept and self.training):
            for step in self._rwfx_steps.values():
                step.rows = None
            return
        # Not by get_parameter: torch.func.functional_call puts plain tensors in their places.
        drawn = sampler(*[view.of(attrgetter(name)(self)) for name, view in self._rwfx_crossed])
        for k, (name, step) in enumerate(self._rwfx_steps.items()):
            step.rows = drawn[k]
            step.scale = drawn[len(self._rwfx_steps) + k] if sampler.unbiased else None
            step.chosen = sampler.chosen.get_buffer(str(k)) if isinstance(sampler, TopKSampler) else None
            step.seen = [self.get_buffer(path) if path else None for path in self._rwfx_seen[name]]
            step.seen_all = self._rwfx_seen_all
            step.calls, step.kept = 0, {}
            step.is_running = True


def substitute(
    model: nn.Module, sampler: RowSampler, graph: WeightGraph, how: tuple[str, str, str], **about: Any
) -> SubstitutedModule:
    """The model with row-sparse calls on the weights of ``sampler``, which was made for the weight graph ``graph``.

    ``how``: mode, dx and grad, as of ``rwfx.transform``.

    Raises:
        ValueError: the model or a part of it has an attribute by the name of one that it is to have.
    """
    _check_attributes(model, SubstitutedModule, "the model", SAMPLER)
    host = shared_copy(model)
    steps = {name: StepRows(how) for name in sampler.kept}
    of_weight = {id(host.get_parameter(name)): step for name, step in steps.items()}
    for path, module in list(host.named_modules()):
        step = of_weight.get(id(module._parameters.get("weight")))
        if step is not None and can_be_row_sparse(module):
            _check_attributes(module, RowSparse, f"the module {path!r}")
            derive(RowSparse, module).__dict__.update(_rwfx_step=step, _rwfx_bias=f"{path}.bias")
    seen, seen_all = observed(sampler)
    by_use = {name: [seen.get(use.node, "") for use in graph.uses if use.weight == name] for name in steps}
    views = {name: of.view for name, of in graph.weights.items()}
    crossed = tuple((graph.parameter(name), views.get(name, View())) for name in sampler.crossed)
    substituted = derive(SubstitutedModule, host)
    substituted.__dict__.update(about, _rwfx_crossed=crossed, _rwfx_steps=steps, _rwfx_is_running=False)
    substituted.__dict__.update(_rwfx_seen=by_use, _rwfx_seen_all=seen_all)
    substituted._modules[SAMPLER] = sampler
    return substituted


def read_elsewhere(gm: GraphModule, graph: WeightGraph, host: nn.Module) -> dict[str, str]:
    """The weights that are read by another call than that of a plain module of their own, each with the reason.

    ``gm``: the normalized graph of a run over ``host`` that was written down (``rwfx.capture.tape``).
    """
    calls = {node.name: node for node in gm.graph.nodes}
    found: dict[str, str] = {}
    for use in graph.uses:
        about: Mapping[str, Any] = calls[use.node].meta
        module = None if about.get(MODULE) is None else host.get_submodule(about[MODULE])
        is_own = module is not None and module._parameters.get("weight") is host.get_parameter(
            graph.parameter(use.weight)
        )
        view = graph.weights[use.weight].view if use.weight in graph.weights else View()
        if view.computed:
            found[use.weight] = "the forward pass computes a weight from it"
        elif (
            module is None
            or not is_own
            or not can_be_row_sparse(module)
            or view != View(transposed=is_transposed(module))
        ):
            found.setdefault(use.weight, f"it is read outside of its module's forward, at {about.get(PLACE)}")
    return found


def _check_attributes(module: nn.Module, mixin: type[nn.Module], which: str, *parts: str) -> None:
    bases = [base for base in mixin.__mro__ if base not in nn.Module.__mro__]
    added = [name for base in bases for name in (*vars(base), *get_annotations(base))]
    for name in (*added, *parts):
        if hasattr(module, name) and not hasattr(nn.Module, name):
            raise ValueError(
                f"{which} has an attribute named {name!r}, which it would have anew once it is transformed. Rename it, "
                "or put the module into one of its own."
            )
