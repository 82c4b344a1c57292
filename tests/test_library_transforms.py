"""The pixels that a model of another library sees here are the pixels that its library gives it."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from deltalens.backbones.hf.preprocessing import as_preprocessing
from deltalens.data import eval_transform

LEVEL = 1 / 255  # one level of an 8-bit image, before the division by std


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Landscape and portrait, with odd differences to the crops, so that every rounding shows."""
    whole = Image.fromarray(load_sample_image("china.jpg"))
    return [whole, whole.resize((301, 453)), whole.crop((3, 5, 340, 276))]


PROCESSORS = {
    "squash": ("ViTImageProcessor", {}),
    "shortest side, crop": ("CLIPImageProcessor", {}),
    "crop of a larger image": (
        "BitImageProcessor",
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
    ),
    "share of the crop": ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    "squash from 384 on": ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    "squash, crop": ("DeiTImageProcessor", {}),
    "normalised twice": ("EfficientNetImageProcessor", {}),
    "offset": (
        "EfficientNetImageProcessor",
        {"rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False},
    ),
    "LeViT": ("LevitImageProcessor", {}),
    "blue first": ("MobileViTImageProcessor", {}),
    "a size of its own": ("PoolFormerImageProcessor", {}),
    "Lanczos": ("FlavaImageProcessor", {"resample": 1}),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_transformers_processors(case, photographs):
    """Both resample uint8 tensors with torchvision: equal but for the order of the float operations."""
    import transformers

    kind, settings = PROCESSORS[case]
    processor = getattr(transformers, kind)(**settings)
    preprocessing = as_preprocessing(processor, transformers.ResNetConfig())
    for image in photographs:
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(eval_transform(preprocessing)(image), expected, atol=1e-6, rtol=0)


def test_dinov3_rounds_after_resizing(photographs):
    """Its processor resizes float values; we resize 8-bit ones, as all others do: at most one level apart."""
    import transformers

    processor = transformers.DINOv3ViTImageProcessor()
    transform = eval_transform(as_preprocessing(processor, transformers.ResNetConfig()))
    for image in photographs:
        difference = transform(image) - processor(image, return_tensors="pt")["pixel_values"][0]
        assert difference.abs().max() <= LEVEL / min(processor.image_std)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "efficientnet_b1", "resnet50"])
def test_torchvisions_weights(name, photographs):
    """torchvision's transforms resize PIL images with PIL: one level at most, rarely."""
    from torchvision import models

    from deltalens.backbones.torchvision.named import _preprocessing

    weights = models.get_model_weights(name).DEFAULT
    own, transform = weights.transforms(), eval_transform(_preprocessing(weights, None))
    for image in photographs:
        difference = (transform(image) - own(image)).abs()
        assert difference.max() <= 1.01 * LEVEL / min(own.std)
        assert difference.mean() <= 0.02 * LEVEL / min(own.std)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_open_clips_transforms(mode, interpolation, photographs):
    """open_clip resizes PIL images with PIL: one level at most, rarely."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from deltalens.backbones.open_clip.named import as_preprocessing as of_open_clip

    config = PreprocessCfg(size=96, resize_mode=mode, interpolation=interpolation, fill_color=7)
    own, transform = image_transform_v2(config, is_train=False), eval_transform(of_open_clip(vars(config)))
    for image in photographs:
        difference = (transform(image) - own(image)).abs()
        assert difference.max() <= 1.01 * LEVEL / min(config.std)
        assert difference.mean() <= 0.02 * LEVEL / min(config.std)


def test_timms_border(photographs):
    from timm.data import create_transform

    from deltalens.backbones.preprocessing import preprocessing_of

    model = torch.nn.Module()
    model.pretrained_cfg = {"input_size": (3, 96, 96), "crop_mode": "border", "interpolation": "bilinear"}
    found = preprocessing_of(model)
    own = create_transform((3, 96, 96), crop_pct=1.0, crop_mode="border", interpolation="bilinear")
    for image in photographs:
        difference = (eval_transform(found)(image) - own(image)).abs()
        assert difference.max() <= 1.01 * LEVEL / 0.224


def test_unknown_modes_and_gray_images(photographs):
    preprocessing = as_preprocessing(None, type("Config", (), {"image_size": 32, "num_channels": 3})())
    assert preprocessing["input_size"] == [3, 32, 32]
    assert eval_transform(preprocessing)(np.zeros((20, 50, 3), np.uint8)).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="crop_mode is center"):
        eval_transform({**preprocessing, "crop_mode": "middle"})


@pytest.mark.parametrize(("crop_mode", "other"), [("torchvision", "center"), ("transformers", "torchvision")])
def test_the_rounding_shows(crop_mode, other, photographs):
    """The bounds above would not hold with the rounding of another library."""
    preprocessing = {"input_size": [3, 97, 97], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
    transforms = [
        eval_transform({**preprocessing, "crop_pct": 0.875, "crop_mode": mode}) for mode in (crop_mode, other)
    ]
    assert max((transforms[0](i) - transforms[1](i)).abs().max() for i in photographs) > 10 * LEVEL / 0.25
