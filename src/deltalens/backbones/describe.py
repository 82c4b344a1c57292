"""`describe(model)`: the anatomy of any model, known families first, the fallback for the rest."""

from __future__ import annotations

import importlib

from torch import nn

from deltalens.backbones import classifier, hf, open_clip, points, timm, torchvision, unknown, zero_shot
from deltalens.backbones.hf.names import in_classifier
from deltalens.backbones.timm.features import canonical_names
from deltalens.sites.anatomy import Anatomy, Site, Tower, prefixed
from deltalens.sites.swap import original_class

# module (or package) in which blocks are defined -> the files that know them, imported when a model has such a block
FAMILIES: dict[str, tuple[str, ...]] = {
    **timm.FAMILIES,
    **hf.FAMILIES,
    **torchvision.FAMILIES,
    **open_clip.FAMILIES,
    **points.FAMILIES,
}


def describe(
    model: nn.Module, backbone: str | None = None, blocks: str | None = None, only: str | None = None
) -> Anatomy:
    """Find towers, head and everything outside the backbone.

    backbone: path of the submodule that is the backbone; what lies outside it counts as head. blocks: regular
    expression of the block paths inside the backbone, for networks whose blocks are found wrongly or not at all. only:
    name of the one tower that is wanted ("vision", "text"); the others are left as they are. A model's attribute
    `adapted` is the default of backbone. Raises TypeError where no
    repeated blocks are found, AttributeError for an unknown path, ValueError for an unknown tower.
    """
    anatomy = _describe(model, own_backbone(model) if backbone is None else backbone, blocks)
    if only is None:
        return anatomy
    chosen = [tower for tower in anatomy.towers if tower.name == only]
    if not chosen:
        names = ", ".join(tower.name for tower in anatomy.towers)
        raise ValueError(f"{type(model).__name__} has no tower {only!r}; it has {names}")
    anatomy.parts = tuple(tower.root for tower in chosen if tower.root)
    anatomy.towers = chosen
    return anatomy


def own_backbone(model: nn.Module) -> str | None:
    """The path of the submodule that a model says is its backbone (`adapted`, of networks for dense prediction), None
    for a model that is one itself."""
    path = getattr(model, "adapted", None)
    return path if isinstance(path, str) else None


def _describe(model: nn.Module, backbone: str | None, blocks: str | None) -> Anatomy:
    body = _submodule(model, backbone)
    towers = _towers(body, blocks)
    if not towers:
        raise TypeError(
            f"no repeated blocks found in {type(body).__name__}; name them with blocks=, a regular expression of their "
            "paths, such as blocks=r'stages\\.\\d+\\.\\d+'"
        )
    canonical = in_classifier(canonical_names(model, backbone or ""), body)
    if backbone is None and all(tower.classifier is None for tower in towers) and classifier.reads_as(model):
        width = classifier.width_of_features(model)
        towers[0].classifier = Site("", model, classifier.CLASSIFIER, width, tower=towers[0])
    if backbone is not None and backbone == own_backbone(model):
        for tower in towers:
            tower.classifier = None  # nobody calls the backbone's own head there
    if backbone:
        modules, tensors = _outside(model, backbone)
        prefixed(backbone, towers)
        return Anatomy(model, towers, [], modules, canonical, tensors + _untrained(towers))
    heads = classifier.find_heads(model)
    if len(heads) > 1:  # one features tensor before one layer: several layers have no such place
        for tower in towers:
            tower.classifier = None
    anatomy = Anatomy(model, towers, heads, [], canonical, _untrained(towers))
    zero_shot.claim(model, anatomy)
    return anatomy


def _untrained(towers: list[Tower]) -> list[str]:
    return [path for tower in towers for path in tower.untrained]


def _submodule(model: nn.Module, path: str | None) -> nn.Module:
    try:
        return model.get_submodule(path or "")
    except AttributeError:
        children = ", ".join(name for name, _ in model.named_children())
        raise AttributeError(
            f"{type(model).__name__} has no submodule {path!r}; its children are: {children}"
        ) from None


def _towers(body: nn.Module, blocks: str | None) -> list[Tower]:
    found = known_towers(body) if blocks is None else []
    if not found:
        found = [tower for _, tower in unknown.find_towers(body, blocks)]
    return [tower for tower in found if not any(_contains(other, tower) for other in found)]


def known_towers(body: nn.Module) -> list[Tower]:
    """The towers that family files find, without the fallback."""
    found: list[Tower] = []
    for name in _family_files(body):
        for path, tower in importlib.import_module(name).find_towers(body):
            found += prefixed(path, [tower])
    return found


def _family_files(body: nn.Module) -> list[str]:
    """The files that know classes of the model, or classes that those are derived from."""
    classes = {base for module in body.modules() for base in original_class(module).__mro__}
    defined_in = {cls.__module__ for cls in classes}
    packages = {".".join(steps[: i + 1]) for steps in (m.split(".") for m in defined_in) for i in range(len(steps))}
    return list(dict.fromkeys(name for key, names in FAMILIES.items() if key in packages for name in names))


def _contains(outer: Tower, inner: Tower) -> bool:
    """Whether the blocks of one tower lie inside the patch embedding or a block of another: the ResNet stem of a hybrid
    is no tower of its own."""
    sites = [*outer.blocks, *([outer.embed] if outer.embed else []), *([outer.image] if outer.image else [])]
    around = tuple(f"{site.path}." for site in sites if site.path)
    return outer is not inner and all(block.path.startswith(around) for block in inner.blocks)


def _outside(model: nn.Module, backbone: str) -> tuple[list[str], list[str]]:
    """Paths of the largest submodules with parameters or buffers that do not contain the backbone, and of the
    parameters of the modules that do."""
    modules, tensors, parent = [], [], ""
    for step in backbone.split("."):
        for name, child in model.get_submodule(parent).named_children():
            if name != step and (any(True for _ in child.parameters()) or any(True for _ in child.buffers())):
                modules.append(f"{parent}.{name}".lstrip("."))
        tensors += [f"{parent}.{name}".lstrip(".") for name in model.get_submodule(parent)._parameters]
        parent = f"{parent}.{step}".lstrip(".")
    return modules, tensors
