"""H2RBox-v2: coder, views, cells, losses, and that angles of the targets are never seen."""

import math

import pytest
import torch
from detectors import TwoLevels
from oriented_bars import angle_between, picture_of, target_of, two_bars
from torch import nn

import deltalens as dl
from deltalens.backbones.dense.h2rbox_losses import (
    boxes_around,
    centreness,
    circumscribed_loss,
    owners,
    symmetry_loss,
)
from deltalens.backbones.dense.h2rbox_v2 import on_pyramid
from deltalens.backbones.dense.h2rbox_views import SecondView, draw_view
from deltalens.backbones.dense.oriented_anchors import upright_as_oriented
from deltalens.backbones.dense.phase_coder import decode_angles, encode_angles
from deltalens.models.oriented_boxes import enclosing
from deltalens.models.oriented_iou import oriented_iou, paired_iou

SMALL = {"channels": 32, "convolutions": 1}
ANGLES = torch.linspace(-1.57, 1.57, 101, dtype=torch.float64)


def small(num_classes=3, **options):
    torch.manual_seed(0)
    return on_pyramid(TwoLevels(), num_classes, {**SMALL, **options})


# ------------------------------------------------------------------ coder
def test_angles_come_back():
    assert torch.allclose(decode_angles(encode_angles(ANGLES)), ANGLES, atol=1e-9)
    assert torch.allclose(decode_angles(0.1 * encode_angles(ANGLES) + 3), ANGLES, atol=1e-9)
    assert torch.allclose(encode_angles(ANGLES + math.pi), encode_angles(ANGLES), atol=1e-9)
    codes = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(decode_angles, codes)


def test_codes_without_a_phase_have_no_gradient():
    codes = torch.full((2, 3), 0.0, requires_grad=True)
    angles = decode_angles(codes)
    angles.sum().backward()
    assert angles.tolist() == [0, 0]
    assert codes.grad.tolist() == [[0] * 3] * 2


# ------------------------------------------------------------------ views
@pytest.mark.parametrize("view", [SecondView(0.7), SecondView(None)], ids=["turned", "flipped"])
def test_boxes_lie_where_the_view_shows_them(view):
    boxes = [[36.0, 28.0, 26.0, 10.0, 0.4]]
    image = picture_of(boxes, [0])[None]
    seen = view.of_images(image)[0]
    turned = view.of_boxes(torch.tensor(boxes), (64, 64))
    expected = picture_of(turned.tolist(), [0])
    inside = (expected[0] > 0.9) & (expected[1] < -0.9)
    assert inside.sum() > 200
    assert seen[0][inside].mean() > 0.9
    assert seen[1][inside].mean() < -0.9
    rim = picture_of([[*turned[0, :2].tolist(), 34.0, 18.0, float(turned[0, 4])]], [0])
    outside = (rim[0] > 0.9) & ~(expected[0] > 0.3)
    assert seen[0][outside].mean() < 0.3


def test_angles_that_agree_with_a_view():
    angles = ANGLES.float()
    for view in (SecondView(0.7), SecondView(None)):
        boxes = torch.zeros(len(angles), 5)
        boxes[:, 4] = angles
        second = view.of_boxes(boxes, (64, 64))[:, 4]
        assert view.disagreement(angles, second).abs().max() < 1e-5
        assert view.disagreement(angles, second + math.pi).abs().max() < 1e-5
        assert torch.allclose(view.disagreement(angles, second + 0.2), torch.tensor(0.2), atol=1e-5)


def test_views_are_drawn_as_asked():
    torch.manual_seed(0)
    views = [draw_view(0.5, (0.25, 0.75)) for _ in range(200)]
    turns = [view.turn for view in views if view.turn is not None]
    assert 70 < len(turns) < 130
    assert math.pi / 4 <= min(turns) < 0.9
    assert 2.2 < max(turns) <= 3 * math.pi / 4
    assert draw_view(0.0, (0.25, 0.75)).turn is None
    assert draw_view(1.0, (0.5, 0.5)).turn == pytest.approx(math.pi / 2)


# ------------------------------------------------------------------ cells
def test_owners_by_hand():
    """Strides 8 and 16: a small box on the finer level, a large one on the coarser, only near their centres."""
    points = torch.tensor([[20.0, 20.0], [28.0, 20.0], [36.0, 20.0], [100.0, 100.0], [20.0, 20.0], [100.0, 100.0]])
    strides = torch.tensor([8.0, 8.0, 8.0, 8.0, 16.0, 16.0])
    boxes = torch.tensor([[22.0, 20.0, 40.0, 20.0, 0.0], [100.0, 104.0, 150.0, 160.0, 0.0]])
    owner, sides = owners(boxes, points, strides, 1.5)
    assert owner.tolist() == [0, 0, -1, -1, -1, 1]
    assert sides[0].tolist() == pytest.approx([18, 10, 22, 10])
    assert sides[5].tolist() == pytest.approx([75, 76, 75, 84])
    turned = torch.tensor([[22.0, 20.0, 40.0, 20.0, math.pi / 2]])  # 20 wide, 40 high
    owner, sides = owners(turned, points, strides, 1.5)
    assert owner.tolist() == [0, 0, -1, -1, -1, -1]
    assert sides[0].tolist() == pytest.approx([20, 12, 20, 8], abs=1e-4)
    nested = torch.tensor([[22.0, 20.0, 40.0, 20.0, 0.0], [22.0, 20.0, 30.0, 20.0, 0.0]])
    assert owners(nested, points, strides, 1.5)[0][:2].tolist() == [1, 1]
    assert (owners(boxes[:0], points, strides, 1.5)[0] == -1).all()


def test_boxes_around_points_have_their_distances():
    random = torch.Generator().manual_seed(0)
    points, distances = 50 * torch.rand(20, 2, generator=random), 1 + 20 * torch.rand(20, 4, generator=random)
    angles = 3 * torch.rand(20, generator=random)
    found = boxes_around(points, distances, angles)
    strides = torch.ones(20)
    for row in range(20):
        owner, sides = owners(found[row : row + 1], points[row : row + 1], strides[:1], 1e6)
        assert int(owner) == 0
        assert torch.allclose(sides[0], distances[row], atol=1e-4)
    assert centreness(torch.tensor([[2.0, 3.0, 8.0, 3.0]])).tolist() == pytest.approx([0.5])


# ------------------------------------------------------------------ losses
def test_circumscribed_boxes_are_the_enclosing_ones():
    random = torch.Generator().manual_seed(1)
    low = torch.tensor([30.0, 30.0, 10.0, 10.0, -1.5])
    found = low + torch.rand(50, 5, generator=random) * torch.tensor([8.0, 8.0, 20.0, 20.0, 3.0])
    given = low + torch.rand(50, 5, generator=random) * torch.tensor([8.0, 8.0, 20.0, 20.0, 0.0])
    given[:, 4] = 0
    around = upright_as_oriented(enclosing(found))
    assert torch.allclose((-circumscribed_loss(found, given)).exp(), paired_iou(around, given), atol=1e-4)
    view = SecondView(0.9)  # both turned together: the same
    turned = [view.of_boxes(each, (64, 64)) for each in (found, given)]
    assert torch.allclose(circumscribed_loss(*turned), circumscribed_loss(found, given), atol=1e-3)
    exact = torch.tensor([[30.0, 30.0, 20.0, 10.0, 0.5]])
    assert float(circumscribed_loss(exact, upright_as_oriented(enclosing(exact)))) == pytest.approx(0, abs=1e-5)
    apart = torch.tensor([[300.0, 30.0, 20.0, 10.0, 0.0]])
    assert circumscribed_loss(exact, apart).isfinite().all()


def test_symmetry_loss():
    """Codes that follow the view cost nothing; others do, unless their object is square or seen once."""
    view = SecondView(0.8)
    objects, second = torch.tensor([0, 0, 1, 2, 0, 1]), torch.tensor([False, False, False, False, True, True])
    true = torch.tensor([0.3, 0.3, -1.2, 0.9, 0.3 + 0.8, -1.2 + 0.8])
    none = torch.zeros(3, dtype=torch.bool)
    assert float(symmetry_loss(encode_angles(true), objects, second, none, view)) == pytest.approx(0, abs=1e-6)
    wrong = true.clone()
    wrong[5] += 0.5
    assert float(symmetry_loss(encode_angles(wrong), objects, second, none, view)) == pytest.approx(0.45 / 2, abs=1e-4)
    square = torch.tensor([False, True, False])
    assert float(symmetry_loss(encode_angles(wrong), objects, second, square, view)) == pytest.approx(0, abs=1e-6)
    once = symmetry_loss(encode_angles(wrong[:4]), objects[:4], second[:4], none, view)
    assert float(once) == 0
    codes = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([codes], lr=0.05)
    for _ in range(100):
        loss = symmetry_loss(codes, objects, second, none, view)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


# ------------------------------------------------------------------ learning
class OneLevel(nn.Module):
    """A map of stride 8, of a few convolutions."""

    def __init__(self):
        super().__init__()
        self.channels, self.strides = [32], [8]
        self.backbone = nn.Sequential(*(self.layers(a, b) for a, b in ((3, 16), (16, 32), (32, 32))))

    @staticmethod
    def layers(before, after):
        norms = nn.GroupNorm(8, after), nn.GroupNorm(8, after)
        first, second = nn.Conv2d(before, after, 3, 2, 1), nn.Conv2d(after, after, 3, 1, 1)
        return nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU())

    def forward(self, images):
        return [self.backbone(images)]


@pytest.mark.slow
def test_angles_are_learnt_from_upright_boxes():
    torch.manual_seed(0)
    model = on_pyramid(OneLevel(), 2, {"channels": 32, "convolutions": 2, "nms_threshold": 0.3}).train()
    images, targets = two_bars()
    upright = [{**each, "boxes": upright_as_oriented(enclosing(each["boxes"]))} for each in targets]
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0), 800
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        sum(model(images, upright).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(images)
    for label, (each, target) in enumerate(zip(found, targets, strict=True)):
        assert int(each["labels"][0]) == label
        assert angle_between(each["boxes"][0, 4], target["boxes"][0, 4]) < 10
        assert paired_iou(each["boxes"][:1], target["boxes"]) > 0.5


# ------------------------------------------------------------------ the network
@pytest.mark.parametrize("turned", [0.0, 1.0])
def test_both_modes(turned):
    model = small(score_threshold=0.0, candidates=50, turned=turned)
    images, targets = two_bars()
    images[1] = images[1][:, :56, :40]
    losses = model.train()(images, targets)
    assert set(losses) == {"classification", "bbox_regression", "bbox_ctrness", "symmetry"}
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["symmetry"] > 0
    sum(losses.values()).backward()
    trained = [*model.head.parameters(), *model.backbone.fpn.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert model.head.regression_head.angle_codes.weight.grad.abs().sum() > 0
    with torch.no_grad():
        found = model.eval()(images)
    for each in found:
        boxes = each["boxes"]
        assert len(boxes) == len(each["labels"]) == len(each["scores"]) > 0
        assert (boxes[:, 2] >= boxes[:, 3]).all()
        assert (each["scores"].diff() <= 0).all()
        for label in range(3):
            own = boxes[each["labels"] == label]
            assert (oriented_iou(own, own).fill_diagonal_(0) <= 0.1 + 1e-5).all()


def test_only_the_symmetry_loss_teaches_the_angle():
    model, (images, targets) = small(turned=1.0).train(), two_bars()
    losses = model(images, targets)
    layer = model.head.regression_head.angle_codes.weight
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss, [layer], retain_graph=True, allow_unused=True)
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) == (name == "symmetry")


def test_angles_of_targets_are_never_seen():
    """Any box with the same enclosing one gives the same losses."""
    images, targets = two_bars()
    upright = [{**each, "boxes": upright_as_oriented(enclosing(each["boxes"]))} for each in targets]
    both = []
    for given in (targets, upright):
        model = small(turned=1.0).train()
        torch.manual_seed(3)
        both.append(model(images, given))
    assert all(both[0][name].item() == pytest.approx(both[1][name].item(), rel=1e-5) for name in both[0])


def test_no_objects_and_tiny_ones():
    model, (images, _) = small().train(), two_bars()
    for boxes in ([], [[20.0, 20.0, 0.0, 0.0, 0.0], [30.0, 30.0, 1e-4, 50.0, 1.0], [40.0, 40.0, 0.3, 0.2, 0.1]]):
        model.zero_grad()
        losses = model(images, [target_of(boxes, [0] * len(boxes)), target_of([], [])])
        assert all(each.isfinite() for each in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_square_and_shrunk_classes():
    images = two_bars()[0]
    plain, own = small(score_threshold=0.0).eval(), small(score_threshold=0.0, square_classes=(0, 1, 2)).eval()
    assert (own(images)[0]["boxes"][:, 4].remainder(math.pi / 2) == 0).all()
    assert (plain(images)[0]["boxes"][:, 4] != 0).any()
    whole = small(score_threshold=0.0, nms_threshold=1.0, candidates=5).eval()(images)[0]
    less = small(score_threshold=0.0, nms_threshold=1.0, candidates=5, shrunk_classes=(0, 1, 2)).eval()(images)[0]
    assert torch.allclose(less["boxes"][:, 2:4], 0.85 * whole["boxes"][:, 2:4], atol=1e-4)
    with pytest.raises(ValueError, match="between 0 and 2, got 3"):
        small(square_classes=(3,))


@torch.no_grad()
def test_lower_scores_can_be_asked_for():
    images = two_bars()[0][:1]
    model = small(score_threshold=0.9).eval()
    assert len(model(images)[0]["scores"]) == 0
    model.keep_scores_from(0.0)
    assert len(model(images)[0]["scores"]) > 0


def test_under_bf16_boxes_and_losses_are_float32():
    model, (images, targets) = small(score_threshold=0.0), two_bars()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(images, targets)
        found = model.eval()(images)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {each[name].dtype for each in found for name in ("boxes", "scores")} == {torch.float32}


def test_a_network_by_name_comes_back_from_files(tmp_path):
    def network():
        torch.manual_seed(0)
        return dl.create_backbone(
            "vit_tiny_patch16_224",
            num_classes=3,
            pretrained=False,
            head="h2rbox_v2",
            head_options={**SMALL, "score_threshold": 0.0, "detections_per_image": 5},
            patch_size=8,
            embed_dim=24,
            depth=3,
            num_heads=3,
        )

    model, (images, targets) = network(), two_bars()
    dl.attach(model, dl.MonaConfig(bottleneck=4))
    sum(model.train()(images, targets).values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    dl.save_pretrained(model, tmp_path)
    other = dl.load_adapter(network(), tmp_path)
    with torch.no_grad():
        found, again = model.eval()(images), other.eval()(images)
    assert all(torch.equal(one[name], two[name]) for one, two in zip(found, again, strict=True) for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turned": 1.5}, "between 0 and 1, got 1.5"),
        ({"turns": (0.5,)}, "two angles in half turns"),
        ({"symmetry_weight": -1.0}, "must not be negative"),
        ({"channels": 48}, "multiple of 32, got 48"),
        ({"turn": 1}, "h2rbox_v2 has no option 'turn'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@torch.no_grad()
def test_nothing_is_found_in_what_a_batch_is_padded_with():
    images = [torch.zeros(3, 64, 64), torch.zeros(3, 32, 40)]
    model = small(score_threshold=0.0, nms_threshold=1.0, detections_per_image=10_000, candidates=10_000).eval()
    first, second = (each["boxes"] for each in model(images))
    assert len(first) > len(second) > 0
    low, high = enclosing(second)[:, :2], enclosing(second)[:, 2:]
    assert (high > 0).all()
    assert (low < torch.tensor([40.0, 32.0])).all()
