"""Other people's training loops around a transformed model."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import rwfx

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "program", "options"),
    [
        ("transformers", "hugging_face", []),
        ("transformers", "hugging_face", ["--checkpointing", "--bf16"]),
        ("lightning", "lightning_loop", []),
    ],
)
def test_the_example_of_a_library_runs_and_its_own_claims_hold(library, program, options, capsys, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.setattr("sys.argv", [program, *options])
    runpy.run_path(str(EXAMPLES / f"{program}.py"), run_name="__main__")
    assert "sparse" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulated_by_accelerate_the_gradients_are_those_of_a_plain_loop(precision):
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    halves = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(2)]

    def gradients(step, seed=5):
        sparse = rwfx.transform(model, rows=rwfx.Uniform({"*": 0.4}), seed=seed, break_even=False)
        step(sparse)
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    def plain(sparse):
        for x, y in halves:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = sparse(x)
            (F.cross_entropy(logits.float(), y) / 2).backward()

    def by_accelerate(sparse):
        accelerate.state.AcceleratorState._reset_state(True)  # what a process is started with stays for its lifetime
        accelerator = accelerate.Accelerator(mixed_precision=precision, gradient_accumulation_steps=2, cpu=True)
        prepared, optimizer = accelerator.prepare(sparse, torch.optim.SGD(model.parameters(), lr=0.0))
        for x, y in halves:
            with accelerator.accumulate(prepared):
                accelerator.backward(F.cross_entropy(prepared(x), y))
                optimizer.step()

    for one, other in zip(gradients(by_accelerate), gradients(plain), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("grad", ["dense", "rows"])
def test_activations_that_are_computed_again_inside_of_the_model_change_no_gradient(grad, reentrant):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    batch = {name: torch.arange(14).reshape(2, 7) for name in ("input_ids", "labels")}

    def gradients(*, again):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double().train()
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        sparse = rwfx.transform(model, 3, example_inputs=batch, grad=grad, seed=1, break_even=False)
        assert (sparse.report.route == "substitution") == again
        for _ in range(2):
            model.zero_grad()
            loss = sparse(**batch).loss
            rows = {name: of.clone() for name, of in sparse.rows.items()}
            loss.backward()
            assert_close(sparse.rows, rows)
        return {name: p.grad.to_dense() for name, p in model.named_parameters()}

    assert_close(gradients(again=True), gradients(again=False), rtol=0, atol=1e-12)
