"""RetinaNet with oriented boxes: both modes, losses, torchvision's in the upright case, learning, files, precision."""

import math

import pytest
import torch
from detectors import TwoLevels
from oriented_bars import BARS, angle_between, picture_of, target_of, two_bars
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead

import deltalens as dl
from deltalens.backbones.dense import retinanet
from deltalens.backbones.dense.oriented_batch import OrientedBatch, resized_boxes
from deltalens.backbones.dense.oriented_coder import OrientedCoder
from deltalens.backbones.dense.oriented_detections import candidates
from deltalens.backbones.dense.oriented_losses import BOX_LOSSES
from deltalens.backbones.dense.oriented_retinanet import OrientedRetinaNetOptions, on_pyramid
from deltalens.models.oriented_boxes import enclosing, from_upright
from deltalens.models.oriented_iou import oriented_iou, paired_iou

SMALL = {"channels": 16, "anchor_scale": 2.0}


def small(num_classes=3, **options):
    torch.manual_seed(0)
    return on_pyramid(TwoLevels(), num_classes, {**SMALL, **options})


@pytest.mark.parametrize("loss", list(BOX_LOSSES))
def test_both_modes(loss):
    model = small(score_threshold=0.0, box_loss=loss, candidates=50)
    images, targets = two_bars()
    images[1] = images[1][:, :56, :40]
    losses = model.train()(images, targets)
    assert set(losses) == {"classification", "bbox_regression"}
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    trained = [*model.head.parameters(), *model.backbone.fpn.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    with torch.no_grad():
        found = model.eval()(images)
    for each in found:
        assert len(each["boxes"]) == len(each["labels"]) == len(each["scores"]) > 0
        assert each["boxes"].shape[1] == 5
        assert (each["boxes"][:, 2] >= each["boxes"][:, 3]).all()
        assert (each["boxes"][:, 4].abs() <= math.pi / 2).all()
        assert (each["scores"].diff() <= 0).all()
        assert set(each["labels"].tolist()) <= {0, 1, 2}
        for label in range(3):
            own = each["boxes"][each["labels"] == label]
            assert (oriented_iou(own, own).fill_diagonal_(0) <= 0.1 + 1e-5).all()
    assert model.num_classes == 3
    assert model.get_submodule(model.adapted) is model.backbone.pyramid.backbone


@pytest.mark.parametrize("loss", list(BOX_LOSSES))
def test_no_objects_and_tiny_ones(loss):
    model = small(box_loss=loss).train()
    images = two_bars()[0]
    for boxes in ([], [[20.0, 20.0, 0.0, 0.0, 0.0], [30.0, 30.0, 1e-4, 50.0, 1.0], [40.0, 40.0, 0.3, 0.2, 0.1]]):
        model.zero_grad()
        losses = model(images, [target_of(boxes, [0] * len(boxes))] * 2)
        assert all(each.isfinite() for each in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model(images, [target_of([], [])] * 2)["bbox_regression"] == 0


# ------------------------------------------------------------------ torchvision's, where boxes are upright
def torchvisions(model):
    """torchvision's RetinaNet around the neck, the anchors and the convolutions of an oriented one without angles."""
    own = model.head.regression_head
    anchors = own.bbox_reg.out_channels // 5
    head = RetinaNetHead(16, anchors, 3)
    head.classification_head = model.head.classification_head
    head.regression_head.conv = own.conv
    for name in ("weight", "bias"):
        rows = getattr(own.bbox_reg, name).data.unflatten(0, (anchors, 5))
        rows[:, 4] = 0
        getattr(head.regression_head.bbox_reg, name).data.copy_(rows[:, :4].flatten(0, 1))
    generator = retinanet.PyramidAnchors(*model_shapes(model), model.backbone.strides)
    theirs = RetinaNet(model.backbone, 3, anchor_generator=generator, head=head, score_thresh=0.0, nms_thresh=0.1)
    theirs.transform, theirs.topk_candidates, theirs.detections_per_img = OrientedBatch(model.options), 300, 50
    return theirs


def model_shapes(model):
    return model.anchor_generator.sizes, model.anchor_generator.aspect_ratios


def test_upright_boxes_are_torchvisions(monkeypatch):
    """Losses, and detections where no angle is found. Boxes are wide, so that le90 gives them angle 0. torchvision cuts
    boxes at the rim of the image before it suppresses doubles, which is taken out of it here."""
    monkeypatch.setattr("torchvision.ops.boxes.clip_boxes_to_image", lambda boxes, size: boxes)
    model = small(score_threshold=0.0, candidates=300, detections_per_image=50).train()
    for parameter in model.head.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    theirs = torchvisions(model).train()
    upright = [torch.tensor([[10.0, 20.0, 40.0, 36.0], [4.0, 40.0, 30.0, 58.0]]), torch.zeros(0, 4)]
    labels = [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.int64)]
    images = two_bars()[0]
    found = model(images, [{"boxes": from_upright(b), "labels": c} for b, c in zip(upright, labels, strict=True)])
    expected = theirs(images, [{"boxes": b, "labels": c} for b, c in zip(upright, labels, strict=True)])
    assert found["classification"].item() == pytest.approx(expected["classification"].item(), rel=1e-5)
    assert found["bbox_regression"].item() == pytest.approx(expected["bbox_regression"].item(), rel=1e-5)
    theirs.transform.eval()
    with torch.no_grad():
        ours, whole = model.eval()(images), theirs.eval()(images)
    for one, other in zip(ours, whole, strict=True):
        assert len(one["boxes"]) > 10
        assert torch.equal(one["labels"], other["labels"])
        assert torch.allclose(one["scores"], other["scores"], atol=1e-6)
        assert torch.allclose(enclosing(one["boxes"]), other["boxes"], atol=1e-3)


# ------------------------------------------------------------------ losses
@pytest.mark.parametrize("name", ["kld", "gwd", "iou"])
def test_losses_of_boxes_pull_towards_the_truth(name):
    """From a turned and moved box, with steps against the gradient alone."""
    coder, anchor = OrientedCoder(), torch.tensor([[32.0, 32.0, 40.0, 20.0, 0.0]])
    truth = torch.tensor([[36.0, 30.0, 36.0, 14.0, 0.6]])
    codes = torch.zeros(1, 5, requires_grad=True)
    optimizer = torch.optim.Adam([codes], lr=0.04)
    for _ in range(80):
        loss = BOX_LOSSES[name](coder, codes, anchor, truth).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = coder.decode(codes.detach(), anchor)
    assert paired_iou(found, truth) > 0.93
    assert angle_between(found[0, 4], truth[0, 4]) < 3


def test_kld_by_hand():
    """Two boxes of one shape, moved by d along the long side w: D = d^2 / (w / 2)^2."""
    coder = OrientedCoder()
    anchor, truth = torch.tensor([[10.0, 10.0, 20.0, 8.0, 0.0]]), torch.tensor([[16.0, 10.0, 20.0, 8.0, 0.0]])
    found = BOX_LOSSES["kld"](coder, torch.zeros(1, 5), anchor, truth)
    assert float(found) == pytest.approx(1 - 1 / (1 + math.log(1 + 36 / 100)), abs=1e-5)
    wide = torch.tensor([[10.0, 10.0, 40.0, 8.0, 0.0]])  # covariances 100 and 400: D = 4 - 1 - log 4
    found = BOX_LOSSES["kld"](coder, torch.zeros(1, 5), wide, anchor)
    assert float(found) == pytest.approx(1 - 1 / (1 + math.log(1 + 3 - math.log(4))), abs=1e-5)


def test_losses_are_averaged_over_foreground_anchors_of_each_image():
    model = small(box_loss="iou").train()
    images, targets = two_bars()
    both = model(images, targets)
    alone = [model([image], [target]) for image, target in zip(images, targets, strict=True)]
    for name, value in both.items():
        assert value.item() == pytest.approx(sum(each[name].item() for each in alone) / 2, rel=1e-4)
    heavy = small(box_loss="iou", box_weight=3.0).train()(images, targets)
    assert heavy["bbox_regression"].item() == pytest.approx(3 * both["bbox_regression"].item(), rel=1e-4)


def test_upright_matching_has_more_anchors_for_a_diagonal_bar():
    boxes = torch.tensor([[32.0, 32.0, 44.0, 8.0, math.pi / 4]])
    matched = []
    for matching in ("oriented", "upright"):
        model = small(matching=matching)
        anchors = model.anchor_generator(*batch_and_maps(model))[0]
        matched.append(int((model._match(boxes, anchors) >= 0).sum()))
    assert matched[0] < matched[1]


def batch_and_maps(model):
    batch, _ = model.transform([torch.zeros(3, 64, 64)])
    return batch, list(model.backbone(batch.tensors).values())


# ------------------------------------------------------------------ learning
@pytest.mark.parametrize(
    "loss", ["l1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kld", "smooth_l1", "gwd", "iou"))]
)
def test_two_bars_are_learnt(loss):
    model, (images, targets) = small(2, box_loss=loss, nms_threshold=0.3).train(), two_bars()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    steps = 60
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(images)
    for label, (each, target) in enumerate(zip(found, targets, strict=True)):
        assert int(each["labels"][0]) == label
        assert float(each["scores"][0]) > 0.3
        assert angle_between(each["boxes"][0, 4], target["boxes"][0, 4]) < 5
        assert paired_iou(each["boxes"][:1], target["boxes"]) > 0.6


# ------------------------------------------------------------------ detections
def test_candidates():
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.7, 0.05]])
    values, rows, classes = candidates(scores, 0.15, 3)
    assert values.tolist() == pytest.approx([0.9, 0.7, 0.5])
    assert (rows.tolist(), classes.tolist()) == ([0, 2, 1], [1, 0, 0])
    assert len(candidates(scores, 0.95, 3)[0]) == 0


@torch.no_grad()
def test_nothing_is_found_in_what_a_batch_is_padded_with():
    images = [torch.zeros(3, 64, 64), torch.zeros(3, 32, 40)]
    model = small(score_threshold=0.0, nms_threshold=1.0, detections_per_image=10_000, candidates=10_000).eval()
    first, second = (each["boxes"] for each in model(images))
    assert len(first) > len(second) > 0
    low, high = enclosing(second)[:, :2], enclosing(second)[:, 2:]
    assert (high > 0).all()
    assert (low < torch.tensor([40.0, 32.0])).all()


@torch.no_grad()
def test_lower_scores_can_be_asked_for_and_the_better_ones_stay():
    images = two_bars()[0][:1]
    everything = small(score_threshold=0.0, detections_per_image=20).eval()(images)[0]
    middle = float(everything["scores"].median())
    own = small(score_threshold=middle, detections_per_image=20).eval()
    few = own(images)[0]
    assert 0 < len(few["scores"]) < len(everything["scores"])
    own.keep_scores_from(0.9)
    assert len(own(images)[0]["scores"]) == len(few["scores"])
    own.keep_scores_from(0.0)
    assert torch.equal(own(images)[0]["boxes"], everything["boxes"])


def test_min_size_scales_boxes_with_the_image_and_back():
    model = small(min_size=32, max_size=64, score_threshold=0.0).train()
    boxes, labels = BARS[0], [0]
    image = picture_of(boxes, labels)
    batch, (target,) = model.transform([image], [target_of(boxes, labels)])
    assert batch.image_sizes == [(32, 32)]
    assert torch.allclose(target["boxes"], torch.tensor([[15.0, 17.0, 20.0, 6.0, 0.5]]), atol=1e-4)
    back = resized_boxes(target["boxes"], (32, 32), (64, 64))
    assert torch.allclose(back, torch.tensor(boxes), atol=1e-4)
    inside = model.eval().transform.postprocess([dict(target)], [(32, 32)], [(64, 64)])
    assert torch.allclose(inside[0]["boxes"], torch.tensor(boxes), atol=1e-4)
    plain = small().train().transform([image], [target_of(boxes, labels)])[1][0]["boxes"]
    assert torch.equal(plain, torch.tensor(boxes))


def test_under_bf16_boxes_and_losses_are_float32():
    model, (images, targets) = small(score_threshold=0.0), two_bars()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(images, targets)
        found = model.eval()(images)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {each[name].dtype for each in found for name in ("boxes", "scores")} == {torch.float32}


# ------------------------------------------------------------------ by name, with methods, in files
BODIES = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 4},
    ),
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}),
}


def named(body, **options):
    name, sizes = BODIES[body]
    torch.manual_seed(0)
    given = {**SMALL, "score_threshold": 0.0, "detections_per_image": 5, **options}
    return dl.create_backbone(
        name, num_classes=3, pretrained=False, head="oriented_retinanet", head_options=given, **sizes
    )


@pytest.mark.parametrize("body", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_networks_by_name_train_and_come_back_from_files(body, tmp_path):
    model, (images, targets) = named(body), two_bars()
    dl.attach(model, dl.MonaConfig(bottleneck=4))
    model.set_grad_checkpointing()
    sum(model.train()(images, targets).values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    dl.save_pretrained(model, tmp_path)
    other = dl.load_adapter(named(body), tmp_path)
    with torch.no_grad():
        found, again = model.eval()(images), other.eval()(images)
    assert all(torch.equal(one[name], two[name]) for one, two in zip(found, again, strict=True) for name in one)


# ------------------------------------------------------------------ options
def test_defaults_are_mmrotates():
    options = OrientedRetinaNetOptions()
    assert (options.nms_threshold, options.score_threshold, options.detections_per_image) == (0.1, 0.05, 2000)
    model = on_pyramid(TwoLevels(), 15)
    assert model.anchor_generator.num_anchors_per_location() == [9] * 3
    assert model.head.regression_head.bbox_reg.out_channels == 45
    assert model.anchor_generator.sizes[0] == pytest.approx((32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box_loss": "giou"}, "one of l1, smooth_l1, kld, gwd, iou, got 'giou'"),
        ({"matching": "hbb"}, "one of oriented, upright, got 'hbb'"),
        ({"background_iou": 0.6}, "in this order, got 0.6 and 0.5"),
        ({"box_weight": -1.0}, "must not be negative, got -1.0"),
        ({"convention": "le180"}, "one of le90, le135, oc"),
        ({"anchor_angle": 1}, "oriented_retinanet has no option 'anchor_angle'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_wrong_targets():
    model = small().train()
    with pytest.raises(ValueError, match="needs targets"):
        model([torch.zeros(3, 64, 64)])
    with pytest.raises(ValueError, match=r"those of image 0 are \(1, 4\)"):
        model([torch.zeros(3, 64, 64)], [{"boxes": torch.zeros(1, 4), "labels": torch.zeros(1, dtype=torch.int64)}])
    wrong = target_of([[20.0, 20.0, float("nan"), 5.0, 0.0]], [0])
    with pytest.raises(ValueError, match="a box of image 0 is not finite"):
        model([torch.zeros(3, 64, 64)], [wrong])
