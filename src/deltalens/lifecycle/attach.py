"""Attach an adapter to a model, and take all adapters off again."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence

from torch import nn

from deltalens.backbones.classifier import classes_of
from deltalens.backbones.describe import describe, own_backbone
from deltalens.lifecycle.state import KEY, ROOT, Adapter, State, all_slots, plain_labels, state_of
from deltalens.lifecycle.switch import set_adapter
from deltalens.lifecycle.wrapped import make_wrappings, on_plain_layers
from deltalens.methods.base import Method, Placement
from deltalens.sites import weights
from deltalens.sites.anatomy import Anatomy, Site, Tower, require
from deltalens.sites.output import class_count
from deltalens.sites.slots import Slots
from deltalens.sites.swap import Swapped, refuse_unswappable, swap, unswap


@on_plain_layers
def attach(
    model: nn.Module,
    config: Method | Sequence[Method],
    name: str = "default",
    *,
    num_classes: int | None = None,
    backbone: str | None = None,
    blocks: str | None = None,
    tower: str | None = None,
) -> nn.Module:
    """Freeze a model, insert an adapter into it in place, and make that adapter active. Returns the same model.

    config: a method's configuration, or several that together make one adapter. name: letters, digits, "-", "_".
    num_classes: give the adapter a fresh head with this many classes, or fresh heads where the model has several
    (distilled networks); None copies the model's own head, which is then trained. backbone: path of the submodule to
    adapt; everything outside it is trained and saved like a head. A model's attribute `adapted` is its default, which
    networks for dense prediction have. blocks: regular expression of block paths, for
    networks whose blocks are not found by themselves. tower: adapt only this tower of several ("vision" or "text" of a
    CLIP); the others stay frozen.

    Nothing of the model is replaced: parameters keep their names, modules their classes (`isinstance` holds) and
    attributes. The
    original head and unfrozen tensors are kept, so that `detach` and switching give them back bit for bit.

    Raises ValueError for a used name, a config that matches nothing, or a head that does not exist; TypeError where a
    block does not offer the slot that a method needs. The model is unchanged after an error.
    """
    configs = list(config) if isinstance(config, (list, tuple)) else [config]
    backbone = own_backbone(model) if backbone is None else backbone
    state = _check(model, configs, name, backbone, blocks, tower)
    if state is not None:
        backbone, blocks, tower = state.backbone, state.blocks, state.tower
    anatomy = describe(model, backbone, blocks, tower)
    for each in anatomy.towers:
        _share_layout(each)
    placements = [_placements(method, anatomy) for method in configs]
    unfrozen = list(dict.fromkeys(path for method in configs for path in method.unfreeze(anatomy)))
    unfrozen += [path for path in anatomy.outside_tensors if path not in unfrozen]
    wrappings = make_wrappings(configs, placements, anatomy, state)
    _check_matches(configs, placements, wrappings, unfrozen, anatomy)
    if num_classes is not None and anatomy.head is None:
        raise ValueError(
            f"num_classes={num_classes} was given, but {type(model).__name__} has no classifier layer to replace; "
            "create the model with a head (create_backbone(..., num_classes=...)), or build the head outside and pass "
            "backbone="
        )
    _check_heads(configs, anatomy)

    if state is None:
        state = State(
            backbone,
            blocks,
            {path: p.requires_grad for path, p in model.named_parameters()},
            class_count(model),
            plain_labels(model),
            tower,
        )
        model.__dict__[KEY] = state
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        swap(model, ROOT)
    adapter = state.adapters[name] = Adapter(configs, wrappings=wrappings, num_classes=state.num_classes)
    for method, placed in zip(configs, placements, strict=True):
        for site, slot, module in placed:
            _install(anatomy, site, slot, name, method.name, module)
    for wrapping in wrappings:
        for path in wrapping.originals:
            weights.swap_caller(anatomy, path)
    for each in anatomy.towers:
        _swap_owner(each)
    _overlay_tensors(model, state, adapter, unfrozen)
    _overlay_heads(model, state, adapter, anatomy, num_classes)
    set_adapter(model, name)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Remove every adapter and give the backbone back as it was, bit for bit. Returns the same model."""
    state = state_of(model)
    set_adapter(model, ())
    for path, _ in list(all_slots(model)):
        del model.get_submodule(path)._modules["delta"]
    for module in model.modules():
        if isinstance(module, Swapped):
            unswap(module)
            module.__dict__.pop("delta_layout", None)
    del model.__dict__[KEY]
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(state.requires_grad.get(path, True))
    return model.train(model.training)


# ------------------------------------------------------------------ checks before anything changes
def _check(model, configs, name, backbone, blocks, tower) -> State | None:
    if not configs or not all(isinstance(config, Method) for config in configs):
        raise TypeError(
            f"attach takes a method configuration such as MonaConfig(), or a list of them, not {configs or 'nothing'}"
        )
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"adapter name {name!r} must consist of letters, digits, '-' and '_'")
    for module in model.modules():
        refuse_unswappable(module)
    state = model.__dict__.get(KEY)
    if state is None:
        if any(True for _ in all_slots(model)):
            raise ValueError("this model holds a merged adapter or sits inside an adapted one; attach to a plain model")
        return None
    if name in state.adapters:
        raise ValueError(f"there is already an adapter named {name!r}; pass another name= or delete_adapter first")
    if (backbone or blocks or tower) and (backbone, blocks, tower) != (state.backbone, state.blocks, state.tower):
        raise ValueError(
            f"the first adapter was attached with backbone={state.backbone!r}, blocks={state.blocks!r}, "
            f"tower={state.tower!r}; further ones share that"
        )
    return state


def _placements(method: Method, anatomy: Anatomy) -> list[Placement]:
    placed = list(method.place(anatomy))
    for site, slot, module in placed:
        require(site, slot, type(method).__name__, anatomy.model)
        if slot.startswith("weights:"):
            weights.check_fit(site.module, site.parts[slot.partition(":")[2]], module)
    return placed


def _check_matches(configs, placements, wrappings, unfrozen: list[str], anatomy: Anatomy) -> None:
    parameters = dict(anatomy.model.named_parameters())
    unknown = [path for path in unfrozen if path not in parameters]
    if unknown:
        raise ValueError(f"a method asks to unfreeze tensors that do not exist: {', '.join(unknown[:3])}")
    for method, placed in zip(configs, placements, strict=True):
        wraps = any(wrapping.method == method.name for wrapping in wrappings)
        if not placed and not wraps and not method.head_only and not list(method.unfreeze(anatomy)):
            raise ValueError(
                f"{method} matches nothing in {type(anatomy.model).__name__}: it would train the head only"
            )
    if not any(placements) and not wrappings and not unfrozen and not anatomy.head_paths():
        raise ValueError(f"nothing would be trained: {type(anatomy.model).__name__} has no head")


def _check_heads(configs: list[Method], anatomy: Anatomy) -> None:
    """A head of a method's own stands where a classifier stood, and reads features (..., d), which a convolution as
    classifier does not get."""
    own = [type(method).__name__ for method in configs if type(method).head is not Method.head]
    if own and not anatomy.heads and anatomy.head_paths():
        raise TypeError(
            f"{own[0]} replaces a classifier layer, and {type(anatomy.model).__name__} has none: LinearConfig trains "
            "its head as it is"
        )
    for path in anatomy.heads:
        for method in configs:
            layer = anatomy.model.get_submodule(path)
            if type(method).head is not Method.head and isinstance(layer, nn.Conv2d):
                raise TypeError(
                    f"{type(method).__name__} replaces a linear classifier layer, and that of "
                    f"{type(anatomy.model).__name__} ({path}) is a convolution"
                )


# ------------------------------------------------------------------ changes
def _install(anatomy: Anatomy, site: Site, slot: str, name: str, method: str, module: nn.Module) -> None:
    reference = next(iter(site.module.parameters()), None)
    if reference is not None and reference.is_floating_point():
        module.to(reference.device, reference.dtype)
    module.train(site.module.training)
    if slot.startswith("weights:"):
        part_name = slot.partition(":")[2]
        part = site.parts[part_name]
        layer = weights.equip(site.module, part, site.layout)
        layer.delta.rows[part_name] = part.rows
        layer.delta.put(part_name, name, method, module)
        weights.swap_caller(anatomy, ".".join(piece for piece in (site.path, part.path) if piece))
        return
    _slots_of(site).put(slot, name, method, module)
    if slot == "pool":  # it wants the tokens that adapters added, too
        _slots_of(site.tower.blocks[-1]).put("tokens.kept", name, method, module)
    adds = slot.startswith(("tokens", "embed")) or getattr(module, "adds_tokens", False)
    if adds and (site.tower.carriers or site.tower.blocks_count_tokens):
        for carrier in site.tower.carriers:
            swap(carrier.module, carrier.family)
        for block in site.tower.blocks[site.index :]:
            _slots_of(block)


def _slots_of(site: Site) -> Slots:
    block = site.module
    if "delta" not in block._modules:
        block.delta = Slots(site.layout, last=site.is_last)
        for path, family in site.family.companions.items():
            swap(block.get_submodule(path), family)
    swap(block, site.family)
    return block.delta


def _share_layout(tower: Tower) -> None:
    """All adapters of a tower read the one layout whose grid its embedding records."""
    sites = [site.module for site in (tower.embed, tower.owner) if site is not None]
    layouts = [module.__dict__["delta_layout"] for module in sites if "delta_layout" in module.__dict__]
    shared = [block.module for block in tower.blocks if block.family.layout is None]
    layouts += [block.delta.layout for block in shared if "delta" in block._modules]
    tower.layout = next(iter(layouts), tower.layout)


def _swap_owner(tower: Tower) -> None:
    """Swap what belongs to a whole tower: the recorder of its grid, the owner of its tokens, the modules that are
    always swapped, and its last block, so that a head that reads the class token only costs one row there."""
    for site in (tower.embed, tower.owner, *tower.always):
        if site is not None:
            site.module.__dict__["delta_layout"] = tower.layout
            swap(site.module, site.family)
            if site.family.slots:
                _slots_of(site)
    if tower.owner is not None:
        _slots_of(tower.blocks[-1])


def _overlay_tensors(model: nn.Module, state: State, adapter: Adapter, unfrozen: Iterable[str]) -> None:
    for path in unfrozen:
        original = state.parameters.setdefault(path, model.get_parameter(path))
        adapter.parameters[path] = nn.Parameter(original.detach().clone())
        owner = path.rpartition(".")[0]
        for leaf, buffer in model.get_submodule(owner)._buffers.items():
            buffer_path = f"{owner}.{leaf}".lstrip(".")
            if buffer is not None and leaf not in model.get_submodule(owner)._non_persistent_buffers_set:
                state.buffers.setdefault(buffer_path, buffer)
                adapter.buffers[buffer_path] = state.buffers[buffer_path].detach().clone()


def _overlay_heads(model: nn.Module, state: State, adapter: Adapter, anatomy: Anatomy, num_classes: int | None) -> None:
    for path in anatomy.head_paths():
        original = state.heads.setdefault(path, model.get_submodule(path))
        if path in anatomy.heads and num_classes not in (None, classes_of(original)):
            head = _fresh_head(original, num_classes)
        else:
            head = copy.deepcopy(original)
        if path in anatomy.heads:
            adapter.num_classes = classes_of(head)
            for method in adapter.configs:
                head = method.head(head)
        adapter.heads[path] = head.requires_grad_(True)


def _fresh_head(original: nn.Module, num_classes: int) -> nn.Module:
    """A linear layer like the original, or a 1x1 convolution, with new weights for so many classes; a head of several
    layers says itself how it looks for other classes (`with_classes`)."""
    if hasattr(original, "with_classes"):
        return original.with_classes(num_classes)
    options = {"bias": original.bias is not None, "device": original.weight.device, "dtype": original.weight.dtype}
    if isinstance(original, nn.Conv2d):
        head: nn.Module = nn.Conv2d(original.in_channels, num_classes, 1, **options)
    else:
        head = nn.Linear(original.in_features, num_classes, **options)
    nn.init.trunc_normal_(head.weight, std=0.02)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return head
