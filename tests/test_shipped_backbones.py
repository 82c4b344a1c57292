"""The two backbones whose weights travel with the package."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from deltalens.backbones import shipped

MODELS = {"deltalens_swin_mini": 4.86e6, "deltalens_vit_mini": 2.75e6}
ANY_SIZE = {"deltalens_swin_mini": {"strict_img_size": False}, "deltalens_vit_mini": {"dynamic_img_size": True}}
LEAST_TOP1 = {"deltalens_swin_mini": 29.0, "deltalens_vit_mini": 32.0}
DATA = Path(__file__).parents[2] / "shared/data/tiny_imagenet_48"

each_model = pytest.mark.parametrize("name", list(MODELS))


def facts(name: str) -> dict:
    return json.loads(shipped.weights_file(name).with_suffix(".json").read_text())


def test_files_are_small():
    files = list(shipped.WEIGHTS.iterdir())
    assert {file.name for file in files} >= {
        "swin-mini.safetensors",
        "vit-mini.safetensors",
        "clip-mini.safetensors",
        "points-mini.safetensors",
        "README.md",
    }
    assert sum(file.stat().st_size for file in files) <= 27 * 2**20


@each_model
def test_pretrained_classifier(name):
    model = timm.create_model(name, pretrained=True).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == pytest.approx(MODELS[name], rel=0.01)
    assert parameters == facts(name)["parameters"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.num_classes == len(facts(name)["class_names"]) == 200
    size = model.pretrained_cfg["input_size"]
    assert size[-1] == facts(name)["input_size"]
    with torch.inference_mode():
        assert model(torch.randn(2, *size)).shape == (2, 200)


@each_model
def test_listed_by_timm_and_preprocessing(name):
    assert name in timm.list_models("deltalens_*", pretrained=True)
    config = timm.data.resolve_data_config(model=timm.create_model(name))
    assert config["interpolation"] == "bicubic"
    assert config["crop_pct"] == 1.0
    assert config["mean"] == IMAGENET_DEFAULT_MEAN


@each_model
def test_other_head_keeps_the_backbone(name):
    model = timm.create_model(name, pretrained=True, num_classes=10, drop_path_rate=0.1)
    assert model.get_classifier().out_features == 10
    shipped_weights = timm.create_model(name, pretrained=True).state_dict()
    backbone = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("head.")}
    assert all(torch.equal(tensor, shipped_weights[key]) for key, tensor in backbone.items())


@each_model
def test_other_image_size_interpolates(name):
    model = timm.create_model(name, pretrained=True, img_size=96, num_classes=0).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 96, 96)).shape == (2, model.num_features)


@each_model
def test_any_image_size(name):
    model = timm.create_model(name, pretrained=True, **ANY_SIZE[name]).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 64, 96)).shape == (1, 200)


@each_model
def test_one_input_channel(name):
    model = timm.create_model(name, pretrained=True, in_chans=1).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 1, *model.pretrained_cfg["input_size"][1:])).isfinite().all()


def test_swin_feature_maps():
    model = timm.create_model(
        "deltalens_swin_mini", pretrained=True, num_classes=10, img_size=128, features_only=True, drop_path_rate=0.1
    ).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    with torch.inference_mode():
        maps = model(torch.randn(1, 3, 128, 128))
    assert [tuple(m.shape) for m in maps] == [(1, 32, 32, 40), (1, 16, 16, 80), (1, 8, 8, 160), (1, 4, 4, 320)]


def test_vit_feature_maps():
    model = timm.create_model("deltalens_vit_mini", pretrained=True, img_size=96, features_only=True).eval()
    with torch.inference_mode():
        maps = model(torch.randn(1, 3, 96, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 192, 12, 12)] * 3


def val_images(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every step-th image, normalised 48 px; decoded here so that the test does not lean on the training tools."""
    index = np.load(DATA / "val.npz")
    packed = (DATA / "val-00.bin").read_bytes()
    pieces = zip(index["offset"][::step].astype(int), index["length"][::step].astype(int), strict=True)
    images = [np.asarray(Image.open(io.BytesIO(packed[o : o + n])).convert("RGB")) for o, n in pieces]
    mean, std = (torch.tensor(values) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    normal = (torch.from_numpy(np.stack(images)) / 255 - mean) / std
    return normal.permute(0, 3, 1, 2), torch.from_numpy(index["label"][::step].astype(np.int64))


@each_model
@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/tiny_imagenet_48")
def test_accuracy_on_real_images(name):
    model = timm.create_model(name, pretrained=True).eval()
    images, labels = val_images(step=10)
    images = F.interpolate(images, model.pretrained_cfg["input_size"][1:], mode="bicubic", antialias=True)
    with torch.inference_mode():
        top1 = (model(images).argmax(1) == labels).float().mean().item() * 100
    assert top1 > LEAST_TOP1[name]
