"""Proposals of Oriented R-CNN: torchvision's where boxes are upright, oriented ones by hand, losses, no gradient."""

import math

import pytest
import torch
from small_oriented_rcnn import random_boxes
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from deltalens.backbones.dense.detector_parts import PyramidAnchors
from deltalens.backbones.dense.midpoint_offsets import MidpointOffsetCoder
from deltalens.backbones.dense.oriented_proposals import OrientedProposalHead, OrientedProposals, overlaps_image
from deltalens.models.oriented_boxes import enclosing, from_upright

STRIDES, CHANNELS = [8, 16], 8
LEAST, KEPT, SAMPLED = 0.8, 30, 64


def anchors():
    return PyramidAnchors([(32.0,), (64.0,)], [(0.5, 1.0, 2.0)] * 2, STRIDES)


def proposals_network(nms=LEAST, kept=KEPT):
    torch.manual_seed(0)
    head = OrientedProposalHead(CHANNELS, 3)
    return OrientedProposals(anchors(), head, {"training": kept, "testing": kept}, nms, SAMPLED)


def torchvisions():
    torch.manual_seed(0)
    counts = {"training": KEPT, "testing": KEPT}
    return RegionProposalNetwork(anchors(), RPNHead(CHANNELS, 3), 0.7, 0.3, SAMPLED, 0.5, counts, counts, LEAST)


def batch(count=2, side=128):
    random = torch.Generator().manual_seed(1)
    maps = {str(n): torch.randn(count, CHANNELS, side // s, side // s, generator=random) for n, s in enumerate(STRIDES)}
    return ImageList(torch.zeros(count, 3, side, side), [(side, side)] * count), maps


def all_anchors():
    images, maps = batch()
    return anchors()(images, list(maps.values()))


def upright_boxes(count, seed):
    random = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    low = 80 * random[:, :2]
    return torch.cat((low, low + 16 + 60 * random[:, 2:]), 1)


def test_upright_objects_are_assigned_as_torchvision_does():
    boxes = [upright_boxes(5, 1), torch.zeros(0, 4)]
    expected = torchvisions().assign_targets_to_anchors(all_anchors(), [{"boxes": each} for each in boxes])
    found = proposals_network().assign_targets_to_anchors(all_anchors(), [{"boxes": from_upright(b)} for b in boxes])
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.equal(one, other)
    assert {-1.0, 0.0, 1.0} == set(found[0][0].tolist())
    assert set(found[0][1].tolist()) == {0.0}
    read = found[0][0] == 1
    assert torch.allclose(enclosing(found[1][0][read]), expected[1][0][read], atol=1e-4)


def test_assignment_by_hand():
    """A thin bar on the diagonal of an anchor: the anchor is its, although the bar fills a sixth of it."""
    given = torch.tensor([[0.0, 0, 40, 40], [4, 4, 44, 44], [20, 20, 60, 60], [60, 0, 100, 40]])
    thin = torch.tensor([[20.0, 20, 52, 4.5, math.pi / 4]])  # its upright box is nearly the first anchor
    labels, matched = proposals_network().assign_targets_to_anchors([given], [{"boxes": thin}])
    assert labels[0].tolist() == [1.0, -1.0, 0.0, 0.0]
    assert torch.equal(matched[0][0], thin[0])
    far = torch.tensor([[8.0, 8, 12, 4, 0.3]])  # IoU below 0.3 with all anchors: the best is its all the same
    labels, _ = proposals_network().assign_targets_to_anchors([given[:3]], [{"boxes": far}])
    assert labels[0].tolist() == [1.0, 0.0, 0.0]
    outside = torch.cat((far - torch.tensor([500.0, 0, 0, 0, 0]), thin))  # no anchor touches the first
    labels, matched = proposals_network().assign_targets_to_anchors([given, given], [{"boxes": outside}] * 2)
    assert labels[1].tolist() == [1.0, -1.0, 0.0, 0.0]
    assert torch.equal(matched[1][0], thin[0])
    labels, _ = proposals_network().assign_targets_to_anchors([given], [{"boxes": outside[:1]}])
    assert labels[0].tolist() == [0.0] * 4


def test_upright_losses_are_torchvisions():
    """With offsets found exactly, the box loss is that of four numbers."""
    plain, oriented = torchvisions(), proposals_network()
    boxes = upright_boxes(4, 2)
    given = all_anchors()[:1]
    labels, matched = plain.assign_targets_to_anchors(given, [{"boxes": boxes}])
    wanted = plain.box_coder.encode(matched, given)
    _, own = oriented.assign_targets_to_anchors(given, [{"boxes": from_upright(boxes)}])
    own_wanted = [oriented.box_coder.encode(own[0], given[0])]
    count = len(given[0])
    objectness, deltas = torch.randn(count, 1), torch.randn(count, 4)
    offsets = own_wanted[0][:, 4:]
    torch.manual_seed(3)
    expected = plain.compute_loss(objectness, deltas, labels, wanted)
    torch.manual_seed(3)
    found = oriented.compute_loss(objectness, torch.cat((deltas, offsets), 1), labels, own_wanted)
    assert torch.allclose(torch.stack(found), torch.stack(expected))
    torch.manual_seed(3)
    off = oriented.compute_loss(objectness, torch.cat((deltas, offsets + 1), 1), labels, own_wanted)
    torch.manual_seed(3)
    positive = plain.fg_bg_sampler(labels)
    counted = positive[0][0].sum() / (positive[0][0].sum() + positive[1][0].sum())
    assert torch.allclose(off[1] - found[1], counted * 2 * (1 - 1 / 18))  # smooth L1 of 1, twice


def test_upright_proposals_are_torchvisions():
    """The same boxes and scores: the same ones are kept, in the same order."""
    plain, oriented = torchvisions().eval(), proposals_network().eval()
    given = all_anchors()
    counts = [3 * (128 // stride) ** 2 for stride in STRIDES]
    random = torch.Generator().manual_seed(4)
    middle = [torch.cat(((a[:, :2] + a[:, 2:]) / 2, a[:, 2:] - a[:, :2]), 1) for a in given]
    centres = 64 + 16 * torch.randn(2, len(given[0]), 2, generator=random)
    sides = 16 + 24 * torch.rand(2, len(given[0]), 2, generator=random)
    boxes = torch.cat((centres - sides / 2, centres + sides / 2), -1).clamp(1, 127)
    objectness = torch.randn(2, len(middle[0]), 1, generator=random)
    coder = MidpointOffsetCoder()
    deltas = torch.stack([coder.encode(from_upright(b), a) for b, a in zip(boxes, given, strict=True)])
    expected, _ = plain.filter_proposals(boxes, objectness, [(128, 128)] * 2, counts)
    found = oriented.proposals_of(deltas, objectness, given, [(128, 128)] * 2, counts)
    for one, other in zip(found, expected, strict=True):
        assert len(other) == KEPT
        assert torch.allclose(enclosing(one), other, atol=1e-2)


def test_suppression_is_by_upright_boxes_of_a_level():
    """Two thin crossing bars share their upright box: of one level the better stays, of two levels both do."""
    pair = torch.tensor([[40.0, 40, 60, 4, math.pi / 4], [40, 40, 60, 4, -math.pi / 4], [90, 90, 20, 10, 0.2]])
    given = enclosing(pair) + torch.tensor([1.0, 0, 3, 2])
    network = proposals_network().eval()
    deltas = network.box_coder.encode(pair, given)[None]
    scores = torch.tensor([[[0.1], [2.0], [1.0]]])
    kept = network.proposals_of(deltas, scores, [given], [(128, 128)], [3])[0]
    assert torch.allclose(kept, pair[[1, 2]], atol=1e-3)
    kept = network.proposals_of(deltas, scores, [given], [(128, 128)], [1, 2])[0]
    assert torch.allclose(kept, pair[[1, 2, 0]], atol=1e-3)
    few = proposals_network(kept=1).eval().proposals_of(deltas, scores, [given], [(128, 128)], [1, 2])[0]
    assert torch.allclose(few, pair[[1]], atol=1e-3)


def test_what_lies_outside():
    boxes = torch.tensor(
        [
            [-20.0, 30, 30, 10, 0.2],
            [-10, 30, 30, 10, 0.2],
            [60, 60, 30, 1e-4, 0.2],
            [30, 30, 9, 9, 1],
            [30, 75, 9, 9, 1],
        ]
    )
    assert overlaps_image(boxes, (64, 128), 1e-3).tolist() == [False, True, False, True, False]


def test_training_gives_losses_and_proposals_without_gradient():
    network, (images, maps) = proposals_network().train(), batch()
    maps = {name: each.requires_grad_() for name, each in maps.items()}
    boxes = random_boxes(3, 2, torch.float32) / 2
    found, losses = network(images, maps, [{"boxes": boxes}, {"boxes": boxes[:0]}])
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg"}
    assert all(0 < len(each) <= KEPT and each.shape[1] == 5 and not each.requires_grad for each in found)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    _, losses = network(images, maps, [{"boxes": boxes[:0]}] * 2)
    assert losses["loss_rpn_box_reg"] == 0
    assert losses["loss_objectness"] > 0
    with torch.no_grad():
        network.head.cls_logits.weight[0] += 1
        again, none = network.eval()(images, maps)
    assert none == {}
    assert len(again) == 2


def test_numbers_belong_to_their_anchors():
    """One anchor of one cell is changed: that one's box moves."""
    network, (images, maps) = proposals_network(nms=1.0, kept=10_000).eval(), batch(1)
    with torch.no_grad():
        network.head.bbox_pred.weight.zero_()
        network.head.bbox_pred.bias.zero_()
        network.head.bbox_pred.bias[6] = 0.25  # dx of the second anchor of each cell
        logits = [torch.zeros(1, 3, 128 // s, 128 // s) for s in STRIDES]
        logits[0][0, 1, 5, 9] = 9.0
        changes = network.head(list(maps.values()))[1]
        network.head.forward = lambda maps: (logits, changes)
        best = network(images, maps)[0][0][0]
    width = 32  # of ratio 1
    assert best[:2].tolist() == pytest.approx([9 * 8 + 0.25 * width, 5 * 8], abs=1e-3)
