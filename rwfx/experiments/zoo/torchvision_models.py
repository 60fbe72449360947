"""The models of torchvision, all that it lists, without weights, and small inputs for each.

In: a name of ``list_models()``. Out: the model, in train mode, and the positional arguments of a call.
"""

from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from rwfx.experiments.extras import require

CLASSES = 7
SCENE = 96
WITHOUT_DATA = ("vit_h_14", "regnet_y_128gf")  # of more than six hundred million numbers

# The first pattern that fits gives the inputs. Images of 96 are the least that every network of convolutions takes
# with more than one place left at its end: a batch norm over single places has no gradient to speak of.
SIZES = {
    "inception_v3": (2, 3, 299, 299),
    "googlenet": (2, 3, 96, 96),
    "vit_*_32": (2, 3, 224, 224),
    "vit_*": (2, 3, 112, 112),
    "maxvit_t": (2, 3, 224, 224),
    "swin3d_*": (2, 3, 4, 64, 64),
    "mvit_*": (1, 3, 16, 224, 224),
    "s3d": (2, 3, 16, 224, 224),
    "r3d_18": (2, 3, 4, 48, 48),
    "mc3_18": (2, 3, 4, 48, 48),
    "r2plus1d_18": (2, 3, 4, 48, 48),
    "*": (2, 3, 96, 96),
}


def names() -> tuple[str, ...]:
    """The names of all models."""
    return tuple(require("torchvision.models").list_models())


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Make the model ``name``, and inputs for it, by torch's random stream; on the meta device if it is large."""
    model, inputs = _build(name)
    if name in WITHOUT_DATA:  # not made there: a RegNet reads its widths from tensors
        return model.to("meta"), tuple(x.to("meta") for x in inputs)
    return model, inputs


def _build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    models = require("torchvision.models")
    if name.startswith("raft_"):
        frames = torch.rand(2, 2, 3, 128, 128) * 2 - 1
        return models.get_model(name, weights=None).train(), (*frames, 2)  # refined twice
    if hasattr(models.detection, name):
        size = {} if name.startswith("ssd") else {"min_size": SCENE, "max_size": SCENE}
        return models.get_model(name, weights=None, weights_backbone=None, **size).train(), _scenes(name)
    options: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
    if hasattr(models.segmentation, name):
        options |= {"weights_backbone": None}
        if not name.startswith("lraspp"):
            options["aux_loss"] = True
    if name.startswith("quantized_"):
        options["quantize"] = False
    if name.startswith("vit_"):
        options["image_size"] = 224 if name.endswith("_32") else 112
    if name in ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"):
        options["init_weights"] = True
    model = models.get_model(name, **options).train()
    shape = next(shape for pattern, shape in SIZES.items() if fnmatch(name.removeprefix("quantized_"), pattern))
    return model, (torch.randn(shape),)


def _scenes(name: str) -> tuple[Any, ...]:
    """Two images, each with a box, as the detectors take them."""
    images = [torch.rand(3, SCENE, SCENE), torch.rand(3, SCENE, SCENE)]
    targets = []
    for _ in images:
        target = {"boxes": torch.tensor([[8.0, 12.0, 60.0, 72.0]]), "labels": torch.tensor([1])}
        if name.startswith("maskrcnn"):
            target["masks"] = torch.ones(1, SCENE, SCENE, dtype=torch.uint8)
        if name.startswith("keypointrcnn"):
            target["keypoints"] = torch.rand(1, 17, 3) * 40 + 12
            target["keypoints"][..., 2] = 1
        targets.append(target)
    return images, targets
