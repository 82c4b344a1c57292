"""An adapter between networks around one backbone: classifier, feature extractor, networks for dense prediction.

The rule: tensors inside the backbone go where they belong, whatever is around it. A head is loaded where the network
has a head of the same kind (a classifier's, or the same `head=` of `create_backbone`); any other network keeps its own
head as it is, and a warning of the logger says that the file's was passed over. What the file says about its head
(class names, metrics, preprocessing) is passed over with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deltalens.backbones.describe import own_backbone
from deltalens.backbones.names import source_of
from deltalens.lifecycle.state import KEY, State
from deltalens.lifecycle.tensors import adapter_tensors, anatomy_of, head_tensors, unfrozen_tensors

log = logging.getLogger(__name__)
OUTSIDE = "outside."


def places(model: nn.Module, base: dict[str, Any]) -> dict[str, str | None]:
    """Where in this model the adapter of a file belongs: `attach`'s backbone, blocks and tower.

    base: the file's `base_model` block. A dense network's own backbone comes first, and an adapter of one belongs to
    the whole of a model that is the backbone itself.
    """
    state: State | None = model.__dict__.get(KEY)
    if state is not None:
        return {"backbone": state.backbone, "blocks": state.blocks, "tower": state.tower}
    backbone = own_backbone(model)
    if backbone is None and _dense_head(base) is None:
        backbone = base.get("backbone")
    return {"backbone": backbone, "blocks": base.get("blocks"), "tower": base.get("tower")}


def same_head(model: nn.Module, base: dict[str, Any]) -> bool:
    """Whether the model has the kind of head that the file's adapter was trained with."""
    if own_backbone(model) is None:
        return _dense_head(base) is None
    source = source_of(model)
    return source is not None and _dense_head(base) == source.kwargs.get("head") is not None


def without_head(model: nn.Module, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors without its head, with the model's own in its place; also with the model's own norms outside
    the blocks, which a network of another kind may lack (the final norm of a classifier)."""
    heads = tuple(f"{path}." for path in config.get("heads") or ())
    passed = [key for key in tensors if key.startswith((OUTSIDE, *heads))]
    kept = {key: tensor for key, tensor in tensors.items() if key not in passed}
    own = head_tensors(model, name) | {
        key: tensor
        for key, tensor in unfrozen_tensors(model, name).items()
        if key.startswith(OUTSIDE) or not key.startswith(_blocks(model))
    }
    own = {key: tensor.detach().clone() for key, tensor in own.items() if key not in kept}
    if passed:
        log.warning(
            "the adapter's head (%d tensors, such as %s) is passed over: it belongs to %s, and %s keeps its own head, "
            "which is fresh unless you load one",
            len(passed),
            passed[0],
            _in_words(config.get("base_model") or {}),
            type(model).__name__,
        )
    return {**kept, **own}


def beyond(model: nn.Module, name: str) -> Callable[[str], bool]:
    """Whether a file's tensor belongs to a part of the plain classifier that this network does not have."""
    anatomy, own = anatomy_of(model), adapter_tensors(model, name).keys()
    names = {anatomy.canonical(path) for path, _ in anatomy.backbone_parameters()}
    blocks = _blocks(model)
    return lambda key: key not in own and not key.startswith((OUTSIDE, *blocks)) and key not in names


def _blocks(model: nn.Module) -> tuple[str, ...]:
    anatomy = anatomy_of(model)
    return tuple(f"{anatomy.canonical(block.path)}." for block in anatomy.blocks())


def _dense_head(base: dict[str, Any]) -> str | None:
    return (base.get("kwargs") or {}).get("head")


def _in_words(base: dict[str, Any]) -> str:
    head = _dense_head(base)
    return "a classifier" if head is None else f"a network with head={head!r}"
