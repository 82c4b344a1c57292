"""RoI align of oriented boxes: torchvision's at angle 0, and the same map when image and box turn together."""

import math

import pytest
import torch
from torchvision.ops import roi_align

from deltalens.models import oriented_roi_align as module
from deltalens.models.oriented_roi_align import oriented_roi_align

SCALE = 0.125


def a_map(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def boxes_around(count, width, height, images=2):
    """(count, 6), some beyond the image's border."""
    made = torch.Generator().manual_seed(1)
    centres = (torch.rand(count, 2, generator=made) * 1.3 - 0.15) * torch.tensor([width, height])
    image = torch.randint(images, (count, 1), generator=made)
    sides = torch.rand(count, 2, generator=made) * 80
    return torch.cat([image, centres, sides, torch.randn(count, 1, generator=made)], 1).double()


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
def test_angle_0_is_torchvisions(sampling_ratio, monkeypatch):
    features, boxes = a_map(2, 3, 17, 13), boxes_around(80, 13 / SCALE, 17 / SCALE)
    boxes[:, 5] = 0
    boxes[0, 3] = 0  # no width: no samples where their number adapts
    upright = torch.cat([boxes[:, :1], boxes[:, 1:3] - boxes[:, 3:5] / 2, boxes[:, 1:3] + boxes[:, 3:5] / 2], 1)
    want = roi_align(features, upright, (5, 7), SCALE, sampling_ratio, aligned=True)
    assert (want.abs().amax((1, 2, 3)) == 0).any()
    found = oriented_roi_align(features, boxes, (5, 7), SCALE, sampling_ratio)
    torch.testing.assert_close(found, want, atol=1e-12, rtol=0)
    monkeypatch.setattr(module, "_MOST_READS", 2000)
    in_parts = oriented_roi_align(features, boxes, (5, 7), SCALE, sampling_ratio)
    torch.testing.assert_close(in_parts, want, atol=1e-12, rtol=0)
    single = oriented_roi_align(features.float(), boxes.float(), (5, 7), SCALE, sampling_ratio)
    torch.testing.assert_close(single, want.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_image_and_box_turn_together(sampling_ratio):
    """A quarter turn clockwise takes (x, y) of an image of height h to (h - y, x)."""
    features, boxes = a_map(1, 3, 16, 24), boxes_around(40, 24 / SCALE, 16 / SCALE, images=1)
    turned = boxes.clone()
    turned[:, 1], turned[:, 2] = 16 / SCALE - boxes[:, 2], boxes[:, 1]
    turned[:, 5] += math.pi / 2
    want = oriented_roi_align(features, boxes, (4, 6), SCALE, sampling_ratio)
    found = oriented_roi_align(features.rot90(-1, (2, 3)), turned, (4, 6), SCALE, sampling_ratio)
    torch.testing.assert_close(found, want, atol=1e-10, rtol=0)


def test_bins_follow_the_box():
    """On a map that holds x, bins hold the x of their centres: mean of the samples, linear between pixels."""
    features = torch.arange(32.0).expand(1, 1, 32, 32)
    angle = 0.6
    pooled = oriented_roi_align(features, torch.tensor([[0, 16, 15, 12, 6, angle]]), (2, 3), 1.0, 2)[0, 0]
    for i, across in enumerate((-1.5, 1.5)):
        for j, along in enumerate((-4.0, 0.0, 4.0)):
            want = 16 - 0.5 + along * math.cos(angle) - across * math.sin(angle)
            assert pooled[i, j].item() == pytest.approx(want, abs=1e-4)


def test_gradients():
    features, boxes = a_map(2, 2, 7, 6).requires_grad_(), boxes_around(6, 48, 56)
    boxes[:, 1:3] = boxes[:, 1:3].clamp(12, 36)
    boxes[:, 3:5] = boxes[:, 3:5] / 4 + 5
    boxes.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: oriented_roi_align(x, y, 2, SCALE, 2), (features, boxes))


def test_no_boxes_and_dtypes():
    features = a_map(1, 3, 8, 8)
    assert oriented_roi_align(features, torch.zeros(0, 6), 7, 1.0, 2).shape == (0, 3, 7, 7)
    half = oriented_roi_align(features.bfloat16(), torch.tensor([[0, 4, 4, 4, 4, 1.0]]), 2, 1.0, 2)
    assert half.dtype == torch.bfloat16


def test_wrong_input_is_named():
    features = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"\(n, 6\)"):
        oriented_roi_align(features, torch.zeros(1, 5), 7, 1.0, 2)
    with pytest.raises(ValueError, match="2 images"):
        oriented_roi_align(features, torch.tensor([[2.0, 0, 0, 1, 1, 0]]), 7, 1.0, 2)
    with pytest.raises(ValueError, match="B, C, H, W"):
        oriented_roi_align(features[0], torch.zeros(1, 6), 7, 1.0, 2)
