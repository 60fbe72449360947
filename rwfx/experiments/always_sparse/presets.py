"""The published settings, by name; what a command gives beside a name counts instead.

*GSE*   M. Heddes et al., "Always-Sparse Training by Growing Connections with Guided Stochastic Exploration", 2024, and
        the defaults of its code (``our_training.py``, ``training.py``).
*RigL*  U. Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 4.2, and the defaults of
        its code (``cifar_resnet/resnet_train_eval.py``).
*SET*   D. Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
        network science", Nature Communications 2018, and the defaults of its code.

Epochs are those of all training data; a command trains on nine tenths of them, as it validates on the rest, and has the
schedules fall at the same shares of the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """How a paper trains one of its networks."""

    source: str
    model: str
    lr: float
    dataset: str = "cifar10"
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    batch_size: int = 128
    epochs: float = 200
    drops: tuple[float, ...] = ()
    """The epochs after which the rate falls, to ``drop_to`` of what it was."""
    drop_to: float = 0.1
    warmup: float = 0
    """The epochs over which the rate rises, in a line, from ``1e-4`` of it."""
    augment: bool = True
    alpha: float = 0.2
    interval: int = 1000
    end: float = 120
    """The epoch of the last update of the topology."""
    schedule: str = "cosine"
    gamma: float = 1.0
    scope: str = "global"
    init: str = "er"

    def settings(self) -> dict[str, Any]:
        """As fields of a plan: what happens at an epoch happens at that share of the run."""
        found = {name: value for name, value in vars(self).items() if name not in ("source", "lr")}
        drops = tuple(epoch / self.epochs for epoch in self.drops)
        shares = {"drops": drops, "warmup": self.warmup / self.epochs, "end": self.end / self.epochs}
        return found | shares | {"lrs": (self.lr,), "decay": "drops" if drops else "constant"}


def _gse(model: str, lr: float = 0.1) -> Preset:
    """A network of GSE's on CIFAR-10, with the code's defaults."""
    return Preset("GSE", model, lr, drops=(80, 120), warmup=5)


_RIGL_EPOCH = 97_656 / 250
"""Steps of an epoch: a whole run has 97 656."""

PRESETS: Mapping[str, Preset] = {
    "gse-resnet56": _gse("resnet56"),
    "gse-vgg16": _gse("vgg16"),
    "gse-vit": _gse("vit", lr=0.01),
    "rigl-wrn22-2": Preset(
        "RigL",
        "wrn22-2",
        lr=0.1,
        nesterov=True,
        weight_decay=5e-4,
        epochs=250,
        drops=tuple(step / _RIGL_EPOCH for step in (30_000, 60_000, 90_000)),
        drop_to=0.2,
        alpha=0.3,
        interval=100,
        end=75_000 / _RIGL_EPOCH,
        scope="layer",
        init="erk",
    ),
    # Moves at the end of each epoch, of 500 steps, until the last; the paper gives no decay of the weights.
    "set-mlp": Preset(
        "SET",
        "set-mlp",
        lr=0.01,
        weight_decay=0.0,
        batch_size=100,
        epochs=1000,
        augment=True,
        alpha=0.3,
        interval=500,
        end=1000,
        schedule="constant",
        scope="layer",
    ),
}
"""By the names of the command."""
