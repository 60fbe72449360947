"""Models of transformers and timm, tiny, captured and trained as they come."""

import copy
import pickle

import numpy as np
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


def wav2vec2(library):
    config = library.Wav2Vec2Config(
        **{**TINY, "vocab_size": 32},
        conv_dim=(32, 32),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    return library.Wav2Vec2ForSequenceClassification(config), {"input_values": torch.randn(2, 2000)}


def longformer(library):
    config = library.LongformerConfig(**TINY, attention_window=4, max_position_embeddings=64)
    return library.LongformerForSequenceClassification(config), TEXT


def detr(library):
    backbone = library.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in {"layers": 1, "ffn_dim": 40}.items()}
    config = library.DetrConfig(backbone_config=backbone, d_model=32, num_queries=7, num_labels=5, **sizes)
    return library.DetrForObjectDetection(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def detector(name):
    """One of torchvision's, for small images."""

    def make(library):
        sizes = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 128}
        model = library.models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **sizes)
        images = [torch.rand(3, 96, 120).double(), torch.rand(3, 100, 96).double()]
        boxes = torch.tensor([[10.0, 10, 60, 70], [20, 30, 80, 90]]).double()
        masks = [torch.randint(0, 2, (2, *image.shape[1:]), dtype=torch.uint8) for image in images]
        return model, (images, [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": mask} for mask in masks])

    return make


NO_GRAPH = {
    "wav2vec2": ("transformers", wav2vec2, "apply_spec_augment=False"),
    "longformer": ("transformers", longformer, "modeling_longformer.py"),
    "detr": ("transformers", detr, "modeling_detr.py"),
    **{
        name: ("torchvision", detector(name), "for target in targets")
        for name in (
            *("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"),
            *("fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"),
        )
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NO_GRAPH)
def test_a_model_that_no_graph_holds_has_its_own_losses_and_the_gradients_of_the_masked_one(name):
    package, make, why = NO_GRAPH[name]
    library = pytest.importorskip(package)
    torch.manual_seed(0)
    model, batch = make(library)
    model = model.double().train()
    if isinstance(batch, dict):
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    options = {"num_paths": 20, "break_even": False, "seed": 1, "dx": "rows", "example_inputs": batch}
    sparse, masked = (rwfx.transform(model, mode=mode, **options) for mode in ("sparse", "masked"))
    assert sparse.report.route == "substitution"
    assert why in sparse.notes[-1]
    found = []
    for module in (model, sparse, masked):
        model.zero_grad()
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002  what masks for augmentation are drawn from
        buffers = copy.deepcopy(dict(model.named_buffers()))
        given = module(**batch) if isinstance(batch, dict) else module(*batch)
        outputs = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        sum(x.square().sum() for x in outputs).backward()
        for buffer, before in zip(model.buffers(), buffers.values(), strict=True):
            buffer.copy_(before)
        found.append((outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert_close(found[1][0], found[0][0], rtol=0, atol=0)
    assert_close(sparse.rows, masked.rows)
    assert found[1][1].keys() == found[2][1].keys()
    largest = max(float(grad.abs().max()) for grad in found[2][1].values())
    for name, grad in found[2][1].items():
        assert_close(found[1][1][name], grad, rtol=1e-8, atol=1e-12 * largest)
    weights = [line for line in sparse.report.lines if line.calls]
    assert sum(not line.dense_because for line in weights) >= 0.9 * len(weights)


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
