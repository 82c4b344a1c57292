"""Rotation, scale and shift of clouds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class Augment:
    """Each cloud (n, 3) of a batch by itself: turned about the third axis, which points up in the voxels; stretched
    along each axis by a factor of U(1 / scale, scale); moved by U(-shift, shift)."""

    rotation: bool = True
    scale: float = 1.5
    shift: float = 0.2

    def __call__(self, clouds: torch.Tensor) -> torch.Tensor:
        batch = len(clouds)
        if self.rotation:
            clouds = clouds @ about_third_axis(torch.rand(batch) * 2 * math.pi)
        factors = torch.empty(batch, 1, 3).uniform_(1 / self.scale, self.scale)
        return clouds * factors + torch.empty(batch, 1, 3).uniform_(-self.shift, self.shift)


def about_third_axis(angles: torch.Tensor) -> torch.Tensor:
    """(B,) radians -> rotations (B, 3, 3)."""
    rotations = torch.zeros(len(angles), 3, 3)
    rotations[:, 0, 0] = rotations[:, 1, 1] = angles.cos()
    rotations[:, 0, 1], rotations[:, 1, 0] = angles.sin(), -angles.sin()
    rotations[:, 2, 2] = 1
    return rotations
