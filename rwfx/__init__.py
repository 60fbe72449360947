"""rwfx: a ``torch.fx`` pass that trains a PyTorch model with a row-sparse backward chosen by random walks.

once         model --capture--> GraphModule --weight_graph--> WeightGraph
                                     |                             |
                                     +---------- passes -----------+
                                                   |
                                    GraphModule with a row sampler inside --torch.compile--> step

every step   row sampler: WeightGraph, |W| --walks--> row sets --> row-sparse ops --> row gradients --> optimizer
"""

from rwfx import draw, ops, optim, schedules
from rwfx.backend import backend
from rwfx.break_even import CostModel
from rwfx.examples import AdaptiveExamples, SampledExamples, TopExamples
from rwfx.history import History
from rwfx.policies import AdaptiveWalk, LearnedWalk, Magnitude, RandomWalk, TopK, Uniform
from rwfx.sparse_memory import memory_of
from rwfx.sparse_module import SparseModule
from rwfx.sparse_weight import SparseWeight
from rwfx.sparsified import SparsifiedModule
from rwfx.sparsify import densify, sparsify
from rwfx.substituted import SubstitutedModule
from rwfx.topology import Topology
from rwfx.train import RandomWalkTrainer
from rwfx.transform import transform
from rwfx.transformed import Transformed
from rwfx.walk import random_walks
from rwfx.weight_graph import WeightGraph, weight_graph

__version__ = "0.1.0"
__all__ = [
    "AdaptiveExamples",
    "AdaptiveWalk",
    "CostModel",
    "History",
    "LearnedWalk",
    "Magnitude",
    "RandomWalk",
    "RandomWalkTrainer",
    "SampledExamples",
    "SparseModule",
    "SparseWeight",
    "SparsifiedModule",
    "SubstitutedModule",
    "TopExamples",
    "TopK",
    "Topology",
    "Transformed",
    "Uniform",
    "WeightGraph",
    "backend",
    "densify",
    "draw",
    "memory_of",
    "ops",
    "optim",
    "random_walks",
    "schedules",
    "sparsify",
    "transform",
    "weight_graph",
]
