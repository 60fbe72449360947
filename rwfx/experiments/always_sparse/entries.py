"""The runs that there are to do, each told apart from every other, and the lines of the files about them."""

from dataclasses import dataclass

from rwfx.experiments.always_sparse.plan import DENSE, SMALL, Plan

TUNING_SEED = 1_000_003
"""The seed of every trial; those of the final runs are counted from 0."""


@dataclass(frozen=True)
class Entry:
    """A run that is to be done."""

    dataset: str
    model: str
    method: str
    density: float
    """Of ``small-dense`` that of the sparse networks that have as many parameters; of ``dense`` 1."""
    seed: int
    lr: float


@dataclass(frozen=True)
class Trial(Entry):
    """A run that judged a learning rate."""

    plan: str
    validation: float


@dataclass(frozen=True)
class Result(Entry):
    """A final run at its end, judged on test data."""

    plan: str
    parameters: int
    nnz: int
    """Of the weights that are stored as non-zeros; 0 of a dense network."""
    bytes: int
    """Of parameters, gradients, optimizer state, index and topology."""
    steps: int
    seconds: float
    """Forward, backward, update, ``zero_grad`` and the topology's updates; not the making of batches."""
    topology_seconds: float
    """Of these, the calls that update the topology."""
    step_ms: float
    """The median over the steps."""
    flops: float
    """Of linear calls and convolutions, as executed."""
    published_flops: float
    """By the published formulas."""
    accuracy: float


@dataclass(frozen=True)
class Point(Entry):
    """A final run after one of its steps."""

    plan: str
    step: int
    seconds: float
    flops: float
    accuracy: float


def contenders(plan: Plan) -> list[tuple[str, float]]:
    """Give every method with each of its densities, in the order in which they are run."""
    sparse = plan.sparse_methods
    found = [(DENSE, 1.0)] if DENSE in plan.methods else []
    for density in sorted(plan.densities, reverse=True) if sparse else ():
        found += [(method, density) for method in (*sparse, SMALL)]
    return found


def trial_entries(plan: Plan, method: str, density: float) -> list[Entry]:
    """Give the trials of a contender: none where there is one rate only."""
    if len(plan.lrs) == 1:
        return []
    return [Entry(plan.dataset, plan.model, method, density, TUNING_SEED, lr) for lr in sorted(plan.lrs)]


def final_entry(plan: Plan, method: str, density: float, seed: int, lr: float) -> Entry:
    """Give the final run of a contender and a seed."""
    return Entry(plan.dataset, plan.model, method, density, seed, lr)


def worded(plan: Plan, steps: int) -> str:
    """Say what decides the numbers of a run besides its entry."""
    widths = f" {'-'.join(map(str, plan.hidden))}" if plan.model == "mlp" else ""
    sgd = f" {plan.momentum:g}{' nesterov' * plan.nesterov}" if plan.optimizer == "sgd" else ""
    drops = f" to {plan.drop_to:g} at {', '.join(f'{of:g}' for of in plan.drops)}" if plan.decay == "drops" else ""
    return (
        f"{plan.model}{widths}, width {plan.width:g}, {steps} steps of {plan.batch_size}{' augmented' * plan.augment}, "
        f"{plan.optimizer}{sgd}, weight decay {plan.weight_decay:g}, rate {plan.decay}{drops}, warm-up "
        f"{plan.warmup:g}; init {plan.init}, alpha {plan.alpha:g} {plan.schedule}, every {plan.interval} steps to "
        f"{plan.end:g}, scope {plan.scope}, gamma {plan.gamma:g} {plan.distribution}; {plan.device}"
    )
