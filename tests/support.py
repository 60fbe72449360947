"""What feeds what, found by running: an oracle for the weight graph that knows nothing of labels.

The output of every weighted call is held at fixed numbers; one row of one call is moved; the input features of every
call that then change are those that the row feeds. Normalising layers and dropout are taken out, as their statistics
mix all features.
"""

import torch
from torch import fx, nn
from torch.fx import GraphModule

from rwfx.capture import Capture, exported, symbolic
from rwfx.capture.inputs import bind_inputs
from rwfx.label_rules import bare_name, operation_of
from rwfx.label_run import spelled
from rwfx.passes.normalize import CONVOLUTIONS, normalize, weight_of
from rwfx.weight_graph import graph_of, shapes_of

IDENTITIES = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "dropout", "feature_dropout"}


def captured_by_tracing(model, args):
    """The normalized graph of a model, with its weight graph."""
    return _captured(symbolic, model, args)


def captured_by_export(model, args):
    """The same, with the operators of ATen."""
    return _captured(exported, model, args)


def _captured(route, model, args):
    inputs = bind_inputs(model, args)
    graphs = route.capture(model, inputs)
    graph = graphs.train if model.training else graphs.eval
    captured = Capture(graphs.host, graph, graph, (), route.NAME, inputs)
    gm = normalize(GraphModule(captured.host, captured.train))
    return gm, graph_of(gm, captured, shapes_of(gm, captured))


class Frozen(fx.Interpreter):
    """Runs a normalized graph with the outputs of its weighted calls held; ``inputs`` are those of the calls."""

    def __init__(self, gm, outputs, moved=None):
        super().__init__(gm)
        self.gm, self.outputs, self.moved, self.inputs = gm, outputs, moved, {}

    def run_node(self, n):
        self.node = n
        return super().run_node(n)

    def call_module(self, target, args, kwargs):
        module = self.fetch_attr(target)
        if isinstance(module, nn.MultiheadAttention):
            return self.attention(module, *args[:3]), None
        return args[0] if operation_of(module) in IDENTITIES else module(*args, **kwargs)

    def call_function(self, target, args, kwargs):
        if weight_of(self.gm, self.node) is not None:
            dim = -1 - CONVOLUTIONS.get(target, 0)
            return self.held(self.node.name, args[0], dim, lambda: target(*args, **kwargs), dim)
        if bare_name(spelled(target)) in IDENTITIES:
            return args[0]
        return super().call_function(target, args, kwargs)

    def attention(self, module, q, k, v):
        """The two calls on weights that the module is."""
        name, heads = self.node.name, module.num_heads
        packed = self.held(name, q, -1, lambda: q.new_zeros(*q.shape[:-1], 3 * q.shape[-1]), -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(-2, -3) for part in packed.chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)
        return self.held(f"{name}#2", out, -1, lambda: out, -1)

    def held(self, name, x, in_dim, run, out_dim):
        """A fixed output of a call, with one row moved if it is to be."""
        self.inputs[name] = x.movedim(in_dim, 0).flatten(1)
        if name not in self.outputs:
            self.outputs[name] = torch.rand_like(run()) * 0.1 + 0.1
        out = self.outputs[name].clone()
        if self.moved and self.moved[0] == name:
            row = out.select(out_dim, self.moved[1])
            row += 0.05 * torch.rand_like(row)  # not alike at all places: attention would not see it
        return out


def fed_by_running(gm, args, call, row, outputs, before):
    """Per call, which of its features move with a row of another."""
    run = Frozen(gm, outputs, (call, row))
    with torch.no_grad():
        run.run(*args)
    return {name: (now != before[name]).any(1) for name, now in run.inputs.items()}


def fed_by_graph(graph, use, row):
    """The same, as the weight graph has it."""
    behind = torch.zeros(len(graph) + 1, dtype=torch.bool)  # the last one is for -1
    behind[use.base + row] = True
    found = {}
    for s in graph.stations:
        if hasattr(s, "feature_map"):
            found[s.name] = behind[s.feature_map]
        else:
            behind[s.base : s.base + s.size] = behind[s.members].any(1)
    return found
