"""Train a small Llama with the Hugging Face ``Trainer``, each backward pass confined to a part of the rows.

    pip install transformers accelerate
    python examples/hugging_face.py [--checkpointing] [--bf16]

About half a minute. Prints what was made row-sparse and the loss before and after. With ``--checkpointing`` activations
are computed again in the backward pass, with the rows of the step; with ``--bf16`` in mixed precision.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import rwfx

LENGTH = 32
"""Characters of a sequence."""


class Text(Dataset):
    """The characters of this file, in overlapping sequences."""

    def __init__(self) -> None:
        self.codes = torch.tensor([min(ord(character), 127) for character in Path(__file__).read_text()])

    def __len__(self) -> int:
        return len(self.codes) - LENGTH

    def __getitem__(self, start: int) -> dict[str, torch.Tensor]:
        ids = self.codes[start : start + LENGTH]
        return {"input_ids": ids, "labels": ids}


def main(steps: int = 120, checkpointing: bool = False, bf16: bool = False) -> None:
    """Train and compare."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if checkpointing:  # before it is transformed
        model.gradient_checkpointing_enable()
    text = Text()
    batch = torch.utils.data.default_collate([text[k] for k in range(4)])
    sparse_model = rwfx.transform(model, rows=rwfx.TopK(0.25), example_inputs=batch, break_even=False)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=5e-3,
            bf16=bf16,
            report_to="none",
            save_strategy="no",
            disable_tqdm=bool(os.environ.get("CI")),
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(sparse_model, arguments, train_dataset=text)
        before = trainer.evaluate(text)["eval_loss"]
        trainer.train()
        after = trainer.evaluate(text)["eval_loss"]
    print(sparse_model.report)
    print(f"loss before {before:.2f}, after {steps} steps {after:.2f}")
    assert after < 0.7 * before
    # The model it was made from has been trained: save it, or go on with it, as ever.
    model.eval()
    with torch.no_grad():
        assert model(**batch).loss < 0.7 * before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    main(**vars(parser.parse_args()))
