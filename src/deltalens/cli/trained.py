"""Load a trained adapter, or a zero-shot model in its place, for a command that uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from jsonargparse import ArgumentParser, Namespace
    from torch import nn


@dataclass(frozen=True)
class Classifier:
    """model: in eval mode on its device. info: what the adapter's file says beside tensors, empty without adapter.
    said: how messages and results call it."""

    model: nn.Module
    class_names: list[str]
    device: torch.device
    said: str
    info: dict[str, Any] = field(default_factory=dict)


def add_model_arguments(parser: ArgumentParser) -> None:
    """Declare the adapter's folder, and what may stand in its place. The command's `translate` is `room_for_model`."""
    add = parser.add_argument
    add("adapter", type=str, help="folder of the adapter; left out with --model")
    add("--model", type=str | None, default=None, help="in place of an adapter, a model with an image and a text tower")
    add("--checkpoint", type=str | None, default=None, help="weights file of --model, instead of the hub's")


def room_for_model(argv: list[str]) -> list[str]:
    """With --model no adapter is named: an empty word takes its place."""
    named = any(word == "--model" or word.startswith("--model=") for word in argv)
    return ["", *argv] if named else argv


def load_classifier(
    args: Namespace, class_names: Sequence[str] | None = None, templates: Sequence[str] | None = None
) -> Classifier:
    """The adapter that `args.adapter` names, or the zero-shot classifier of `args.model`, with these classes.

    class_names: None for the adapter's own. templates: None for the adapter's own, or "a photo of a {}.". Raises
    ValueError where an adapter's classes are outputs of a head, and as `deltalens.from_pretrained` and
    `deltalens.create_backbone`.
    """
    import torch

    import deltalens as dl

    if bool(args.adapter) == bool(args.model):
        which = f"both {args.adapter} and --model {args.model}" if args.model else "neither"
        raise ValueError(f"name an adapter's folder, or a zero-shot model with --model; got {which}")
    if args.model is None:
        if args.checkpoint is not None:
            raise ValueError("--checkpoint is for --model: an adapter's folder names its own backbone")
        model, own_names, device = load_trained(args.adapter, args.device)
        names = own_names if class_names is None else list(class_names)
        if class_names is not None or templates is not None:
            set_classes(model, names, templates, args.adapter)
        return Classifier(model, names, device, args.adapter, dl.adapter_info(model))
    if class_names is None:
        raise ValueError(f"{args.model} without an adapter has no classes of its own: name them with --classes")
    said: dict[str, Any] = {} if templates is None else {"templates": templates}
    model = dl.create_backbone(args.model, checkpoint=args.checkpoint, class_names=list(class_names), **said)
    device = torch.device(chosen_device(args.device))
    return Classifier(model.eval().to(device), list(class_names), device, args.model)


def set_classes(model: nn.Module, names: Sequence[str], templates: Sequence[str] | None, said: str) -> None:
    """Give an adapted model other classes or templates. ValueError where it cannot take them.

    said: the adapter's folder.
    """
    import deltalens as dl

    if not isinstance(model, dl.ZeroShotClassifier):
        raise ValueError(
            f"the classes of {said} are outputs of a head that was trained for them, and no texts: other classes need "
            "an adapter trained with --templates, or a zero-shot model (--model open_clip/... in place of the adapter)"
        )
    own = [module.template for module in model.live("text.context") if getattr(module, "template", None)]
    if templates is not None and own:
        raise ValueError(f"{said} has learned words in the place of templates ({own[-1]!r}): leave --templates out")
    described = model.descriptions if templates is None else None
    missing = [name for name in names if name not in described] if described is not None else []
    if missing:
        raise ValueError(
            f"the classes of {said} are described by sentences, and it has none for {missing[0]}: pass --templates, "
            "such as 'a photo of a {}.'"
        )
    model.set_classes(names, templates)


def trained_with_sigmoid(model: nn.Module) -> bool:
    """Whether the model's logits have a bias, so that the sigmoid of each is a probability by itself (SigLIP)."""
    import deltalens as dl
    from deltalens.backbones.two_towers import two_towers_of

    return isinstance(model, dl.ZeroShotClassifier) and two_towers_of(model.clip).bias(model.clip) is not None


def load_trained(directory: str, device: str | None) -> tuple[nn.Module, list[str], torch.device]:
    """(model in eval mode on the device, class names, device). Where the adapter names no classes they are "0", "1"...

    Raises as `deltalens.from_pretrained`; ValueError for a device that is not there.
    """
    import torch

    import deltalens as dl
    from deltalens.lifecycle.state import adapter_of

    model = dl.from_pretrained(directory)
    class_names = dl.class_names(model) or [str(i) for i in range(adapter_of(model)[1].num_classes or 0)]
    chosen = chosen_device(device)
    return model.to(chosen), class_names, torch.device(chosen)


def chosen_device(name: str | None) -> str:
    """The device of that name, or the fastest there is. ValueError for one that is not there."""
    import torch

    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.append("mps")
    if torch.cuda.is_available():
        available.append("cuda")
    if name is None:
        return available[-1]
    if name.partition(":")[0] not in available:
        raise ValueError(f"there is no device {name!r} here; available: {', '.join(available)}")
    return name


def label_of(model: nn.Module, folder: str) -> str:
    """For figures: the last two names of the path as it was given, and the method."""
    from pathlib import Path

    from deltalens.lifecycle.state import adapter_of

    methods = " + ".join(method.name for method in adapter_of(model)[1].configs)
    return f"{'/'.join(Path(folder).parts[-2:])} ({methods})"
