"""`deltalens analyze layers`: which dataset a sample comes from, by the features of every block of a model's towers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from jsonargparse import Namespace
    from torch import nn

    from deltalens.data import Splits
    from deltalens.studies.recognition import StageAccuracy

FEW = 10  # classes held out of each dataset


def run_layers(args: Namespace) -> None:
    """Compute features, tell datasets apart, print the table, and write figure and CSV."""
    from deltalens.studies.figure import check_kind
    from deltalens.studies.recognition_output import to_table, write_recognition

    check_kind(args.output)
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds names a seed twice: {', '.join(map(str, args.seeds))}")
    if (args.model is None) != (len(args.adapters) == 1):
        raise ValueError("deltalens analyze layers takes one model: the folder of an adapter, or --model NAME")
    read = {name: _read(args, name, folder) for name, folder in _named(args.data, "--data").items()}
    if len(read) < 2:
        raise ValueError(f"datasets are told from each other: give --data NAME=FOLDER twice or more, got {len(read)}")
    model, title, device = _model(args)
    texts = args.tower != "vision" and _has_texts(args, model)
    found: list[StageAccuracy] = []
    if args.tower != "text":
        found += _of_images(args, model, device, read)
    if texts:
        found += _of_texts(args, model, read)
    file = write_recognition(found, list(read), args.seeds, title, args.output)
    print(f"\n{to_table(found)}\n")
    print(f"chance is {100 / len(read):.1f} %; drawn in {args.output}; numbers in {file}")


# ------------------------------------------------------------------ what is given
def _named(words: Any, option: str) -> dict[str, str]:
    """NAME=VALUE words as a mapping; ValueError for others."""
    found: dict[str, str] = {}
    for word in [words] if isinstance(words, str) else words:
        name, equals, value = word.partition("=")
        if not (equals and name and value):
            raise ValueError(f"layers takes {option} NAME=VALUE, such as --data pets=photos/pets, got {word!r}")
        if name in found:
            raise ValueError(f"{option} names {name!r} twice")
        found[name] = value
    return found


def _read(args: Namespace, name: str, folder: str) -> Splits:
    from deltalens.data import ReadOptions, read_data

    words = [args.format] if isinstance(args.format, str) else args.format
    formats = _named([word for word in words if "=" in word], "--format")
    others = [word for word in words if "=" not in word]
    unknown = [each for each in formats if each not in _named(args.data, "--data")]
    if len(others) > 1 or unknown:
        problem = f"names {unknown[0]!r}, which no --data does" if unknown else f"is given twice: {', '.join(others)}"
        raise ValueError(f"--format {problem}; it is one for all datasets, or NAME=FORMAT for each")
    options = ReadOptions(skip_broken=args.skip_broken, allow_missing_classes=True)
    return read_data(folder, formats.get(name, others[0] if others else "auto"), options=options)


def _model(args: Namespace) -> tuple[nn.Module, str, torch.device]:
    """(model, what it is called, device). A name with two towers becomes a classifier made of texts, whatever texts."""
    import torch

    import deltalens as dl
    from deltalens.cli.trained import chosen_device, label_of, load_trained

    if args.model is None:
        model, _, device = load_trained(args.adapters[0], args.device)
        return model, label_of(model, args.adapters[0]), device
    device = torch.device(chosen_device(args.device))
    try:
        model = dl.create_backbone(args.model, checkpoint=args.checkpoint, class_names=["thing"])
    except ValueError:  # no two towers; if something else is wrong, the next line says it
        model = dl.create_backbone(args.model, checkpoint=args.checkpoint)
    return model.to(device), args.model, device


def _has_texts(args: Namespace, model: nn.Module) -> bool:
    """Whether the text tower can be looked at. Where it was not asked for by name, a line says why not."""
    from deltalens.studies.layer_features import readable_texts

    if readable_texts(model) is not None:
        return True
    problem = f"{type(model).__name__} has no text tower that is known inside"
    if args.tower is not None:
        raise ValueError(f"{problem}: choose --tower vision")
    print(f"{problem}: the image tower alone is analysed")
    return False


# ------------------------------------------------------------------ the two towers
def _of_images(args: Namespace, model: nn.Module, device: torch.device, read: dict[str, Splits]) -> list[StageAccuracy]:
    import deltalens as dl
    from deltalens.data import eval_transform
    from deltalens.data.formats import part_of
    from deltalens.data.transforms import image_mode
    from deltalens.studies.layer_features import image_stages
    from deltalens.studies.recognition import Draws, recognition
    from deltalens.training.loaders import default_workers, evaluation_loader

    parts = {name: part_of(splits, args.split or "train", name) for name, splits in read.items()}
    sizes = tuple(len(part) for part in parts.values())
    draws = Draws(sizes, min(args.images, *sizes), tuple(args.seeds))
    preprocessing = dl.preprocessing(model)
    chosen = [part.subset(units.tolist()) for part, units in zip(parts.values(), draws.units, strict=True)]
    for part in chosen:
        part.transform, part.mode = eval_transform(preprocessing), image_mode(preprocessing)
    print(f"images: {_said(draws, 'images')}")
    batches = (images for part in chosen for images, _ in evaluation_loader(part, args.batch_size, default_workers()))
    return recognition(image_stages(model, batches), draws)


def _of_texts(args: Namespace, model: Any, read: dict[str, Splits]) -> list[StageAccuracy]:
    from deltalens.backbones.class_prompts import IMAGENET_SELECT
    from deltalens.studies.layer_features import text_stages
    from deltalens.studies.recognition import Draws, recognition

    own = [module.template for module in model.live("text.context") if getattr(module, "template", None)]
    asked = IMAGENET_SELECT if args.templates is None else args.templates
    templates = own[-1:] or ([asked] if isinstance(asked, str) else list(asked))
    if own:
        print(f"texts: the adapter has words of its own, so that each class has one text, {own[-1]!r}")
    sizes = tuple(len(splits.class_names) for splits in read.values())
    draws = Draws(sizes, min(sizes), tuple(args.seeds), len(templates))
    print(f"texts: {_said(draws, 'classes')}, {len(templates)} templates")
    if draws.held_out < FEW:
        print(
            f"       so few classes make accuracies uncertain; the smallest dataset has {min(sizes)}: try more --seeds"
        )
    texts = [
        model.prompts_with(templates, [splits.class_names[unit] for unit in units])
        for splits, units in zip(read.values(), draws.units, strict=True)
    ]
    return recognition(text_stages(model, texts), draws)


def _said(draws: Any, what: str) -> str:
    return f"{draws.count} {what} of each dataset, {draws.held_out} of them held out, {len(draws.seeds)} seeds"
