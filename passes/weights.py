"""The weights of a normalized graph, by name: what its calls are linear in."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from rwfx.passes.normalize import weighted
from rwfx.weight_views import View


class Weight(NamedTuple):
    """A weight and the parameter that it is a view of, by the first of its names."""

    name: str
    parameter: str
    view: View

    def of(self, model: nn.Module) -> Tensor:
        """The weight in a model that has the parameter."""
        return self.view.of(model.get_parameter(self.parameter))


def weights_of(gm: GraphModule) -> dict[Node, Weight]:
    """The weight of every weighted call, in the order of the graph.

    A parameter that is also used transposed gives two weights with one name each: ``w`` for the first, ``w[:, 0:O]``.
    """
    names = {id(p): name for name, p in reversed(list(gm.named_parameters(remove_duplicate=False)))}
    found: dict[Node, Weight] = {}
    taken: dict[str, View] = {}
    for node in gm.graph.nodes:
        if (weight := weighted(gm, node)) is None:
            continue
        parameter, view = weight
        name = view.name(names[id(parameter)])
        if taken.setdefault(name, view) != view:
            name = view._replace(part=(0, len(view.of(parameter)))).name(names[id(parameter)])
        found[node] = Weight(name, names[id(parameter)], view)
    return found
