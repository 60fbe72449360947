"""Contenders: the ways to train that are compared.

*dense*      every row of every example, with ``torch.optim.Adam(fused=True)``; a contender with each batch size.
*rows*       the rows of a weight with the largest gradient, ``TopK``.
*examples*   the examples with the largest gradient at the output; *adaptive*, as many as keep a share of the squared
             gradient; *uniform*, drawn whatever their gradients, the control of the choice.
*both*       these rows of these examples; *mixed*, of examples drawn half by their gradients and half uniformly, for
             wrong labels have large gradients too.
*two-pass*   dense on the examples with the largest gradient, found by a forward pass before (see ``two_pass``).

With rows the optimizer is ``rwfx.optim.Adam``, which touches the rows kept and nothing else; without it is dense's.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rwfx import AdaptiveExamples, SampledExamples, TopExamples
from rwfx.experiments.frontier.plan import SPARSE_NAMES, Plan
from rwfx.experiments.frontier.two_pass import TwoPass, two_pass_loss
from rwfx.policies import Policy, TopK
from rwfx.train import RandomWalkTrainer


@dataclass(frozen=True)
class Contender:
    """A way to train."""

    rows: Policy | None = None
    examples: TopExamples | SampledExamples | AdaptiveExamples | None = None
    two_pass: float | None = None
    """The share of the examples that takes part in the second pass."""


CONTENDERS = {
    "dense": Contender(),
    "rows-0.25": Contender(rows=TopK(0.25)),
    "rows-0.1": Contender(rows=TopK(0.1)),
    "examples-0.3": Contender(examples=TopExamples(0.3)),
    "examples-0.5": Contender(examples=TopExamples(0.5)),
    "adaptive-0.9": Contender(examples=AdaptiveExamples(0.9)),
    "uniform-0.3": Contender(examples=SampledExamples(0.3, floor=1.0)),
    "both-0.5": Contender(rows=TopK(0.25), examples=TopExamples(0.5)),
    "both-0.3": Contender(rows=TopK(0.25), examples=TopExamples(0.3)),
    "both-mixed-0.5": Contender(rows=TopK(0.25), examples=SampledExamples(0.5, floor=0.5)),
    "two-pass-0.3": Contender(two_pass=0.3),
    "two-pass-0.5": Contender(two_pass=0.5),
}
assert tuple(CONTENDERS) == ("dense", *SPARSE_NAMES)


def trainer_of(
    plan: Plan, name: str, network: nn.Module, inputs: Tensor, lr: float, epochs: int, seed: int
) -> RandomWalkTrainer:
    """The trainer that trains ``network`` in place, on batches such as ``inputs``.

    Raises:
        ValueError: ``rwfx.transform`` has no such backward for this network.
    """
    contender = CONTENDERS[name]
    options: dict[str, Any] = {"lr": lr, "epochs": epochs, "seed": seed, "progress": False}
    if contender.two_pass is not None:
        return RandomWalkTrainer(TwoPass(network, contender.two_pass), "full", loss_fn=two_pass_loss, **options)
    if contender.rows is None and contender.examples is None:
        return RandomWalkTrainer(network, "full", **options)
    options |= {"example_inputs": (inputs,), **plan.transform_options}
    if contender.examples is not None:
        options["examples"] = contender.examples
    if contender.rows is not None:
        options["rows"] = contender.rows
    return RandomWalkTrainer(network, "rw_sparse", **options)
