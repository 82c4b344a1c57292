"""The names that official repositories give to what they train beside a CLIP.

One function per source: (model, adapter, official state dict) -> (our names and tensors, entries used). Keys may have
the prefix of the module that holds them (`prompt_learner.`, `adapter.`), and Lightning's or DataParallel's `module.`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from deltalens.lifecycle.state import all_slots, state_of
from deltalens.lifecycle.tensors import adapter_tensors, anatomy_of
from deltalens.methods.maple import CoupledTokens, DeepTokens
from deltalens.methods.tip_adapter import FeatureCache, names_as_bytes
from deltalens.sites.norms import is_norm

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


def kgcoop(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """KgCoOp: CoOp's `ctx`; its `meta_net` and `adapter` are never used and not read."""
    return _renamed(state_dict, r"(?:.+\.)?(ctx)", "text_context.kgcoop.")


def prograd(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """ProGrad: CoOp's `ctx`."""
    return _renamed(state_dict, r"(?:.+\.)?(ctx)", "text_context.prograd.")


_MAPLE = re.compile(
    r"(?:.+\.)?(ctx|proj\.(?:weight|bias)|compound_prompts_text\.\d+|"
    r"compound_prompt_projections\.\d+\.(?:weight|bias))"
)


def maple(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """MaPLe: `ctx` and `proj.weight` of block 1, `compound_prompts_text.0` and `compound_prompt_projections.0.weight`
    of block 2, and so on."""
    ours = {id(tensor): key for key, tensor in adapter_tensors(model, name).items()}
    blocks = {block.path: i for tower in anatomy_of(model).towers for i, block in enumerate(tower.blocks)}
    wanted: dict[str, str] = {}  # official name -> ours
    for path, slots in all_slots(model):
        for module in (module for _, module in slots.of(name) if isinstance(module, CoupledTokens)):
            words, layer = "ctx", "proj"
            if isinstance(module, DeepTokens):
                number = blocks[path] - 1
                words, layer = f"compound_prompts_text.{number}", f"compound_prompt_projections.{number}"
            wanted[words] = ours[id(module.words.ctx)]
            wanted |= {f"{layer}.{leaf}": ours[id(getattr(module.proj, leaf))] for leaf in ("weight", "bias")}
    matches = {key: match[1] for key in state_dict if (match := _MAPLE.fullmatch(key))}
    if set(matches.values()) != set(wanted):
        depth, own = (sum("compound_prompts_text" in key for key in names) + 1 for names in (matches, wanted))
        raise ValueError(
            f"the checkpoint has words in {depth} blocks, and the adapter in {own}: attach MaPLeConfig(depth={depth})"
            if depth != own
            else f"this is no whole MaPLe checkpoint: it lacks {', '.join(sorted(set(wanted) - set(matches.values())))}"
        )
    return {wanted[official]: state_dict[key] for key, official in matches.items()}, len(matches)


def rpo(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """RPO: `text_prompt` (K, d), `img_prompt` (K, C)."""
    places = {"text_prompt": "", "img_prompt": ""}
    for key in adapter_tensors(model, name):
        if key.endswith("embed.rpo.prompt"):
            places["text_prompt" if key.startswith("text_embed.") else "img_prompt"] = key
    matches = {key: key.rpartition(".")[2] for key in state_dict if key.rpartition(".")[2] in places}
    return {places[leaf]: state_dict[key] for key, leaf in matches.items()}, len(matches)


_LASP_NORM = re.compile(r"(?:.+\.)?(?:image_encoder|visual)\.transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)")


def lasp(model: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> Import:
    """LASP: `ctx`, `w`, and of the whole image encoder that it saves `resblocks.0.ln_1.weight` and so on, the norms
    that are trained. An adapter without norms takes only checkpoints whose norms are still the model's own."""
    found, used = _renamed(state_dict, r"(?:.+\.)?(ctx)", "text_context.lasp.")
    shift, more = _renamed(state_dict, r"(?:.+\.)?(w)", "text_output.lasp.")
    own = adapter_tensors(model, name)
    if shift and not shift.keys() <= own.keys() and any(bool(tensor.any()) for tensor in shift.values()):
        raise ValueError("the checkpoint has a vector w, and the adapter none: attach LASPConfig(correction=True)")
    norms, trained = _norms_of_images(model), state_of(model).adapters[name].parameters
    anatomy = anatomy_of(model)
    for key, tensor in state_dict.items():
        match = _LASP_NORM.fullmatch(key)
        if match is None:
            continue
        path = norms.get((int(match[1]), int(match[2]), match[3]))
        if path is None:
            raise ValueError(f"the checkpoint has {key}, and the model's image tower no such norm")
        if path in trained:
            found[anatomy.canonical(path)] = tensor
            used += 1
        elif not torch.allclose(tensor.float(), model.get_parameter(path).detach().float().cpu(), rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"{key} was trained in the checkpoint, and not in the adapter: attach LASPConfig(norms=True)"
            )
    kept = {key: tensor for key, tensor in shift.items() if key in own}
    return found | kept, used + len(kept) * more


def _norms_of_images(model: nn.Module) -> dict[tuple[int, int, str], str]:
    """(block, 1 or 2, weight or bias) -> path, of the norms in the image tower's blocks."""
    found: dict[tuple[int, int, str], str] = {}
    vision = next(tower for tower in anatomy_of(model).towers if tower.name == "vision")
    for index, block in enumerate(vision.blocks):
        inside = [path for path, module in block.module.named_modules() if is_norm(module)]
        norms = [path for path in inside if "delta" not in path.split(".")]
        for number, path in enumerate(norms, 1):
            for leaf in ("weight", "bias"):
                found[index, number, leaf] = f"{block.path}.{path}.{leaf}"
    return found


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


SOURCES: dict[str, Callable[[nn.Module, str, Mapping[str, Tensor]], Import]] = {
    "mma": mma,
    "coop": coop,
    "cocoop": cocoop,
    "kgcoop": kgcoop,
    "prograd": prograd,
    "maple": maple,
    "rpo": rpo,
    "lasp": lasp,
    "clip_adapter": clip_adapter,
    "tip_adapter": tip_adapter,
}
