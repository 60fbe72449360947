"""A model of each module of timm, the one with the fewest parameters, without weights.

In: a name of a module, a key of ``MODELS``. Out: its model, in train mode, and the positional arguments of a call.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rwfx.experiments.extras import require

CLASSES = 7
BATCH = 2


@dataclass(frozen=True)
class Model:
    """How to make the model of a module: the least side of an image that it takes of 96 or more, and options."""

    name: str
    side: int
    options: Mapping[str, Any] = field(default_factory=dict)


def names() -> tuple[str, ...]:
    """The names of all modules that have a model here."""
    return tuple(MODELS)


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Make the model of the module ``name``, and inputs for it, by torch's random stream."""
    made = MODELS[name]
    model = require("timm").create_model(made.name, pretrained=False, num_classes=CLASSES, **made.options)
    return model.train(), (torch.randn(BATCH, 3, made.side, made.side),)


# Of a transformer with hundreds of millions of numbers, two blocks.
MODELS: dict[str, Model] = {
    "beit": Model("beit_base_patch16_224", 224, {"depth": 2}),
    "byoanet": Model("halonet_h1", 256),
    "byobnet": Model("test_byobnet", 96),
    "cait": Model("cait_xxs24_224", 224),
    "coat": Model("coat_tiny", 224),
    "convit": Model("convit_tiny", 224),
    "convmixer": Model("convmixer_768_32", 96),
    "convnext": Model("test_convnext", 96),
    "cpubone": Model("cpubone_nano", 96),
    "crossvit": Model("crossvit_tiny_240", 96),
    "csatv2": Model("csatv2", 96),
    "cspnet": Model("cs3darknet_focus_s", 96),
    "cspnext": Model("cspnext_tiny", 96),
    "davit": Model("davit_tiny", 96),
    "deepseek_vit": Model("deepseek_vit_412m", 224, {"depth": 2}),
    "deit": Model("deit_tiny_patch16_224", 224),
    "densenet": Model("densenet121", 96),
    "dla": Model("dla46x_c", 96),
    "dpn": Model("dpn48b", 96),
    "edgenext": Model("edgenext_xx_small", 96),
    "efficientformer": Model("efficientformer_l1", 224),
    "efficientformer_v2": Model("efficientformerv2_s0", 224),
    "efficientnet": Model("test_efficientnet", 96),
    "efficientvim": Model("efficientvim_m1", 96),
    "efficientvit_mit": Model("efficientvit_b0", 96),
    "efficientvit_msra": Model("efficientvit_m0", 96),
    "eva": Model("vit_tiny_patch16_dinov3_qkvb", 96),
    "fasternet": Model("fasternet_t0", 96),
    "fastvit": Model("fastvit_t8", 96),
    "focalnet": Model("focalnet_tiny_srf", 96),
    "gcvit": Model("gcvit_xxtiny", 224),
    "gemma4_vit": Model("gemma4_vit_167m_enc", 96, {"depth": 2}),
    "ghostnet": Model("ghostnet_050", 96),
    "hardcorenas": Model("hardcorenas_b", 96),
    "hgnet": Model("hgnetv2_b0", 96),
    "hiera": Model("hiera_tiny_224", 224),
    "hieradet_sam2": Model("hieradet_small", 96),
    "hrnet": Model("hrnet_w18_small", 96),
    "iformer": Model("iformer_t", 96),
    "inception_next": Model("inception_next_atto", 96),
    "inception_resnet_v2": Model("inception_resnet_v2", 96),
    "inception_v3": Model("inception_v3", 96),
    "inception_v4": Model("inception_v4", 96),
    "lcnetv2": Model("lcnetv2_small", 96),
    "levit": Model("levit_128s", 224),
    "lowformer": Model("lowformer_b0", 96),
    "mambaout": Model("test_mambaout", 96),
    "maxxvit": Model("test_coatnet", 160),
    "metaformer": Model("poolformerv2_s12", 96),
    "mlp_mixer": Model("gmlp_ti16_224", 224),
    "mobilenetv3": Model("lcnet_035", 96),
    "mobilenetv5": Model("mobilenetv5_base", 96),
    "mobilevit": Model("mobilevit_xxs", 96),
    "mvitv2": Model("mvitv2_tiny", 96),
    "naflexvit": Model("naflexvit_base_patch16_parfac_gap", 96, {"depth": 2}),
    "nasnet": Model("nasnetalarge", 96),
    "nest": Model("nest_tiny", 224),
    "nextvit": Model("nextvit_small", 96),
    "nfnet": Model("test_nfnet", 96),
    "pit": Model("pit_ti_224", 224),
    "pnasnet": Model("pnasnet5large", 96),
    "pvt_v2": Model("pvt_v2_b0", 96),
    "qwen3_vit": Model("qwen3_vit_88m", 96, {"depth": 2}),
    "rdnet": Model("rdnet_tiny", 96),
    "regnet": Model("regnetx_002", 96),
    "repghost": Model("repghostnet_050", 96),
    "repvit": Model("repvit_m1", 96),
    "res2net": Model("res2next50", 96),
    "resnest": Model("resnest14d", 96),
    "resnet": Model("test_resnet", 96),
    "resnetv2": Model("resnetv2_18", 96),
    "rexnet": Model("rexnet_100", 96),
    "selecsls": Model("selecsls42", 96),
    "senet": Model("legacy_seresnet18", 96),
    "sequencer": Model("sequencer2d_s", 96),
    "shvit": Model("shvit_s1", 96),
    "sknet": Model("skresnet18", 96),
    "starnet": Model("starnet_s050", 96),
    "swiftformer": Model("swiftformer_xs", 96),
    "swin_transformer": Model("swin_tiny_patch4_window7_224", 224),
    "swin_transformer_v2": Model("swinv2_tiny_window8_256", 256),
    "swin_transformer_v2_cr": Model("swinv2_cr_tiny_224", 224),
    "tiny_vit": Model("tiny_vit_5m_224", 96),
    "tnt": Model("tnt_s_legacy_patch16_224", 224),
    "tresnet": Model("tresnet_m", 96),
    "twins": Model("twins_svt_small", 96),
    "vgg": Model("vgg11", 96),
    "visformer": Model("visformer_tiny", 224),
    "vision_transformer": Model("test_vit", 96),
    "vision_transformer_hybrid": Model("vit_tiny_r_s16_p8_224", 224),
    "vision_transformer_relpos": Model("test_vit_relpos", 160),
    "vision_transformer_sam": Model("samvit_base_patch16_224", 96),
    "vitamin": Model("vitamin_small_224", 224),
    "volo": Model("volo_d1_224", 224),
    "vovnet": Model("ese_vovnet19b_slim_dw", 96),
    "xception": Model("legacy_xception", 96),
    "xception_aligned": Model("xception41p", 96),
    "xcit": Model("xcit_nano_12_p8_224", 96),
}
