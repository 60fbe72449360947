"""The models that are known not to be as they should be, each with a part of what is said of it (``problem_of``).

A model that is not here has no problem; one that is has this one. The tests say so in both directions.
"""

from rwfx.experiments.zoo.records import Record, problem_of

EXPECTED: dict[str, str] = {
    # torch.compile breaks the graph around nn.LSTM unless torch._dynamo.config.allow_rnn says otherwise.
    "timm/sequencer": "3 graphs",
}


def surprise_of(record: Record) -> str:
    """Say what is new about a model: another problem than is known, or none where one is; empty where nothing is."""
    problem, known = problem_of(record), EXPECTED.get(record.entry, "")
    if problem and not known:
        return f"a new problem: {problem}"
    if known and not problem:
        return f"no problem any more; take it out of {__name__}.EXPECTED: {known}"
    return "" if known in problem else f"another problem than {known!r}: {problem}"
