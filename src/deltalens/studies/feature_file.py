"""Features of image files, kept on a disk so that another search over the same images need not compute them.

A safetensors file: `features` (N, ...), float32, and as metadata the digest of the model, and for each row the image's
path relative to the folder of this file, its size in bytes and its time of modification in nanoseconds. A row is used
as long as these three are the image's.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from deltalens.lifecycle.atomic import atomic_path
from deltalens.lifecycle.info import preprocessing
from deltalens.lifecycle.state import KEY, state_of

KIND = "deltalens image features 1"
Mark = tuple[str, int, int]  # relative path, bytes, nanoseconds


class FeatureFile:
    """Rows of features by image, read from a file if it is there.

    model: its digest (`model_digest`). Raises ValueError for a file of another model, or that is none of these files.
    """

    def __init__(self, file: str | os.PathLike, model: str):
        self.file, self.model = Path(file), model
        self.rows: dict[Mark, Tensor] = {}
        if self.file.exists():
            self._read()

    def mark(self, image: Path) -> Mark:
        """What tells an image, as it is now, from others."""
        found = image.stat()
        here, folder = os.path.abspath(image), os.path.abspath(self.file.parent)
        try:
            path = os.path.relpath(here, folder)
        except ValueError:  # another drive of Windows
            path = here
        return Path(path).as_posix(), found.st_size, found.st_mtime_ns

    def write(self) -> None:
        """Write the rows, but for those of images that have changed or are gone."""
        rows = {mark: row for mark, row in self.rows.items() if self._present(mark)}
        if not rows:
            return
        metadata = {"kind": KIND, "model": self.model, "images": json.dumps(list(rows))}
        with atomic_path(self.file) as temporary:
            temporary.write_bytes(save({"features": torch.stack(list(rows.values()))}, metadata=metadata))

    def _present(self, mark: Mark) -> bool:
        try:
            return self.mark(self.file.parent / mark[0]) == mark
        except OSError:
            return False

    def _read(self) -> None:
        try:
            with safe_open(self.file, framework="pt") as content:
                metadata = content.metadata() or {}
                if metadata.get("kind") != KIND:
                    raise ValueError(f"{self.file} holds no image features: name another file for them")
                if metadata.get("model") != self.model:
                    raise ValueError(
                        f"{self.file} holds features of another model, adapter or preprocessing: name another file, or "
                        "remove this one"
                    )
                features = content.get_tensor("features")
        except SafetensorError as error:
            raise ValueError(f"{self.file} is no readable file of image features: {error}; remove it") from error
        marks = [(path, size, time) for path, size, time in json.loads(metadata["images"])]
        self.rows = dict(zip(marks, features, strict=True))


def model_digest(model: nn.Module) -> str:
    """A digest of everything that decides a model's image features: tensors, layers, methods, preprocessing.

    It changes with the text tower, too, and does not with device or classes.
    """
    state = state_of(model) if KEY in model.__dict__ else None
    methods = [config.to_dict() for name in state.active for config in state.adapters[name].configs] if state else []
    digest = hashlib.sha256(json.dumps([methods, preprocessing(model)], sort_keys=True, default=str).encode())
    for path, module in model.named_modules():
        if not any(True for _ in module.children()):
            digest.update(f"{path} {module}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
