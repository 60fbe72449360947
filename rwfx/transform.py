"""The front door: a model in, the same model with a row-sparse backward pass out.

capture -> normalize -> weight graph -> follow_examples -> sample_rows -> sparse_backward -> sparse_examples ->
read_columns -> verify
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import GraphModule

from rwfx import native
from rwfx.break_even import CostModel
from rwfx.capture import Capture, ExampleInputs, capture, same_outputs, shared_copy, tape
from rwfx.capture.host import scratch_copy, set_mode
from rwfx.capture.route import first_lines
from rwfx.choose import densities_of, left_out, lines_of, weigh, with_expected, with_followers, with_sources
from rwfx.draws import sampler_of
from rwfx.example_sampler import ExampleSampler
from rwfx.examples import ExamplePolicy, expected_fraction
from rwfx.options import Options, checked_options, common_seed
from rwfx.passes.follow_examples import MARK, follow_examples
from rwfx.passes.normalize import normalize
from rwfx.passes.read_columns import read_columns
from rwfx.passes.sample_rows import SAMPLER, RowNodes, sample_rows
from rwfx.passes.sparse_backward import MASKED, SPARSE, sparse_backward
from rwfx.passes.sparse_examples import EXAMPLES, sparse_examples
from rwfx.passes.verify import verify
from rwfx.policies import Densities, Policy
from rwfx.row_calls import RowSparse
from rwfx.sampler import RowSampler
from rwfx.sparse_module import SparseModule
from rwfx.substituted import SubstitutedModule, read_elsewhere, substitute
from rwfx.transformed import Transformed
from rwfx.two_graphs import check_names
from rwfx.weight_graph import graph_of, shapes_of
from rwfx.where import Where


def transform(
    model: nn.Module,
    num_paths: int | None = None,
    *,
    density: Densities | None = None,
    rows: Policy | None = None,
    examples: float | int | ExamplePolicy | None = None,
    include: Where | Sequence[Where] = "all",
    exclude: Where | Sequence[Where] = (),
    mode: Literal["sparse", "masked"] = "sparse",
    dx: Literal["rows", "full"] | None = None,
    grad: Literal["dense", "rows"] = "dense",
    seed: int | None = None,
    resample_every: int = 1,
    break_even: bool | CostModel = True,
    example_inputs: Any = None,
) -> SparseModule | SubstitutedModule:
    """Give ``model`` a backward pass that computes, every step, only the rows that a policy chooses: by random walks.

    The result is a ``torch.fx.GraphModule`` with the model's call signature; or, where no graph holds the forward pass
    (data-dependent branches, detectors), a module of the model's own class whose linear layers and convolutions are
    row-sparse (``rwfx.substituted``). It shares the model's parameters and
    buffers, has the same ``state_dict`` keys, and its forward pass is the model's own, bit for bit. At every
    training forward it draws a row set ``R`` for each weight of a linear call or a convolution, and with ``g = dL/dy``
    the backward of ``y = x @ W.T + b`` is

        dx = g[..., R] @ W[R]      dW[R] = g[..., R].T @ x      db[R] = g[..., R].sum(0)      zero elsewhere.

    In eval mode it is the dense model; without gradients nothing is drawn. ``model`` itself is left as it was, and may
    be transformed again: the two results share its parameters and buffers, and each draws rows of its own.

    Args:
        model: an ``nn.Module`` that ``torch.fx`` can trace symbolically or, with ``example_inputs``, any. A graph of
            ``torch.export`` keeps the dtype and the device that the model has now.
        num_paths, density: short for ``rows=rwfx.RandomWalk(num_paths, density)``: 50 walks a step by default. With a
            density, above 0 and at most 1, every row set has that share of its weight's rows, rounded up: no shape
            changes from step to step and nothing is read back from a GPU, as CUDA graphs need
            (``torch.compile(mode="reduce-overhead")``; but by ``Magnitude``, by ``AdaptiveExamples``, and by
            convolutions in groups). A schedule or a mapping by names will do as well; see ``rwfx.policies``.
        rows: how the rows of a step are chosen: ``rwfx.RandomWalk``, ``AdaptiveWalk``, ``LearnedWalk``, ``TopK``,
            ``Uniform`` or ``Magnitude``.
        examples: how many examples of a batch take part in the backward pass: a fraction or a number of those with the
            largest gradient at the output, or an example policy (``rwfx.TopExamples``, ``SampledExamples``,
            ``AdaptiveExamples``; see ``rwfx.examples``). With ``rows``, ``density`` or ``num_paths`` a call then
            computes with the kept rows of the kept examples; without any of them with all rows.
        include, exclude: the weights that may be row-sparse, and those of them that stay dense: a name of a weight or
            module, where ``*`` and ``?`` match any letters (``"encoder.*"``), a role (``"head"``, ``"mlp"``,
            ``"attention"``, ``"all"``; see ``rwfx.roles``), a class of modules, a function of a weight's name and its
            module, or several. The head of a language model, with a row for every word, is row-sparse only where it is
            asked for by more than ``"all"``.
        mode: ``"sparse"``, or ``"masked"``: dense products, masked afterwards, to compare with.
        dx: ``"rows"`` sums the input's gradient over the row set, ``"full"`` over every row; then the gradients
            are those of plain backpropagation, masked. By default ``"rows"``, and ``"full"`` with
            ``mode="masked"``, which together are the method of the original research code.
        grad: ``"dense"``: gradients with zeros outside the rows, for any optimizer. ``"rows"``: hybrid
            ``torch.sparse_coo`` gradients that hold the rows alone, for ``rwfx.optim``.
        seed: of the policy's private random stream, which no other draw disturbs and which disturbs no other; equal
            seeds draw equal rows on every rank. By default one number of ``torch.manual_seed``'s stream, that of
            rank 0 where ``torch.distributed`` is initialized: then every rank has to call ``transform``.
        resample_every: draw new row sets every so many training forwards.
        break_even: leave a weight dense where a row-sparse backward is predicted to take longer, by
            ``rwfx.CostModel()`` or by the one given (``CostModel.measured(batch_size)`` measures this machine). False
            weighs nothing. On other devices than a CPU nothing is predicted unless a model is given.
        example_inputs: a tuple, a dict of keyword arguments, a single value for ``model.forward``, or a batch of a data
            loader, of which inputs alone are taken. Needed where the model reshapes or branches by the shape of its
            inputs, or to say which optional arguments are used; the result is then also checked against the model
            on them.

    Raises:
        TypeError, ValueError: an argument is not allowed, the model cannot be captured, has no linear weight
            or convolution, or no weight is left to make sparse. Nothing has been changed then.
    """
    options = checked_options(
        num_paths, density, rows, examples, include, exclude, mode, dx, grad, seed, resample_every, break_even
    )
    _check_new(model)
    captured = capture(model, example_inputs)
    check_names(captured.host, SparseModule, SAMPLER, EXAMPLES)
    return transform_captured(model, captured, options)


def _check_new(model: Any) -> None:
    """Refuse what is transformed already, as a whole or in a part."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, (Transformed, RowSparse)):
            what = f"module {path!r} of the model" if path else "model"
            raise ValueError(f"{what} is already transformed. Transform the model it was made from.")


def transform_captured(model: nn.Module, captured: Capture, options: Options) -> SparseModule | SubstitutedModule:
    """The same of a model that has been captured."""
    policy, of_examples, mode, dx, grad = options.policy, options.examples, options.mode, options.dx, options.grad
    substituted = captured.route == tape.NAME
    if substituted and of_examples is not None:
        raise ValueError(
            "examples= needs a graph of the forward pass, to follow the examples in it, and none holds that of "
            f"{type(model).__name__} ({captured.notes[-1]}). Leave examples out of the arguments."
        )
    gm = normalize(GraphModule(captured.host, captured.train))
    shapes = shapes_of(gm, captured)
    # Here and below: what torch.set_default_device says is of the model's own tensors.
    with torch.device("cpu"):
        graph = graph_of(gm, captured, shapes)
        densities = densities_of(policy.density, graph, captured.host, options.include)
        unasked = left_out(gm, graph, captured, options.include, options.exclude, policy.density)
        if substituted:
            unasked = read_elsewhere(gm, graph, captured.host) | unasked
        lines = lines_of(gm, graph, captured, unasked, grad, policy, densities, of_examples is not None, shapes)
    kept = [line.weight for line in lines if not line.dense_because]
    gm, example_notes = _followed(gm, captured, of_examples)
    lines = with_followers(lines, gm)
    if not kept and of_examples is None:
        reasons = "; ".join(f"{line.weight}: {line.dense_because}" for line in lines)
        raise ValueError(f"no weight is left to make sparse ({reasons}).")

    seed = common_seed() if options.seed is None else options.seed
    device = captured.host.get_parameter(graph.parameter(lines[0].weight)).device
    # Beside weights on the meta device, which have no data to draw by, what the report reads is still there.
    home = torch.device("cpu") if device.type == "meta" else device
    if device.type == "cpu":
        native.ready()

    def rewritten(kept: Sequence[str]) -> tuple[GraphModule, dict[str, RowNodes], RowSampler]:
        with torch.device("cpu"):
            sampler = sampler_of(policy, graph, kept, seed, densities, options.resample_every).to(home)
        if substituted:  # the calls are made row-sparse in the model's own modules
            return gm, {}, sampler
        sampled, nodes = sample_rows(gm, sampler)
        sparse = sparse_backward(sampled, nodes, SPARSE if mode == "sparse" else MASKED, dx=dx, grad=grad)
        if of_examples is not None:
            with torch.device("cpu"):
                of_step = ExampleSampler(of_examples, seed).to(home)
            sparse = sparse_examples(sparse, of_step, sampler)
        return verify(read_columns(sparse), model, nodes), nodes, sampler

    sparse_gm, nodes, sampler = rewritten(kept)
    with torch.device("cpu"):
        lines = with_expected(with_sources(lines, sparse_gm, nodes), gm, graph, sampler)
    costs = options.costs_on(device.type)
    if costs is not None:
        share = 1.0 if of_examples is None else expected_fraction(of_examples)
        with torch.device("cpu"):
            lines = weigh(gm, sampler, lines, graph, shapes, costs, grad, dx, share)
        paying = [line.weight for line in lines if not line.dense_because]
        if paying != kept:
            sparse_gm, nodes, sampler = rewritten(paying)
            lines = with_sources(lines, sparse_gm, nodes)
        if not paying and of_examples is None:
            warnings.warn(
                f"no weight of {type(model).__name__} is large enough for a row-sparse backward to pay, so the "
                "transformed model trains densely. Its report says what was predicted; break_even=False makes every "
                "weight row-sparse all the same.",
                stacklevel=3,
            )

    settings = {
        "rows": policy,
        "examples": of_examples,
        "mode": mode,
        "dx": dx,
        "grad": grad,
        "seed": seed,
        "resample_every": options.resample_every,
        "route": captured.route,
    }
    about = {
        "lines": lines,
        "settings": settings,
        "notes": (*graph.notes, *captured.notes, *sampler.notes, *example_notes),
    }
    if substituted:
        result = substitute(model, sampler, graph, (mode, dx, grad), **about)
        _check_substituted(model, result, captured.inputs)
        return result
    sparse_model = SparseModule.over(captured.host, sparse_gm.graph, captured.eval, **about)
    sparse_model._modules[SAMPLER] = sampler
    if of_examples is not None:
        sparse_model._modules[EXAMPLES] = sparse_gm.get_submodule(EXAMPLES)
    _check_replay(model, sparse_model, captured.inputs)
    return sparse_model


def _check_replay(model: nn.Module, sparse_model: SparseModule, inputs: ExampleInputs | None) -> None:
    if inputs is None or any(p.is_meta for p in model.parameters()):
        return
    theirs, mode = shared_copy(model), sparse_model.training
    flags = {path: module.training for path, module in sparse_model.named_modules()}
    same = same_outputs(theirs, sparse_model, inputs)
    for module in (theirs, sparse_model):
        module.train(not mode)
    same = same_outputs(theirs, sparse_model, inputs) and same
    for path, module in sparse_model.named_modules():
        module.training = flags[path]
    if not same:
        raise ValueError(
            f"the captured graph of {type(model).__name__} gives other outputs than the model on example_inputs, so "
            "its forward pass does something that tracing froze (a branch or a number computed in Python)."
        )


def _check_substituted(model: nn.Module, result: SubstitutedModule, inputs: ExampleInputs | None) -> None:
    """The same, on copies: their forward pass may assign what it likes."""
    if inputs is None or any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return
    for mode in (True, False):
        theirs, ours, again, and_again = (scratch_copy(of) for of in (model, result, model, model))
        for module in (theirs, ours, again, and_again):
            set_mode(module, mode)
        try:
            same = same_outputs(theirs, ours, inputs)
        except Exception as error:
            raise ValueError(f"{_not_itself(model)}: {first_lines(error)}") from error
        if not same and same_outputs(again, and_again, inputs):  # else they differ from call to call anyway
            raise ValueError(f"{_not_itself(model)}: it gives other outputs in {'train' if mode else 'eval'} mode.")


def _not_itself(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} does not run on example_inputs as it did before its linear layers and convolutions "
        "became row-sparse, which gives it and them classes derived from their own (a forward pass must not ask for "
        "`type(module) is nn.Linear`: ask for isinstance)"
    )


def _followed(
    gm: GraphModule, captured: Capture, of_examples: ExamplePolicy | None
) -> tuple[GraphModule, tuple[str, ...]]:
    """``gm`` with the calls marked that follow the examples, and a note for each other."""
    if of_examples is None:
        return gm, ()
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    is_meta = any(p.is_meta for p in gm.parameters())  # a trial needs numbers
    inputs = None if captured.inputs is None or is_meta else captured.inputs.in_order(placeholders)
    marked, notes = follow_examples(gm, inputs, of_examples.unit)
    if not any(node.meta.get(MARK) for node in marked.graph.nodes):
        raise ValueError(
            f"examples= finds no linear call that it could confine to the kept examples ({'; '.join(notes)})."
        )
    return marked, notes
