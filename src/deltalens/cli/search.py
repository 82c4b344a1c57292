"""Find images by text: rank images of folders by how near they are to a query, with a two-tower model.

The model is an adapter's, whose classes are texts, or a zero-shot one (--model). A query is a whole text, "a photo of
a dog"; several are a list or a .txt file with one on a line. The result gives the cosine of text and image; only its
order within a query counts. An output that ends with .png, .svg or .pdf is a sheet of the pictures. With --features
the images' features are kept, so that the next search reads the images that are new or changed only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from deltalens.cli.trained import add_model_arguments, load_classifier, room_for_model

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from deltalens.backbones.zero_shot import ZeroShotClassifier
    from deltalens.studies.text_search import Found

translate = room_for_model
ENDINGS = {".csv": "csv", ".json": "json", ".png": "sheet", ".svg": "sheet", ".pdf": "sheet"}


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add_model_arguments(parser)
    add("query", type=list[str] | str, help="a text, a list of texts, or a .txt file with one on a line")
    add("images", type=str, nargs="+", help="image files, folders or globs")
    add("--topk", type=int, default=10, help="images for each query, nearest first")
    add("--features", type=str | None, default=None, metavar="FILE", help="keep the images' features in this file")
    add(
        "--format",
        type=Literal["table", "csv", "json", "sheet"] | None,
        default=None,
        help="of the result; by default by the ending of --output, or a table",
    )
    add("--output", type=str | None, default=None, help="file for the result, instead of the terminal")
    add("--skip-broken", type=bool, default=False, help="leave out images that cannot be read")
    add("--batch-size", type=int, default=64, help="images at a time")
    add("--workers", type=int | None, default=None, help="loader processes; by default by the number of cores")
    add("--device", type=str | None, default=None, help="cpu, cuda, mps; by default the fastest there is")


def run(args: Namespace) -> None:
    """Search, print or write."""
    import contextlib
    import sys

    import torch

    from deltalens.cli.predict import find_images
    from deltalens.cli.word_lists import read_words
    from deltalens.lifecycle.atomic import write_text
    from deltalens.studies.contact_sheet import plot_found
    from deltalens.studies.text_search import image_features, refuse_what_features_do_not_show, search
    from deltalens.training.loaders import default_workers

    form = _form(args)
    if args.topk < 1:
        raise ValueError(f"topk must be at least 1, got {args.topk}")
    queries = read_words(args.query, "queries") or []
    images = find_images(args.images)
    model = _two_towers(args, queries)
    refuse_what_features_do_not_show(model)
    with torch.no_grad():
        model.text_features_of(queries)  # says what is wrong with a query before images are read
    with contextlib.redirect_stdout(sys.stderr):  # broken images are named there, not in the result
        features = image_features(
            model,
            images,
            args.features,
            batch_size=args.batch_size,
            workers=default_workers() if args.workers is None else args.workers,
            skip_broken=args.skip_broken,
        )
    if args.features is not None:
        known = len(features.images) - features.computed
        print(f"{args.features}: {known} images were known, {features.computed} computed", file=sys.stderr)
    found = search(model, queries, features, args.topk)
    if form == "sheet":
        plot_found(queries, found, args.output)
    else:
        text = {"table": as_table, "csv": as_csv, "json": as_json}[form](queries, found)
        if args.output is None:
            print(text, end="")
            return
        write_text(args.output, text)
    print(f"the nearest {len(found[0])} of {len(features.images)} images are in {args.output}")


def _form(args: Namespace) -> str:
    """The form of the result. ValueError for a sheet without a file that can hold one."""
    from pathlib import Path

    ending = None if args.output is None else Path(args.output).suffix.lower()
    form = args.format or ENDINGS.get(ending or "", "table")
    if form == "sheet" and ENDINGS.get(ending or "") != "sheet":
        raise ValueError(f"a sheet is a file that ends with .png, .svg or .pdf: --output is {args.output}")
    return form


def _two_towers(args: Namespace, queries: list[str]) -> ZeroShotClassifier:
    """The adapter or the zero-shot model. ValueError for an adapter without a text tower."""
    import deltalens as dl

    model = (load_classifier(args) if args.model is None else load_classifier(args, queries, ["{}"])).model
    if not isinstance(model, dl.ZeroShotClassifier):
        raise ValueError(
            f"the model of {args.adapter} has a head and no text tower, so that no text can be compared: search needs "
            "an adapter trained with --templates, or a zero-shot model (--model open_clip/... in place of the adapter)"
        )
    return model


# ------------------------------------------------------------------ formats
def as_table(queries: Sequence[str], found: Sequence[Sequence[Found]]) -> str:
    """Each query, and under it rank, cosine and image."""
    blocks = []
    for query, images in zip(queries, found, strict=True):
        width = len(str(len(images)))
        lines = [f"  {rank:>{width}}  {each.cosine:7.4f}  {each.image}" for rank, each in enumerate(images, 1)]
        blocks.append("\n".join([query, *lines]) + "\n")
    return "\n".join(blocks)


def as_csv(queries: Sequence[str], found: Sequence[Sequence[Found]]) -> str:
    """One line per query and image: query, rank, image, cosine."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("query", "rank", "image", "cosine"))
    for query, images in zip(queries, found, strict=True):
        writer.writerows((query, rank, each.image, f"{each.cosine:.6f}") for rank, each in enumerate(images, 1))
    return text.getvalue()


def as_json(queries: Sequence[str], found: Sequence[Sequence[Found]]) -> str:
    """[{"query": ..., "images": [{"image": ..., "cosine": ...}, ...]}, ...]."""
    import json

    entries: list[dict[str, Any]] = [
        {"query": query, "images": [{"image": str(each.image), "cosine": each.cosine} for each in images]}
        for query, images in zip(queries, found, strict=True)
    ]
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
