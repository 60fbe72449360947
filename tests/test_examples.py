"""``transform(examples=...)``: the gradients are those of the dense model in which dropped examples count as zero."""

import pytest
import torch
import torch.nn.functional as F
from oracles import chances_of, gradients_at, kept_gradients, sizes_of_examples, to_dense
from torch import nn
from torch.testing import assert_close
from zoo import ZOO, Heads, Modules, Sequence, Single, Twice, loss_of, make

import rwfx
from rwfx import AdaptiveExamples, AdaptiveWalk, LearnedWalk, SampledExamples, TopExamples, TopK, Uniform

EXAMPLES = {
    "top": TopExamples(0.4),
    "two": 2,
    "sampled": SampledExamples(0.4, floor=0.3),
    "sampled-unbiased": SampledExamples(0.4, floor=0.3, unbiased=True),
    "adaptive": AdaptiveExamples(0.8, 0.3, 0.9),
}
ROWS = {
    "all": {},
    "all, row gradients": {"grad": "rows"},
    "top-k": {"rows": TopK(0.5), "grad": "rows"},
    "top-k, full": {"rows": TopK(0.5), "dx": "full"},
    "uniform": {"rows": Uniform(0.4)},
    "uniform-unbiased": {"rows": Uniform(0.4, unbiased=True), "grad": "rows"},
    "adaptive": {"rows": AdaptiveWalk(3)},
    "learned": {"rows": LearnedWalk(3), "grad": "rows"},
    "walk": {"num_paths": 6, "grad": "rows"},
    "walk, full": {"num_paths": 6, "dx": "full"},
}


def batch_for(model, size=13):
    """The inputs of a zoo model, with more examples than it has of its own accord."""
    torch.manual_seed(3)
    if isinstance(model, Heads):
        return (torch.randn(size, 12, dtype=torch.float64),), {"z": torch.randn(size, 7, dtype=torch.float64)}
    return (torch.randn(size, *model.shape[1:], dtype=torch.float64),), {}


def run(module, inputs):
    args, kwargs = inputs
    torch.manual_seed(7)
    return module(*args, **kwargs)


def listen(sparse):
    """What each forward is given: its ``kept``, which its backward fills in, and the scales of its rows by weight."""
    heard = {"kept": [], "scales": {}}
    rows = sparse.row_sampler

    def keep(_, __, drawn):
        heard["scales"].update(zip(rows.kept, drawn[len(rows.kept) :], strict=False))

    rows.register_forward_hook(keep)
    sparse.example_sampler.register_forward_hook(lambda _, __, made: heard["kept"].append(made[0]))
    return heard


def with_all_examples(sparse):
    """The weights whose calls compute with all examples, as the report tells."""
    return {note.split()[0] for note in sparse.report.notes if "computes with all examples" in note}


def assert_exact(sparse, model, inputs, dx="rows", steps=2):
    """Some steps, each against the oracle."""
    heard, num_examples = listen(sparse), len(inputs[0][0])
    policy, counts = sparse.settings["examples"], []
    for _ in range(steps):
        model.zero_grad()
        loss_of(run(sparse, inputs)).backward()
        ours = {name: to_dense(p.grad) for name, p in model.named_parameters()}
        kept, factors = heard["kept"][-1], None
        assert torch.equal(kept, kept.unique())
        assert sparse.examples == (len(kept), num_examples)
        counts.append(len(kept))
        if getattr(policy, "unbiased", False):
            sizes = sizes_of_examples(gradients_at(run(model, inputs), loss_of, num_examples))
            factors = 1 / chances_of(sizes, len(kept), policy.floor)
        told = sparse.rows, dx, heard["scales"], factors, with_all_examples(sparse)
        oracle = kept_gradients(model, lambda m: run(m, inputs), loss_of, kept, num_examples, *told)
        # Factors are float32.
        error = 1e-6 if factors is not None or heard["scales"] else 1e-12
        for name, theirs in oracle.items():
            tolerance = {"rtol": 0, "atol": error * max(1.0, 0.0 if theirs is None else float(theirs.abs().max()))}
            assert_close(ours[name], theirs, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    return counts


def refused(kind, name):
    """Whether unbiased examples are asked for of a model with an output that has no entry for each of them."""
    return kind is Heads and EXAMPLES[name] == EXAMPLES["sampled-unbiased"]


def allowed(kind, options):
    """No density for the only weight, which gives the outputs; no ``1/p`` where a gradient would pass it twice."""
    rows = options.get("rows")
    return not (kind is Single and getattr(rows, "density", None)) and not (
        kind is Twice and getattr(rows, "unbiased", False)
    )


def is_exact(kind, examples, options, told):
    model = make(kind)
    (x,), kwargs = inputs = batch_for(model)
    sparse = rwfx.transform(
        model, examples=examples, seed=1, example_inputs={"x": x, **kwargs} if told else None, **options
    )
    assert_exact(sparse, model, inputs, options.get("dx", "rows"))


PAIRS = [(kind, name) for kind in ZOO for name in EXAMPLES]
every_pair = pytest.mark.parametrize(("kind", "name"), PAIRS, ids=[f"{kind.__name__}-{name}" for kind, name in PAIRS])


@every_pair
def test_gradients_are_those_of_the_dense_model_in_which_dropped_examples_are_zero(kind, name):
    """Every model with every policy of examples and of rows; these with one another somewhere."""
    if refused(kind, name):
        pytest.skip("refused, as another test says")
    first = ZOO.index(kind) + [*EXAMPLES].index(name)
    rows = [*ROWS.values()]
    for number in (first, first + 5):
        options = rows[number % len(rows)]
        if allowed(kind, options):
            is_exact(kind, EXAMPLES[name], options, told=kind in (Sequence, Heads) or number % 2)


@pytest.mark.slow
@every_pair
def test_gradients_are_those_for_every_policy_of_rows(kind, name):
    if refused(kind, name):
        pytest.skip("refused, as another test says")
    for number, options in enumerate(ROWS.values()):
        if allowed(kind, options):
            is_exact(kind, EXAMPLES[name], options, told=kind in (Sequence, Heads) or number % 2)


# --- Which calls follow the examples ---------------------------------------------------------------------------------


class Between(nn.Module):
    """Two linear layers with something in between, and a head behind them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.positions = nn.Parameter(torch.randn(4, 1, 6))
        self.rule = between

    def forward(self, x):
        return self.head(self.second(self.rule(self, self.first(x))))


def test_the_trial_leaves_the_global_random_stream_alone():
    before = torch.get_rng_state()
    model = Modules()
    after = torch.get_rng_state()
    assert not torch.equal(before, after)
    rwfx.transform(model, examples=0.5, seed=1, example_inputs=torch.randn(8, 3, 4, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), after)


WITHIN = {
    "pointwise": lambda m, h: h.relu() * 2 + h,
    "slices": lambda m, h: h[:, 1:].sum(-1, keepdim=True) + h[..., :],
    "softmax": lambda m, h: h.softmax(-1) + h.log_softmax(1),
    "cat": lambda m, h: torch.cat([h[:, :3], h[:, 3:]], -1),
    "product": lambda m, h: F.linear(h, m.first.weight),
}
ACROSS = {
    "order": lambda m, h: h.flip(0),
    "every second": lambda m, h: torch.cat([h[::2], h[1::2]]),
    "total": lambda m, h: h - h.mean(),
    "mean over the batch": lambda m, h: h - h.mean(0),
    "cumulative": lambda m, h: h.cumsum(0),
    "similarity": lambda m, h: F.linear(h, h) @ h,
    "pairs": lambda m, h: (h[:, None] + h[None]).mean(1),
    "pairs of known": lambda m, h: (h[:, None] + h).mean(1),
    "softmax over the batch": lambda m, h: h.softmax(0),
}


def following(sparse):
    return {name for name in ("first.weight", "second.weight", "head.weight")} - with_all_examples(sparse)


@pytest.mark.parametrize("told", [False, True], ids=["known", "tried"])
@pytest.mark.parametrize("between", WITHIN.values(), ids=WITHIN)
def test_calls_with_operations_within_examples_between_them_follow_the_examples(between, told):
    model = Between(between).double()
    inputs = (torch.randn(12, 6, dtype=torch.float64),), {}
    sparse = rwfx.transform(model, examples=0.3, example_inputs=inputs[0] if told else None)
    assert following(sparse) == {"first.weight", "second.weight", "head.weight"}
    assert_exact(sparse, model, inputs)


@pytest.mark.parametrize("told", [False, True], ids=["known", "tried"])
@pytest.mark.parametrize("between", ACROSS.values(), ids=ACROSS)
def test_calls_before_an_operation_across_examples_compute_with_all_of_them(between, told):
    model = Between(between).double()
    inputs = (torch.randn(12, 6, dtype=torch.float64),), {}
    options = {"examples": 0.3, "example_inputs": inputs[0] if told else None}
    if not told:  # what comes after it is not known to hold the examples, and all would be left
        with pytest.raises(ValueError, match=r"first\.weight computes with all examples: only example_inputs"):
            rwfx.transform(model, **options)
        return
    sparse = rwfx.transform(model, **options)
    assert following(sparse) == {"second.weight", "head.weight"}
    assert_exact(sparse, model, inputs)


def test_a_constant_that_puts_a_dimension_before_the_examples_is_noticed():
    model = Between(lambda m, h: h + m.positions).double()
    with pytest.raises(ValueError, match="examples= finds no linear call"):
        rwfx.transform(model, examples=0.5)


def test_an_output_without_examples_does_not_keep_a_call_from_following():
    class Outputs(Between):
        def forward(self, x):
            y = super().forward(x)
            return y, x.shape[0], y.detach(), y.mean()

    model = Outputs(lambda m, h: h.relu()).double()
    sparse = rwfx.transform(model, examples=0.5)
    assert following(sparse) == {"first.weight", "second.weight", "head.weight"}
    y, number, detached, mean = sparse(torch.randn(8, 6, dtype=torch.float64))
    assert number == 8
    assert [t.requires_grad for t in (y, detached, mean)] == [True, False, True]
