"""Records: what the check of a model found, a line of ``zoo.csv`` each, and whether anything is wrong with it."""

from dataclasses import dataclass

from rwfx.capture import tape

SHARE = 0.95
"""Of the linear and convolution weights of a model, the least that must be row-sparse, or dense for a reason."""

EXACT = {"float64": 1e-9, "float64, rounded within": 1e-5, "float32": 1e-3}
"""How far gradients may be from the oracle's, by the type of the numbers."""

SKIPPED = "not run"


@dataclass(frozen=True)
class Record:
    """A model that was checked; of one that could not be, ``error`` and what was found before."""

    suite: str
    model: str
    parameters: int = 0
    route: str = ""
    weights: int = 0
    """Linear and convolution weights: those of such modules, and other parameters that a product reads."""
    sparse: int = 0
    dense: int = 0
    """How many of them stay dense for a stated reason."""
    reasons: str = ""
    """The reasons, each with the number of weights that it is of."""
    dtype: str = ""
    forward: str = ""
    """Whether outputs and buffers are the model's own, bit for bit: equal, or what is not."""
    gradient: float = 0.0
    """The largest difference from the oracle's gradient, over the largest number of the parameter's."""
    worst: str = ""
    """The parameter it is of."""
    state_dict: str = ""
    """Whether the keys of the ``state_dict`` are the model's, in its order: equal, or what is not."""
    graphs: int = 0
    """How many graphs ``torch.compile`` makes of a training forward; 0: it was not tried."""
    seconds: float = 0.0
    """Of ``rwfx.transform``."""
    notes: str = ""
    error: str = ""

    @property
    def entry(self) -> str:
        """The name of the model in the zoo."""
        return f"{self.suite}/{self.model}"


def problem_of(record: Record) -> str:
    """Say what is wrong with a model; empty where nothing is."""
    if record.error:
        return record.error
    problems = []
    if record.sparse + record.dense < SHARE * record.weights:
        missed = record.weights - record.sparse - record.dense
        problems.append(f"{missed} of {record.weights} weights are in no line of the report")
    if record.forward not in ("equal", SKIPPED):
        problems.append(f"forward: {record.forward}")
    if not record.gradient <= EXACT.get(record.dtype, 0.0):
        problems.append(f"the gradient of {record.worst} is off by {record.gradient:.1e}")
    if record.state_dict != "equal":
        problems.append(f"state_dict: {record.state_dict}")
    if record.graphs > 1 and record.route != tape.NAME:  # the model's own code, in as many as that makes
        problems.append(f"{record.graphs} graphs")
    return "; ".join(problems)
