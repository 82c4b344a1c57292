"""Adapters on disk: `adapter_config.json`, `adapter_model.safetensors`, `README.md`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from deltalens.backbones.describe import describe
from deltalens.lifecycle import peft_format, transfer
from deltalens.lifecycle.atomic import atomic_path
from deltalens.lifecycle.attach import attach
from deltalens.lifecycle.base_model import base_model_block, check_fingerprint, rebuild
from deltalens.lifecycle.card import model_card
from deltalens.lifecycle.count import count_parameters
from deltalens.lifecycle.state import KEY, adapter_of, state_of
from deltalens.lifecycle.switch import delete_adapter
from deltalens.lifecycle.tensors import adapter_tensors, anatomy_of, head_tensors, load_tensors, whole
from deltalens.lifecycle.wrapped import plain_layers
from deltalens.methods.base import Method, make_config, without_fetching

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FORMAT = 1


def save_pretrained(model: nn.Module, directory: str | os.PathLike, name: str | None = None) -> None:
    """Write an adapter: two files and a filled model card. name: None means the active adapter.

    An adapter that is LoRA and a head is written in peft's format, and peft loads it; all others in our own (see docs).
    All files are written to temporary names, then renamed, the configuration last: a full disk leaves what the folder
    held before, and a folder that has a configuration is whole whenever the process was killed.
    """
    name, adapter = adapter_of(model, name)
    directory = Path(directory)
    tensors = {key: whole(tensor).contiguous().cpu() for key, tensor in adapter_tensors(model, name).items()}
    with plain_layers(model):
        base_model = base_model_block(model)
    config: dict[str, Any] = {
        "peft_type": adapter.configs[0].name.upper(),
        "deltalens_format": FORMAT,
        "methods": [method.to_dict() for method in adapter.configs],
        "base_model_name_or_path": base_model["id"],
        "base_model": base_model,
        "num_classes": adapter.num_classes,
        "heads": list(adapter.heads),
        "trained_parameters": _count(model, name),
        "info": adapter.info,
    }
    if peft_format.applies(model, adapter.configs):
        with plain_layers(model):
            tensors, config = peft_format.encode(model, name, tensors, config)
    with contextlib.ExitStack() as renamed_at_the_end:
        files = {
            file: renamed_at_the_end.enter_context(atomic_path(directory / file)) for file in (CONFIG, CARD, TENSORS)
        }
        files[TENSORS].write_bytes(
            save(_unshared(tensors), metadata={"format": "pt"})
        )  # save_file has names of its own
        files[CARD].write_text(model_card(config), encoding="utf-8")
        files[CONFIG].write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (directory / CONFIG).unlink(missing_ok=True)  # an earlier adapter's, which would not fit the new tensors


def load_adapter(model: nn.Module, directory: str | os.PathLike, name: str = "default") -> nn.Module:
    """Load an adapter from a folder into a model, attach it and make it active. Returns the model.

    The folder is one of ours or one that peft wrote for LoRA. A head of another kind than the model's (a classifier's
    adapter in a network for dense prediction, or the other way) is passed over: see `docs/dense.md`.
    Raises FileNotFoundError for a missing file, ValueError for a damaged one, one of a newer format, of another
    backbone, or whose tensors do not fit; the model is then as it was.
    """
    config, tensors = read_files(directory)
    if peft_format.is_peft(config):
        config, tensors = peft_format.decode(model, config, tensors)
    methods = _methods(config)
    base = config.get("base_model") or {}
    had_adapters = KEY in model.__dict__
    same_head = transfer.same_head(model, base)
    num_classes = config.get("num_classes") if same_head and _has_classifier(model, config) else None
    with without_fetching():  # the file holds every tensor
        where = {} if had_adapters else transfer.places(model, base)
        attach(model, methods, name, num_classes=num_classes, **where)
    try:
        with plain_layers(model):
            check_fingerprint(model, base.get("fingerprint") or {})
            if same_head:
                load_tensors(model, name, _fitting(model, name, tensors), _beyond(model))
            else:
                fitting = transfer.without_head(model, name, config, tensors)
                load_tensors(model, name, fitting, transfer.beyond(model, name))
    except ValueError as error:
        _undo(model, name, had_adapters)
        raise ValueError(f"{directory}: {error}") from error
    if same_head:
        state_of(model).adapters[name].info.update(config.get("info") or {})
    return model


def from_pretrained(
    directory: str | os.PathLike, model: nn.Module | None = None, *, name: str = "default"
) -> nn.Module:
    """Rebuild backbone, adapter, head, preprocessing and class names from an adapter's folder, in eval mode.

    model: the backbone, for adapters whose backbone was built by hand or is at hand already; None builds the one that
    the folder
    names (from the hub, the package or a checkpoint file). Errors as in `load_adapter`, and ConnectionError where
    weights cannot be fetched.
    """
    if model is None:
        config, _ = read_files(directory)
        model = rebuild(config.get("base_model") or {}, config.get("num_classes"))
    return load_adapter(model, directory, name).eval()


def read_files(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of an adapter's folder, checked for presence, damage and format."""
    directory = Path(directory)
    for file in (CONFIG, TENSORS):
        if not (directory / file).is_file():
            present = ", ".join(sorted(p.name for p in directory.iterdir())) if directory.is_dir() else "no such folder"
            raise FileNotFoundError(f"{directory} is no adapter: {file} is missing (found: {present or 'nothing'})")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG} is damaged: {error}") from error
    if config.get("deltalens_format", FORMAT) > FORMAT:
        raise ValueError(
            f"{directory} was written by a newer deltalens (format {config['deltalens_format']}, this version reads "
            f"{FORMAT}): upgrade deltalens"
        )
    try:
        return config, load_file(directory / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{directory / TENSORS} is damaged: {error}; copy or download it again") from error


# ------------------------------------------------------------------ details
def _methods(config: dict[str, Any]) -> list[Method]:
    entries = config.get("methods")
    if not entries:
        raise ValueError(
            f"the configuration has no methods block (peft_type {config.get('peft_type')!r}); of peft's own methods "
            "only LoRA can be loaded"
        )
    return [make_config(entry["method"], **{k: v for k, v in entry.items() if k != "method"}) for entry in entries]


def _count(model: nn.Module, name: str) -> dict[str, float]:
    state = state_of(model)
    if state.active != (name,):
        return {}
    count = count_parameters(model)
    return {
        "adapter": count.adapter,
        "head": count.head,
        "backbone": count.backbone,
        "percent": round(count.percent, 4),
        "percent_with_head": round(count.percent_with_head, 4),
    }


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    unshared = {}
    for key, tensor in tensors.items():
        unshared[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return unshared


def _has_classifier(model: nn.Module, config: dict[str, Any]) -> bool:
    if not config.get("heads"):
        return False
    where = transfer.places(model, config.get("base_model") or {})
    with plain_layers(model):
        return describe(model, where["backbone"], where["blocks"], where["tower"]).head is not None


def _fitting(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without a head in the file, the adapter keeps the model's own; cast nothing, `copy_` does."""
    heads = {key: tensor.detach().clone() for key, tensor in head_tensors(model, name).items()}
    return tensors if heads.keys() & tensors.keys() else {**heads, **tensors}


def _beyond(model: nn.Module) -> Callable[[str], bool]:
    """Whether a file's tensor belongs to a part of the classifier that this feature extractor does not have."""
    anatomy = anatomy_of(model)
    if anatomy.head_paths():
        return lambda key: False
    blocks = tuple(f"{anatomy.canonical(block.path)}." for block in anatomy.blocks())
    names = {anatomy.canonical(path) for path, _ in anatomy.backbone_parameters()}
    return lambda key: not key.startswith(blocks) and key not in names


def _undo(model: nn.Module, name: str, had_adapters: bool) -> None:
    from deltalens.lifecycle.attach import detach

    if had_adapters:
        delete_adapter(model, name)
    else:
        detach(model)
