"""A ``GraphModule`` with two graphs over one tree of modules: one runs in train mode, the other in eval mode."""

import copy
import functools
from collections.abc import Callable
from typing import Any, Self

from torch import fx, nn
from torch.fx.graph import PythonCode
from torch.fx.graph_module import GraphModule, _forward_from_src

from rwfx.graph_pickle import read_graph, write_graph


class TwoGraphs(GraphModule):
    """Runs ``graph`` in train mode and ``eval_graph`` in eval mode; copied and pickled with both."""

    eval_graph: fx.Graph | None = None

    @classmethod
    def over(cls, host: nn.Module, train: fx.Graph, evaluation: fx.Graph, **about: Any) -> Self:
        """Build from a host (``rwfx.capture``), which gives its modules, tensors and hooks, and two graphs."""
        module = cls(nn.Module(), fx.Graph(), type(host).__name__)
        own = dict(module.__dict__)
        module.__dict__.update({k: v for k, v in host.__dict__.items() if k not in own or k.startswith(_SHARED)})
        module.__dict__.update(about, eval_graph=evaluation, training=host.training)
        module.graph = train
        return module

    def recompile(self) -> PythonCode:
        """Generate the code of both graphs; called by ``fx`` when ``graph`` is set."""
        code = super().recompile()
        if self.eval_graph is not None:
            evaluation = self.eval_graph.python_code(root_module="self")
            cls = type(self)
            cls.forward = _by_mode(cls.forward, _forward_from_src(evaluation.src, evaluation.globals, {}))
        return code

    def __copy__(self) -> Self:
        copied = _blank(type(self))
        copied.__dict__.update(self.__dict__)
        copied.graph = copy.deepcopy(self._graph)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = _blank(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied.graph = copied._graph
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        graphs = [write_graph(graph) for graph in (state.pop("_graph"), state.pop("eval_graph"))]
        return _rebuild, (_kind(type(self)), state, *graphs)


def check_names(host: nn.Module, kind: type[TwoGraphs], *own: str) -> None:
    """Refuse a model whose parts have names that a ``kind`` made from it needs itself, ``own`` among them.

    Raises:
        ValueError: names the part and what to do.
    """
    for name in (*host._modules, *host._parameters, *host._buffers):
        if hasattr(kind, name) or name in ("lines", "settings", "notes", "meta", *own):
            raise ValueError(
                f"the model has a part named {name!r}, which is an attribute of every {kind.__name__}. Rename it, or "
                "put the model into a module of its own."
            )


def _rebuild(kind: type[TwoGraphs], state: dict[str, Any], train: list[Any], evaluation: list[Any]) -> TwoGraphs:
    module = _blank(kind)
    module.__dict__.update(state, eval_graph=read_graph(evaluation))
    module.graph = read_graph(train)
    return module


def _blank(cls: type[Any]) -> Any:
    return GraphModule.__new__(_kind(cls))


def _kind(cls: type[Any]) -> type[Any]:
    """The class that was written: ``fx`` derives one from it for every ``GraphModule``."""
    return next(base for base in cls.__mro__ if base.__qualname__.split(".")[-1] != "GraphModuleImpl")


# The tables of the host that are taken over as they are, so that every tensor and hook is shared.
_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent",
    "_forward",
    "_backward",
    "_is_full_backward_hook",
    "_state_dict",
    "_load",
)


def _by_mode(train: Callable[..., Any], evaluate: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self, *args, **kwargs):
        return train(self, *args, **kwargs) if self.training else evaluate(self, *args, **kwargs)

    # Dynamo keeps its compiled code by code object: each model needs one of its own.
    forward.__code__ = forward.__code__.replace()
    return functools.update_wrapper(forward, train)
