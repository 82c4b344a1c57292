"""What every detector is told, and how a dictionary of options becomes a dataclass."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from torch import nn

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.pyramid import STRIDES, make_pyramid

Options = TypeVar("Options", bound="DetectorOptions")
PYRAMID_OPTIONS = ("strides", "norms", "blocks")


@dataclass(frozen=True)
class DetectorOptions:
    """levels: which maps of the pyramid the neck reads, counted from 0; None for what the detector was published with.
    channels: of the neck and the head. score_threshold: detections below it are dropped. nms_threshold: of two boxes
    of one class with a larger IoU the better one stays. detections_per_image: at most so many. size_divisor: a batch is
    padded, right and below, to multiples of it. min_size, max_size: let the network scale every image to this shorter
    side, in pixels, unless the longer one would exceed max_size; its boxes are those of the image as it came. None:
    images are taken as they come. top_down: add coarser maps to finer ones (FPN). False: the pyramid's maps go to the
    head as they are, which ViTDet found to be enough behind its simple pyramid. None: as published, False for plain
    networks such as ViTs, else True.

    Raises ValueError for values that make no sense.
    """

    levels: tuple[int, ...] | None = None
    channels: int = 256
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections_per_image: int = 100
    size_divisor: int = 32
    min_size: int | None = None
    max_size: int = 1333
    top_down: bool | None = None

    def __post_init__(self) -> None:
        for name in ("channels", "detections_per_image", "size_divisor", "max_size", "min_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.levels is not None and (not self.levels or min(self.levels) < 0):
            raise ValueError(f"levels are numbers of the pyramid's maps, counted from 0, got {self.levels}")


def norm_groups(channels: int) -> int:
    """Groups of a head's group norms: 32, as in torchvision, but of two channels at least. The coarsest map of a small
    image is one cell, which of a single channel leaves nothing to norm."""
    return min(32, channels // 2)


def pyramid_and_options(
    body: Body,
    kind: type[Options],
    head: str,
    given: Mapping[str, Any],
    finest: int,
) -> tuple[nn.Module, Options]:
    """(pyramid of a backbone, the head's options), both from one dictionary. The pyramid's are strides (of its maps;
    without them and without levels, those from `finest` to 32, which the head reads), norms (on its maps, see
    `make_pyramid`) and blocks (of a plain network, see `SimplePyramid`, whose maps get the head's channels). ValueError
    for what neither has."""
    shape = {name: given[name] for name in PYRAMID_OPTIONS if name in given}
    own = options_from(kind, head, {name: value for name, value in given.items() if name not in shape})
    each_stride_its_block = len(shape.get("blocks", (-1,))) > 1
    if own.levels is None and not each_stride_its_block:  # a finer map would be computed, and nobody would read it
        shape.setdefault("strides", [stride for stride in STRIDES if stride >= finest])
    if body.plain:
        shape["out_channels"] = own.channels
        own = replace(own, top_down=bool(own.top_down))
    return make_pyramid(body, **shape), own


def options_from(kind: type[Options], head: str, given: Mapping[str, Any] | Options | None) -> Options:
    """The options of a head from a dictionary. Lists become tuples. ValueError for a name that the head does not
    have."""
    if isinstance(given, kind):
        return given
    known = [field.name for field in fields(kind)]
    for name in given or {}:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else "."
            others = ", ".join([*known, *PYRAMID_OPTIONS])
            raise ValueError(f"the head {head} has no option {name!r}{meant} It has {others}")
    return kind(**{name: _as_tuple(value) for name, value in dict(given or {}).items()})


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(each) for each in value) if isinstance(value, list | tuple) else value
