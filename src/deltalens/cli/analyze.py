"""Look into trained adapters, or into a model.

embeddings: what the heads of several adapters read, by t-SNE, one panel each, with the accuracy of 5 nearest neighbours
and the silhouette. attention: where a block of a ViT or Swin looks in one picture, over patches and prompts, head by
head. layers: how well the features of each block tell which dataset a sample comes from, image tower and text tower.
experts: which experts of Adapter-X the blocks and the classes use, and which are dead. ensemble: accuracy of several
VPT adapters of one backbone alone and averaged, in one forward pass. storage: bytes on disk of one backbone and all
adapters, against a whole model for each.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from deltalens.cli.analyze_experts import run_experts
from deltalens.cli.analyze_layers import run_layers
from deltalens.cli.method_options import MODEL_HELP
from deltalens.cli.repeated import gather

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

ANALYSES = ("embeddings", "attention", "layers", "experts", "ensemble", "storage")


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("analysis", type=Literal[ANALYSES], help="what to look at")
    add(
        "adapters",
        type=str,
        nargs="*",
        help="folders of adapters; attention and experts take one, layers one or --model",
    )
    add(
        "--data",
        type=list[str] | str | None,
        default=None,
        metavar="FOLDER",
        help="embeddings, experts, ensemble: folder of images or clouds; layers: NAME=FOLDER, once for each dataset",
    )
    add(
        "--split",
        type=Literal["train", "val", "test", "all"] | None,
        default=None,
        help="which of its images; by default test, and train for layers",
    )
    add(
        "--images",
        type=int,
        default=1000,
        help="embeddings, experts: at most so many, spread over the split; layers: at most so many of each dataset",
    )
    add("--image", type=str | None, default=None, help="attention: the picture")
    add("--block", type=int, default=-1, help="attention: number of the block, from 0, or negative from the end")
    add("--model", type=str | None, default=None, help=f"layers: instead of an adapter, {MODEL_HELP}")
    add("--checkpoint", type=str | None, default=None, help="layers: weights file of --model, instead of the hub's")
    add(
        "--tower",
        type=Literal["vision", "text", "both"] | None,
        default=None,
        help="layers: which towers; by default all that can be looked at",
    )
    add(
        "--templates",
        type=list[str] | str | None,
        default=None,
        help="layers: texts of the classes, 'a photo of a {}.', or a list of such; by default seven",
    )
    add("--seeds", type=list[int], default=[0, 1, 2], help="layers: draws of samples and of what is held out")
    add(
        "--format",
        type=list[str] | str,
        default="auto",
        help="layers: of the data, as in train; NAME=FORMAT for a single dataset; may be repeated",
    )
    add("--skip-broken", type=bool, default=False, help="layers: leave out images that cannot be read")
    add(
        "--output",
        type=str | None,
        default=None,
        help="embeddings, attention, layers, experts: figure (.svg, .png, .pdf); attention writes its arrays beside it "
        "as .npz, layers and experts their numbers as .csv; ensemble, storage: JSON file",
    )
    add("--batch-size", type=int, default=64, help="images at a time")
    add("--seed", type=int, default=0, help="of t-SNE")
    add("--device", type=str | None, default=None, help="cpu, cuda, mps; by default the fastest there is")


def translate(argv: list[str]) -> list[str]:
    """Gather the words of an option that was given several times into one list."""
    rest, found = gather(argv, ("--data", "--format"))
    for option, values in found.items():
        if values:
            rest += [option, values[0] if len(values) == 1 else json.dumps(values)]
    return rest


NEEDED = {
    "embeddings": ("adapters", "data", "output"),
    "attention": ("adapters", "image", "output"),
    "layers": ("data", "output"),
    "experts": ("adapters", "data", "output"),
    "ensemble": ("adapters", "data"),
    "storage": ("adapters",),
}


def run(args: Namespace) -> None:
    """Do the analysis, print its numbers, and write what was asked for."""
    if "adapters" in NEEDED[args.analysis] and not args.adapters:
        raise ValueError(f"deltalens analyze {args.analysis} needs the folder of an adapter")
    missing = [f"--{name}" for name in NEEDED[args.analysis] if getattr(args, name) is None]
    if missing:
        raise ValueError(f"deltalens analyze {args.analysis} needs {' and '.join(missing)}")
    for name in ("images", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.analysis != "layers" and isinstance(args.data, list):
        raise ValueError(f"deltalens analyze {args.analysis} takes one --data, got {len(args.data)}")
    analyses = {
        "embeddings": _embeddings,
        "attention": _attention,
        "layers": run_layers,
        "experts": lambda args: run_experts(args, _batches),
        "ensemble": _ensemble,
        "storage": _storage,
    }
    analyses[args.analysis](args)


# ------------------------------------------------------------------ the analyses
def _embeddings(args: Namespace) -> None:
    from deltalens.cli.trained import label_of, load_trained
    from deltalens.studies.embeddings import embed, plot_embeddings
    from deltalens.studies.figure import check_kind

    check_kind(args.output)
    found, names = [], None
    for folder in args.adapters:
        model, class_names, _ = load_trained(folder, args.device)
        if names not in (None, class_names):
            raise ValueError(f"{folder} was trained on other classes than {args.adapters[0]}")
        names = class_names
        found.append(embed(label_of(model, folder), model, _batches(args, model, class_names, args.images), args.seed))
    width = max(len(each.name) for each in found)
    print(f"{'adapter':<{width}}  5-NN, %  silhouette")
    for each in found:
        print(f"{each.name:<{width}}  {100 * each.knn_accuracy:7.1f}  {each.silhouette:10.3f}")
    plot_embeddings(found, names, args.output)
    print(f"{len(found[0].labels)} {_counted(model)}; drawn in {args.output}")


def _attention(args: Namespace) -> None:
    from pathlib import Path

    import numpy as np
    import torch

    import deltalens as dl
    from deltalens.cli.trained import load_trained
    from deltalens.data import eval_transform
    from deltalens.data.image_folder import read_image
    from deltalens.data.inputs import IMAGES, kind_of
    from deltalens.data.transforms import image_mode
    from deltalens.lifecycle.atomic import atomic_path
    from deltalens.studies.attention_maps import block_attention, plot_attention
    from deltalens.studies.figure import check_kind

    check_kind(args.output)
    if len(args.adapters) > 1:
        raise ValueError(f"attention takes one adapter, got {len(args.adapters)}")
    model, _, device = load_trained(args.adapters[0], args.device)
    preprocessing = dl.preprocessing(model)
    if kind_of(preprocessing) != IMAGES:
        raise ValueError(
            f"attention is drawn over the patches of an image, and {args.adapters[0]} takes point clouds: see "
            "embeddings and experts, which take clouds"
        )
    pixels = eval_transform(preprocessing)(read_image(args.image, image_mode(preprocessing)))
    attention = block_attention(model, pixels[None].to(device), args.block)
    mean, std = (torch.tensor(preprocessing[name])[:, None, None] for name in ("mean", "std"))
    shown = ((pixels * std + mean).clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    plot_attention(shown, attention, args.output, Path(args.image).name)
    arrays = {"over_map": attention.over_map(), "over_prompts": attention.over_prompts(), "weights": attention.weights}
    file = Path(args.output).with_suffix(".npz")
    with atomic_path(file) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(stream, **{name: values[0].float().cpu().numpy() for name, values in arrays.items()})
    shares = {
        "prefix": attention.over_prefix(),
        "prompts": attention.over_prompts(),
        "patches": attention.over_map().flatten(2),
    }
    print(", ".join(f"{name} {100 * float(each[0].sum(-1).mean()):.1f} %" for name, each in shares.items()))
    print(f"drawn in {args.output}; arrays in {file}")


def _ensemble(args: Namespace) -> None:
    import torch

    import deltalens as dl
    from deltalens.cli.trained import load_trained
    from deltalens.lifecycle.atomic import write_text
    from deltalens.studies.ensemble import ensemble_logits

    model, class_names, device = load_trained(args.adapters[0], args.device)
    names = [f"set{number}" for number in range(len(args.adapters))]
    for name, folder in zip(names, args.adapters, strict=True):
        dl.load_adapter(model, folder, name=name)
        if (dl.class_names(model) or class_names) != class_names:
            raise ValueError(f"{folder} was trained on other classes than {args.adapters[0]}")
    model.to(device)
    right, count = torch.zeros(len(names) + 1), 0
    for images, labels in _batches(args, model, class_names, None):
        logits = ensemble_logits(model, images.to(device), names).float().cpu()
        answers = [*logits.argmax(-1), logits.softmax(-1).mean(0).argmax(-1)]
        right += torch.tensor([float((answer == labels).sum()) for answer in answers])
        count += len(labels)
    accuracies = dict(zip([*args.adapters, "ensemble"], (right / count).tolist(), strict=True))
    width = max(map(len, accuracies))
    for name, accuracy in accuracies.items():
        print(f"{name:<{width}}  {100 * accuracy:.1f} %")
    print(f"{count} {_counted(model)} ({args.split or 'test'})")
    if args.output:
        write_text(args.output, json.dumps({"images": count, "accuracy": accuracies}, indent=2) + "\n")


def _storage(args: Namespace) -> None:
    from dataclasses import asdict

    from deltalens.lifecycle.atomic import write_text
    from deltalens.studies.markdown import markdown_table
    from deltalens.studies.storage import storage_table
    from deltalens.studies.stored_adapters import StoredAdapters

    stored = StoredAdapters()
    by_backbone = stored.rows(args.adapters)
    for backbone, rows in by_backbone.items():
        header, body, note = storage_table(rows)
        print(f"{backbone}\n\n{markdown_table(header, body)}\n")
    print("\n".join([note, *stored.notes]))
    if args.output:
        found = {backbone: [asdict(row) for row in rows] for backbone, rows in by_backbone.items()}
        write_text(args.output, json.dumps(found, indent=2) + "\n")


# ------------------------------------------------------------------ details
def _counted(model: Any) -> str:
    """What a model takes: "images" or "clouds"."""
    import deltalens as dl
    from deltalens.data.inputs import IMAGES, kind_of

    return "images" if kind_of(dl.preprocessing(model)) == IMAGES else "clouds"


def _batches(args: Namespace, model: Any, class_names: list[str], most: int | None) -> Any:
    """(images or clouds, labels) batches of the split, as the adapter was trained to see them."""
    import deltalens as dl
    from deltalens.data import read_part
    from deltalens.data.inputs import set_inputs
    from deltalens.training.loaders import default_workers, evaluation_loader

    info = dl.adapter_info(model)
    if info.get("task") not in (None, "classification"):
        raise ValueError(f"{args.analysis} needs one label an image, and the adapter was trained for {info['task']}")
    files = read_part(args.data, args.split or "test", class_names, info.get("split"))
    if most is not None and len(files) > most:
        files = files.subset([i * len(files) // most for i in range(most)])
    set_inputs(files, dl.preprocessing(model))
    return evaluation_loader(files, args.batch_size, default_workers())
