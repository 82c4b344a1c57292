"""An adapter as a dictionary of named tensors, and back.

Names are paths in the plain classifier: `blocks.3.attention_stream.mona.gamma` for an inserted module,
`blocks.3.attn.qkv.hada_w1_a` for one of a wrapper, `blocks.3.norm1.bias` for an unfrozen tensor, `head.weight` for
the head. They carry no adapter name, and are the same
in a classifier and in its `features_only` form. A module shared by several places is held once, under its first place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from deltalens.backbones.describe import describe
from deltalens.lifecycle.state import adapter_of, all_slots, state_of
from deltalens.lifecycle.wrapped import on_plain_layers, plain_layers
from deltalens.methods.sized_by_data import SizedByData
from deltalens.sites.anatomy import Anatomy


def anatomy_of(model: nn.Module) -> Anatomy:
    """The anatomy of an adapted model, as attach saw it."""
    state = state_of(model)
    with plain_layers(model):
        return describe(model, state.backbone, state.blocks, state.tower)


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its graph; one that FSDP has sharded is gathered, for which every rank must come here."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def names_in_files(model: nn.Module) -> Callable[[str], str]:
    """Path in this model -> name in files. Where a submodule is the backbone, names count from it, and what lies
    around it is named `outside.<path>`."""
    canonical, backbone = anatomy_of(model).canonical, state_of(model).backbone
    if backbone is None:
        return canonical
    return lambda path: canonical(path) if path.startswith(f"{backbone}.") else f"outside.{path}"


def inserted_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Name -> tensor of the modules that the adapter inserted; parameters and buffers, not copied."""
    file_name, seen, found = names_in_files(model), set(), {}
    for owner, slots in all_slots(model):
        for place, module in slots.of(name):
            for leaf, tensor in module.state_dict(keep_vars=True).items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[file_name(f"{owner}.{place}.{leaf}".lstrip("."))] = tensor
    return found


def wrapper_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Name -> tensor of the adapter's wrappers, as the method that made them names them."""
    wrappings = state_of(model).adapters[name].wrappings
    return {key: tensor for wrapping in wrappings for key, tensor in wrapping.tensors().items()}


@on_plain_layers
def unfrozen_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Name -> tensor of the backbone that the adapter replaces, with running statistics."""
    file_name, state = names_in_files(model), state_of(model)
    adapter = state.adapters[name]
    live = {path: model.get_buffer(path) for path in adapter.buffers} if name in state.active else adapter.buffers
    return {file_name(path): tensor for path, tensor in [*adapter.parameters.items(), *live.items()]}


def head_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Name -> tensor of the adapter's heads."""
    file_name = names_in_files(model)
    return {
        file_name(f"{path}.{leaf}"): tensor
        for path, head in state_of(model).adapters[name].heads.items()
        for leaf, tensor in head.state_dict(keep_vars=True).items()
    }


def adapter_tensors(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """All tensors of an adapter by name, not copied: inserted, of wrappers, unfrozen, head."""
    name, _ = adapter_of(model, name)
    added = inserted_tensors(model, name) | wrapper_tensors(model, name)
    return added | unfrozen_tensors(model, name) | head_tensors(model, name)


def _sized_by_data(model: nn.Module, name: str) -> dict[str, tuple[SizedByData, str]]:
    """Name -> (module, tensor) of what is as long as a file says."""
    file_name = names_in_files(model)
    return {
        file_name(f"{owner}.{place}.{f'{path}.' if path else ''}{leaf}".lstrip(".")): (part, leaf)
        for owner, slots in all_slots(model)
        for place, module in slots.of(name)
        for path, part in module.named_modules()
        if isinstance(part, SizedByData)
        for leaf in part.open_length
    }


def load_tensors(
    model: nn.Module, name: str, tensors: Mapping[str, Tensor], may_be_extra: Callable[[str], bool] = lambda key: False
) -> None:
    """Copy tensors into an adapter. Missing, extra or misshapen ones are a ValueError that names them, before any
    change. Tensors that are made of data get the length that they come with.

    may_be_extra: whether a tensor of this name is passed over where the adapter has no place for it.
    """
    own, open_length = adapter_tensors(model, name), _sized_by_data(model, name)
    missing = sorted(own.keys() - tensors.keys())
    extra = sorted(key for key in tensors.keys() - own.keys() if not may_be_extra(key))
    wrong = [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own.keys() & tensors.keys()
        if own[key].shape[key in open_length :] != tensors[key].shape[key in open_length :]
    ]
    problems = [
        f"{label}: {', '.join(found[:4])}{f' and {len(found) - 4} more' if len(found) > 4 else ''}"
        for label, found in (("missing", missing), ("not expected", extra), ("of another shape", sorted(wrong)))
        if found
    ]
    if problems:
        raise ValueError(f"the tensors do not fit this adapter of {type(model).__name__}. " + "; ".join(problems))
    with torch.no_grad():
        for wrapping in state_of(model).adapters[name].wrappings:
            keys = wrapping.tensors().keys()
            wrapping.load({key: tensors[key] for key in keys})
            own = {key: tensor for key, tensor in own.items() if key not in keys}
        for key, (module, leaf) in open_length.items():
            if key in own:
                module.make_room(leaf, len(tensors[key]))
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
