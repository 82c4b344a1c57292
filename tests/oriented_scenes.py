"""Oriented boxes for tests, and their areas by shapely in float64."""

import numpy as np
import shapely
import torch

from deltalens.models.oriented_boxes import corners_of


def some_boxes(count, *, extent=50.0, sides=(5.0, 60.0), seed=0):
    """(count, 5) in float32: centres in a square of the extent, angles of a few turns."""
    made = torch.Generator().manual_seed(seed)
    centres = torch.rand(count, 2, generator=made) * extent
    lengths = sides[0] + (sides[1] - sides[0]) * torch.rand(count, 2, generator=made)
    return torch.cat([centres, lengths, (torch.rand(count, 1, generator=made) - 0.5) * 20], 1)


def true_areas(first, second):
    """Intersection, union, row by row."""
    mine, others = (shapely.polygons(corners_of(boxes.double()).numpy()) for boxes in (first, second))
    inter = shapely.area(shapely.intersection(mine, others))
    return inter, shapely.area(mine) + shapely.area(others) - inter


def true_iou(first, second):
    inter, union = true_areas(first, second)
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
