"""The `base_model` block of an adapter's configuration: which backbone it belongs to, and proof of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltalens.backbones.names import Source, create_backbone, library_of, source_of
from deltalens.backbones.preprocessing import preprocessing_of
from deltalens.lifecycle.state import state_of
from deltalens.lifecycle.tensors import anatomy_of, whole

SAMPLED_TENSORS, SAMPLED_VALUES, TOLERANCE = 24, 4, 2e-2


def frozen_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Canonical name -> original tensor of the backbone, whatever adapters are active."""
    anatomy, state = anatomy_of(model), state_of(model)
    return {
        anatomy.canonical(path): state.parameters.get(path, parameter)
        for path, parameter in anatomy.backbone_parameters()
    }


def fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """A few values of some backbone tensors, evenly spaced over the names: enough to tell backbones apart."""
    values = {name: tensor for name, tensor in sorted(frozen_values(model).items()) if tensor.numel() >= SAMPLED_VALUES}
    names = list(values)
    step = max(1, len(names) // SAMPLED_TENSORS)
    return {name: _sample(values[name]) for name in names[::step]}


def _sample(tensor: torch.Tensor) -> list[float]:
    flat = whole(tensor).flatten()
    index = torch.linspace(0, flat.numel() - 1, SAMPLED_VALUES, device=flat.device).long()
    index = index.clamp(max=flat.numel() - 1)  # float32 rounds the last index of a very large tensor up
    return [float(value) for value in flat[index].float().cpu()]


def check_fingerprint(model: nn.Module, expected: dict[str, list[float]]) -> None:
    """Raise ValueError where the backbone's values differ from the fingerprint, naming the first tensor.

    Values are compared in float32 with a tolerance that a cast to bfloat16 stays within. Names the model lacks (a
    pruned feature extractor) are passed over, unless it has none of them. So are tensors that are no layer's (position
    embeddings, tables of position biases): they are interpolated where a model is made for another image size.
    """
    values = frozen_values(model)
    known = [name for name in expected if name in values]
    if expected and not known:
        raise ValueError(
            f"this adapter belongs to a backbone with tensors such as {next(iter(expected))}, which "
            f"{type(model).__name__} does not have"
        )
    of_layers = _tensors_of_layers(model)
    for name in known:
        if values[name].is_meta or name not in of_layers:
            continue
        found, wanted = torch.tensor(_sample(values[name])), torch.tensor(expected[name])
        if not torch.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE * float(wanted.abs().max()) + 1e-8):
            raise ValueError(
                f"this adapter was trained on a backbone with other weights: {name} holds {found.tolist()}, the "
                f"adapter expects {wanted.tolist()}. Load the backbone it names in adapter_config.json (base_model)"
            )


def _tensors_of_layers(model: nn.Module) -> set[str]:
    """Canonical names of the backbone's tensors whose owner has no other module inside."""
    anatomy, found = anatomy_of(model), set()
    for path, _ in anatomy.backbone_parameters():
        owner = model.get_submodule(path.rpartition(".")[0])
        if all(child == "delta" for child in owner._modules):
            found.add(anatomy.canonical(path))
    return found


def base_model_block(model: nn.Module) -> dict[str, Any]:
    """Everything a file says about the backbone."""
    source = source_of(model)
    return {
        "library": library_of(source.name) if source else None,
        "id": source.name if source else None,
        "kwargs": source.kwargs if source else {},
        "checkpoint": source.checkpoint if source else None,
        "pretrained": source.pretrained if source else None,
        "class": type(model).__name__,
        "backbone": state_of(model).backbone,
        "blocks": state_of(model).blocks,
        "tower": state_of(model).tower,
        **preprocessing_of(model),
        "fingerprint": fingerprint(model),
    }


def rebuild(block: dict[str, Any], num_classes: int | None) -> nn.Module:
    """Build the backbone that a `base_model` block names. ValueError where it names none."""
    if not block.get("id"):
        raise ValueError(
            f"the adapter does not name a backbone that can be rebuilt (it was trained on a {block.get('class')} "
            "built by hand): build it yourself and pass it as model="
        )
    if block.get("pretrained") is False:
        raise ValueError(
            f"the adapter was trained on {block['id']} with random weights, which cannot be had again: pass "
            "that very model as model="
        )
    source = Source(block["id"], block.get("kwargs") or {}, block.get("checkpoint"))
    return create_backbone(source.name, num_classes=num_classes, checkpoint=source.checkpoint, **source.kwargs)
