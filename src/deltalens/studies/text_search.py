"""Images ranked by how near they are to texts: retrieval by the cosine of a two-tower model, adapted or not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltalens.backbones.cosines import cosines
from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.data.image_folder import ImageFiles, without_broken
from deltalens.data.transforms import eval_transform, image_mode
from deltalens.lifecycle.info import preprocessing
from deltalens.studies.feature_file import FeatureFile, model_digest
from deltalens.training.loaders import evaluation_loader


@dataclass(frozen=True)
class Found:
    """An image and the cosine of its features with a text's, -1 to 1."""

    image: Path
    cosine: float


@dataclass(frozen=True)
class ImageFeatures:
    """Normalised features (N, D) of N images, or (N, K, D) where an adapter reads K tokens, float32 on the CPU.

    computed: how many were not in the file of kept features.
    """

    images: list[Path]
    features: Tensor
    computed: int


def search(
    model: ZeroShotClassifier, texts: Sequence[str], images: ImageFeatures, topk: int | None = 10
) -> list[list[Found]]:
    """For each text the `topk` images with the most similar features, best first; None for all of them.

        cosine = <normalize(image(x)), normalize(text(query))>         (mean over the pairs where K tokens are read)

    texts: whole texts ("a photo of a dog"), as `ZeroShotClassifier.text_features_of` reads them. Images that are
    equally near stay in their order. Raises TypeError where texts have no features of their own (CoCoOp), and
    ValueError for an adapter that acts on logits (Tip-Adapter), which features do not show.
    """
    refuse_what_features_do_not_show(model)
    with torch.inference_mode():
        queries = model.text_features_of(texts).float().cpu()
    nearest = cosines(images.features, queries).sort(dim=0, descending=True, stable=True)
    return [
        [Found(images.images[i], value) for i, value in zip(rows, values, strict=True)]
        for rows, values in zip(nearest.indices[:topk].T.tolist(), nearest.values[:topk].T.tolist(), strict=True)
    ]


def image_features(
    model: ZeroShotClassifier,
    images: Sequence[Path],
    keep: str | os.PathLike | None = None,
    *,
    batch_size: int = 64,
    workers: int = 0,
    skip_broken: bool = False,
) -> ImageFeatures:
    """The features of image files, in their order, by a model that is put in eval mode.

    keep: a file of features (`deltalens.studies.feature_file`): those of images that have not changed are taken from
    it, and what was computed is added, also when the work is stopped. A broken image raises ValueError, or is left out
    with skip_broken. ValueError for a file of another model.
    """
    images = list(images)
    kept = None if keep is None else FeatureFile(keep, model_digest(model))
    marks = {} if kept is None else {image: kept.mark(image) for image in images}
    rows = {image: kept.rows[mark] for image, mark in marks.items() if mark in kept.rows} if kept is not None else {}
    absent, wanted = [image for image in images if image not in rows], preprocessing(model)
    files = ImageFiles(absent, range(len(absent)), eval_transform(wanted), image_mode(wanted))
    if skip_broken and absent:
        files = without_broken(files, True)
    try:
        for number, row in _computed(model, files, batch_size, workers):
            image = absent[number]
            rows[image] = row
            if kept is not None:
                kept.rows[marks[image]] = row
    finally:
        if kept is not None and len(files):
            kept.write()
    present = [image for image in images if image in rows]
    if not present:
        raise ValueError("there are no images to search")
    return ImageFeatures(present, torch.stack([rows[image] for image in present]), len(files))


def refuse_what_features_do_not_show(model: ZeroShotClassifier) -> None:
    """ValueError for an active adapter that acts on logits: an image's features are those without it."""
    changed = next(iter(model.live("logits")), None)
    if changed is not None:
        raise ValueError(
            f"{type(changed).__name__} acts on the logits of its own classes and leaves features as they are: search "
            "with the model without it"
        )


def _computed(model: ZeroShotClassifier, files: ImageFiles, batch_size: int, workers: int):
    """(number of the image, its features) one by one."""
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for batch, numbers in evaluation_loader(files, batch_size, workers) if len(files) else ():
            found = model.image_features(batch.to(device)).float().cpu().clone()
            yield from zip(numbers.tolist(), found, strict=True)
