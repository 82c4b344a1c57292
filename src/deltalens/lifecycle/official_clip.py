"""The names that official repositories give to what they train beside a CLIP.

One function per source: (model, adapter, official state dict) -> (our names and tensors, entries used). Keys may have
the prefix of the module that holds them (`prompt_learner.`, `adapter.`), and Lightning's or DataParallel's `module.`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from deltalens.lifecycle.state import all_slots
from deltalens.lifecycle.tensors import adapter_tensors, anatomy_of
from deltalens.methods.tip_adapter import FeatureCache, names_as_bytes

Import = tuple[dict[str, Tensor], int]
_MMA = re.compile(
    r"(?:.+\.)?(?:(text|visual)_adapter\.(\d+)\.(?:down\.0|(up))|(shared)_adapter\.(\d+)\.0)\.(weight|bias)"
)


def mma(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """Multi-Modal-Adapter: `visual_adapter.5.down.0.weight`, `text_adapter.5.up.bias`, `shared_adapter.5.0.weight`,
    counted from 1, 0 before the first block. Where towers differ in depth the number counts as in `MMAConfig`."""
    number = _numbers(model)
    wanted: dict[tuple[str, int, str, str], str] = {}  # (tower, number, part, leaf) -> our name
    for key in adapter_tensors(model, name):
        place, mark, rest = key.rpartition(".mma.")
        if mark:
            tower, index = number(place)
            part, leaf = rest.split(".")
            wanted["shared" if part == "shared" else tower, index, part, leaf] = key
    found: dict[str, Tensor] = {}
    used = 0
    for key, tensor in state_dict.items():
        match = _MMA.fullmatch(key)
        if match:
            tower = match[1] or "shared"
            part = "shared" if match[4] else match[3] or "down"
            ours = wanted.get((tower, int(match[2] or match[5]), part, match[6]))
            if ours is None:
                raise ValueError(
                    f"the checkpoint has {key}, which the adapter has no place for: attach MMAConfig with the start, "
                    "end and towers that it was trained with"
                )
            found[ours] = tensor
            used += 1
    return found, used


def _numbers(model: nn.Module) -> Callable[[str], tuple[str, int]]:
    """Place of an MMA module -> ("visual" or "text", its official number)."""
    anatomy = anatomy_of(model)
    depth = min(len(tower.blocks) for tower in anatomy.towers)
    blocks = {
        anatomy.canonical(block.path): ("text" if tower.name == "text" else "visual", i + 1 - len(tower.blocks) + depth)
        for tower in anatomy.towers
        for i, block in enumerate(tower.blocks)
    }

    def number(place: str) -> tuple[str, int]:
        path, _, slot = place.rpartition(".")
        if slot == "block_parallel":
            return blocks[path]
        return ("text" if slot == "text_context" else "visual"), 0

    return number


def coop(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """CoOp: `ctx`; `token_prefix` and `token_suffix` are the class names' embeddings, which are not read."""
    return _renamed(state_dict, r"(?:.+\.)?(ctx)", "text_context.coop.")


def cocoop(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """CoCoOp: `ctx`, `meta_net.linear1.weight`, ..."""
    return _renamed(state_dict, r"(?:.+\.)?(ctx|meta_net\.linear[12]\.(?:weight|bias))", "text_context.cocoop.")


def clip_adapter(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """CLIP-Adapter: `fc.0.weight`, `fc.2.weight`."""
    return _renamed(state_dict, r"(?:.+\.)?(fc\.[02]\.weight)", "output.clip_adapter.")


def tip_adapter(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """Tip-Adapter saves single tensors; they are given as {"cache_keys": (D, N), "cache_values": (N, C) one-hot}, and
    for Tip-Adapter-F, whose keys were trained, `weight` (N, D) with "cache_values"; it stands before "cache_keys"."""
    caches = [m for _, slots in all_slots(model) for _, m in slots.of(name) if isinstance(m, FeatureCache)]
    if len(caches) != 1:
        raise ValueError("the adapter has no Tip-Adapter: attach TipAdapterConfig first")
    weight = next((tensor for key, tensor in state_dict.items() if key.rpartition(".")[2] == "weight"), None)
    keys, values = state_dict.get("cache_keys"), state_dict.get("cache_values")
    if values is None or (weight is None and keys is None):
        raise ValueError('Tip-Adapter needs "cache_values" with "cache_keys" or, for trained keys, "weight"')
    rows = weight if weight is not None else keys.T
    if values.shape != (len(rows), model.num_classes) or not bool((values.sum(1) == 1).all()):
        raise ValueError(
            f"cache_values have shape {tuple(values.shape)}, expected one-hot rows ({len(rows)}, {model.num_classes})"
        )
    place = "logits.tip_adapter."
    found = {
        f"{place}keys": rows,
        f"{place}labels": values.argmax(1),
        f"{place}classes": names_as_bytes(model.class_names),
    }
    return found, 1 + sum(tensor is not None for tensor in (weight, keys))


def _renamed(state_dict: Mapping[str, Tensor], pattern: str, place: str) -> Import:
    """What matches, its first group behind `place`."""
    matches = {key: re.fullmatch(pattern, key) for key in state_dict}
    found = {place + match[1]: state_dict[key] for key, match in matches.items() if match}
    return found, len(found)


# further sources of CLIP's methods are added here
SOURCES: dict[str, Callable[[nn.Module, str, Mapping[str, Tensor]], Import]] = {
    "mma": mma,
    "coop": coop,
    "cocoop": cocoop,
    "clip_adapter": clip_adapter,
    "tip_adapter": tip_adapter,
}
