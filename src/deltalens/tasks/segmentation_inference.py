"""From a segmentation network to the logits of whole images: at once or by windows, at one size or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]
BATCH = 8  # windows that go through the network together


@dataclass(frozen=True)
class Inference:
    """How a whole image is segmented.

    window: edge in pixels of the windows that the network sees one by one, None for the whole image. stride: pixels
    from one window to the next, None for 2/3 of the window, as is usual; the last ones are moved back to the image's
    edge, and where windows overlap their logits are averaged. scales: factors of the image's size; flip: also mirrored.
    Of several views (scales, mirrored) the probabilities are averaged, as mmsegmentation does.

    Raises ValueError for values that make no sense.
    """

    window: int | None = None
    stride: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"the window's edge is a number of pixels from 1, got {self.window}")
        if self.stride is not None and self.window is None:
            raise ValueError(f"a stride of {self.stride} needs a window")
        if self.stride is not None and self.window is not None and not 1 <= self.stride <= self.window:
            raise ValueError(
                f"the stride must lie between 1 and the window's edge, {self.window}, so that no pixel is left out, "
                f"got {self.stride}"
            )
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales are factors above 0, at least one, got {self.scales}")

    @property
    def step(self) -> int:
        """The stride that is used with a window."""
        assert self.window is not None
        return max(1, 2 * self.window // 3) if self.stride is None else self.stride


def segment(model: nn.Module, images: Sequence[Tensor] | Tensor, sizes: Sequence[Size], how: Inference) -> list[Tensor]:
    """Images (3, h, w) of any sizes -> for each logits (K, H, W) in the size wanted of it, float32.

    Images of one size go through the network together. Logits are resized bilinearly (align_corners=False). Of several
    views these are logarithms of the mean probabilities. model: eval mode; (B, 3, h, w) -> {"out": (B, K, h, w)}.
    """
    found: dict[int, Tensor] = {}
    for numbers in _of_one_size(images, sizes):
        stack = torch.stack([images[i] for i in numbers])
        found |= dict(zip(numbers, _views(model, stack, sizes[numbers[0]], how), strict=True))
    return [found[i] for i in range(len(images))]


def _of_one_size(images: Sequence[Tensor] | Tensor, sizes: Sequence[Size]) -> Iterator[list[int]]:
    groups: dict[tuple, list[int]] = {}
    for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
        groups.setdefault((*image.shape, *size), []).append(i)
    yield from groups.values()


def _views(model: nn.Module, images: Tensor, size: Size, how: Inference) -> Tensor:
    """Logits (B, K, H, W) of images (B, 3, h, w), in size (H, W)."""
    views = [(scale, mirrored) for scale in how.scales for mirrored in ((False, True) if how.flip else (False,))]
    if len(views) == 1:
        return _view(model, images, size, *views[0], how)
    probabilities: Tensor | float = 0.0
    for scale, mirrored in views:
        probabilities = probabilities + _view(model, images, size, scale, mirrored, how).softmax(1)
    return (probabilities / len(views)).clamp(min=torch.finfo(torch.float32).tiny).log()


def _view(model: nn.Module, images: Tensor, size: Size, scale: float, mirrored: bool, how: Inference) -> Tensor:
    height, width = (max(1, int(side * scale + 0.5)) for side in images.shape[-2:])
    seen = resized(images, (height, width))
    seen = seen.flip(-1) if mirrored else seen
    logits = _whole(model, seen) if how.window is None else by_windows(model, seen, how.window, how.step)
    return resized(logits.flip(-1) if mirrored else logits, size)


def _whole(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)["out"].float()


def by_windows(model: nn.Module, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits (B, K, H, W) of images (B, 3, H, W), each pixel the mean of the windows that hold it.

    Windows are window x window pixels, or as much as the image has; they begin at 0, stride, 2 stride ..., and the last
    one ends at the image's edge.
    """
    height, width = images.shape[-2:]
    corners = [(top, left) for top in _starts(height, window, stride) for left in _starts(width, window, stride)]
    at_once = max(1, BATCH // len(images))
    total: Tensor | None = None
    count = images.new_zeros((height, width), dtype=torch.float32)
    for begin in range(0, len(corners), at_once):
        places = [(slice(top, top + window), slice(left, left + window)) for top, left in corners[begin:][:at_once]]
        logits = _whole(model, torch.cat([images[(..., *place)] for place in places]))
        total = logits.new_zeros(len(images), logits.shape[1], height, width) if total is None else total
        for place, piece in zip(places, logits.split(len(images)), strict=True):
            total[(..., *place)] += piece
            count[place] += 1
    assert total is not None
    return total / count


def _starts(length: int, window: int, stride: int) -> list[int]:
    last = max(length - window, 0)
    return sorted({min(start, last) for start in range(0, last + stride, stride)})


def resized(maps: Tensor, size: Size) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinearly."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
