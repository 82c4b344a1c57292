"""What lies between data as it is read and a model's input: the one place that tells images from clouds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch.utils.data import Dataset

from deltalens.data.cloud_transforms import DEFAULT, Steps, augmentation_words, cloud_steps
from deltalens.data.clouds import Clouds, keep_clouds
from deltalens.data.memory import keep_in_memory
from deltalens.data.transforms import eval_resize, eval_transform, image_mode, train_resize, train_transform

IMAGES, POINTS = "images", "points"


@dataclass(frozen=True)
class Augmentation:
    """Of training images: min_crop, hflip, rand_augment (`train_transform`). Of training clouds: cloud_augment
    (`cloud_steps`)."""

    min_crop: float = 0.5
    hflip: float = 0.5
    rand_augment: int = 0
    cloud_augment: str = DEFAULT

    @property
    def of_images(self) -> tuple[float, float, int]:
        return self.min_crop, self.hflip, self.rand_augment

    @classmethod
    def among(cls, options: dict[str, Any]) -> Augmentation:
        """Those among other options."""
        names = [each.name for each in fields(cls)]
        return cls(**{name: options[name] for name in names if name in options})

    def check(self, kind: str) -> None:
        """ValueError for what is said and has no meaning for data of this kind."""
        own = {"cloud_augment"} if kind == POINTS else {"min_crop", "hflip", "rand_augment"}
        plain = type(self)()
        said = [name for name in vars(plain) if name not in own and getattr(self, name) != getattr(plain, name)]
        if said:
            other = "point clouds: see cloud_augment" if kind == POINTS else "images: see min_crop, hflip, rand_augment"
            raise ValueError(f"{said[0]} has no meaning for {other}")
        augmentation_words(self.cloud_augment)


def kind_of(preprocessing: dict[str, Any]) -> str:
    """What a model takes: "images" or "points"."""
    return preprocessing.get("kind", IMAGES)


def check_same_kind(data: Any, preprocessing: dict[str, Any]) -> str:
    """What data and model both are. ValueError where they differ."""
    here, wanted = (POINTS if isinstance(data, Clouds) else IMAGES), kind_of(preprocessing)
    if here != wanted:
        names = {IMAGES: "images", POINTS: "point clouds"}
        models = ", such as deltalens/points-mini" if here == POINTS else ""
        raise ValueError(f"the data are {names[here]} and the model takes {names[wanted]}: take a model for "
                         f"{names[here]}{models}, or other data (--format)")  # fmt: skip
    return wanted


def set_inputs(part: Any, preprocessing: dict[str, Any], augmentation: Augmentation | None = None) -> None:
    """Give a dataset the transform that turns its items into the model's input: that of the test, or with
    `augmentation` that of training. Raises ValueError for data of the other kind, and for augmentation of it."""
    kind = check_same_kind(part, preprocessing)
    if augmentation is not None:
        augmentation.check(kind)
    if kind == POINTS:
        once, each = _steps(preprocessing, augmentation)
        part.transform = Steps(once, each)
        return
    part.mode = image_mode(preprocessing)
    if augmentation is None:
        part.transform = eval_transform(preprocessing)
    else:
        part.transform = train_transform(preprocessing, *augmentation.of_images)


def kept_inputs(part: Any, preprocessing: dict[str, Any], augmentation: Augmentation | None = None) -> Dataset:
    """A copy of a dataset with that transform, read once and kept in memory where there is room for it."""
    part = part.subset(range(len(part)))
    set_inputs(part, preprocessing, augmentation)
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


def _steps(preprocessing: dict[str, Any], augmentation: Augmentation | None):
    return (
        cloud_steps(preprocessing) if augmentation is None else cloud_steps(preprocessing, augmentation.cloud_augment)
    )
