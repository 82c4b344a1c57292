"""torchvision's classifiers by name: `torchvision/<model>[.<weights>]`, its best weights where none are named."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from deltalens.backbones.checkpoint import load_weights, read_weights
from deltalens.backbones.preprocessing import crop_share, record

AUXILIARY = {"googlenet", "inception_v3"}  # further heads inside, which a frozen network has no use for


def create(
    name: str, num_classes: int | None, pretrained: bool, checkpoint: str | None, options: dict[str, Any]
) -> tuple[nn.Module, str]:
    """(classifier, its full name with the weights). options go to torchvision's function; img_size is image_size of
    the vision transformers, and a check for all others, which take any size."""
    architecture, weights = _resolve(name)
    options = dict(options)
    size = options.pop("img_size", None)
    if size is not None and not isinstance(size, int):
        raise ValueError(f"torchvision's models take square images, got img_size={size}")
    model = _build(architecture, weights, size, pretrained and checkpoint is None, options)
    path, head = _head(model, name)
    if num_classes is not None and num_classes != _outputs(head):
        model.set_submodule(path, _fresh(head, num_classes))
    if checkpoint is not None:
        load_weights(model, read_weights(checkpoint), {f"{path}.weight", f"{path}.bias"}, checkpoint)
    record(model, _preprocessing(weights, size))
    return model, f"torchvision/{architecture}.{weights.name}"


def list_models(pattern: str, pretrained: bool) -> list[str]:
    """Full names whose part after `torchvision/` matches; with `pretrained` one for each weights."""
    from torchvision import models

    names = models.list_models(module=models)
    if pretrained:
        names = [f"{name}.{weights.name}" for name in names for weights in models.get_model_weights(name)]
    wanted = (pattern, f"{pattern}.*")
    return [f"torchvision/{name}" for name in names if any(fnmatch.fnmatch(name, each) for each in wanted)]


def _resolve(name: str) -> tuple[str, Any]:
    """(architecture, its weights)."""
    from torchvision import models

    architecture, _, tag = name.partition(".")
    known = models.list_models(module=models)
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=4)
        hint = f"; did you mean {', '.join(f'torchvision/{n}' for n in near)}?" if near else ""
        raise ValueError(f"torchvision has no classifier {architecture!r}{hint}")
    weights = models.get_model_weights(architecture)
    if tag and tag not in weights.__members__:
        raise ValueError(
            f"torchvision/{architecture} has no weights {tag!r}; it has {', '.join(weights.__members__)}, and DEFAULT "
            "is the best of them"
        )
    return architecture, weights[tag or "DEFAULT"]


# ------------------------------------------------------------------ model
def _build(architecture: str, weights: Any, size: int | None, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    builder = models.get_model_builder(architecture)
    if architecture in AUXILIARY:
        options = {"aux_logits": False, **options}
    native = weights.transforms().crop_size[0]
    if architecture.startswith("vit_"):
        size = size or native
        if not pretrained:
            return _vit(builder, size, options)
        if size != native:
            return _resized_vit(builder, weights, size, options)
    elif not pretrained:
        if architecture in AUXILIARY:
            options = {"transform_input": True, "init_weights": False, **options}
        model = builder(weights=None, **options)
        _check_size(model, architecture, size)
        return model
    with _tensors_only(weights):
        model = builder(weights=weights, **options)
    _check_size(model, architecture, size)
    return model


def _resized_vit(builder: Any, weights: Any, size: int, options: dict[str, Any]) -> nn.Module:
    from torchvision.models.vision_transformer import interpolate_embeddings

    model = _vit(builder, size, options)
    with _tensors_only(weights):
        tensors = weights.get_state_dict(progress=True, check_hash=True)
    model.load_state_dict(interpolate_embeddings(size, model.patch_size, tensors))
    return model


def _vit(builder: Any, size: int, options: dict[str, Any]) -> nn.Module:
    try:
        return builder(weights=None, image_size=size, **options)
    except AssertionError as error:
        raise ValueError(f"torchvision's vision transformer cannot be built for {size} pixels: {error}") from error


@contextlib.contextmanager
def _tensors_only(weights: Any) -> Iterator[None]:
    """torchvision reads its files with the whole of pickle; within the context, with weights_only=True. What it says
    about a download goes to stderr, so that it is no part of a command's result."""
    weights.get_state_dict = partial(type(weights).get_state_dict, weights, weights_only=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        del weights.get_state_dict


def _check_size(model: nn.Module, architecture: str, size: int | None) -> None:
    """ValueError where the network does not take images of that size; a forward of fake tensors shows it."""
    if size is None:
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    training = model.training
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model.eval()(torch.empty(2, 3, size, size))
    except Exception as error:
        raise ValueError(f"torchvision/{architecture} does not take images of {size} pixels: {error}") from error
    finally:
        model.train(training)


def _head(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Path and layer of the classifier: the last linear layer, or SqueezeNet's 1x1 convolution."""
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    path, layer = next(pair for pair in reversed(layers) if isinstance(pair[1], nn.Linear) or "classifier" in pair[0])
    return path, layer


def _outputs(head: nn.Module) -> int:
    return head.out_channels if isinstance(head, nn.Conv2d) else head.out_features


def _fresh(head: nn.Module, num_classes: int) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    if isinstance(head, nn.Conv2d):
        fresh: nn.Module = nn.Conv2d(head.in_channels, num_classes, head.kernel_size, bias=head.bias is not None)
    else:
        fresh = nn.Linear(head.in_features, num_classes, bias=head.bias is not None)
    nn.init.trunc_normal_(fresh.weight, std=0.02)
    if fresh.bias is not None:
        nn.init.zeros_(fresh.bias)
    return fresh


def _preprocessing(weights: Any, size: int | None) -> dict[str, Any]:
    own = weights.transforms()
    crop, resized = own.crop_size[0], own.resize_size[0]
    side = size or crop
    return {
        "input_size": [3, side, side],
        "mean": list(own.mean),
        "std": list(own.std),
        "interpolation": own.interpolation.value,
        "crop_pct": crop_share(crop, resized),
        "crop_mode": "torchvision",
    }
