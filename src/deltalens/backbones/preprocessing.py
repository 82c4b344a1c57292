"""How images become inputs of a model, in one dictionary for every library.

input_size (C, H, W), mean, std (of values in 0..1), interpolation ("bicubic"...), crop_pct (the crop's share of the
resized image), and crop_mode: which library's rounding the resizing and cropping follow, so that the pixels are its
own.

* "center": timm's; the shorter side becomes floor(H / crop_pct), the longer one is rounded.
* "torchvision": the longer side is cut off to a whole number, the crop's corner is rounded.
* "transformers": the same, and the crop's corner is cut off, too.
* "squash": both sides become floor(H / crop_pct), floor(W / crop_pct), without keeping proportions.
* "border": the whole image is fitted into the input, and the rest filled with `fill` (by default the mean).

A model of point clouds has other keys: kind ("points"), num_points, and normalize: "unit_sphere" where clouds are
centred and scaled to a largest radius of 1, None where they are taken as they are.

channel_order "bgr" stands in it where a model reads colours in that order.

Of a model that takes point clouds it has none of these, but "kind": "points", num_points (how many a cloud is
resampled to) and normalize ("unit_sphere": centred, and scaled to radius 1; or None).
"""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import nn

from deltalens.models.point_transformer import PointTransformer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING_KEY = "_deltalens_preprocessing"


def record(model: nn.Module, preprocessing: dict[str, Any]) -> None:
    """Keep with a model what its library says about its images."""
    model.__dict__[PREPROCESSING_KEY] = preprocessing


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """What was recorded, else what the model's own configuration says: that of timm, transformers or open_clip."""
    recorded = model.__dict__.get(PREPROCESSING_KEY)
    if recorded is not None:
        return dict(recorded)
    if isinstance(model, PointTransformer):
        return of_points(model)
    if "transformers" in sys.modules and isinstance(model, sys.modules["transformers"].PreTrainedModel):
        from deltalens.backbones.hf.preprocessing import known_of

        return known_of(model)
    for tower in (model, getattr(model, "visual", None), getattr(model, "backbone", None)):
        if isinstance(getattr(tower, "preprocess_cfg", None), dict):
            from deltalens.backbones.open_clip.named import as_preprocessing

            return as_preprocessing(tower.preprocess_cfg)
    return _of_timm(model)


def of_points(model: PointTransformer, normalize: str | None = "unit_sphere") -> dict[str, Any]:
    """Clouds of the model's own number of points."""
    return {"kind": "points", "num_points": model.num_points, "normalize": normalize}


def _of_timm(model: nn.Module) -> dict[str, Any]:
    """From a timm model's configuration, ImageNet's numbers where there is none; the present input size."""
    from deltalens.backbones.unknown import input_size

    config = getattr(model, "pretrained_cfg", None) or {}
    return {
        "input_size": list(input_size(model)),
        "mean": list(config.get("mean", IMAGENET_MEAN)),
        "std": list(config.get("std", IMAGENET_STD)),
        "interpolation": config.get("interpolation", "bicubic"),
        "crop_pct": config.get("crop_pct", 1.0),
        "crop_mode": config.get("crop_mode", "center"),
    }


def input_in_words(preprocessing: dict[str, Any]) -> str:
    """ "3x224x224", or "clouds of 1,024 points"."""
    if preprocessing.get("kind") == "points":
        return f"clouds of {preprocessing['num_points']:,} points"
    return "x".join(map(str, preprocessing["input_size"]))


def crop_share(crop: int, resized: int) -> float:
    """crop / resized, such that floor(crop / crop_share) is `resized` in floating point, too."""
    share = crop / resized
    while math.floor(crop / share) < resized:
        share = math.nextafter(share, 0)
    return share
