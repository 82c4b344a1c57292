"""Oriented R-CNN as a whole: both modes, what cannot be learnt, resizing, precision, files, and that it learns."""

import math

import pytest
import torch
from detectors import TwoLevels
from small_oriented_rcnn import SMALL, TWO, bar, bars, oriented_target, random_boxes, small_rcnn

import deltalens as dl
from deltalens.backbones.dense import oriented_rcnn
from deltalens.backbones.dense.oriented_batch import resized_boxes
from deltalens.backbones.dense.oriented_rcnn import OrientedRCNNOptions
from deltalens.models.oriented_boxes import boxes_of, corners_of
from deltalens.models.oriented_iou import paired_iou

LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"
BODIES = {
    "swin": (
        SWIN,
        {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 4},
    ),
    "vit": (VIT, {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}),
}


def network(body="swin", **options):
    name, sizes = BODIES[body]
    torch.manual_seed(0)
    given = {**SMALL, "score_threshold": 0.0, "detections_per_image": 5, **options}
    return dl.create_backbone(name, num_classes=3, pretrained=False, head="oriented_rcnn", head_options=given, **sizes)


@torch.no_grad()
def found_in(model, images):
    return [{key: value.clone() for key, value in each.items()} for each in model.eval()(images)]


def same(one, other):
    return all(torch.equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in a)


def test_both_modes():
    model = small_rcnn(score_threshold=0.0)
    images, targets = bars(*TWO)
    images, targets = [images[0], images[1][:, :40, :56]], [targets[0], oriented_target([], [])]
    labels = [target["labels"].clone() for target in targets]
    losses = model.train()(images, targets)
    assert set(losses) == LOSSES
    sum(losses.values()).backward()
    parts = (model.backbone.fpn, model.rpn, model.roi_heads)
    assert all(p.grad is not None and p.grad.isfinite().all() for part in parts for p in part.parameters())
    assert all(torch.equal(before, target["labels"]) for before, target in zip(labels, targets, strict=True))
    found = found_in(model, images)
    for each in found:
        boxes, scores = each["boxes"], each["scores"]
        assert boxes.shape == (len(scores), 5)
        assert 0 < len(boxes) <= SMALL["detections_per_image"]
        assert (boxes[:, 2] >= boxes[:, 3]).all()
        assert ((boxes[:, 4] >= -math.pi / 2) & (boxes[:, 4] < math.pi / 2)).all()
        assert set(each["labels"].tolist()) <= {0, 1, 2}
        assert torch.equal(scores, scores.sort(descending=True)[0])
    assert model.num_classes == 3
    assert model.get_submodule(model.adapted) is model.backbone.pyramid.backbone
    assert same(found, found_in(model, [image.clone() for image in images]))


def test_defaults_are_mmrotates():
    options = OrientedRCNNOptions()
    assert (options.score_threshold, options.nms_threshold, options.detections_per_image) == (0.05, 0.1, 2000)
    assert (options.proposals, options.proposals_train, options.proposal_nms) == (2000, 2000, 0.8)
    assert (options.sampled_anchors, options.sampled_regions, options.box_width) == (256, 512, 1024)
    model = oriented_rcnn.on_pyramid(TwoLevels(), 3)
    assert model.rpn.anchor_generator.sizes == ((32.0,), (64.0,), (128.0,))
    assert model.rpn.head.bbox_pred.out_channels == 3 * 6
    assert (model.rpn.proposal_matcher.high_threshold, model.rpn.proposal_matcher.low_threshold) == (0.7, 0.3)
    assert model.rpn.box_coder.stds == (1, 1, 1, 1, 0.5, 0.5)
    assert model.roi_heads.box_coder.stds == (0.1, 0.1, 0.2, 0.2, 0.1)
    assert model.roi_heads.box_predictor.bbox_pred.out_features == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proposal_nms": 0}, "proposal_nms"),
        ({"candidates": 0}, "candidates"),
        ({"anchor_ratios": ()}, "anchor_ratios"),
        ({"nms_threshold": 2}, "nms_threshold"),
        ({"proposal": 3}, "did you mean proposals"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        small_rcnn(**options)


def test_targets_that_cannot_be_learnt():
    model, (images, _) = small_rcnn().train(), bars(TWO[0])
    with pytest.raises(ValueError, match="needs targets"):
        model(images)
    for box in ([30, 30, 20, 0, 0.1], [30, 30, 20, math.nan, 0.1]):
        with pytest.raises(ValueError, match="no area or is not finite"):
            model(images, [oriented_target([box], [0])])
    with pytest.raises(ValueError, match=r"\(n, 5\)"):
        model(images, [{"boxes": torch.zeros(1, 4), "labels": torch.zeros(1, dtype=torch.int64)}])


def test_objects_outside_of_the_image_and_any_convention():
    model, (images, _) = small_rcnn(), bars(TWO[0])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    everywhere = [[-300.0, 30, 40, 10, 0.3], [62, 60, 40, 10, 0.7], [20, 20, 5000, 9, 0.2], [30, 30, 0.5, 0.2, 0.1]]
    losses = model.train()(images, [oriented_target(everywhere, [0, 1, 2, 0])])
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    found = []
    for box in ([30.0, 34, 36, 12, 0.5], [30, 34, 12, 36, 0.5 + math.pi / 2], [30, 34, 36, 12, 0.5 - math.pi]):
        model.load_state_dict(state)
        torch.manual_seed(1)
        found.append(torch.stack(list(model(images, [oriented_target([box], [0])]).values())))
    assert torch.allclose(found[0], found[1], rtol=1e-3)
    assert torch.allclose(found[0], found[2], rtol=1e-3)


def test_the_second_stage_teaches_the_first_nothing():
    model, (images, targets) = small_rcnn().train(), bars(*TWO)
    losses = model(images, targets)
    (losses["loss_classifier"] + losses["loss_box_reg"]).backward()
    assert all(p.grad is None for p in model.rpn.parameters())
    assert all(p.grad is not None for p in model.roi_heads.parameters())
    assert any(p.grad is not None for p in model.backbone.parameters())


@torch.no_grad()
def test_lower_scores_can_be_asked_for():
    model, (images, _) = small_rcnn(score_threshold=0.0), bars(TWO[0])
    everything = found_in(model, images)[0]
    middle = float(everything["scores"].median())
    own = small_rcnn(score_threshold=middle)
    assert 0 < len(found_in(own, images)[0]["scores"]) < len(everything["scores"])
    own.keep_scores_from(0.0)
    assert same(found_in(own, images), [everything])


# ------------------------------------------------------------------ sizes
def test_boxes_are_resized_with_the_image():
    boxes = random_boxes(100, 1)
    assert torch.equal(resized_boxes(boxes, (50, 80), (50, 80)), boxes)
    even = resized_boxes(boxes, (50, 80), (100, 160))
    assert torch.allclose(corners_of(even).sort(1)[0], 2 * corners_of(boxes).sort(1)[0])
    found = resized_boxes(boxes, (300, 401), (224, 300))  # 0.74667 and 0.74813
    corners = corners_of(boxes) * torch.tensor([300 / 401, 224 / 300], dtype=torch.float64)
    assert paired_iou(found, boxes_of(corners)).min() > 0.99
    assert torch.allclose(found[:, :2], corners.mean(1))


def test_the_network_resizes_and_gives_boxes_of_the_image_as_it_came():
    """An image of twice the size, which the network halves: the same truth, and boxes twice as large."""
    image, target = bar([30.0, 34.0, 36.0, 12.0, 0.5])
    large = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    scale = torch.tensor([2.0, 2, 2, 2, 1])
    plain, resizing = small_rcnn(score_threshold=0.0), small_rcnn(score_threshold=0.0, min_size=64)
    found, twice = found_in(plain, [image])[0], found_in(resizing, [large])[0]
    assert torch.allclose(twice["boxes"], found["boxes"] * scale, atol=0.05)
    losses = []
    for model, pair in ((plain, (image, target)), (resizing, (large, {**target, "boxes": target["boxes"] * scale}))):
        torch.manual_seed(1)
        losses.append(torch.stack(list(model.train()([pair[0]], [pair[1]]).values())))
    assert torch.allclose(losses[0][:2], losses[1][:2], rtol=1e-3)


# ------------------------------------------------------------------ precision, cost, files
def test_bf16_training():
    model, (images, targets) = small_rcnn(), bars(*TWO)
    seen = []
    model.rpn.head.register_forward_hook(lambda module, given, made: seen.extend([*made[0], *made[1]]))
    model.roi_heads.box_predictor.register_forward_hook(lambda module, given, made: seen.extend(made))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(images, targets)
    assert {each.dtype for each in [*losses.values(), *seen]} == {torch.float32}
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_true_regions_are_found_exactly_under_autocast():
    """IoUs of boxes of a thousand pixels are not rounded to 8 bits."""
    boxes = torch.tensor([[1003.0, 517.0, 60.0, 20.0, 0.5]])
    with torch.autocast("cpu", torch.bfloat16):
        deltas = small_rcnn().roi_heads.box_coder.encode(boxes + 1, boxes)
        back = small_rcnn().roi_heads.box_coder.decode(deltas, boxes)
        assert paired_iou(boxes, boxes) == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(back[:, :2], boxes[:, :2] + 1, atol=1e-3)


def test_checkpointing_changes_nothing():
    gradients = []
    for enable in (False, True):
        model = dl.attach(network(), dl.MonaConfig(bottleneck=4))
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        sum(model.train()(*bars(*TWO)).values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(g, gradients[1][name], atol=1e-5) for name, g in gradients[0].items())


@pytest.mark.parametrize("body", list(BODIES))
def test_networks_by_name_and_their_files(body, tmp_path):
    model, (images, targets) = network(body), bars(*TWO)
    assert any("fpn.inner_blocks" in name for name, _ in model.named_parameters()) == (body == "swin")
    plain = found_in(model, images)
    dl.attach(model, dl.MonaConfig(bottleneck=4))
    sum(model.train()(images, targets).values()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    for p in trained.values():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    adapted = found_in(model, images)
    assert not same(plain, adapted)
    dl.save_pretrained(model, tmp_path / "adapter")
    other = dl.load_adapter(network(body), tmp_path / "adapter")
    assert same(found_in(other, images), adapted)
    assert same(found_in(dl.detach(model), images), plain)


# ------------------------------------------------------------------ learning
@pytest.mark.slow
def test_it_learns_two_bars():
    """Two images by heart: class, place, sides and angle of each bar."""
    images, targets = bars(*TWO)
    model = small_rcnn().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for step in range(120):
        if step == 90:
            optimizer.param_groups[0]["lr"] = 5e-4
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for found, target in zip(found_in(model, images), targets, strict=True):
        best, truth = found["boxes"][:1], target["boxes"]
        assert found["labels"][0] == target["labels"][0]
        assert found["scores"][0] > 0.5
        off = (best[0, 4] - truth[0, 4] + math.pi / 2) % math.pi - math.pi / 2
        assert abs(math.degrees(off)) < 5
        assert paired_iou(best, truth) > 0.7
