"""How many bytes an adapter takes on disk, and how many its backbone."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from deltalens.lifecycle.files import TENSORS
from deltalens.lifecycle.state import state_of
from deltalens.lifecycle.wrapped import on_plain_layers, wrapper_parameters

# safetensors' names of element types, in the order in which it writes them
_TYPES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32",
    "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def stored_bytes(model: nn.Module, directory: str | os.PathLike) -> dict[str, int]:
    """Bytes on disk. "adapter": the tensors of the adapter in that folder, head included. "backbone": the plain
    backbone without a head, "model": with the present one, as safetensors files of their own; computed, not written,
    and left out where an element type is none of safetensors'.
    """
    found = {"adapter": adapter_bytes(directory)}
    with contextlib.suppress(TypeError):
        found |= plain_bytes(model)
    return found


def adapter_bytes(directory: str | os.PathLike) -> int:
    """The size of an adapter's file of tensors. FileNotFoundError where the folder holds none."""
    file = Path(directory) / TENSORS
    if not file.is_file():
        raise FileNotFoundError(f"{directory} is no adapter: {TENSORS} is missing")
    return file.stat().st_size


def plain_bytes(model: nn.Module, heads: Sequence[str] | None = None) -> dict[str, int]:
    """As in `stored_bytes`: "backbone" and "model". heads: as in `plain_tensors`. TypeError for an element type that
    safetensors lacks."""
    backbone, head = plain_tensors(model, heads)
    return {"backbone": safetensors_bytes(backbone), "model": safetensors_bytes(backbone | head)}


@on_plain_layers
def plain_tensors(model: nn.Module, heads: Sequence[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of the plain backbone, tensors of its heads) by name, shared ones once. What adapters inserted is left
    out; a tensor that an adapter replaces is there in its place. heads: paths; None for those of an adapted model."""
    prefixes = tuple(f"{path}." for path in (state_of(model).heads if heads is None else heads))
    seen = wrapper_parameters(model)
    backbone, head = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if "delta" in name.split(".") or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        (head if prefixes and name.startswith(prefixes) else backbone)[name] = tensor
    return backbone, head


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of the file that `safetensors.torch.save_file` writes of these tensors with the metadata
    {"format": "pt"}: 8 bytes for the length of the header, the header in JSON, padded to a multiple of 8, and the
    values. TypeError for an element type that the format lacks here."""
    types = list(_TYPES)
    named = [(str(tensor.dtype).removeprefix("torch."), name, tensor) for name, tensor in tensors.items()]
    unknown = next((name for kind, name, _ in named if kind not in _TYPES), None)
    if unknown is not None:
        raise TypeError(f"{unknown} is {tensors[unknown].dtype}; known are {', '.join(types)}")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for kind, name, tensor in sorted(named, key=lambda each: (types.index(each[0]), each[1])):
        begin, end = end, end + tensor.numel() * torch.empty((), dtype=tensor.dtype).element_size()
        header[name] = {"dtype": _TYPES[kind], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + (-length) % 8 + end
