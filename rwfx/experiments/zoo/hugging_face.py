"""Architectures of ``transformers``, each with a configuration of two small layers: nothing is downloaded.

In: a name of ``MODELS``. Out: the model with random weights, in train mode, and the keyword arguments of a call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rwfx.experiments.extras import require

Inputs = dict[str, Tensor]

BATCH, LENGTH, WORDS = 2, 12, 99


@dataclass(frozen=True)
class Architecture:
    """How to make one."""

    name: str
    head: str  # with the name, that of the class
    config: dict[str, Any]
    inputs: Callable[[], Inputs]


def names() -> tuple[str, ...]:
    """The names of all architectures."""
    return tuple(MODELS)


def build(name: str) -> tuple[nn.Module, Inputs]:
    """Make the architecture ``name``, and inputs for it, by torch's random stream."""
    made = MODELS[name]
    require("transformers.utils.logging").set_verbosity_error()  # what it says of sizes and of kernels that are missing
    kind = getattr(require("transformers"), made.name + made.head)
    return kind(kind.config_class(**made.config)).train(), made.inputs()


def _text() -> Inputs:
    ids = torch.randint(5, WORDS, (BATCH, LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _ids() -> Inputs:
    return {"input_ids": torch.randint(5, WORDS, (BATCH, LENGTH))}


def _translation() -> Inputs:
    return {**_text(), "decoder_input_ids": torch.randint(5, WORDS, (BATCH, LENGTH - 5))}


def _image() -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32)}


def _large_image() -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, 64, 64)}


def _image_and_text() -> Inputs:
    return {**_text(), **_image()}


def _sound() -> Inputs:
    return {"input_values": torch.randn(BATCH, 2000)}


def _spectrogram() -> Inputs:
    spoken = torch.randint(5, WORDS, (BATCH, LENGTH))
    return {"input_features": torch.randn(BATCH, 8, 40), "decoder_input_ids": spoken}


# The same sizes under the names that configurations have for them.
_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_ENCODER = {"vocab_size": WORDS, **_LAYERS, "max_position_embeddings": 64}
_DECODER = {**_ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {"vocab_size": WORDS, **_GPT, "use_cache": False}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_BOTH = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_BOTH = {"d_model": 32, **_BOTH, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 64}
_BOTH = {"vocab_size": WORDS, **_BOTH, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
_BOTH = {**_BOTH, "decoder_start_token_id": 1, "forced_eos_token_id": None}
_VISION = {**_LAYERS, "image_size": 32, "patch_size": 8}
_SOUND = {
    **_LAYERS,
    "vocab_size": 32,
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
_CLASSES = "ForSequenceClassification"
_NEXT = "ForCausalLM"
_IMAGES = "ForImageClassification"
_GENERATION = "ForConditionalGeneration"

MODELS: dict[str, Architecture] = {
    # Encoders of text
    "bert": Architecture("Bert", _CLASSES, _ENCODER, _text),
    "roberta": Architecture("Roberta", _CLASSES, _ENCODER, _text),
    "distilbert": Architecture(
        "DistilBert",
        _CLASSES,
        {"vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 64},
        _text,
    ),
    "albert": Architecture("Albert", _CLASSES, {**_ENCODER, "embedding_size": 16}, _text),
    "electra": Architecture("Electra", _CLASSES, {**_ENCODER, "embedding_size": 16}, _text),
    "deberta": Architecture(
        "Deberta", _CLASSES, {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, _text
    ),
    "deberta_v2": Architecture(
        "DebertaV2", _CLASSES, {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, _text
    ),
    "mpnet": Architecture("MPNet", _CLASSES, _ENCODER, _text),
    "xlnet": Architecture(
        "XLNet", _CLASSES, {"vocab_size": WORDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40}, _text
    ),
    "longformer": Architecture("Longformer", _CLASSES, {**_ENCODER, "attention_window": 4}, _text),
    "big_bird": Architecture("BigBird", _CLASSES, _ENCODER, _text),
    "funnel": Architecture(
        "Funnel",
        _CLASSES,
        {"vocab_size": WORDS, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 40},
        _text,
    ),
    "modernbert": Architecture(
        "ModernBert", _CLASSES, {**_ENCODER, "pad_token_id": 0, "global_attn_every_n_layers": 2}, _text
    ),
    "fnet": Architecture("FNet", _CLASSES, _ENCODER, _ids),
    "squeezebert": Architecture("SqueezeBert", _CLASSES, {**_ENCODER, "embedding_size": 32}, _text),
    # Language models
    "gpt2": Architecture("GPT2", "LMHeadModel", _GPT, _text),
    "gpt_neo": Architecture(
        "GPTNeo",
        _NEXT,
        {**_DECODER, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        _text,
    ),
    "gptj": Architecture("GPTJ", _NEXT, {**_GPT, "rotary_dim": 4}, _text),
    "gpt_neox": Architecture("GPTNeoX", _NEXT, _DECODER, _text),
    "opt": Architecture("OPT", _NEXT, {**_DECODER, "ffn_dim": 40, "word_embed_proj_dim": 32}, _text),
    "bloom": Architecture("Bloom", _NEXT, {**_DECODER, "n_layer": 2, "n_head": 4}, _text),
    "llama": Architecture("Llama", _NEXT, _GROUPED, _text),
    "mistral": Architecture("Mistral", _NEXT, _GROUPED, _text),
    "mixtral": Architecture("Mixtral", _NEXT, {**_GROUPED, "num_local_experts": 4}, _text),
    "qwen2": Architecture("Qwen2", _NEXT, _GROUPED, _text),
    "qwen3": Architecture("Qwen3", _NEXT, {**_GROUPED, "head_dim": 8}, _text),
    "qwen3_moe": Architecture("Qwen3Moe", _NEXT, {**_EXPERTS, "head_dim": 8, "num_experts": 4}, _text),
    "gemma": Architecture("Gemma", _NEXT, {**_GROUPED, "head_dim": 8}, _text),
    "gemma2": Architecture("Gemma2", _NEXT, {**_GROUPED, "head_dim": 8, "sliding_window": 8}, _text),
    "gemma3": Architecture("Gemma3", _NEXT, {**_GROUPED, "head_dim": 8, "sliding_window": 8}, _text),
    "phi": Architecture("Phi", _NEXT, _DECODER, _text),
    "phi3": Architecture("Phi3", _NEXT, _GROUPED, _text),
    "falcon": Architecture("Falcon", _NEXT, _DECODER, _text),
    "stablelm": Architecture("StableLm", _NEXT, _GROUPED, _text),
    "olmo": Architecture("Olmo", _NEXT, _GROUPED, _text),
    "olmo2": Architecture("Olmo2", _NEXT, _GROUPED, _text),
    "cohere": Architecture("Cohere", _NEXT, _GROUPED, _text),
    "granite": Architecture("Granite", _NEXT, _GROUPED, _text),
    "starcoder2": Architecture("Starcoder2", _NEXT, _GROUPED, _text),
    "mpt": Architecture(
        "Mpt",
        _NEXT,
        {"vocab_size": WORDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "use_cache": False},
        _text,
    ),
    "codegen": Architecture("CodeGen", _NEXT, {**_GPT, "rotary_dim": 4}, _text),
    "persimmon": Architecture("Persimmon", _NEXT, _DECODER, _text),
    "deepseek_v3": Architecture(
        "DeepseekV3",
        _NEXT,
        {
            **_EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        _text,
    ),
    "mamba": Architecture("Mamba", _NEXT, {**_DECODER, "state_size": 8, "time_step_rank": 4}, _ids),
    "mamba2": Architecture(
        "Mamba2", _NEXT, {**_DECODER, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2}, _ids
    ),
    "rwkv": Architecture("Rwkv", _NEXT, {**_DECODER, "attention_hidden_size": 32, "context_length": 64}, _ids),
    # Both
    "t5": Architecture(
        "T5",
        _GENERATION,
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
            "use_cache": False,
        },
        _translation,
    ),
    "bart": Architecture("Bart", _GENERATION, _BOTH, _translation),
    "pegasus": Architecture("Pegasus", _GENERATION, _BOTH, _translation),
    "marian": Architecture("Marian", "MTModel", _BOTH, _translation),
    "m2m_100": Architecture(
        "M2M100", _GENERATION, _BOTH | {"encoder_layerdrop": 0, "decoder_layerdrop": 0}, _translation
    ),
    # Images
    "vit": Architecture("ViT", _IMAGES, _VISION, _image),
    "deit": Architecture("DeiT", _IMAGES, _VISION, _image),
    "beit": Architecture("Beit", _IMAGES, _VISION, _image),
    "swin": Architecture(
        "Swin",
        _IMAGES,
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        _image,
    ),
    "convnext": Architecture(
        "ConvNext", _IMAGES, {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, _large_image
    ),
    "dinov2": Architecture("Dinov2", _IMAGES, _VISION, _image),
    "segformer": Architecture(
        "Segformer",
        _IMAGES,
        {
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "num_attention_heads": [1, 2],
            "sr_ratios": [4, 2],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
        },
        _large_image,
    ),
    "mobilevit": Architecture(
        "MobileViT",
        _IMAGES,
        {
            "image_size": 64,
            "patch_size": 2,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": 4,
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
        },
        _large_image,
    ),
    "resnet": Architecture(
        "ResNet", _IMAGES, {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}, _large_image
    ),
    # Several kinds
    "clip": Architecture(
        "CLIP",
        "Model",
        {"text_config": _ENCODER | {"eos_token_id": 2}, "vision_config": _VISION, "projection_dim": 16},
        _image_and_text,
    ),
    "vilt": Architecture(
        "Vilt", "ForQuestionAnswering", {**_ENCODER, "image_size": 32, "patch_size": 8}, _image_and_text
    ),
    "detr": Architecture(
        "Detr",
        "ForObjectDetection",
        {
            **{name: value for name, value in _BOTH.items() if "token" not in name and name != "use_cache"},
            "num_queries": 6,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
        },
        _large_image,
    ),
    "whisper": Architecture(
        "Whisper",
        _GENERATION,
        {
            **_BOTH,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 64,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
            "apply_spec_augment": False,
        },
        _spectrogram,
    ),
    "wav2vec2": Architecture("Wav2Vec2", _CLASSES, _SOUND, _sound),
    "hubert": Architecture("Hubert", _CLASSES, _SOUND, _sound),
}
