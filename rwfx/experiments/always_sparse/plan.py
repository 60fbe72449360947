"""What a comparison of always-sparse methods is to run."""

import math
from dataclasses import dataclass
from pathlib import Path

from rwfx.experiments.always_sparse.networks import HIDDEN, MODELS
from rwfx.experiments.data import DATA_SETS

STEPS = {"digits": 300, "mnist": 2000, "fashion-mnist": 3000, "cifar10": 3000}
"""The data sets, and the steps of a run where none are asked for."""
assert set(STEPS) == set(DATA_SETS)

SPARSE = ("gse", "rigl", "set", "snfs", "topkast", "gradual", "static")
"""The methods of ``rwfx.Topology``."""
DENSE, SMALL = "dense", "small-dense"
METHODS = (*SPARSE, DENSE)
"""Those to choose from; ``small-dense`` is there wherever one of ``SPARSE`` is."""

CHOICES = {
    "dataset": tuple(STEPS),
    "model": tuple(MODELS),
    "optimizer": ("adam", "adamw", "sgd"),
    "decay": ("cosine", "drops", "constant"),
    "schedule": ("cosine", "linear", "constant"),
    "scope": ("layer", "global"),
    "distribution": ("uniform", "grabo", "graest"),
    "init": ("er", "erk", "uniform"),
}
"""What the fields that are names can be."""


@dataclass(frozen=True)
class Plan:
    """What to run and where to write it."""

    out: Path = Path("results/always-sparse")
    dataset: str = "mnist"
    model: str = "mlp"
    methods: tuple[str, ...] = ("gse", "rigl", "set", "static", "dense")
    densities: tuple[float, ...] = (0.1, 0.05, 0.02)
    seeds: int = 3
    steps: int | None = None
    epochs: float | None = None
    """Instead of ``steps``: passes over the training examples."""
    width: float = 1.0
    """Times the widths of the model."""
    hidden: tuple[int, ...] = HIDDEN
    """Of the model ``mlp``."""
    batch_size: int = 128
    optimizer: str = "adam"
    momentum: float = 0.9
    """Of ``sgd``, and so is ``nesterov``."""
    nesterov: bool = False
    weight_decay: float = 0.0
    lrs: tuple[float, ...] = (1e-3,)
    """The learning rates; of several, each method has the best at each density."""
    decay: str = "cosine"
    """How the rate falls: to zero by a cosine, by ``drop_to`` at each of ``drops``, or not at all."""
    drops: tuple[float, ...] = ()
    """As shares of the run."""
    drop_to: float = 0.1
    warmup: float = 0.0
    """The share of the run over which the rate rises."""
    augment: bool = False
    """Whether training images are shifted by up to 4 pixels and mirrored."""
    init: str = "er"
    alpha: float = 0.3
    interval: int = 100
    """Steps from one update of the topology to the next."""
    end: float = 0.75
    """The share of the run after which the topology stays as it is."""
    schedule: str = "cosine"
    gamma: float = 1.0
    distribution: str = "uniform"
    scope: str = "layer"
    evaluations: int = 10
    data_dir: Path | None = None
    device: str = "cpu"

    def steps_of(self, examples: int) -> int:
        """How many steps a run on so many training examples has."""
        if self.epochs is not None:
            return max(1, round(self.epochs * (examples // self.batch_size)))
        return self.steps or STEPS[self.dataset]

    def end_of(self, steps: int) -> int:
        """The last step after which the topology may be updated."""
        return round(self.end * steps)

    @property
    def sparse_methods(self) -> tuple[str, ...]:
        """Those of the methods that are no dense training."""
        return tuple(method for method in self.methods if method != DENSE)


def check_plan(plan: Plan) -> None:
    """Refuse what makes no comparison.

    Raises:
        ValueError: names it.
    """
    for name, known in CHOICES.items():
        if (given := getattr(plan, name)) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; given {given!r}.")
    for method in plan.methods:
        if method not in METHODS:
            raise ValueError(f"the methods are {', '.join(METHODS)}; given {method!r}.")
    for name in ("methods", "densities", "lrs"):
        given = getattr(plan, name)
        if not given:
            raise ValueError(f"there must be at least one of the {name}.")
        if len(set(given)) < len(given):
            raise ValueError(f"one of the {name} is there twice: {', '.join(map(str, given))}.")
    if plan.steps is not None and plan.epochs is not None:
        raise ValueError("steps and epochs both say how long a run is: give one of them.")
    for name in ("seeds", "steps", "batch_size", "interval", "evaluations"):
        if (given := getattr(plan, name)) is not None and given < 1:
            raise ValueError(f"{name} must be at least 1; given {given}.")
    shares = {"density": plan.densities, "drop": plan.drops, "end": (plan.end,), "alpha": (plan.alpha,)}
    for name, values in shares.items():
        for given in values:
            if not 0 < given <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1; given {given}.")
    positive = {"epochs": (plan.epochs or 1,), "width": (plan.width,), "gamma": (plan.gamma,), "lr": plan.lrs}
    for name, values in positive.items():
        for given in values:
            if not 0 < given < math.inf:
                raise ValueError(f"{name} must be above 0; given {given}.")
