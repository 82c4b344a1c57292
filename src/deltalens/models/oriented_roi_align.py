"""RoI align of oriented boxes: bilinear samples on a grid that turns with the box.

Map coordinates are those of mmcv's `RoIAlignRotated` with aligned=True and clockwise=True, which mmrotate's le90 models
use: the box is scaled by `spatial_scale`, its centre moved by half a pixel up and left, and bin (i, j) is the mean of
g_h x g_w samples at

    (x, y) = centre + X u + Y v,  X = (j + (l + 1/2) / g_w) w / W - w / 2,  Y = (i + (k + 1/2) / g_h) h / H - h / 2,

u = (cos a, sin a), v = (-sin a, cos a). At angle 0 this is torchvision.ops.roi_align(aligned=True). Samples more than
one pixel outside the map are 0, nearer ones take the value of the border, in all three.

Differentiable in features and in boxes; mmcv's gives gradients to the features alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_MOST_READS = 1 << 22  # pixels read at once: bounds the memory of their indices


def oriented_roi_align(
    features: Tensor, boxes: Tensor, output_size: int | tuple[int, int], spatial_scale: float, sampling_ratio: int = 0
) -> Tensor:
    """Pooled maps (n, C, h, w) of features (B, C, H, W) under boxes (n, 6): number of the image, cx, cy, w, h, angle.

    output_size: (h, w), or one number for both; w runs along the box's first side. spatial_scale: pixels of the map
    for one of the boxes' units, such as 1/8. sampling_ratio: samples of a bin in each direction; 0 takes
    ceil(side / bins) of them, for each box its own. Computed in float32 at least, given in the dtype of the features.
    """
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    _check(features, boxes, height, width)
    dtype = torch.promote_types(torch.promote_types(features.dtype, boxes.dtype), torch.float32)
    pixels = features.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)  # (B H W, C)
    image, scaled = boxes[:, 0].long(), boxes[:, 1:5].to(dtype) * spatial_scale
    boxes = torch.cat([scaled[:, :2] - 0.5, scaled[:, 2:], boxes[:, 5:].to(dtype)], 1)
    out = pixels.new_zeros(len(boxes), features.shape[1], height, width)
    for rows, grid in _groups(boxes.detach(), (height, width), sampling_ratio):
        x, y = _samples(boxes[rows], (height, width), grid)
        where, weights = _corners(x, y, features.shape[-2:])
        where = where + image[rows, None, None] * features[0, 0].numel()
        bins = embedding_bag(where.flatten(0, 1), pixels, per_sample_weights=weights.flatten(0, 1), mode="sum")
        bins = bins / (grid[0] * grid[1])
        out = out.index_copy(0, rows, bins.view(len(rows), height, width, -1).permute(0, 3, 1, 2))
    return out.to(features.dtype)


def _groups(boxes: Tensor, size: tuple[int, int], sampling_ratio: int) -> list[tuple[Tensor, tuple[int, int]]]:
    """Rows of boxes with the same samples (g_h, g_w) in a bin, in parts that fit into memory; boxes of none lack."""
    if sampling_ratio > 0:
        grids = torch.full((len(boxes), 2), sampling_ratio, device=boxes.device)
    else:
        grids = (boxes[:, [3, 2]] / boxes.new_tensor(size)).ceil().long().clamp(min=0)
    groups = []
    for grid in grids.unique(dim=0).tolist():
        if grid[0] and grid[1]:
            rows = (grids == grids.new_tensor(grid)).all(1).nonzero().squeeze(1)
            reads = 4 * grid[0] * grid[1] * size[0] * size[1]
            groups += [(part, (grid[0], grid[1])) for part in rows.split(max(1, _MOST_READS // reads))]
    return groups


def _samples(boxes: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """x and y (n, h w, g_h g_w) of the samples of boxes (n, 5), in pixels of the map."""

    def shares(bins: int, samples: int) -> Tensor:  # (bins, samples), from -1/2 to 1/2 of the side
        places = torch.arange(bins * samples, device=boxes.device, dtype=boxes.dtype)
        return ((places + 0.5) / (bins * samples) - 0.5).view(bins, samples)

    cx, cy, w, h, a = (each[:, None, None, None, None] for each in boxes.unbind(1))
    along = w * shares(size[1], grid[1])[None, None, :, None, :]
    across = h * shares(size[0], grid[0])[None, :, None, :, None]
    cos, sin = a.cos(), a.sin()
    x, y = cx + along * cos - across * sin, cy + along * sin + across * cos
    return x.flatten(3).flatten(1, 2), y.flatten(3).flatten(1, 2)


def _corners(x: Tensor, y: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Numbers of the four pixels around each of the samples (n, bins, s), and their weights, both (n, bins, 4 s)."""
    height, width = size
    inside = (x >= -1) & (x <= width) & (y >= -1) & (y <= height)
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    left, top = x.detach().floor(), y.detach().floor()
    right_part, lower_part = x - left, y - top
    column, row = left.long(), top.long() * width
    next_column, next_row = (column + 1).clamp(max=width - 1), (row + width).clamp(max=(height - 1) * width)
    where = [row + column, row + next_column, next_row + column, next_row + next_column]
    upper, lower = (1 - lower_part) * inside, lower_part * inside
    weights = [upper * (1 - right_part), upper * right_part, lower * (1 - right_part), lower * right_part]
    return torch.cat(where, -1), torch.cat(weights, -1)


def _check(features: Tensor, boxes: Tensor, height: int, width: int) -> None:
    if features.ndim != 4:
        raise ValueError(f"features must be (B, C, H, W), got {tuple(features.shape)}")
    if boxes.ndim != 2 or boxes.shape[1] != 6:
        raise ValueError(f"boxes must be (n, 6), (image, cx, cy, w, h, angle), got {tuple(boxes.shape)}")
    if height < 1 or width < 1:
        raise ValueError(f"output_size must be at least 1 in both directions, got {(height, width)}")
    if len(boxes) and not (boxes[:, 0].min() >= 0 and boxes[:, 0].max() < len(features)):
        raise ValueError(f"the first column of boxes must number one of the {len(features)} images, from 0")
