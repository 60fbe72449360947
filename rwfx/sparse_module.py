"""The transformed model: a ``GraphModule`` that trains on row sets and evaluates as the original does."""

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.fx.graph import PythonCode
from torch.fx.graph_module import GraphModule, _forward_from_src

from rwfx.graph_pickle import read_graph, write_graph
from rwfx.passes.sample_rows import SAMPLER
from rwfx.passes.sparse_examples import EXAMPLES
from rwfx.transformed import Transformed


class SparseModule(Transformed, GraphModule):
    """What ``rwfx.transform`` returns where a graph holds the forward pass.

    It holds two graphs over one tree of modules. In train mode ``graph`` runs: it draws row sets and its
    backward is confined to them. In eval mode ``eval_graph`` runs, the original's forward as it was traced.
    """

    eval_graph: fx.Graph | None = None

    @classmethod
    def over(cls, host: nn.Module, train: fx.Graph, evaluation: fx.Graph, **about: Any) -> "SparseModule":
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

    def __copy__(self) -> "SparseModule":
        copied = SparseModule.__new__(SparseModule)
        copied.__dict__.update(self.__dict__)
        copied.graph = copy.deepcopy(self._graph)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparseModule":
        copied = SparseModule.__new__(SparseModule)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied.graph = copied._graph
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        graphs = [write_graph(graph) for graph in (state.pop("_graph"), state.pop("eval_graph"))]
        return _rebuild, (state, *graphs)


def _rebuild(state: dict[str, Any], train: list[Any], evaluation: list[Any]) -> SparseModule:
    module = SparseModule.__new__(SparseModule)
    module.__dict__.update(state, eval_graph=read_graph(evaluation))
    module.graph = read_graph(train)
    return module


def check_names(host: nn.Module) -> None:
    """Refuse a model whose parts have names that a transformed model needs itself.

    Raises:
        ValueError: names the part and what to do.
    """
    about = ("lines", "settings", "notes", "meta", SAMPLER, EXAMPLES)
    for name in (*host._modules, *host._parameters, *host._buffers):
        if hasattr(SparseModule, name) or name in about:
            raise ValueError(
                f"the model has a part named {name!r}, which is an attribute of every transformed model. Rename it, or "
                "put the model into a module of its own."
            )


# The tables of the host that a SparseModule takes over as they are, so that it shares every tensor and hook.
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
