"""The models of the zoo by key, "library/name", each with random weights, few classes and small images.

For timm a name is a module of its models, and the model is the smallest architecture in it: by parameters, at the
smallest image size that it takes. `smallest.json` remembers which those are; delete it after an upgrade of timm.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

CLASSES = 5
SMALLEST = Path(__file__).with_name("smallest.json")
SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 384)
DEPTH = 4  # of networks with more blocks whose constructor takes a depth


class Model(NamedTuple):
    """A model with what it is. size: (height, width) of its images. backbone: what attach is told of it."""

    model: nn.Module
    name: str
    size: int
    note: str = ""
    backbone: str | None = None


def all_keys() -> list[str]:
    import timm

    own = [f"timm/{module}" for module in timm.list_modules()]
    return own + [f"{library}/{name}" for library, names in OTHERS.items() for name in names]


def build(key: str) -> Model:
    """Build the model of a key, with random weights that do not depend on what was built before."""
    library, _, name = key.partition("/")
    torch.manual_seed(0)
    return smallest_of_timm(name) if library == "timm" else OTHERS[library][name]()


# ------------------------------------------------------------------ timm
def smallest_of_timm(module: str) -> Model:
    import timm

    known = json.loads(SMALLEST.read_text()) if SMALLEST.is_file() else {}
    if module not in known:
        known[module] = _smallest_form(_smallest_name(module))
        SMALLEST.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    name, options, size = known[module]["name"], known[module]["options"], known[module]["size"]
    note = f"depth={options['depth']}" if "depth" in options else ""
    return Model(timm.create_model(name, num_classes=CLASSES, **options), name, size, note)


def _smallest_name(module: str) -> str:
    """The architecture with the fewest parameters."""
    import timm

    def parameters(name: str) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(name).parameters())

    return min(timm.list_models(module=module), key=parameters)


def _smallest_form(name: str) -> dict:
    """What to create of an architecture: its options and the smallest size of images with which it runs."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    takes = inspect.signature(type(model).__init__).parameters
    shallow = {"depth": DEPTH} if "depth" in takes and len(getattr(model, "blocks", ())) > DEPTH else {}
    for less in (shallow, {}):  # some constructors take a depth that their architectures give them already
        for size in (*SIZES, model.pretrained_cfg["input_size"][-1]):
            options = {**less, **({"img_size": size} if "img_size" in takes else {})}
            problem = _problem(name, options, size)
            if problem is None:
                return {"name": name, "options": options, "size": size}
        if not shallow:
            break
    raise RuntimeError(f"{name} runs at none of the sizes {SIZES}: {problem}") from problem


def _problem(name: str, options: dict, size: int) -> Exception | None:
    """Why an architecture does not run with these options and images of this size; None where it does."""
    import timm
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    try:
        model = timm.create_model(name, num_classes=CLASSES, **options).eval()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with FakeCopyMode(mode):
            model = copy.deepcopy(model)
        with mode, torch.no_grad():
            model(torch.empty(2, 3, size, size))
    except Exception as error:
        return error
    return None


# ------------------------------------------------------------------ transformers
_TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
_STAGES = {"image_size": 64, "depths": [2, 1, 2, 1], "hidden_sizes": [8, 12, 16, 20]}
_WINDOWS = {
    "image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "drop_path_rate": 0.0,
}  # fmt: skip
_PAIRS = {"vision_config": {**_TINY, "intermediate_size": 48}}

# name -> (class of the model, class of the configuration, its settings)
TRANSFORMERS: dict[str, tuple[str, str, dict]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", {**_TINY, "intermediate_size": 48}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {**_TINY, "intermediate_size": 48}),
    "deit-with-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**_TINY, "intermediate_size": 48}),
    "swin": ("SwinForImageClassification", "SwinConfig", _WINDOWS),
    "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", _WINDOWS),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", _TINY),
    "dinov2-with-registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", _TINY),
    "dinov3-vit": ("DINOv3ViTModel", "DINOv3ViTConfig", {**_TINY, "intermediate_size": 48}),
    "dinov3-convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", _STAGES),
    "beit": ("BeitForImageClassification", "BeitConfig", {**_TINY, "intermediate_size": 48}),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", _STAGES),
    "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", _STAGES),
    "clip": ("CLIPForImageClassification", "CLIPConfig", _PAIRS),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", _PAIRS),
}  # fmt: skip


def of_transformers(name: str) -> Model:
    import transformers

    model_class, config_class, settings = TRANSFORMERS[name]
    config = getattr(transformers, config_class)(num_labels=CLASSES, **settings)
    image = settings.get("image_size") or settings["vision_config"]["image_size"]
    model = getattr(transformers, model_class)(config)
    if hasattr(config, "num_labels") and "Classification" in model_class:
        return Model(model, model_class, image)
    return Model(Classified(model, _pooled, _width(config)), model_class, image, "", "backbone")


def _width(config) -> int:
    return config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size


def _pooled(output) -> torch.Tensor:
    return output.pooler_output


def _as_it_is(features: torch.Tensor) -> torch.Tensor:
    return features


class Classified(nn.Module):
    """A backbone without a classifier, and a linear layer on its features."""

    def __init__(self, backbone: nn.Module, read: Callable, width: int):
        super().__init__()
        self.backbone, self.read, self.head = backbone, read, nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.read(self.backbone(x)))


# ------------------------------------------------------------------ torchvision and open_clip
def of_torchvision(name: str, size: int) -> Model:
    import torchvision

    options = {"image_size": size} if name.startswith("vit_") else {}
    return Model(torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options), name, size)


def of_open_clip(name: str) -> Model:
    from open_clip.model import CLIP

    vision = {
        "vit": {"image_size": 32, "layers": 3, "width": 24, "head_width": 8, "patch_size": 8},
        "modified-resnet": {"image_size": 64, "layers": [2, 1, 2, 1], "width": 8, "head_width": 8},
        "timm": {"image_size": 64, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "token"},
    }[name]
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    visual = CLIP(16, vision, text).visual
    return Model(Classified(visual, _as_it_is, 16), f"visual tower, {name}", vision["image_size"], "", "backbone")


# name -> size of the images
TORCHVISION = {
    "vit_b_16": 32, "swin_t": 64, "swin_v2_t": 64, "convnext_tiny": 64, "resnet18": 64, "resnet50": 64, "maxvit_t": 224,
    "efficientnet_b0": 64, "mobilenet_v3_small": 64, "regnet_x_400mf": 64, "densenet121": 64, "vgg11": 64,
}  # fmt: skip
OTHERS: dict[str, dict[str, Callable[[], Model]]] = {
    "hf": {name: functools.partial(of_transformers, name) for name in TRANSFORMERS},
    "torchvision": {name: functools.partial(of_torchvision, name, size) for name, size in TORCHVISION.items()},
    "open_clip": {name: functools.partial(of_open_clip, name) for name in ("vit", "modified-resnet", "timm")},
}
