"""timm's models by name: `timm/<model>[.<tag>]`, folders in timm's format, timm's repositories on the hub."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
from torch import nn

SHIPPED = {"deltalens/swin-mini": "deltalens_swin_mini", "deltalens/vit-mini": "deltalens_vit_mini"}


def create(
    name: str, num_classes: int | None, pretrained: bool, checkpoint: str | None, options: dict[str, Any]
) -> tuple[nn.Module, str]:
    """(model, its full name). name: without the prefix `timm/`, or one of SHIPPED."""
    resolved = _resolve(name)
    options = dict(options) | ({} if num_classes is None else {"num_classes": num_classes})
    if checkpoint is not None:
        options["pretrained_cfg_overlay"] = {"file": checkpoint, "hf_hub_id": None, "url": ""}
    model = timm.create_model(resolved, pretrained=pretrained or checkpoint is not None, **options)
    return model, _full_name(resolved)


def source_of(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """(full name, constructor's options) of a model that timm built, as its configuration remembers them."""
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture = config.get("architecture")
    if not architecture:
        return None
    shipped = {value: key for key, value in SHIPPED.items()}
    if architecture in shipped:
        return shipped[architecture], constructor_options(model)
    tag = config.get("tag")
    return (f"timm/{architecture}.{tag}" if tag else f"timm/{architecture}"), constructor_options(model)


def constructor_options(model: nn.Module) -> dict[str, Any]:
    """What the model's constructor was given beside the number of classes, as timm remembers it: its present image size
    above all. Options that JSON cannot hold (layer classes) are left out."""
    options = getattr(model, "_model_args", None) or {}
    plain = (str, int, float, bool, list, tuple, type(None))
    return {k: v for k, v in options.items() if k not in ("num_classes", "pretrained") and isinstance(v, plain)}


def list_models(pattern: str, pretrained: bool) -> list[str]:
    """Full names whose part after `timm/` matches."""
    names = timm.list_models(pattern, pretrained=pretrained)
    return [f"timm/{name}" for name in names if not name.startswith("deltalens_")]


def _resolve(name: str) -> str:
    if name in SHIPPED or f"deltalens/{name}" in SHIPPED:
        import deltalens.backbones.shipped  # noqa: F401  (registers the shipped models with timm)

        return SHIPPED.get(name) or SHIPPED[f"deltalens/{name}"]
    architecture = name.partition(".")[0]
    if name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(architecture):
        return name
    known = list(SHIPPED) + [f"timm/{n}" for n in timm.list_models()]
    near = difflib.get_close_matches(f"timm/{architecture}", known, n=4) or difflib.get_close_matches(name, known, n=4)
    message = f"unknown model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
    if name.count("/") == 1 and not name.startswith(("deltalens/", ".")) and not Path(name).is_absolute():
        message += f"; a repository of the Hugging Face Hub is named hf/{name} (or hf-hub:{name} for timm's)"
    raise ValueError(message)


def _full_name(resolved: str) -> str:
    shipped = {value: key for key, value in SHIPPED.items()}
    if resolved in shipped:
        return shipped[resolved]
    return resolved if resolved.startswith(("local-dir:", "hf-hub:")) else f"timm/{resolved}"
