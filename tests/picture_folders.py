"""Generated image folders, and a tiny backbone in a folder, for the tests of data, training and command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

CLASSES = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 40, 50)}


def write_pictures(folder: Path, count: int, seed: int = 0, classes=CLASSES, size: int = 32) -> Path:
    """`count` noisy pictures of one colour per class, as PNG and JPEG in turns."""
    random = np.random.default_rng(seed)
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.clip(np.array(colour) + random.normal(0, 40, (size, size + 4, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.{'png' if i % 2 else 'jpg'}")
    return folder


def write_splits(folder: Path, train: int = 8, val: int = 4, test: int = 4) -> Path:
    for seed, (split, count) in enumerate({"train": train, "val": val, "test": test}.items()):
        if count:
            write_pictures(folder / split, count, seed)
    return folder


def write_tiny_backbone(folder: Path) -> Path:
    """A ViT of 3 blocks and 24 channels for 32 px, in timm's local format."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=7, **arguments)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    timm.models.save_for_hf(
        model, folder, model_config={"input_size": (3, 32, 32)}, model_args=arguments, safe_serialization=True
    )
    return folder
