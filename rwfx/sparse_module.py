"""The transformed model: a ``GraphModule`` that trains on row sets and evaluates as the original does."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode
from torch.fx.graph_module import GraphModule, _forward_from_src

from rwfx.example_sampler import ExampleSampler
from rwfx.graph_pickle import read_graph, write_graph
from rwfx.passes.sample_rows import SAMPLER
from rwfx.passes.sparse_examples import EXAMPLES
from rwfx.report import Line, Report
from rwfx.sampler import RowSampler
from rwfx.walk import WalkSampler


class SparseModule(GraphModule):
    """What ``rwfx.transform`` returns.

    It holds two graphs over one tree of modules. In train mode ``graph`` runs: it draws row sets and its
    backward is confined to them. In eval mode ``eval_graph`` runs, the original's forward as it was traced.
    Parameters and buffers are the original's own, and so are the keys of the ``state_dict``.
    """

    eval_graph: fx.Graph | None = None
    lines: tuple[Line, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...]

    @classmethod
    def over(cls, host: nn.Module, train: fx.Graph, evaluation: fx.Graph, **about: Any) -> "SparseModule":
        """Build from a host (``rwfx.capture``), which gives its modules, tensors and hooks, and two graphs."""
        module = cls(nn.Module(), fx.Graph(), type(host).__name__)
        own = dict(module.__dict__)
        module.__dict__.update({k: v for k, v in host.__dict__.items() if k not in own or k.startswith(_SHARED)})
        module.__dict__.update(about, eval_graph=evaluation, training=host.training)
        module.graph = train
        return module

    @property
    def rows(self) -> dict[str, Tensor]:
        """The row sets of the last training forward: ``{weight: (K,) int64}``, sorted, without repeats."""
        return self._sampler.row_sets()

    @property
    def report(self) -> Report:
        """What was rewritten, what stayed dense and why, and the cost of the last step against dense."""
        drawn = bool(self._sampler.state[1])
        kept = {name: len(rows) for name, rows in self.rows.items()} if drawn else {}
        if not any(kept.values()):  # TopK chooses in the backward pass, which has not been
            kept = {}
        settings = self.settings
        about = settings["mode"], settings["dx"], settings["rows"], kept, self.notes
        return Report(self.lines, *about, settings["examples"], self.examples, settings["route"], settings["grad"])

    def sampler_state(self) -> dict[str, Tensor]:
        """The row sampler's random stream, last draw and memory: with ``state_dict`` all for an exact resume."""
        return {**self._sampler.sampler_state(), **(self._examples.sampler_state() if self._examples else {})}

    def load_sampler_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``sampler_state`` was taken.

        Raises:
            ValueError: the state does not fit this model; nothing is changed then.
        """
        of_examples = {name: tensor for name, tensor in state.items() if name.startswith("examples.")}
        if self._examples is None:
            if of_examples:
                raise ValueError("the sampler state was saved from a model that leaves out examples (examples=).")
            self._sampler.load_sampler_state(state)
            return
        self._examples.check_state(of_examples)
        self._sampler.load_sampler_state({name: state[name] for name in state.keys() - of_examples.keys()})
        self._examples.load_sampler_state(of_examples)

    @property
    def examples(self) -> tuple[int, int] | None:
        """How many examples the last training forward kept for its backward, and of how many.

        None before the first, and for a model that was made without ``examples=``.
        """
        kept, of = (0, 0) if self._examples is None else self._examples.last.tolist()
        return (kept, of) if of else None

    @property
    def starts_at_labels(self) -> bool:
        """Whether walks start at the labels given to ``start_from``."""
        return isinstance(self._sampler, WalkSampler) and self._sampler.starts_at_labels

    def start_from(self, labels: Tensor) -> None:
        """Let the walks of the next training forward start at the output rows that ``labels`` name.

        And of those after it, until other labels are given. For ``RandomWalk(start="labels")`` and its kin; ``labels``:
        whole numbers of any shape, each starts in
        proportion to how often it is there.

        Raises:
            ValueError: the policy has another ``start``, or a label is no row of the output weight; nothing is changed
            then.
        """
        if not isinstance(self._sampler, WalkSampler):
            raise ValueError(
                f'start_from is for walks with start="labels"; the row policy is {self.settings["rows"]!r}.'
            )
        self._sampler.start_from(labels)

    @property
    def _sampler(self) -> RowSampler:
        return self._modules[SAMPLER]  # type: ignore[return-value]

    @property
    def _examples(self) -> ExampleSampler | None:
        return self._modules.get(EXAMPLES)  # type: ignore[return-value]

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
    "_state_dict",
    "_load",
)


def _by_mode(train: Callable[..., Any], evaluate: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self, *args, **kwargs):
        return train(self, *args, **kwargs) if self.training else evaluate(self, *args, **kwargs)

    # Dynamo keeps its compiled code by code object: each model needs one of its own.
    forward.__code__ = forward.__code__.replace()
    return functools.update_wrapper(forward, train)
