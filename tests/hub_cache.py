"""Repositories of random weights in the cache layout of the Hugging Face Hub and of torch.hub, so that tests need no
network: models--owner--name/{blobs,refs,snapshots}, and checkpoints/<file> under TORCH_HOME."""

from __future__ import annotations

import copy
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from models import randomize
from torch import nn

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HIDDEN = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
SQUARES = {"image_size": 32, "patch_size": 8}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.3, 0.2, 0.25],
}


def add_repository(hub: Path, name: str, folder: Path) -> Path:
    """Put every file of a folder into the cache as a repository's only snapshot."""
    root = hub / f"models--{name.replace('/', '--')}"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "refs/main").write_text(COMMIT)
    for file in folder.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        link = root / "snapshots" / COMMIT / file.name
        link.symlink_to(Path("../../blobs") / blob.name)
    return root


def write_transformers(folder: Path, kind: str = "vit", processor: dict | None = PROCESSOR, **settings) -> nn.Module:
    """A small random model of transformers, in the folder: "vit" with a classifier of 7 classes, "dinov2", "dinov3",
    "clip", "convnext" or "beit"."""
    import transformers as T

    towers = {
        "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**HIDDEN, **SQUARES, num_labels=7, **settings)),
        "dinov2": lambda: T.Dinov2Model(
            T.Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, **SQUARES)
        ),
        "dinov3": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**HIDDEN, **SQUARES, num_register_tokens=2)),
        "clip": lambda: T.CLIPModel(
            T.CLIPConfig(
                text_config={**HIDDEN, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2},
                vision_config={**HIDDEN, **SQUARES},
            )
        ),
        "convnext": lambda: T.ConvNextForImageClassification(
            T.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 3, 1], num_labels=7)
        ),
        "mae": lambda: T.ViTMAEModel(T.ViTMAEConfig(**HIDDEN, **SQUARES)),
    }
    torch.manual_seed(0)
    model = randomize(towers[kind]()).eval()
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}
OPEN_CLIP_IMAGES = {"mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25], "interpolation": "bilinear"}


def write_open_clip(folder: Path, depth: int | None = None) -> nn.Module:
    """A small random CLIP in open_clip's format for the hub. depth: blocks of both towers, with room for the texts of
    open_clip's own tokenizer."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    sizes = copy.deepcopy(OPEN_CLIP)
    if depth is not None:
        sizes["vision_cfg"]["layers"] = depth
        sizes["text_cfg"] |= {"layers": depth, "context_length": 16, "vocab_size": 49408}
    model = randomize(open_clip.CLIP(**sizes)).eval()
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": sizes, "preprocess_cfg": {**OPEN_CLIP_IMAGES, "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return model


def write_words(folder: Path, words: str) -> None:
    """A tokenizer of transformers for a model of 40 words ("clip"); 39, the largest, ends a text as in CLIP."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(["<pad>", "<unknown>", *words.split()])} | {"<start>": 38, "<end>": 39}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <end>", None, [("<start>", 38), ("<end>", 39)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unknown>"
    ).save_pretrained(folder)


def write_timm(folder: Path, name: str) -> nn.Module:
    """Random weights as timm's repositories on the hub hold them."""
    import timm

    torch.manual_seed(0)
    model = randomize(timm.create_model(name)).eval()
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return model


def write_torchvision(home: Path, name: str) -> nn.Module:
    """Random weights under the name that torch.hub gives the downloaded file."""
    from torchvision import models

    torch.manual_seed(0)
    model = randomize(models.get_model_builder(name)(weights=None)).eval()
    file = home / "hub/checkpoints" / Path(models.get_model_weights(name).DEFAULT.url).name
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


def register_tiny_torchvision() -> None:
    """`vit_tiny`: a vision transformer of torchvision for 32 px, with an entry for weights as its own have."""
    from torchvision.models import _api, vision_transformer
    from torchvision.transforms._presets import ImageClassification

    class Vit_Tiny_Weights(_api.WeightsEnum):
        IMAGENET1K_V1 = _api.Weights(
            url="https://download.invalid/models/vit_tiny-01234567.pth",
            transforms=partial(ImageClassification, crop_size=32, resize_size=36),
            meta={"min_size": (32, 32)},
        )
        DEFAULT = IMAGENET1K_V1

    def vit_tiny(*, weights: Vit_Tiny_Weights | None = None, progress: bool = True, image_size: int = 32, **options):
        model = vision_transformer.VisionTransformer(image_size, 8, 3, 2, 24, 48, num_classes=7, **options)
        if weights:
            model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
        return model

    vit_tiny.__annotations__["weights"] = Optional[Vit_Tiny_Weights]  # noqa: UP045  (as torchvision writes it)
    vit_tiny.__module__ = "torchvision.models.vision_transformer"
    _api.BUILTIN_MODELS["vit_tiny"] = vit_tiny
