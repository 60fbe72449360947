"""Models of transformers and timm, tiny, captured and trained as they come."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

import rwfx

IDS = torch.randint(5, 90, (2, 9))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
TINY = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


GPT2_PARTS = "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"


def gpt2(library):
    config = library.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False)
    config.bos_token_id = config.eos_token_id = 0
    return library.GPT2LMHeadModel(config), {**TEXT, "labels": IDS}


def bert(library):
    return library.BertForSequenceClassification(library.BertConfig(**TINY)), {**TEXT, "labels": torch.tensor([0, 1])}


def llama(library):
    config = library.LlamaConfig(**TINY, num_key_value_heads=2, use_cache=False)
    return library.LlamaForCausalLM(config), {**TEXT, "labels": IDS}


@pytest.mark.parametrize("make", [gpt2, bert, llama], ids=["gpt2", "bert", "llama"])
def test_a_language_model_is_transformed_with_the_outputs_gradients_and_class_of_its_own(make):
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, batch = make(library)
    model.train()
    twin = copy.deepcopy(model)
    sparse = rwfx.transform(model, rows=rwfx.Uniform({"*": 1.0}), break_even=False, example_inputs=batch)
    assert list(sparse.state_dict()) == list(model.state_dict())
    longer = {name: x.repeat(2, 2) if x.dim() == 2 else x.repeat(2) for name, x in batch.items()}
    for given in (batch, longer):
        outputs = []
        for module in (twin, sparse):
            torch.manual_seed(3)
            module.zero_grad()
            outputs.append(module(**given))
            outputs[-1].loss.backward()
        assert type(outputs[1]) is type(outputs[0])
        assert outputs[1].keys() == outputs[0].keys()
        assert_close(outputs[1].logits, outputs[0].logits, rtol=0, atol=0)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):  # every row is kept
            assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
    restored = pickle.loads(pickle.dumps(sparse)).eval()
    assert_close(restored(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=0)


def test_gpt2_is_row_sparse_in_every_block_with_the_gradients_of_masks():
    library = pytest.importorskip("transformers")
    model, batch = gpt2(library)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train().double()
    ours, masked = (
        rwfx.transform(copy.deepcopy(model), 6, mode=mode, dx="rows", seed=3, break_even=False, example_inputs=batch)
        for mode in ("sparse", "masked")
    )
    blocks = {f"transformer.h.{k}.{part}.weight" for k in range(2) for part in GPT2_PARTS}
    assert set(ours.rows) == blocks
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for module in (compiled, masked):
            module.zero_grad()
            module(**batch).loss.backward()
        assert_close(ours.rows, masked.rows)
        assert all(0 < len(rows) < 64 for rows in ours.rows.values())
        for (name, p), q in zip(ours.named_parameters(), masked.parameters(), strict=True):
            assert_close(p.grad, q.grad, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    for name, rows in ours.rows.items():
        visited = ours.get_parameter(name).grad.count_nonzero(0)
        assert visited.nonzero().squeeze(1).tolist() == rows.tolist()


def test_a_language_model_compiles_as_one_graph():
    library = pytest.importorskip("transformers")
    model, batch = bert(library)
    sparse = rwfx.transform(model, num_paths=5, grad="rows", break_even=False, example_inputs=batch)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    compiled(**batch).loss.backward()
    assert all(
        p.grad is None or p.grad.isfinite().all() for p in model.parameters() if p.grad is None or not p.grad.is_sparse
    )
    assert sparse.rows["classifier.weight"].numel()


def test_random_branches_in_training_name_the_configuration():
    library = pytest.importorskip("transformers")
    config = library.Wav2Vec2Config(
        **{**TINY, "vocab_size": 32},
        conv_dim=(32, 32),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    model = library.Wav2Vec2ForSequenceClassification(config).train()
    with pytest.raises(ValueError, match="apply_spec_augment=False"):
        rwfx.transform(model, example_inputs={"input_values": torch.randn(2, 2000)})


@pytest.mark.slow
def test_a_vision_model_with_branches_on_shapes_is_captured():
    library = pytest.importorskip("timm")
    model = library.create_model("tf_mobilenetv3_small_minimal_100", num_classes=7)  # pads by the shape of its input
    x = torch.randn(2, 3, 64, 64)
    sparse = rwfx.transform(model, num_paths=5, break_even=False, example_inputs=x)
    assert "captured by torch.export" in str(sparse.report)
    assert "the graph holds for any batch" in str(sparse.report)
    with pytest.raises(AssertionError, match=r"x\.shape\[2\] == 64"):
        sparse(torch.randn(2, 3, 96, 96))
    for train in (True, False):
        y = torch.randn(3, 3, 64, 64)
        outputs = []
        for module in (model.train(train), sparse.train(train)):
            torch.manual_seed(0)
            buffers = copy.deepcopy(dict(model.named_buffers()))
            outputs.append(module(y))
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        assert_close(*outputs, rtol=0, atol=0)
