"""The topology of an always-sparse model, moved between steps of the user's own training loop.

In, after each step of the optimizer: what the weights' probes found in the backward pass. Out, every ``interval``
steps: the connections at other places, as many as before, and the optimizer's state with them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Generator, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rwfx.arguments import check_choice, check_number
from rwfx.extremes import largest
from rwfx.ops.probe import EXPLORE
from rwfx.ops.walk import mix
from rwfx.options import common_seed
from rwfx.probe import Probe
from rwfx.sparse_weight import SparseWeight
from rwfx.topology.methods import METHODS, PRUNES, SCOPES, Moment
from rwfx.topology.moving import move
from rwfx.topology.parts import Part
from rwfx.topology.ranks import agree_on_mean, agreed
from rwfx.topology.schedules import DECAYS
from rwfx.topology.topkast import Exploration, check_unexplored

STATE = "settings", "weights", "seed", "steps", "history", "momentum", "exploration"
"""What a ``state_dict`` of a topology holds."""


@dataclass(frozen=True)
class Update:
    """What one update did, by the names of the weights."""

    step: int
    """After how many steps of the optimizer."""
    share: float
    """Of the connections that might be exchanged; for ``gradual`` the density, for ``topkast`` 0."""
    candidates: dict[str, int]
    """How many there were to grow; for ``set`` none, which takes any free place."""
    pruned: dict[str, int]
    grown: dict[str, int]


class Topology:
    """Moves the connections of a sparsified model while it trains::

        topology = rwfx.Topology(model, optimizer, end=7500)
        for x, y in loader:
            loss_fn(model(x), y).backward()
            optimizer.step()
            topology.step()
            optimizer.zero_grad()

    After every ``interval`` steps, up to step ``end``, a share ``alpha_t`` of each weight's connections is pruned and
    as many are grown, with the value 0. The number of non-zeros stays. What the optimizer holds of a connection goes
    with it, and is 0 for a new one. Candidates are found in the backward pass of the step before the update, from its
    batch; that step is one like any other (the algorithms as published leave the optimizer's step out there, the
    published code of GSE does not). They are found by the weights as they were in that backward pass, and connections
    are pruned by what the optimizer's step made of them.

    The model is compiled before or after. Between updates nothing is compiled anew, and in the scope ``"layer"`` not by
    an update either. With ``torch.distributed`` initialized all ranks move the same connections. A weight that is
    frozen after this was made stays as it is until it is trained again.

    Attributes:
        steps: how often ``step`` was called.
        history: an ``Update`` for each update.
        weights: the sparse weights that are trained, by name.

    Args:
        model: what ``rwfx.sparsify`` made, or a model that holds such a one.
        optimizer: trains the model's values, with others or not.
        method: a key of ``METHODS``; by default the ``growth`` that ``rwfx.sparsify`` was told.
        alpha: the share that is exchanged at first, above 0 and at most 1; by default 0.2 for ``"gse"``, 0.3 for
            ``"rigl"`` and ``"set"``, 0.5 for ``"snfs"``.
        interval: steps from one update to the next.
        end: the step up to which there are updates, towards which ``alpha`` decays: about three quarters of a training
            run. It may be left out with ``schedule="constant"``.
        schedule: ``alpha_t = alpha (1 + cos(pi t / end)) / 2`` with ``"cosine"``; ``"linear"``, ``"constant"``.
        scope: ``"layer"``: each weight keeps its number of non-zeros. ``"global"``: pruned and grown are the smallest
            and best of all weights together, whose numbers drift (as in the published code of GSE).
        seed: of the draws; by default a number of ``torch.manual_seed``'s stream, the same on every rank.
        distribution: of ``"gse"``: ``"uniform"``, ``"grabo"`` (by a bound of the gradient's magnitude) or ``"graest"``
            (by an estimate of it).
        gamma: of ``"gse"``: candidates drawn for each non-zero, 1 by default. A weight with more than half of its
            places taken has all others as candidates. Of ``"topkast"``: places trained beside each non-zero.
        prune: of ``"set"``: ``"magnitude"`` or ``"tails"``, the smallest positive and largest negative ones.
        density: of ``"gradual"``: what the model, sparsified with ``density=1``, comes to at the last update, by
            ``1 - (1 - density) (1 - (1 + cos(pi t / end)) / 2)``.

    Raises:
        TypeError, ValueError: says what was given and what is allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: str | None = None,
        alpha: float | None = None,
        interval: int = 1000,
        end: int | None = None,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        scope: Literal["layer", "global"] = "layer",
        *,
        seed: int | None = None,
        distribution: Literal["uniform", "grabo", "graest"] | None = None,
        gamma: float | None = None,
        prune: Literal["magnitude", "tails"] | None = None,
        density: float | None = None,
    ) -> None:
        self.method = _method_of(model) if method is None else method
        for name, given, allowed in (
            ("method", self.method, METHODS),
            ("schedule", schedule, DECAYS),
            ("scope", scope, SCOPES),
        ):
            check_choice(name, given, allowed)
        self._rules = METHODS[self.method]
        if self.method == "topkast" and scope == "global":
            raise ValueError('method="topkast" keeps the number of non-zeros of each weight: use scope="layer".')
        given = {"distribution": distribution, "gamma": gamma, "prune": prune, "density": density}
        self.options = _options(self.method, given)
        self.alpha = _alpha(self.method, alpha)
        check_number("interval", interval, Integral, 1)
        if end is not None:
            check_number("end", end, Integral, interval)
        elif self._rules.choose is not None and (schedule != "constant" or self.method == "gradual"):
            raise ValueError(
                f"schedule={schedule!r} decays towards the step of the last update: give end=, about three quarters of "
                'all steps, or schedule="constant".'
            )
        self.interval, self.end, self.schedule, self.scope = interval, end, schedule, scope
        self.weights = _weights(model, optimizer, scope)
        if self.method == "topkast":
            check_unexplored(optimizer)
        self.optimizer = optimizer
        self.seed = common_seed() if seed is None else seed
        check_number("seed", self.seed, Integral, 0, 2**63 - 1)
        self.steps = 0
        self.history: list[Update] = []
        for weight in self.weights.values():
            weight.probe = None if self._rules.rule is None else Probe(self._rules.rule(self.options))
        self._exploration = None
        if self.method == "topkast":
            self._exploration = Exploration(self.weights, optimizer, self.options["gamma"], self._key(0))
        self._look(first=True)

    @property
    def settings(self) -> dict[str, Any]:
        """How connections move: what must be the same for a run to be the same run."""
        names = "method", "alpha", "interval", "end", "schedule", "scope", "options"
        return {name: getattr(self, name) for name in names}

    @property
    def updates(self) -> int:
        """How many updates there were."""
        return len(self.history)

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the optimizer, and where one is due update the topology."""
        if self._is_due():
            self._update()
        self.steps += 1
        self._look()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the states of the model, which has the connections, and the optimizer."""
        return {
            "settings": self.settings,
            "weights": self._sizes_of_weights(),
            "seed": self.seed,
            "steps": self.steps,
            "history": [asdict(update) for update in self.history],
            "momentum": {name: self._probe(name).grads.clone() for name in self._with_momentum()},
            "exploration": {} if self._exploration is None else self._exploration.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; the model's is to be loaded before.

        Raises:
            ValueError: it is of a topology with other settings, or of a model with other non-zeros; nothing has changed
                then.
        """
        lacking = [name for name in STATE if name not in state]
        if lacking:
            raise ValueError(f"this is no state_dict of a Topology: it has no {', '.join(map(repr, lacking))}.")
        for name, own in self.settings.items():
            if (given := state["settings"].get(name)) != own:
                raise ValueError(
                    f"the state is of a topology with {name}={given!r}, and this one has {own!r}: make it with what "
                    "the state has."
                )
        own = self._sizes_of_weights()
        if state["weights"] != own:
            raise ValueError(
                f"the state is of a model with the weights and non-zeros {state['weights']}, and this one has {own}. "
                "Load the model's state_dict first, and freeze what was trained at first after Topology is made."
            )
        self.seed, self.steps = state["seed"], state["steps"]
        self.history = [Update(**update) for update in state["history"]]
        self._look(first=True)
        for name in self._with_momentum():
            self._probe(name).grads.copy_(state["momentum"][name])
        if self._exploration is not None:
            self._exploration.load_state_dict(state["exploration"])

    def _sizes_of_weights(self) -> dict[str, list[int]]:
        """Of each weight its shape and how many non-zeros it has."""
        return {name: [*weight.shape, weight.nnz] for name, weight in self.weights.items()}

    @property
    def _trained(self) -> dict[str, SparseWeight]:
        """The weights without those that were frozen meanwhile."""
        return {name: weight for name, weight in self.weights.items() if weight.values.requires_grad}

    def _is_due(self) -> bool:
        """Whether the step that comes next, number ``steps`` from 0, ends with an update."""
        counted = (self.steps + 1) % self.interval == 0 and (self.end is None or self.steps < self.end)
        return counted and self.method != "static"

    def _look(self, first: bool = False) -> None:
        """Tell the probes what to look for in the next backward pass.

        At first they get their places also where nothing is due: a model that is compiled then has them.
        """
        due = self._is_due()
        for n, weight in enumerate(self.weights.values()):
            if weight.probe is None or not (first or due or weight.probe.looks or self._rules.always):
                continue
            looks = (due or self._rules.always) and weight.values.requires_grad
            if self.method == "topkast":
                weight.probe.look(looks, given=len(weight.probe.keys))
                continue
            draws, candidates, gradients = self._sizes(weight)
            weight.probe.fit(weight, candidates, gradients)
            weight.probe.look(looks, self._key(n), draws)

    def _sizes(self, weight: SparseWeight) -> tuple[int, int, int]:
        """How many candidates are drawn or kept (0: all), and the places for them and for their gradients."""
        places = weight.rows * weight.columns
        free = places - weight.nnz
        if self.method == "gse":
            draws = 0 if weight.density > 0.5 else max(1, int(self.options["gamma"] * weight.nnz))
            return draws, draws or free, draws or free
        if self.method == "snfs":
            return 0, 0, places
        return (most := self._most(weight)), most, most

    def _most(self, weight: SparseWeight) -> int:
        """How many connections a weight can get in one update."""
        total = sum(w.nnz for w in self._trained.values()) if self.scope == "global" else weight.nnz
        assert self.alpha is not None
        return min(ceil(self.alpha * total), weight.rows * weight.columns - weight.nnz)

    def _key(self, number: int) -> int:
        """The key of random numbers of a weight, or of all together, in this step."""
        seed, place, step = torch.tensor([self.seed, number, self.steps], device="cpu")
        return int(mix(mix(seed, place), step))

    def _share(self) -> float:
        progress = 0.0 if self.end is None else min(self.steps / self.end, 1)
        if self.method == "gradual":
            assert self.end is not None
            # The last update comes to the density itself: end need not be a multiple of the interval.
            last = self.steps + self.interval >= self.end
            return 1 - (1 - self.options["density"]) * (1 - (0 if last else DECAYS[self.schedule](progress)))
        return 0.0 if self.alpha is None else self.alpha * DECAYS[self.schedule](progress)

    def _update(self) -> None:
        before = {name: weight.nnz for name, weight in self.weights.items()}
        share = self._share()
        if self._exploration is not None:
            candidates = {name: len(self._probe(name).keys) for name in self._trained}
            grown = self._exploration.update()
        else:
            generator = Generator().manual_seed(self._key(len(self.weights)))
            moment = Moment(share, self.scope, self.options, generator)
            names = list(self._trained)
            # In the scope "layer" one by one: an update needs memory for one weight at a time then.
            groups = [[name] for name in names] if self.scope == "layer" else [names] * bool(names)
            counts = {name: of for group in groups for name, of in self._exchange(group, moment).items()}
            candidates, grown = ({name: of[k] for name, of in counts.items()} for k in (0, 1))
        pruned = {name: before[name] - self.weights[name].nnz + grown[name] for name in grown}
        self.history.append(Update(self.steps + 1, share, candidates, pruned, grown))

    def _exchange(self, names: list[str], moment: Moment) -> dict[str, tuple[int, int]]:
        """Choose the next connections of some weights and move there; how many candidates and new ones each has."""
        assert self._rules.choose is not None
        parts = [self._part(self.weights[name]) for name in names]
        chosen = self._rules.choose(parts, moment)
        return {
            name: (len(part.candidates), move(self.weights[name], part.keys, keys, self.optimizer))
            for name, part, keys in zip(names, parts, chosen, strict=True)
        }

    def _probe(self, name: str) -> Probe:
        probe = self.weights[name].probe
        assert probe is not None
        return probe

    def _with_momentum(self) -> list[str]:
        """The weights of which there is a mean gradient."""
        return list(self.weights) if self.method == "snfs" else []

    def _part(self, weight: SparseWeight) -> Part:
        keys, values, probe = weight.keys(), weight.values.detach(), weight.probe
        places = weight.rows * weight.columns
        if probe is None:
            return Part(places, keys, values, keys[:0], values[:0])
        if probe.rule != "momentum":
            return Part(places, keys, values, *agreed(probe))
        agree_on_mean(probe.grads)
        size = probe.grads.abs()
        wanted = float(size[keys].mean())
        candidates = largest(size.index_fill_(0, keys, -1), self._most(weight))
        return Part(places, keys, values, candidates, probe.grads[candidates], wanted)


def _method_of(model: nn.Module) -> str:
    settings = (getattr(module, "settings", None) for module in model.modules())
    found = [given["growth"] for given in settings if isinstance(given, dict) and "growth" in given]
    if not found:
        raise ValueError(
            f"{type(model).__name__} is not from rwfx.sparsify, which records a method: give method=, one of "
            f"{', '.join(map(repr, METHODS))}."
        )
    return found[0]


def _options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options, those that are not given as they are by default."""
    own = METHODS[method].options
    for name, value in given.items():
        if value is not None and name not in own:
            others = ", ".join(repr(other) for other in METHODS if name in METHODS[other].options)
            raise ValueError(f"{name}={value!r} is an option of {others}, and the method is {method!r}: leave it out.")
    options = {name: default if given[name] is None else given[name] for name, default in own.items()}
    for name, allowed in (("distribution", EXPLORE), ("prune", PRUNES)):
        if name in options:
            check_choice(name, options[name], allowed)
    if "gamma" in options:
        check_number("gamma", options["gamma"], Real, 0, above=True)
    if "density" in options:
        if options["density"] is None:
            raise ValueError(f"method={method!r} needs density=, the share of non-zeros to come to.")
        check_number("density", options["density"], Real, 0, 1, above=True)
    return options


def _alpha(method: str, alpha: float | None) -> float | None:
    own = METHODS[method].alpha
    if alpha is None:
        return own
    if own is None:
        raise ValueError(f"alpha={alpha!r} with method={method!r}, which exchanges no share: leave it out.")
    check_number("alpha", alpha, Real, 0, 1, above=True)
    return float(alpha)


def _weights(model: nn.Module, optimizer: Optimizer, scope: str) -> dict[str, SparseWeight]:
    """The sparse weights that are trained; all are the optimizer's."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    found = {name: module for name, module in model.named_modules() if isinstance(module, SparseWeight)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no sparse weights: give what rwfx.sparsify(model) returns, and the optimizer "
            "of its parameters."
        )
    trained = {name: weight for name, weight in found.items() if weight.values.requires_grad}
    if not trained:
        raise ValueError(f"none of the sparse weights requires a gradient ({', '.join(found)}): nothing is trained.")
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if missing := [name for name, weight in trained.items() if id(weight.values) not in own]:
        raise ValueError(
            f"the optimizer does not have the values of {', '.join(map(repr, missing))}: make it of the sparsified "
            "model's parameters, after rwfx.sparsify, not of those of the model it was made from."
        )
    if scope == "global" and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            'scope="global" changes how many values a weight has, and DistributedDataParallel keeps gradients in '
            'buffers of fixed sizes: use scope="layer".'
        )
    return trained
