"""open_clip's models by name: `open_clip/<model>/<tag>`, `open_clip/hf-hub:<owner>/<repository>`, a folder, and the
CLIP that comes with the package, `deltalens/clip-mini`."""

from __future__ import annotations

import difflib
import fnmatch
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from deltalens.backbones.feature_classifier import FeatureClassifier
from deltalens.backbones.fetching import missing_library
from deltalens.backbones.open_clip import mini
from deltalens.backbones.preprocessing import record
from deltalens.backbones.two_towers import NamedTwoTowers

CONFIG = "open_clip_config.json"
HUB, FOLDER = "hf-hub:", "local-dir:"


def create(
    name: str, num_classes: int | None, pretrained: bool, checkpoint: str | None, options: dict[str, Any]
) -> tuple[nn.Module, str]:
    """(classifier on the projected image embedding, its full name). The text tower is thrown away. options go to
    open_clip.create_model; img_size is its force_image_size."""
    _require(name)
    options = dict(options)
    if "img_size" in options:
        options["force_image_size"] = options.pop("img_size")
    clip, name = _clip(name, pretrained, checkpoint, options)
    config = clip.visual.preprocess_cfg
    preprocessing = as_preprocessing(config)
    model = FeatureClassifier(clip.visual, num_classes or 0, tuple(preprocessing["input_size"]))
    record(model, preprocessing)
    return model, _full(name)


def create_two_towers(name: str, pretrained: bool, checkpoint: str | None, options: dict[str, Any]) -> NamedTwoTowers:
    """Both towers of a model, with the tokenizer that belongs to it. options as in `create`."""
    _require(name)
    import open_clip

    if "img_size" in options:
        options["force_image_size"] = options.pop("img_size")
    clip, name = _clip(name, pretrained, checkpoint, options)
    place = name if name.startswith((HUB, FOLDER)) else name.partition("/")[0]
    tokenizer = mini.tokenizer() if name == mini.NAME else open_clip.get_tokenizer(place)
    return NamedTwoTowers(clip, tokenizer, as_preprocessing(clip.visual.preprocess_cfg), _full(name))


def as_preprocessing(config: dict[str, Any]) -> dict[str, Any]:
    """open_clip's preprocess_cfg as deltalens' dictionary."""
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mode = {"shortest": "torchvision", "squash": "squash", "longest": "border"}[config.get("resize_mode") or "shortest"]
    if mode == "torchvision" and height != width:
        mode = "center"
    interpolation = config.get("interpolation") or "bicubic"
    found = {
        "input_size": [3, height, width],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": "bilinear" if interpolation == "bilinear" else "bicubic",
        "crop_pct": 1.0,
        "crop_mode": mode,
    }
    return found | ({"fill": config.get("fill_color") or 0} if mode == "border" else {})


def list_models(pattern: str, pretrained: bool) -> list[str]:
    """Full names whose part after `open_clip/` matches; with `pretrained` one for each tag."""
    _require()
    import open_clip

    names = [f"{name}/{tag}" for name, tag in open_clip.list_pretrained()] if pretrained else open_clip.list_models()
    wanted = (pattern, f"{pattern}/*")
    return [f"open_clip/{name}" for name in names if any(fnmatch.fnmatch(name, each) for each in wanted)]


def _require(name: str = "") -> None:
    try:
        import open_clip  # noqa: F401
    except ImportError as error:
        raise missing_library("open_clip", "open-clip", mini.NAME if name == mini.NAME else None) from error


def _full(name: str) -> str:
    return name if name == mini.NAME else f"open_clip/{name}"


def _clip(name: str, pretrained: bool, checkpoint: str | None, options: dict[str, Any]) -> tuple[nn.Module, str]:
    """(both towers, the name with nothing left out)."""
    if name == mini.NAME:
        return mini.create(pretrained, checkpoint, options), name
    if name.startswith((HUB, FOLDER)):
        if checkpoint is not None:
            raise ValueError(
                f"open_clip/{name} has weights of its own: leave checkpoint= out, or name the architecture"
            )
        return _from_repository(name, pretrained, options), name
    architecture, tag = _resolve(name, needs_tag=pretrained and checkpoint is None)
    known = _tag_config(architecture, tag)
    options = {**({"force_quick_gelu": True} if known.get("quick_gelu") else {}), **options}
    images = {key: value for key, value in known.items() if key != "size"}  # the size is the tower's
    weights = checkpoint or (tag if pretrained else None)
    return _create(architecture, pretrained=weights, force_preprocess_cfg=images, **options), name


def _from_repository(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """From a repository or a folder. Its weights are fetched first: open_clip would go on without them."""
    from open_clip.pretrained import download_pretrained_from_hf

    if name.startswith(FOLDER) or pretrained:
        if name.startswith(HUB):
            download_pretrained_from_hf(name.removeprefix(HUB))
        return _create(name, load_weights=pretrained, require_pretrained=pretrained, **options)
    with tempfile.TemporaryDirectory() as folder:  # its configuration alone
        shutil.copy(download_pretrained_from_hf(name.removeprefix(HUB), filename=CONFIG), Path(folder, CONFIG))
        return _create(f"{FOLDER}{folder}", load_weights=False, **options)


def _create(name: str, **options: Any) -> nn.Module:
    import open_clip

    disabled = logging.root.manager.disable
    if options.get("pretrained") is None and not options.get("load_weights"):
        logging.disable(logging.WARNING)  # that the weights are random is what was asked for
    try:
        return open_clip.create_model(name, **{"pretrained_text": False, **options}, weights_only=True)
    finally:
        logging.disable(disabled)


def _resolve(name: str, needs_tag: bool) -> tuple[str, str]:
    """(architecture, tag). ValueError with the nearest names, or with the tags."""
    import open_clip

    architecture, _, tag = name.partition("/")
    known = open_clip.list_models()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=4)
        hint = f"; did you mean {', '.join(f'open_clip/{n}' for n in near)}?" if near else ""
        raise ValueError(f"open_clip has no model {architecture!r}{hint}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if (tag and tag not in tags) or (needs_tag and not tag):
        problem = f"no weights {tag!r}" if tag else "several weights"
        raise ValueError(
            f"open_clip/{architecture} has {problem}: name one of its tags, as in "
            f"open_clip/{architecture}/{tags[0] if tags else '<tag>'}; it has {', '.join(tags) or 'none'}"
        )
    return architecture, tag


def _tag_config(architecture: str, tag: str) -> dict[str, Any]:
    """What the registry says about the weights of a tag: mean, std, interpolation, resizing, activation."""
    from open_clip.pretrained import get_pretrained_cfg

    return dict(get_pretrained_cfg(architecture, tag) or {}) if tag else {}
