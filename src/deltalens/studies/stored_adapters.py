"""What folders of adapters, of whatever origin, take on disk, and their backbones."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deltalens.backbones.describe import describe
from deltalens.backbones.names import create_backbone
from deltalens.lifecycle.files import CONFIG, TENSORS
from deltalens.lifecycle.storage import adapter_bytes, plain_bytes, plain_tensors
from deltalens.methods import make_config
from deltalens.studies.storage import StorageRow, StoredAdapter, storage_rows
from deltalens.training.output import RESULTS

Plain = dict[str, Any]  # "backbone" and "model" in bytes, "parameters" of the backbone; or "unknown": why


class StoredAdapters:
    """Reads folders of adapters. Backbones are built once, without weights, to count their bytes; where a run has
    counted them already, its results are taken. notes: a line for each backbone whose size could not be found."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._built: dict[str, Plain] = {}

    def rows(self, folders: Sequence[str | os.PathLike]) -> dict[str, list[StorageRow]]:
        """Backbone -> a row for each method; every folder is a task of its own.

        Raises FileNotFoundError for a folder without an adapter, ValueError for a damaged one.
        """
        found = [self.read(folder) for folder in folders]
        names = dict.fromkeys(each.backbone for each in found)
        return {name: storage_rows([each for each in found if each.backbone == name]) for name in names}

    def read(self, folder: str | os.PathLike) -> StoredAdapter:
        """One folder."""
        folder = Path(folder)
        config, size = _config(folder), adapter_bytes(folder)
        base = config.get("base_model") or {}
        name = base.get("id") or config.get("base_model_name_or_path") or base.get("class") or "unknown"
        plain = self._plain(folder, config, base, name)
        counted = config.get("trained_parameters") or {}
        adapter, head = counted.get("adapter"), counted.get("head", 0)
        if adapter is None:
            adapter, head = _count(folder), 0
        return StoredAdapter(
            method=_method(config),
            backbone=name,
            task=str(folder),
            adapter_bytes=size,
            backbone_bytes=plain.get("backbone"),
            model_bytes=plain.get("model"),
            adapter_parameters=adapter,
            head_parameters=head,
            backbone_parameters=counted.get("backbone") or plain.get("parameters"),
        )

    def _plain(self, folder: Path, config: dict[str, Any], base: dict[str, Any], name: str) -> Plain:
        results = folder / RESULTS
        known = json.loads(results.read_text(encoding="utf-8")).get("bytes") if results.is_file() else None
        if known and "backbone" in known:
            return known
        build = {"name": name, "num_classes": config.get("num_classes"), **(base.get("kwargs") or {})}
        if not base and not Path(name).is_dir():
            build["name"] = f"hf/{name}"  # peft names repositories of the Hugging Face Hub
        key = json.dumps(build, sort_keys=True, default=str)
        if key not in self._built:
            self._built[key] = _build(build) if base.get("id") or not base else {"unknown": "it was built by hand"}
            if "unknown" in self._built[key]:
                self.notes.append(f"the size of {name} is not known: {self._built[key]['unknown']}")
        return self._built[key]


def _build(options: dict[str, Any]) -> Plain:
    """The backbone without its weights, counted."""
    try:
        model = create_backbone(pretrained=False, **options)
        heads = describe(model).head_paths()
    except Exception as error:  # whatever its library says of a model that cannot be had here
        return {"unknown": " ".join(str(error).split()) or type(error).__name__}
    backbone, _ = plain_tensors(model, heads)
    parameters = {id(parameter) for parameter in model.parameters()}
    return {
        **plain_bytes(model, heads),
        "parameters": sum(tensor.numel() for tensor in backbone.values() if id(tensor) in parameters),
    }


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: name the folder of an adapter")
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no adapter: {CONFIG} is missing")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _count(folder: Path) -> int:
    """Values in an adapter's file, for folders that do not say how many there are."""
    try:
        with safe_open(folder / TENSORS, "pt") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is damaged: {error}; copy or download it again") from error


def _method(config: dict[str, Any]) -> str:
    """The methods with the settings that are not their defaults, so that adapters of other sizes are other rows."""
    entries = config.get("methods")
    if not entries:
        return f"{str(config.get('peft_type', 'unknown')).lower()} (peft)"
    return " + ".join(_with_settings(entry) for entry in entries)


def _with_settings(entry: dict[str, Any]) -> str:
    try:
        method = make_config(entry["method"], **{key: value for key, value in entry.items() if key != "method"})
    except ValueError:  # of a method that is not registered here
        return entry["method"]
    values = {each.name: getattr(method, each.name) for each in fields(method)}
    defaults = {each.name: each.default for each in fields(method)}
    own = [f"{name} {value}" for name, value in values.items() if value != defaults[name]]
    return f"{method.name} ({', '.join(own)})" if own else method.name
