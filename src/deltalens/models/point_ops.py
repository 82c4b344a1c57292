"""Sampling and grouping of point clouds in plain torch: farthest points, nearest neighbours, patches.

Shapes: B clouds of N points, G centres, k neighbours. Nothing here has gradients; coordinates are read in float32 or
float64, whatever autocast says.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR_ORIGIN = 1e-3  # squared length up to which pointnet2_ops passes a point over


def _coordinates(points: Tensor) -> Tensor:
    return points if points.dtype == torch.float64 else points.float()


@torch.no_grad()
def farthest_points(points: Tensor, count: int, skip_origin: bool = True) -> Tensor:
    """Farthest point sampling: indices (B, count) of points (B, N, 3).

    The first centre is point 0; each next one is the point whose squared distance to all centres so far is largest.
    Only one distance per point is kept, and no matrix of all pairs is made.

    skip_origin: the rule of pointnet2_ops, with which the official models were trained: a point with
    x^2 + y^2 + z^2 <= 1e-3 is never chosen after the first centre. Where only such points and chosen ones are left,
    indices repeat. Ties go to the lowest index on a CPU; the CUDA kernel of pointnet2_ops breaks them by its threads.

    Raises ValueError for clouds of another shape or without points.
    """
    if points.dim() != 3 or points.shape[-1] != 3 or not points.shape[1]:
        raise ValueError(f"a batch of clouds is (B, N, 3) with N at least 1, got {tuple(points.shape)}")
    axes = _coordinates(points).permute(2, 0, 1).contiguous()
    distance = torch.full_like(axes[0], torch.inf)
    if skip_origin:
        distance = distance.masked_fill(axes.square().sum(0) <= NEAR_ORIGIN, -1.0)
    chosen = [torch.zeros(len(points), 1, dtype=torch.long, device=points.device)]
    for _ in range(count - 1):
        difference = axes - axes.gather(2, chosen[-1].expand(3, -1, -1))
        distance = torch.minimum(distance, difference.square_().sum(0))
        chosen.append(distance.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


@torch.no_grad()
def nearest_points(points: Tensor, centres: Tensor, count: int) -> Tensor:
    """Indices (B, G, count) of the points (B, N, 3) nearest to each centre (B, G, 3), nearest first.

    A centre that is one of the points is its own first neighbour. Squared distances are summed over the axes, not
    expanded into products, so that equal indices come out of float32 and float64. Raises ValueError where a cloud has
    fewer points.
    """
    if points.shape[1] < count:
        raise ValueError(
            f"a cloud of {points.shape[1]} points has no {count} neighbours: give clouds of more points, or build the "
            f"model with a group_size of at most {points.shape[1]}"
        )
    from_points, to_centres = _coordinates(points).unbind(-1), _coordinates(centres).unbind(-1)
    distance = (to_centres[0].unsqueeze(2) - from_points[0].unsqueeze(1)).square_()
    for point, centre in zip(from_points[1:], to_centres[1:], strict=True):
        distance += (centre.unsqueeze(2) - point.unsqueeze(1)).square_()
    return distance.topk(count, dim=2, largest=False).indices


def take_points(points: Tensor, index: Tensor) -> Tensor:
    """points (B, N, C) at index (B, ...) -> (B, ..., C)."""
    flat = index.flatten(1).unsqueeze(-1).expand(-1, -1, points.shape[-1])
    return points.gather(1, flat).unflatten(1, index.shape[1:])


def group_points(points: Tensor, num_groups: int, group_size: int, skip_origin: bool = True) -> tuple[Tensor, Tensor]:
    """Patches of clouds (B, N, 3): (neighbourhoods (B, G, k, 3) relative to their centres, centres (B, G, 3)).

    Centres are farthest points; each patch holds the centre and its nearest points. Radii are not rescaled.
    """
    points = _coordinates(points)
    centres = take_points(points, farthest_points(points, num_groups, skip_origin))
    groups = take_points(points, nearest_points(points, centres, group_size))
    return groups - centres.unsqueeze(2), centres


def chamfer_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Chamfer distance L2 of point sets (M, n, 3) and (M, m, 3), the mean over the batch: the squared distance from
    each point to the nearest one of the other set, averaged over the points, summed over both directions."""
    squared = (found.unsqueeze(2) - wanted.unsqueeze(1)).square().sum(-1)
    return squared.amin(2).mean() + squared.amin(1).mean()
