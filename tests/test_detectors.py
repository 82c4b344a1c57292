"""Detectors on a pyramid: torchvision's functions, exact boxes, empty images, anchors, options."""

import pytest
import torch
from detectors import BUILDERS, SMALL, WITH_MASKS, Rectangles, TwoLevels, small_detector, target_of
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from deltalens.backbones.dense.detector_options import DetectorOptions
from deltalens.backbones.dense.detector_parts import PaddedBatch, PyramidAnchors, RegionPooling
from deltalens.backbones.dense.fpn import DetectionNeck
from deltalens.backbones.dense.precision import full_precision

HEADS = list(BUILDERS)
LOSSES = {
    "retinanet": {"classification", "bbox_regression"},
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
    "mask_rcnn": {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"},
    "cascade": {"loss_objectness", "loss_rpn_box_reg"}
    | {f"loss_{name}_{stage}" for name in ("classifier", "box_reg", "mask") for stage in (1, 2, 3)},
}


@pytest.mark.parametrize("head", HEADS)
def test_both_modes(head):
    model = small_detector(head, score_threshold=0.0)
    images, targets = Rectangles(4, sizes=((64, 64), (40, 56))).batch()
    labels = [target["labels"].clone() for target in targets]
    losses = model.train()(images, targets)
    assert set(losses) == LOSSES[head]
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.backbone.fpn.parameters())
    assert all(torch.equal(before, target["labels"]) for before, target in zip(labels, targets, strict=True))
    with torch.no_grad():
        found = model.eval()(images)
    assert len(found) == 4
    for image, each in zip(images, found, strict=True):
        height, width = image.shape[1:]
        boxes = each["boxes"]
        assert len(boxes) == len(each["labels"]) == len(each["scores"]) > 0
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()
        assert set(each["labels"].tolist()) <= {0, 1, 2}
        if head in WITH_MASKS:
            assert each["masks"].shape == (len(boxes), 1, height, width)
    assert model.num_classes == 3
    assert model.get_submodule(model.adapted) is model.backbone.pyramid.backbone


@pytest.mark.parametrize("options", [("fcos", {}), ("retinanet", {"group_norm": True})], ids=["fcos", "retinanet"])
def test_norms_of_narrow_heads_have_something_to_norm(options):
    """One image whose coarsest maps are single cells, under the fewest channels that these heads take."""
    head, further = options
    model = small_detector(head, channels=32, score_threshold=0.0, **further)
    images, targets = Rectangles(1, sizes=((32, 32),)).batch()
    sum(model.train()(images, targets).values()).backward()
    assert len(model.eval()(images)[0]["boxes"])
    norms = [each for each in model.head.modules() if isinstance(each, torch.nn.GroupNorm)]
    assert norms
    assert all(each.num_groups == 16 for each in norms)
    wide = small_detector(head, channels=64, **further)
    assert {each.num_groups for each in wide.head.modules() if isinstance(each, torch.nn.GroupNorm)} == {32}


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_lower_scores_can_be_asked_for_and_the_better_ones_stay(head):
    model = small_detector(head, score_threshold=0.0, detections_per_image=20).eval()
    images, _ = Rectangles(1, sizes=((32, 32),)).batch()
    everything = model(images)[0]
    middle = float(everything["scores"].median())
    own = small_detector(head, score_threshold=middle, detections_per_image=20).eval()
    few = own(images)[0]
    assert 0 < len(few["scores"]) < len(everything["scores"])
    own.keep_scores_from(0.9)  # which is no lower
    assert len(own(images)[0]["scores"]) == len(few["scores"])
    own.keep_scores_from(0.0)
    found = own(images)[0]
    assert torch.equal(found["boxes"], everything["boxes"])
    assert torch.equal(found["boxes"][: len(few["boxes"])], few["boxes"])


@pytest.mark.parametrize("head", HEADS)
def test_batches_without_any_object_train(head):
    model = small_detector(head).train()
    images, targets = Rectangles(2, empty=True).batch()
    losses = model(images, targets)
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("head", HEADS)
def test_every_label_can_be_learnt(head):
    """The first and the last class each raise a loss of their own: none of them is taken for the background."""
    model = small_detector(head)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = [torch.zeros(3, 64, 64)]
    gradients = []
    for label in (0, 2):
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(1)
        sum(model.train()(images, [target_of([[10, 10, 40, 40]], [label])]).values()).backward()
        if head in WITH_MASKS:
            layer = (model.roi_heads.stages[0] if head == "cascade" else model.roi_heads).box_predictor.cls_score
        else:
            layer = model.head.classification_head.cls_logits
        rows = layer.bias.grad.reshape(-1, 4 if head in WITH_MASKS else 3).sum(0)
        gradients.append(rows[1:] if head in WITH_MASKS else rows)
    difference = gradients[0] - gradients[1]
    assert difference.argmin() == 0
    assert difference.argmax() == 2


# ------------------------------------------------------------------ batches
def test_images_are_neither_normalised_nor_resized_and_boxes_keep_their_bits():
    transform = PaddedBatch(DetectorOptions())
    images = [torch.randn(3, 33, 70), torch.randn(3, 64, 20)]
    target = {"boxes": torch.rand(5, 4) * 30}
    batch, targets = transform(images, [target, target])
    assert batch.tensors.shape == (2, 3, 64, 96)
    assert torch.equal(batch.tensors[0, :, :33, :70], images[0])
    assert torch.equal(batch.tensors[1, :, :64, :20], images[1])
    assert batch.tensors[0, :, 33:].abs().sum() == batch.tensors[1, :, :, 20:].abs().sum() == 0
    assert torch.equal(targets[0]["boxes"], target["boxes"])
    found = [{"boxes": target["boxes"].clone()} for _ in images]
    back = transform.eval().postprocess(found, batch.image_sizes, [tuple(image.shape[1:]) for image in images])
    assert all(torch.equal(each["boxes"], target["boxes"]) for each in back)


def test_min_size_scales_images_and_gives_boxes_of_the_image_as_it_came():
    transform = PaddedBatch(DetectorOptions(min_size=32, max_size=64)).eval()
    batch, targets = transform([torch.randn(3, 64, 96)], [{"boxes": torch.tensor([[0.0, 0.0, 96.0, 64.0]])}])
    assert batch.image_sizes == [(32, 48)]
    assert targets[0]["boxes"].tolist() == [[0, 0, 48, 32]]
    (back,) = transform.postprocess([{"boxes": targets[0]["boxes"]}], batch.image_sizes, [(64, 96)])
    assert back["boxes"].tolist() == [[0, 0, 96, 64]]


@pytest.mark.parametrize("head", HEADS)
def test_padding_to_a_neighbour_moves_no_anchor(head):
    """An image alone and beside a larger one: anchors of its first two cells are the same."""
    model = small_detector(head).eval()
    generator = model.rpn.anchor_generator if head in WITH_MASKS else model.anchor_generator
    boxes = []
    for size in ((48, 48), (96, 160)):
        batch = torch.zeros(1, 3, *size)
        maps = list(model.backbone(batch).values())
        whole = generator(ImageList(batch, [size]), maps)[0]
        counts = [
            m.shape[-2] * m.shape[-1] * n for m, n in zip(maps, generator.num_anchors_per_location(), strict=True)
        ]
        pairs = zip(whole.split(counts), generator.num_anchors_per_location(), strict=True)
        boxes.append([level[: 2 * each] for level, each in pairs])
    assert all(torch.equal(a, b) for a, b in zip(*boxes, strict=True))


# ------------------------------------------------------------------ anchors, regions
def test_anchors_are_torchvisions_where_its_strides_are_right():
    sizes, ratios = ((16.0, 20.0), (32.0, 40.0)), ((0.5, 1.0, 2.0),) * 2
    maps = [torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 4, 8)]
    images = ImageList(torch.zeros(2, 3, 64, 128), [(64, 128)] * 2)
    expected = AnchorGenerator(sizes, ratios)(images, maps)
    found = PyramidAnchors(sizes, ratios, [8, 16])(images, maps)
    assert len(found) == 2
    assert torch.equal(found[0], expected[0])
    centred = PyramidAnchors(sizes, ratios, [8, 16], offset=0.5)(images, maps)[0]
    assert torch.equal(centred[: 8 * 16 * 6], expected[0][: 8 * 16 * 6] + 4)
    assert torch.equal(centred[8 * 16 * 6 :], expected[0][8 * 16 * 6 :] + 8)


def test_anchors_of_coarse_levels_keep_their_stride():
    """2 cells over 96 pixels lie 64 pixels apart, where torchvision's generator says 48."""
    maps, images = [torch.zeros(1, 1, 2, 2)], ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)])
    boxes = PyramidAnchors(((64.0,),), ((1.0,),), [64])(images, maps)[0]
    assert ((boxes[:, 0] + boxes[:, 2]) / 2).tolist() == [0, 64, 0, 64]


def test_regions_are_pooled_at_the_scale_of_their_level():
    """A map that holds the x of each cell gives the x of the region, also where the first batch is mostly padding: half
    a cell more, because torchvision samples a cell at its corner."""
    pooling = RegionPooling([4, 8], 1, 2, canonical_scale=224)
    row = torch.arange(16.0).expand(1, 1, 16, 16)
    maps = {"0": row * 4 + 2, "1": row[..., :8, :8] * 8 + 4}
    boxes = [torch.tensor([[8.0, 8.0, 24.0, 24.0], [20.0, 4.0, 30.0, 14.0]])]
    found = pooling(maps, boxes, [(20, 20)]).flatten()
    assert found.tolist() == pytest.approx([16 + 2, 25 + 2], abs=1e-4)
    with pytest.raises(ValueError, match=r"powers of two, got \[4, 12\]"):
        RegionPooling([4, 12], 7, 2, 224)


@pytest.mark.parametrize(
    ("extra", "strides"), [("pool", [4, 8, 16]), ("input", [4, 8, 16, 32]), ("output", [4, 8, 16, 32])]
)
def test_neck(extra, strides):
    neck = DetectionNeck(TwoLevels(), None, 4, 16, extra)
    maps = neck(torch.zeros(1, 3, 48, 80))
    assert neck.strides == strides
    sizes = [tuple(each.shape[2:]) for each in maps.values()]
    assert sizes == [(-(-48 // stride), -(-80 // stride)) for stride in strides]
    assert all(each.shape[1] == 16 for each in maps.values())
    assert DetectionNeck(TwoLevels(), [1], 4, 16, extra).strides[0] == 8
    if extra != "pool":
        assert neck.fpn.extra_blocks.p6.in_channels == (24 if extra == "input" else 16)


def test_neck_without_top_down_adds_levels_only():
    pyramid = TwoLevels()
    neck = DetectionNeck(pyramid, [1], 4, 24, "output", top_down=False)
    images = torch.randn(1, 3, 64, 64)
    maps = neck(images)
    assert torch.equal(maps["0"], pyramid(images)[1])
    assert list(maps) == ["0", "p6", "p7"]
    assert not hasattr(neck.fpn, "inner_blocks")
    with pytest.raises(ValueError, match=r"every map must have 24 channels, and the pyramid's have \[12, 24\]"):
        DetectionNeck(pyramid, [0, 1], 4, 24, top_down=False)


def test_equal_widths_do_not_decide_where_p6_comes_from():
    """torchvision takes P5 where both have as many channels."""
    neck = DetectionNeck(TwoLevels(), [1], 4, 24, "input")
    maps = torch.randn(1, 24, 4, 4)
    neck.pyramid.forward = lambda images: [maps, maps]
    expected = torch.nn.functional.conv2d(maps, neck.fpn.extra_blocks.p6.weight, neck.fpn.extra_blocks.p6.bias, 2, 1)
    assert torch.equal(neck(maps)["p6"], expected)


# ------------------------------------------------------------------ precision
@pytest.mark.parametrize("head", HEADS)
def test_under_bf16_boxes_and_losses_are_float32(head):
    model = small_detector(head, score_threshold=0.0)
    images, targets = Rectangles(2).batch()
    seen = []
    coder = model.roi_heads.box_coder if head in WITH_MASKS else model.box_coder
    decode = coder.decode_single if head != "fcos" else coder.decode
    name = "decode_single" if head != "fcos" else "decode"
    setattr(coder, name, lambda codes, boxes: (seen.append((codes.dtype, boxes.dtype)), decode(codes, boxes))[1])
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(images, targets)
        found = model.eval()(images)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert set(seen) == {(torch.float32, torch.float32)}
    assert all(value.dtype == torch.float32 for each in found for key, value in each.items() if key != "labels")


def test_full_precision_keeps_doubles():
    value = {"a": [torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float64)]}
    assert [each.dtype for each in full_precision(value)["a"]] == [torch.float32, torch.float64]


# ------------------------------------------------------------------ options
@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        ("retinanet", {"anchor_scales": 2}, r"retinanet has no option 'anchor_scales'; did you mean anchor_scale\?"),
        ("retinanet", {"levels": [1, 7]}, r"no level 7: it has 2, with strides \[4, 8\]"),
        ("retinanet", {"anchor_sizes": [[8], [16]]}, r"each of 3 levels, whose strides are \[8, 16, 32\]"),
        ("retinanet", {"box_loss": "l2"}, "l1, smooth_l1, giou, got 'l2'"),
        ("retinanet", {"score_threshold": 2}, "between 0 and 1, got 2"),
        ("retinanet", {"extra_levels": "none"}, "pool, input, output, got 'none'"),
        ("retinanet", {"group_norm": True}, "multiple of 32, got 16"),
        ("fcos", {"channels": 48}, "multiple of 32, got 48"),
        ("mask_rcnn", {"proposals": 0}, "proposals must be at least 1, got 0"),
        ("mask_rcnn", {"channels": 0}, "channels must be at least 1, got 0"),
    ],
)
def test_wrong_options(head, options, message):
    with pytest.raises(ValueError, match=message):
        small_detector(head, **options)


def test_options_reach_the_network():
    options = {"anchor_sizes": [[8, 12], [16, 24], [32, 48]], "anchor_ratios": [1.0], "box_loss": "giou", "levels": [1]}
    model = BUILDERS["retinanet"](TwoLevels(), 2, {**SMALL["retinanet"], **options, "nms_threshold": 0.4})
    assert model.anchor_generator.sizes == ((8, 12), (16, 24), (32, 48))
    assert model.anchor_generator.num_anchors_per_location() == [2, 2, 2]
    assert model.head.regression_head._loss_type == "giou"
    assert model.nms_thresh == 0.4
    few = small_detector("mask_rcnn", detections_per_image=3, score_threshold=0.0).eval()
    assert all(len(each["boxes"]) <= 3 for each in few([torch.zeros(3, 64, 64)]))
