"""Images of any size for networks that take some sizes only: padded at the right and the bottom, maps cut back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def size_of(images: Tensor) -> Size:
    """(H, W) of images."""
    return images.shape[-2], images.shape[-1]


def up_to_multiple(length: int, *multiples: int) -> int:
    """The length rounded up to a multiple of the first number, then of the second..."""
    for multiple in multiples:
        length = -(-length // multiple) * multiple
    return length


def frame_of(size: Size, fixed_size: Size | None, *multiples: int) -> Size:
    """(H, W) that images of a size are padded to: the only one that a network takes, or multiples."""
    if fixed_size is not None:
        return fixed_size
    return up_to_multiple(size[0], *multiples), up_to_multiple(size[1], *multiples)


def padded(images: Tensor, size: Size) -> Tensor:
    """Images (B, 3, H, W) with zeros (the mean colour of normalised images) at the right and the bottom."""
    height, width = size_of(images)
    if (height, width) == size:
        return images
    return F.pad(images, (0, size[1] - width, 0, size[0] - height))


def cut(feature_map: Tensor, size: Size, stride: int) -> Tensor:
    """The part of a map (B, C, h, w) that belongs to an image of this size: ceil(H / stride) x ceil(W / stride).

    ValueError where the map is smaller than that.
    """
    height, width = (-(-side // stride) for side in size)
    if feature_map.shape[-2] < height or feature_map.shape[-1] < width:
        raise ValueError(
            f"a map of stride {stride} of an image of {size[0]}x{size[1]} pixels has {height}x{width} positions, and "
            f"the network gave {tuple(feature_map.shape[-2:])}"
        )
    return feature_map[..., :height, :width]


def checked(images: Tensor, fixed_size: Size | None, network: str) -> Size:
    """(H, W) of images, ValueError where a network of one size cannot take them."""
    if images.dim() != 4:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    height, width = size_of(images)
    if fixed_size is not None and (height > fixed_size[0] or width > fixed_size[1]):
        raise ValueError(
            f"{network} takes images of at most {fixed_size[0]}x{fixed_size[1]} pixels and got {height}x{width}: "
            f"create it with img_size=({height}, {width}), or cut the images into windows"
        )
    if height < 1 or width < 1:
        raise ValueError(f"images must have pixels, got {height}x{width}")
    return height, width
