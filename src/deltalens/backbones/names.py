"""Backbones by name: `timm/...`, `deltalens/...`, a local model folder, with an optional checkpoint file."""

from __future__ import annotations

import difflib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import nn

SOURCE_KEY = "_deltalens_source"
SHIPPED = {"deltalens/swin-mini": "deltalens_swin_mini", "deltalens/vit-mini": "deltalens_vit_mini"}


@dataclass(frozen=True)
class Source:
    """Where a backbone came from: enough to build it again.

    name: "timm/swin_tiny_patch4_window7_224.ms_in22k", "deltalens/vit-mini" or "local-dir:path". kwargs: what its
    constructor was given beside the number of classes. checkpoint: a weights file loaded into it, or None. pretrained:
    False where its weights were random, and cannot be had again.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    pretrained: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def create_backbone(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = True,
    checkpoint: str | os.PathLike | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a backbone by name and remember its source.

    name: "timm/<model>[.<tag>]", "deltalens/swin-mini", "deltalens/vit-mini", or a folder in timm's local format
    (config.json
    and weights). The prefix may be left out. checkpoint: a .safetensors or .pth file (read with weights_only=True)
    whose weights are loaded
    instead of the hub's; its head is dropped where class counts differ. kwargs go to the model's constructor (img_size,
    drop_path_rate, features_only...).

    Raises ValueError for an unknown name (with the nearest ones), FileNotFoundError for a missing checkpoint,
    ConnectionError where weights cannot be fetched.
    """
    resolved = _timm_name(name)
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint file at {checkpoint}")
    if checkpoint is not None and resolved.startswith("local-dir:"):
        raise ValueError(f"{name} is a folder with weights of its own: leave checkpoint= out, or name the architecture")
    options = dict(kwargs) | ({} if num_classes is None else {"num_classes": num_classes})
    if checkpoint is not None:
        options["pretrained_cfg_overlay"] = {"file": str(checkpoint), "hf_hub_id": None, "url": ""}
    try:
        model = timm.create_model(resolved, pretrained=pretrained or checkpoint is not None, **options)
    except Exception as error:
        if _is_network_error(error):
            raise ConnectionError(
                f"the weights of {name!r} are not in the local cache and could not be fetched: {error}. Go online, set "
                "HF_ENDPOINT to a mirror, pass checkpoint= with a weights file, or use deltalens/swin-mini"
            ) from error
        raise
    weights = None if checkpoint is None else str(checkpoint)
    source = Source(_canonical(name, resolved), kwargs, weights, pretrained or checkpoint is not None)
    model.__dict__[SOURCE_KEY] = source.to_dict()
    return model


def source_of(model: nn.Module) -> Source | None:
    """The source of a model: as recorded by `create_backbone`, else read from timm's own configuration."""
    recorded = model.__dict__.get(SOURCE_KEY)
    if recorded is not None:
        return Source(**{**recorded, "kwargs": {**recorded["kwargs"], **_constructor_options(model)}})
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture = config.get("architecture")
    if not architecture:
        return None
    shipped = {value: key for key, value in SHIPPED.items()}
    if architecture in shipped:
        return Source(shipped[architecture], _constructor_options(model))
    tag = config.get("tag")
    return Source(f"timm/{architecture}.{tag}" if tag else f"timm/{architecture}", _constructor_options(model))


def _constructor_options(model: nn.Module) -> dict[str, Any]:
    """What the model's constructor was given beside the number of classes, as timm remembers it: its present image size
    above all. Options that JSON cannot hold (layer classes) are left out."""
    options = getattr(model, "_model_args", None) or {}
    plain = (str, int, float, bool, list, tuple, type(None))
    return {k: v for k, v in options.items() if k not in ("num_classes", "pretrained") and isinstance(v, plain)}


def list_models(pattern: str = "*", pretrained: bool = True) -> list[str]:
    """Names that `create_backbone` knows and that match a shell pattern; the shipped ones first."""
    import fnmatch

    shipped = [name for name in SHIPPED if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"*/{pattern}")]
    inner = pattern.removeprefix("timm/")
    names = [n for n in timm.list_models(inner, pretrained=pretrained) if not n.startswith("deltalens_")]
    return shipped + [f"timm/{n}" for n in names]


def _timm_name(name: str) -> str:
    if name in SHIPPED or f"deltalens/{name}" in SHIPPED:
        import deltalens.backbones.shipped  # noqa: F401  (registers the shipped models with timm)

        return SHIPPED.get(name) or SHIPPED[f"deltalens/{name}"]
    if name.startswith("local-dir:") or Path(name).is_dir():
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is no model folder: it has no config.json (timm's format: config.json and weights)"
            )
        return f"local-dir:{folder}"
    if Path(name).is_file():
        raise ValueError(
            f"{name} is a weights file, which does not say of which architecture: pass the architecture as the model "
            f"and the file as checkpoint (--model timm/<architecture> --checkpoint {name})"
        )
    plain = name.removeprefix("timm/")
    architecture = plain.partition(".")[0]
    if plain.startswith("hf-hub:") or timm.is_model(architecture):
        return plain
    known = list(SHIPPED) + [f"timm/{n}" for n in timm.list_models()]
    near = difflib.get_close_matches(f"timm/{architecture}", known, n=4) or difflib.get_close_matches(name, known, n=4)
    raise ValueError(f"unknown model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))


def _canonical(name: str, resolved: str) -> str:
    shipped = {value: key for key, value in SHIPPED.items()}
    if resolved in shipped:
        return shipped[resolved]
    return resolved if resolved.startswith(("local-dir:", "hf-hub:")) else f"timm/{resolved}"


def _is_network_error(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
            return True
        if type(seen).__module__.partition(".")[0] in {"httpx", "httpcore", "requests", "urllib3"}:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
