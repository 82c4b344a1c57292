"""The image processors of transformers as deltalens' dictionary of preprocessing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from deltalens.backbones.preprocessing import IMAGENET_MEAN, IMAGENET_STD, crop_share

WARPED_FROM = 384  # ConvNeXt's processor resizes to squares from this size on


def load_processor(place: str, config: Any, **hub: Any) -> Any | None:
    """The image processor of a repository or folder; where none is found, the one that the model type has by default,
    with a warning where something might have been fetched; None where there is no such."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(place, trust_remote_code=False, **hub)
    except (OSError, ValueError, KeyError, ImportError):
        if not hub.get("local_files_only") and not Path(place).is_dir():
            warnings.warn(
                f"no image processor of {place} was found in its repository or in the local cache: mean, std and sizes "
                f"are the usual ones of its model type ({config.model_type})",
                stacklevel=2,
            )
    return default_processor(config)


def default_processor(config: Any) -> Any | None:
    """The processor of the model type with its own settings, at the size of the configuration."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    try:
        known = IMAGE_PROCESSOR_MAPPING[type(config)]
    except KeyError:
        return None
    cls = known.get("torchvision") or known.get("pil") if isinstance(known, dict) else known
    try:
        processor = cls()
    except (ImportError, ValueError, TypeError):
        return None
    size = image_size(config)
    if size is not None:
        _set_size(processor, size)
    return processor


def _set_size(processor: Any, size: tuple[int, int]) -> None:
    """Another input size, with the processor's own share between crop and resized image."""
    height, width = size
    if getattr(processor, "do_center_crop", False) and _side(processor.crop_size, "height"):
        share = _side(processor.crop_size, "height") / (
            _side(processor.size, "height") or _side(processor.size, "shortest_edge")
        )
        processor.crop_size = type(processor.crop_size)(height=height, width=width)
        height, width = round(height / share), round(width / share)
    if _side(processor.size, "height"):
        processor.size = type(processor.size)(height=height, width=width)
    else:
        processor.size = type(processor.size)(shortest_edge=min(height, width))


def image_size(config: Any) -> tuple[int, int] | None:
    """(H, W) of a model's configuration, that of its vision tower where it has several; None where it has none."""
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    return tuple(size[-2:]) if isinstance(size, (tuple, list)) and len(size) >= 2 else None


def channels(config: Any) -> int:
    """Number of channels of the images."""
    return getattr(getattr(config, "vision_config", config), "num_channels", 3) or 3


def known_of(model: nn.Module) -> dict[str, Any]:
    """Preprocessing of a model that its user built: from the image processor in the cache or folder that the
    configuration names, else from the model type's own settings. Nothing is fetched."""
    config = model.config
    place = getattr(config, "_name_or_path", "")
    processor = load_processor(place, config, local_files_only=True) if place else default_processor(config)
    return as_preprocessing(processor, config)


def as_preprocessing(processor: Any | None, config: Any) -> dict[str, Any]:
    """The dictionary; ImageNet's numbers and the configuration's size without a processor."""
    height, width = image_size(config) or (224, 224)
    if processor is None:
        size = [channels(config), height, width]
        mean, std = list(IMAGENET_MEAN), list(IMAGENET_STD)
        return {
            "input_size": size, "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0,
            "crop_mode": "transformers",
        }  # fmt: skip
    crop, share, mode = _geometry(processor, (height, width))
    found = {"input_size": [channels(config), *crop], **_values(processor, channels(config))}
    found |= {"interpolation": _interpolation(processor), "crop_pct": share, "crop_mode": mode}
    if getattr(processor, "do_flip_channel_order", None):
        found["channel_order"] = "bgr"
    return found


def _geometry(processor: Any, present: tuple[int, int]) -> tuple[tuple[int, int], float, str]:
    """((H, W) of the crop, its share of the resized image, crop_mode)."""
    shortest = _side(processor.size, "shortest_edge")
    if getattr(processor, "do_resize", True) is False:
        shortest, square = None, present
    elif _side(processor.size, "height"):
        square = (_side(processor.size, "height"), _side(processor.size, "width"))
    else:
        square = (shortest, shortest) if shortest else present
    crops = bool(getattr(processor, "do_center_crop", False)) and _side(processor.crop_size, "height")
    crop = (_side(processor.crop_size, "height"), _side(processor.crop_size, "width")) if crops else square
    share = getattr(processor, "crop_pct", None)
    kind = type(processor).__name__
    if kind.startswith("ConvNext"):
        share = share if shortest and shortest < WARPED_FROM else None
        if share is None:
            return crop, 1.0, "squash"
    if kind.startswith("Levit") and shortest:
        share = 224 / 256
    if share:
        square = (int(square[0] / share), int(square[1] / share))
    mode = "transformers" if shortest else "squash"
    return crop, crop_share(min(crop), min(square)), mode


def _values(processor: Any, channels: int) -> dict[str, list[float]]:
    """mean and std of values in 0..1, whatever the processor's scale: (255 f v - offset - mean) / std."""
    mean, std = [0.0] * channels, [1.0] * channels
    if getattr(processor, "do_normalize", True):
        mean, std = (_each(getattr(processor, key), channels) for key in ("image_mean", "image_std"))
    factor = 255 * processor.rescale_factor if getattr(processor, "do_rescale", True) else 255.0
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    again = std if getattr(processor, "include_top", False) else [1.0] * channels  # EfficientNet divides twice
    return {
        "mean": [(m + offset) / factor if abs(factor - 1) > 1e-6 or offset else float(m) for m in mean],
        "std": [
            s * a / factor if abs(factor - 1) > 1e-6 or a != 1 else float(s) for s, a in zip(std, again, strict=True)
        ],
    }


def _each(values: Any, channels: int) -> list[float]:
    values = list(values) if isinstance(values, (tuple, list)) else [values]
    return values if len(values) == channels else [values[0]] * channels


def _interpolation(processor: Any) -> str:
    from transformers.image_utils import pil_torch_interpolation_mapping
    from transformers.utils.import_utils import is_torchvision_greater_or_equal

    resample = getattr(processor, "resample", None)
    mode = "bilinear" if resample is None else pil_torch_interpolation_mapping[resample].value
    return "bicubic" if mode == "lanczos" and not is_torchvision_greater_or_equal("0.27") else mode


def _side(size: Any, key: str) -> int | None:
    return size.get(key) if isinstance(size, dict) else getattr(size, key, None)
