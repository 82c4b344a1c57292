"""Cascade R-CNN part by part: matching, coding, refinement, losses, gradients, averages; one stage is Mask R-CNN."""

import pytest
import torch
import torch.nn.functional as F
from detectors import SMALL, Rectangles, TwoLevels, small_detector, target_of
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, generalized_box_iou, roi_align

from deltalens.backbones.dense import cascade_rcnn
from deltalens.backbones.dense.aligned_pooling import region_pooling
from deltalens.backbones.dense.box_heads import box_head
from deltalens.backbones.dense.cascade_heads import Stage, averaged
from deltalens.backbones.dense.region_losses import BoxLoss, class_loss
from deltalens.backbones.dense.region_sampling import Regions, RegionSampler

STDS = cascade_rcnn.CascadeOptions().box_stds
BOXES_ONLY = {name: value for name, value in SMALL["cascade"].items() if not name.startswith("mask")}


def without_masks(**options):
    torch.manual_seed(0)
    return cascade_rcnn.boxes_on_pyramid(TwoLevels(), 3, {**BOXES_ONLY, **options})


def stage_of(stds=STDS[0], layers=None):
    return Stage(nn.Identity(), layers or nn.Identity(), None, RegionSampler(0.5, 8), stds, 1.0)


def regions_of(boxes, labels, truth):
    boxes, truth = (torch.tensor(each, dtype=torch.float32).reshape(-1, 4) for each in (boxes, truth))
    labels = torch.tensor(labels)
    return Regions([boxes], [labels], [labels * 0], [truth], [labels > 9])


# ------------------------------------------------------------------ one stage
ONE_STAGE = {
    "iou_thresholds": [0.5],
    "box_stds": [[0.1, 0.1, 0.2, 0.2]],
    "stage_weights": [1.0],
    "class_agnostic": False,
    "smooth_l1_beta": 1 / 9,
}


def test_one_stage_is_mask_rcnn():
    """torchvision's, with the same weights and random numbers: all losses, boxes, scores and masks are the same."""
    published = small_detector("mask_rcnn", score_threshold=0.0)
    ours = small_detector("cascade", score_threshold=0.0, **ONE_STAGE)
    state = published.state_dict().items()
    ours.load_state_dict({name.replace("roi_heads.", "roi_heads.stages.0."): value for name, value in state})
    images, targets = Rectangles(4, sizes=((64, 64), (40, 56))).batch()
    losses = []
    for model in (published, ours):
        torch.manual_seed(1)
        losses.append(model.train()(images, targets))
    assert {name.removesuffix("_1"): loss.item() for name, loss in losses[1].items()} == {
        name: loss.item() for name, loss in losses[0].items()
    }
    with torch.no_grad():
        pairs = zip(published.eval()(images), ours.eval()(images), strict=True)
        for expected, found in pairs:
            assert len(found["boxes"]) > 0
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in found)


# ------------------------------------------------------------------ matching
@pytest.mark.parametrize(("threshold", "expected"), [(0.5, [1, 1, 1, 0]), (0.6, [1, 1, 0, 0]), (0.7, [1, 0, 0, 0])])
def test_regions_belong_to_objects_from_each_stages_threshold_on(threshold, expected):
    """Regions that overlap their object by 0.8, 0.6 (the threshold itself), 0.5 and 0.2, and its own box."""
    proposals = torch.tensor([[0.0, 0, 8, 10], [0, 0, 6, 10], [0, 0, 5, 10], [0, 0, 2, 10]])
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1])}
    regions = RegionSampler(threshold, 100)([proposals], [target])
    assert regions.labels[0].tolist() == [*expected, 1]
    assert regions.added[0].tolist() == [False] * 4 + [True]
    assert torch.equal(regions.boxes[0], torch.cat([proposals, target["boxes"]]))
    assert torch.equal(regions.true_boxes[0], target["boxes"].expand(5, 4))


def test_regions_take_the_object_that_they_overlap_most():
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    regions = RegionSampler(0.5, 100)(
        [torch.tensor([[19.0, 0, 30, 10], [0, 0, 10, 9]])], [{"boxes": truth, "labels": torch.tensor([2, 3])}]
    )
    assert regions.matched[0].tolist() == [1, 0, 0, 1]
    assert regions.labels[0].tolist() == [3, 2, 2, 3]


def test_a_quarter_of_the_sample_has_an_object():
    random = torch.Generator().manual_seed(0)
    corner = 50 * torch.rand(400, 2, generator=random)
    proposals = torch.cat([corner, corner + 10 + 30 * torch.rand(400, 2, generator=random)], 1)
    target = {"boxes": proposals[:100], "labels": torch.ones(100, dtype=torch.int64)}
    regions = RegionSampler(0.6, 64)(
        [proposals[100:], proposals[:1]], [target, {**target, "boxes": target["boxes"][:0]}]
    )
    assert [len(each) for each in regions.boxes] == [64, 1]
    assert int((regions.labels[0] > 0).sum()) == 16
    overlap = box_iou(target["boxes"], regions.boxes[0]).amax(0)
    assert torch.equal(overlap >= 0.6, regions.labels[0] > 0)
    assert regions.labels[1].tolist() == [0]


# ------------------------------------------------------------------ coding and refinement
@pytest.mark.parametrize("stds", STDS)
def test_changes_are_in_units_of_each_stages_deviations(stds):
    boxes, truth = torch.tensor([[10.0, 20, 50, 100]]), torch.tensor([[14.0, 12, 54, 108]])
    codes = stage_of(stds).coder.encode_single(truth, boxes)
    width, height = 40, 80
    plain = torch.tensor([4 / width, 0 / height, 0.0, float(torch.tensor(96 / 80).log())])
    assert torch.allclose(codes[0] * torch.tensor(stds), plain, atol=1e-6)
    assert torch.allclose(stage_of(stds).coder.decode_single(codes, boxes), truth, atol=1e-4)


def test_refinement_by_hand():
    """A shift by half a width, a doubled height, and a box that is clipped to its image."""
    boxes = [torch.tensor([[10.0, 10, 30, 30]]), torch.tensor([[10.0, 10, 30, 30], [0, 0, 10, 10]])]
    log2 = float(torch.tensor(2.0).log())
    changes = torch.tensor([[5.0, 0, 0, 0], [0, 0, 0, log2 / 0.2], [-10.0, 0, 0, 0]])
    changes.requires_grad_()
    found = stage_of().refined(boxes, torch.zeros(3, 4), changes, [(100, 35), (100, 100)])
    assert torch.allclose(found[0], torch.tensor([[20.0, 10, 35, 30]]), atol=1e-4)
    assert torch.allclose(found[1], torch.tensor([[10.0, 0, 30, 40], [0, 0, 0, 10]]), atol=1e-4)
    assert not any(each.requires_grad for each in found)


def test_refinement_by_class():
    """A region is moved as its label says; background and unlabelled ones as the likeliest class says."""
    boxes, size = [torch.tensor([[40.0, 40, 50, 50]]).expand(3, 4)], [(100, 100)]
    changes = torch.zeros(3, 3, 4)
    changes[:, 1, 0], changes[:, 2, 0] = 10, -10  # class 1 moves to the right, class 2 to the left, by a width
    logits = torch.tensor([[9.0, 0, 1]]).expand(3, 3)
    labels = torch.tensor([1, 0, 2])
    found = stage_of().refined(boxes, logits, changes.flatten(1), size, labels)[0]
    assert found[:, 0].tolist() == [50, 30, 30]
    assert stage_of().refined(boxes, logits, changes.flatten(1), size)[0][:, 0].tolist() == [30, 30, 30]


def test_stages_are_given_what_the_stage_before_made_of_its_regions():
    """And the objects' own boxes of the stage before are not among them."""
    model = without_masks()
    seen = []
    for stage in model.roi_heads.stages:
        stage.sampler = _Recorded(stage.sampler, seen)
        nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        stage.box_predictor.bbox_pred.bias.data = torch.tensor([1.0, 0, 0, 0])
    target = target_of([[10, 10, 30, 34]], [1])
    model.train()([torch.zeros(3, 64, 64)], [target])
    for number, std in ((0, 0.1), (1, 0.05)):
        (given, _), (after, _) = seen[number], seen[number + 1]
        kept = given.boxes[0][~given.added[0]]
        moved = kept + std * (kept[:, 2] - kept[:, 0])[:, None] * torch.tensor([1, 0, 1, 0])
        assert len(kept) == len(given.boxes[0]) - 1
        assert torch.allclose(seen[number + 1][1][0], moved.clamp(0, 64), atol=1e-4)
        assert torch.equal(after.boxes[0][after.added[0]], target["boxes"])


class _Recorded:
    def __init__(self, sampler, seen):
        self.sampler, self.seen = sampler, seen

    def __call__(self, proposals, targets):
        regions = self.sampler(proposals, targets)
        self.seen.append((regions, list(proposals)))
        return regions


# ------------------------------------------------------------------ losses
def test_losses_of_classes_and_boxes():
    boxes, truth = [[0, 0, 10, 10], [0, 0, 8, 20], [5, 5, 9, 9]], [[2, 0, 12, 10], [0, 0, 8, 24], [0, 0, 1, 1]]
    regions, coder = regions_of(boxes, [1, 2, 0], truth), BoxCoder((10.0, 10.0, 5.0, 5.0))
    random = torch.Generator().manual_seed(0)
    changes, logits = torch.randn(3, 4, generator=random), torch.randn(3, 3, generator=random)
    probabilities = logits.softmax(1)[torch.arange(3), torch.tensor([1, 2, 0])]
    assert torch.allclose(class_loss(logits, regions), -probabilities.log().mean())
    difference = (changes - coder.encode_single(regions.true_boxes[0], regions.boxes[0]))[:2].abs()
    assert torch.allclose(BoxLoss("l1", 2.0)(changes, regions, coder), 2 * difference.sum() / 3)
    smooth = torch.where(difference < 0.5, difference**2, difference - 0.25)
    assert torch.allclose(BoxLoss("smooth_l1", beta=0.5)(changes, regions, coder), smooth.sum() / 3)
    moved = coder.decode_single(changes, regions.boxes[0])[:2]
    giou = generalized_box_iou(moved, regions.true_boxes[0][:2]).diag()
    assert torch.allclose(BoxLoss("giou", 10.0)(changes, regions, coder), 10 * (1 - giou).sum() / 3)
    per_class = torch.zeros(3, 3, 4)
    per_class[[0, 1], [1, 2]] = changes[:2]
    per_class[0, 2] = 99
    expected = BoxLoss("l1")(changes, regions, coder)
    assert torch.allclose(BoxLoss("l1")(per_class.flatten(1), regions, coder), expected)


def test_the_weights_of_stages_weigh_all_their_losses():
    images, targets = Rectangles(2).batch()
    losses = []
    for weights in ((1.0, 0.5, 0.25), (1.0, 1.0, 1.0)):
        model = small_detector("cascade", stage_weights=weights).train()
        torch.manual_seed(1)
        losses.append(model(images, targets))
    for name, loss in losses[0].items():
        weight = {"2": 0.5, "3": 0.25}.get(name[-1], 1)
        assert float(loss) == pytest.approx(weight * float(losses[1][name])), name


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou"])
def test_no_stage_teaches_the_ones_before_it_through_its_boxes(box_loss):
    model = without_masks(box_loss=box_loss).train()
    torch.manual_seed(1)
    losses = model(*Rectangles(2).batch())
    (losses["loss_classifier_3"] + losses["loss_box_reg_3"]).backward(retain_graph=True)
    stages = model.roi_heads.stages
    assert all(p.grad is None for stage in stages[:2] for p in stage.parameters())
    assert all(p.grad is None for p in model.rpn.parameters())
    assert all(p.grad is not None for p in stages[2].parameters())
    assert any(p.grad is not None for p in model.backbone.parameters())
    losses["loss_box_reg_1"].backward()
    assert stages[0].box_predictor.bbox_pred.weight.grad.abs().sum() > 0


def test_networks_without_proposals_and_without_objects():
    images, targets = Rectangles(2, empty=True).batch()
    for options in ({}, {"class_agnostic": False, "box_head": "4conv1fc"}):
        model = small_detector("cascade", **options)
        maps, none, sizes = model.backbone(torch.stack(images)), [torch.zeros(0, 4)] * 2, [(64, 64)] * 2
        _, losses = model.train().roi_heads(maps, none, sizes, targets)
        assert {float(loss) for loss in losses.values()} == {0.0}
        sum(losses.values()).backward()
        found, _ = model.eval().roi_heads(maps, none, sizes)
        assert [tuple(each["boxes"].shape) for each in found] == [(0, 4), (0, 4)]
        assert [tuple(each["masks"].shape) for each in found] == [(0, 1, 28, 28)] * 2


def test_targets_are_asked_for():
    model, images = small_detector("cascade").train(), [torch.zeros(3, 32, 32)]
    target = target_of([[2, 2, 20, 20]], [0], (32, 32))
    with pytest.raises(ValueError, match="boxes, labels, masks, and one has no masks"):
        model(images, [{name: target[name] for name in ("boxes", "labels")}])


# ------------------------------------------------------------------ evaluation
def test_averages_of_stages():
    logits = [torch.tensor([[0.0, 2.0, 4.0]]), torch.tensor([[3.0, 0.0, 3.0]])]
    assert torch.equal(averaged(logits, "logits"), torch.tensor([[1.5, 1.0, 3.5]]))
    mean = (logits[0].softmax(1) + logits[1].softmax(1)) / 2
    assert torch.allclose(averaged(logits, "probabilities").softmax(1), mean)
    assert torch.allclose(averaged(logits, "probabilities").exp(), mean)


@torch.no_grad()
def test_evaluation_by_hand():
    """Each stage on what the one before made of the boxes; mean logits, the last boxes, mean probabilities of masks."""
    model = small_detector("cascade", score_threshold=0.0, nms_threshold=1.0, detections_per_image=1000).eval()
    for parameter in model.roi_heads.parameters():
        parameter.mul_(3)
    heads, image = model.roi_heads, Rectangles(1).batch()[0][0]
    maps, size = model.backbone(image[None]), (64, 64)
    boxes = [torch.tensor([[4.0, 4, 40, 30], [20, 10, 60, 60], [0, 30, 30, 64]])]
    found = heads(maps, boxes, [size])[0][0]
    logits = 0
    for stage, stds in zip(heads.stages, STDS, strict=True):
        pooled = heads.box_roi_pool(maps, boxes, [size])
        features = F.relu(stage.box_head.fc7(F.relu(stage.box_head.fc6(pooled.flatten(1)))))
        logits = logits + stage.box_predictor.cls_score(features) / 3
        changes = stage.box_predictor.bbox_pred(features) * torch.tensor(stds)
        (old,) = boxes
        sides = old[:, 2:] - old[:, :2]
        centre = (old[:, 2:] + old[:, :2]) / 2 + changes[:, :2] * sides
        half = sides * changes[:, 2:].exp() / 2
        boxes = [torch.cat([centre - half, centre + half], 1).clamp(0, 64)]
    scores = logits.softmax(1)[:, 1:]
    assert torch.allclose(found["scores"], scores.flatten().sort(descending=True)[0], atol=1e-6)
    best = scores.flatten().argsort(descending=True)
    assert torch.allclose(found["boxes"], boxes[0][best // 3], atol=1e-3)
    assert found["labels"].tolist() == (best % 3 + 1).tolist()
    pooled = heads.mask_roi_pool(maps, [found["boxes"]], [size])
    rows = torch.arange(len(best))
    masks = [s.mask_predictor(s.mask_head(pooled)).sigmoid()[rows, found["labels"]] for s in heads.stages]
    assert torch.allclose(found["masks"][:, 0], sum(masks) / 3, atol=1e-6)


# ------------------------------------------------------------------ heads, pooling, anchors
def test_box_heads():
    norms = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm}
    for norm in ("batch", "group", None):
        head = box_head("4conv1fc", 16, 24, norm)
        convolutions = [each for each in head.modules() if isinstance(each, nn.Conv2d)]
        assert [(each.in_channels, each.out_channels) for each in convolutions] == [(16, 16)] * 4
        assert sum(isinstance(each, norms.get(norm, ())) for each in head.modules()) == (4 if norm else 0)
        assert [each.in_features for each in head.modules() if isinstance(each, nn.Linear)] == [16 * 49]
        assert head(torch.randn(3, 16, 7, 7)).shape == (3, 24)
    assert box_head("2fc", 16, 24, None)(torch.randn(3, 16, 7, 7)).shape == (3, 24)


def test_aligned_regions_are_not_half_a_cell_off():
    """A map that holds the x of each cell's centre gives the x of the region's, however small the region."""
    row = torch.arange(16.0).expand(1, 1, 16, 16)
    maps = {"0": row * 4 + 2, "1": row[..., :8, :8] * 8 + 4}
    boxes = [torch.tensor([[8.0, 8, 24, 24], [20, 4, 30, 14], [20, 20, 21, 21]])]
    found = region_pooling([4, 8], 1, 2, 8, True)(maps, boxes, [(64, 64)]).flatten()
    assert found.tolist() == pytest.approx([16, 25, 20.5], abs=1e-4)
    expected = roi_align(maps["0"], boxes, 7, 1 / 4, 0, aligned=True)
    assert torch.equal(region_pooling([4], 7, 0, 224, True)(maps, boxes, [(64, 64)]), expected)


def test_anchors_that_are_not_rounded():
    model = without_masks(rounded_anchors=False, anchor_scale=8.0)
    boxes = model.rpn.anchor_generator.generate_anchors((32.0,), (0.5, 1.0, 2.0))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert torch.allclose(sides.prod(1), torch.tensor(1024.0))
    assert torch.allclose(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 1.0, 2.0]))
    assert torch.equal(boxes.round(), without_masks().rpn.anchor_generator.generate_anchors((32.0,), (0.5, 1.0, 2.0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iou_thresholds": [0.5, 0.6]}, "one entry for each stage; got 2, 3 and 3"),
        ({"iou_thresholds": [0.5, 0.6, 1.7]}, "not above 1, got"),
        ({"box_stds": [[0.1, 0.1, 0.2]] * 3}, "four positive numbers"),
        ({"box_loss": "l2"}, "smooth_l1, l1, giou, got 'l2'"),
        ({"average": "scores"}, "logits, probabilities, got 'scores'"),
        ({"box_head": "3fc"}, "2fc, 4conv1fc, got '3fc'"),
        ({"box_head": "4conv1fc", "box_norm": "layer"}, "'batch', 'group' or None, got 'layer'"),
        ({"smooth_l1_beta": 0}, "smooth_l1_beta must be positive"),
        ({"mask_width": 4}, "cascade_rcnn has no option 'mask_width'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        without_masks(**options)
