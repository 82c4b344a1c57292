"""What lies between data as it is read and a model's input: the one place that tells images from clouds, and images
with a label from those with a mask or boxes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch.utils.data import Dataset

from deltalens.data.cloud_transforms import DEFAULT, Steps, augmentation_words, cloud_steps
from deltalens.data.clouds import Clouds, keep_clouds
from deltalens.data.dense_items import DenseImages, MaskedImages, listed, stacked
from deltalens.data.dense_transforms import (
    DenseAugmentation,
    detection_eval_transform,
    detection_train_transform,
    segmentation_eval_transform,
    segmentation_train_transform,
)
from deltalens.data.memory import LIMIT, keep_in_memory
from deltalens.data.oriented_items import OrientedImages
from deltalens.data.oriented_transforms import oriented_eval_transform, oriented_train_transform
from deltalens.data.transforms import eval_resize, eval_transform, image_mode, train_resize, train_transform

IMAGES, POINTS, DENSE, ORIENTED = "images", "points", "dense", "oriented"
OWN = {  # what each kind of data can be told
    IMAGES: ("min_crop", "hflip", "rand_augment"),
    POINTS: ("cloud_augment",),
    DENSE: ("hflip", "dense"),
    ORIENTED: ("dense",),
}
NAMES = {
    IMAGES: "images",
    POINTS: "point clouds",
    DENSE: "images with masks or boxes",
    ORIENTED: "images with oriented boxes",
}


@dataclass(frozen=True)
class Augmentation:
    """Of training images: min_crop, hflip, rand_augment (`train_transform`). Of training clouds: cloud_augment
    (`cloud_steps`). Of images with masks or boxes: hflip and `dense`; with oriented boxes: `dense`, which has their
    flips."""

    min_crop: float = 0.5
    hflip: float = 0.5
    rand_augment: int = 0
    cloud_augment: str = DEFAULT
    dense: DenseAugmentation = field(default_factory=DenseAugmentation)

    @property
    def of_images(self) -> tuple[float, float, int]:
        return self.min_crop, self.hflip, self.rand_augment

    @classmethod
    def among(cls, options: dict[str, Any]) -> Augmentation:
        """Those among other options, those of `dense` by their own names."""
        names = [each.name for each in fields(cls) if each.name != "dense"]
        dense = {each.name: options[each.name] for each in fields(DenseAugmentation) if each.name in options}
        return cls(**{name: options[name] for name in names if name in options}, dense=DenseAugmentation(**dense))

    def check(self, kind: str) -> None:
        """ValueError for what is said and has no meaning for data of this kind."""
        plain = type(self)()
        said = [name for name in vars(plain) if name not in OWN[kind] and getattr(self, name) != getattr(plain, name)]
        if said:
            own = ", ".join((*OWN[kind][:-1], *(vars(plain.dense) if "dense" in OWN[kind] else OWN[kind][-1:])))
            raise ValueError(f"{self._name(said[0])} has no meaning for {NAMES[kind]}: see {own}")
        augmentation_words(self.cloud_augment)

    def _name(self, said: str) -> str:
        """A setting as people write it: of `dense` the first that is not as it was."""
        if said != "dense":
            return said
        plain = DenseAugmentation()
        return next(name for name in vars(plain) if getattr(self.dense, name) != getattr(plain, name))


def kind_of(preprocessing: dict[str, Any]) -> str:
    """What a model takes: "images" or "points"."""
    return preprocessing.get("kind", IMAGES)


def kind_of_data(data: Any) -> str:
    """What a dataset holds: "images", "points", "dense" for images with masks or boxes, or "oriented"."""
    if isinstance(data, DenseImages):
        return ORIENTED if isinstance(data, OrientedImages) else DENSE
    return POINTS if isinstance(data, Clouds) else IMAGES


def check_same_kind(data: Any, preprocessing: dict[str, Any]) -> str:
    """What data and model both are. ValueError where they differ."""
    here, wanted = (POINTS if isinstance(data, Clouds) else IMAGES), kind_of(preprocessing)
    if here != wanted:
        models = ", such as deltalens/points-mini" if here == POINTS else ""
        raise ValueError(f"the data are {NAMES[here]} and the model takes {NAMES[wanted]}: take a model for "
                         f"{NAMES[here]}{models}, or other data (--format)")  # fmt: skip
    return wanted


def set_inputs(part: Any, preprocessing: dict[str, Any], augmentation: Augmentation | None = None) -> None:
    """Give a dataset the transform that turns its items into the model's input: that of the test, or with
    `augmentation` that of training. Raises ValueError for data of the other kind, and for augmentation of it."""
    kind = check_same_kind(part, preprocessing)
    if augmentation is not None:
        augmentation.check(kind_of_data(part))
    if kind == POINTS:
        once, each = _steps(preprocessing, augmentation)
        part.transform = Steps(once, each)
        return
    part.mode = image_mode(preprocessing)
    if isinstance(part, DenseImages):
        _set_dense_inputs(part, preprocessing, augmentation)
    elif augmentation is None:
        part.transform = eval_transform(preprocessing)
    else:
        part.transform = train_transform(preprocessing, *augmentation.of_images)


def kept_inputs(part: Any, preprocessing: dict[str, Any], augmentation: Augmentation | None = None) -> Dataset:
    """A copy of a dataset with that transform, read once and kept in memory where there is room for it."""
    part = part.subset(range(len(part)))
    set_inputs(part, preprocessing, augmentation)
    if isinstance(part, DenseImages):
        return part.in_memory(LIMIT)
    if kind_of(preprocessing) == POINTS:
        once, each = _steps(preprocessing, augmentation)
        kept = keep_clouds(part, once)
        if kept is None:
            return part
        kept.transform = each
        return kept
    trained = augmentation is not None
    resize = train_resize(preprocessing, augmentation.min_crop) if trained else eval_resize(preprocessing)
    return keep_in_memory(part, resize)


def _set_dense_inputs(part: DenseImages, preprocessing: dict[str, Any], augmentation: Augmentation | None) -> None:
    """Crops of training are of one size and are stacked; all else is batched as lists."""
    if isinstance(part, OrientedImages):
        _set_oriented_inputs(part, preprocessing, augmentation)
        return
    of_pixels = isinstance(part, MaskedImages)
    part.collate = stacked if of_pixels and augmentation is not None else listed
    if augmentation is None:
        part.transform = (segmentation_eval_transform if of_pixels else detection_eval_transform)(preprocessing)
    else:
        train = segmentation_train_transform if of_pixels else detection_train_transform
        part.transform = train(preprocessing, augmentation.dense, augmentation.hflip)


def _set_oriented_inputs(
    part: OrientedImages, preprocessing: dict[str, Any], augmentation: Augmentation | None
) -> None:
    part.collate = listed
    if augmentation is None:
        part.transform = oriented_eval_transform(preprocessing)
    else:
        part.transform = oriented_train_transform(preprocessing, augmentation.dense)


def _steps(preprocessing: dict[str, Any], augmentation: Augmentation | None):
    return (
        cloud_steps(preprocessing) if augmentation is None else cloud_steps(preprocessing, augmentation.cloud_augment)
    )
