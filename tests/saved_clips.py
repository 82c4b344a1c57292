"""Folders with a small random CLIP and adapters of it, for tests of commands that ask by text."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from hub_cache import write_open_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltalens as dl
from deltalens.data import eval_transform

CLASSES = ["blue", "green", "red"]


def write_siglip(folder: Path) -> nn.Module:
    """The small CLIP of `write_open_clip` with a bias on its logits, trained with sigmoids as it were."""
    model = write_open_clip(folder, depth=3)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["init_logit_bias"] = -2.0
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = load_file(folder / "open_clip_model.safetensors") | {"logit_bias": torch.tensor(-2.0)}
    save_file(weights, folder / "open_clip_model.safetensors")
    return model


def write_adapter(folder: Path, backbone: str, config: dl.Method) -> nn.Module:
    """An adapter with random weights on a two-tower model for the classes blue, green, red."""
    torch.manual_seed(1)
    model = dl.attach(dl.create_backbone(backbone, class_names=CLASSES), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    if isinstance(config, dl.TipAdapterConfig):
        dl.prepare(model, [(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2]))])
    dl.adapter_info(model)["class_names"] = CLASSES
    dl.save_pretrained(model, folder)
    return model


def pixels(backbone: str, images: list[Path]) -> Tensor:
    """The images as the model reads them."""
    transform = eval_transform(dl.preprocessing(dl.create_backbone(backbone, class_names=CLASSES)))
    return torch.stack([transform(Image.open(image).convert("RGB")) for image in images])


@torch.no_grad()
def raw_cosines(clip: nn.Module, images: Tensor, texts: list[str]) -> Tensor:
    """Cosines (images, texts) by open_clip alone."""
    import open_clip

    ids = open_clip.SimpleTokenizer(context_length=16)(texts)
    return F.normalize(clip.encode_image(images), dim=-1) @ F.normalize(clip.encode_text(ids), dim=-1).T
