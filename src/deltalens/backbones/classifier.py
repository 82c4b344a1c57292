"""Classifiers whatever their blocks: which layers give the logits, and what timm's interface says about the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from deltalens.sites.anatomy import Family
from deltalens.sites.output import live, through_output
from deltalens.sites.swap import original_method

# paths of the classifier layers in libraries that do not name them; of several, every one gives logits
COMMON_HEADS: tuple[tuple[str, ...], ...] = (
    ("head.fc",),
    ("cls_classifier", "distillation_classifier"),
    ("head",),
    ("fc",),
    ("classifier",),
    ("heads.head",),
    ("head.head",),
)


# ------------------------------------------------------------------ layers that give logits
def classes_of(module: nn.Module | None) -> int | None:
    """Number of classes that a layer gives logits of: a linear layer, a 1x1 convolution, or what an adapter has put in
    the place of one. None for anything else."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels if module.kernel_size == (1, 1) and module.groups == 1 else None
    return getattr(module, "out_features", None) if hasattr(module, "in_features") else None


def find_heads(model: nn.Module) -> list[str]:
    """Paths of the classifier layers. Distilled networks and networks of several branches have more than one, and need
    every one of them replaced when the number of classes changes."""
    modules = dict(model.named_modules())
    if hasattr(model, "get_classifier"):
        given, paths = model.get_classifier(), {id(module): path for path, module in modules.items()}
        layers = [*given] if isinstance(given, (tuple, list, nn.ModuleList)) else [given]
        found = [path for layer in layers for path in _layers_in(model, paths.get(id(layer)), modules)]
        # timm names layers there that get_classifier leaves out, such as VOLO's auxiliary head
        return list(dict.fromkeys([*found, *_named_by_timm(model, modules)])) if found else []
    for paths in COMMON_HEADS:
        if all(classes_of(modules.get(path)) or isinstance(modules.get(path), nn.Sequential) for path in paths):
            found = [layer for path in paths for layer in _layers_in(model, path, modules)]
            if found:
                return found
    return []


def _named_by_timm(model: nn.Module, modules: dict[str, nn.Module]) -> Iterable[str]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return [name for name in ((names,) if isinstance(names, str) else names) if classes_of(modules.get(name))]


def _layers_in(model: nn.Module, path: str | None, modules: dict[str, nn.Module]) -> list[str]:
    """The classifier layers in what a library calls the classifier: those with as many outputs as the model has
    classes, the last layer where the model does not say."""
    if path is None:
        return []
    layers = list(_classifying(path, modules[path]))
    classes = getattr(model, "num_classes", None)
    return [name for name in layers if classes_of(modules[name]) == classes] or layers[-1:]


def _classifying(path: str, module: nn.Module) -> Iterator[str]:
    if classes_of(module):
        yield path
        return
    for name, child in module.named_children():
        yield from _classifying(f"{path}.{name}".lstrip("."), child)


# ------------------------------------------------------------------ timm's interface
def reads_as(model: nn.Module) -> bool:
    """Whether the model is classifier(forward_head(forward_features(x))) with one linear classifier, as most of timm's
    models are."""
    if not all(hasattr(model, name) for name in ("forward_features", "forward_head", "get_classifier")):
        return False
    layer, heads = model.get_classifier(), find_heads(model)
    return len(heads) == 1 and hasattr(layer, "in_features") and model.get_submodule(heads[0]) is layer


def width_of_features(model: nn.Module) -> int:
    """Channels of the features that the classifier layer reads; wider than the last block where layers lie between
    (EfficientNet)."""
    return getattr(model.get_classifier(), "in_features", None) or model.num_features


def _forward(self: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    if not live(self, "output"):
        return original_method(self, "forward")(x, *args, **kwargs)
    features = self.forward_head(self.forward_features(x, *args, **kwargs), pre_logits=True)
    return through_output(self, features, x)


CLASSIFIER = Family(
    name="deltalens.backbones.classifier:CLASSIFIER", methods={"forward": _forward}, slots=frozenset({"output"})
)
