"""Transforms of oriented boxes: boxes lie where the picture shows them, behind every step."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from deltalens.data.dense_resizing import ResizeSides, SizeCrop
from deltalens.data.dense_transforms import DenseAugmentation
from deltalens.data.inputs import Augmentation, kept_inputs, set_inputs
from deltalens.data.oriented_items import OrientedImages, OrientedObjects
from deltalens.data.oriented_transforms import (
    CropCorners,
    FlipCorners,
    ResizeCorners,
    TurnCorners,
    oriented_in_original_pixels,
    oriented_train_transform,
    oriented_truth_in_original_pixels,
    scaled,
)
from deltalens.data.quadrilaterals import areas_inside, areas_of, in_order, shares_inside
from deltalens.models.oriented_boxes import boxes_of, corners_of
from deltalens.training.loaders import evaluation_loader, training_loader

PLAIN = {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
BOX = (50.0, 42.0, 44.0, 16.0, math.radians(25))
SIZE = (90, 120)


def drawn(box=BOX, size=SIZE) -> np.ndarray:
    """A dark picture with a bright oriented box."""
    fine = Image.new("L", (size[1] * 8, size[0] * 8))
    corners = corners_of(torch.tensor(box, dtype=torch.float64))
    ImageDraw.Draw(fine).polygon([tuple(point) for point in (corners * 8).tolist()], fill=255)
    cover = np.asarray(fine, float).reshape(size[0], 8, size[1], 8).mean((1, 3)) / 255
    return np.repeat((20 + 210 * cover)[..., None], 3, 2).round().astype(np.uint8)


def seen(image: torch.Tensor, threshold: float = 125) -> np.ndarray:
    """The box of least area about the bright pixels of a picture, (5,)."""
    bright = np.asarray(image, float)[0] > threshold
    ends = [(np.flatnonzero(bright[row])[[0, -1]] + 0.5, row + 0.5) for row in np.flatnonzero(bright.any(1))]
    points = np.array([(column, row) for columns, row in ends for column in columns])
    best = None
    for angle in np.radians(np.arange(-90, 90, 0.5)):
        own = points @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        low, high = own.min(0), own.max(0)
        if best is None or np.prod(high - low) < best[0]:
            middle = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ ((low + high) / 2)
            best = np.prod(high - low), (*middle, *(high - low), angle)
    return np.array(best[1])


def agree(image: torch.Tensor, corners: torch.Tensor, **settings) -> None:
    """The corners (4, 2) are those of the box that the picture shows, within 1.2 pixels."""
    found = corners_of(torch.tensor(seen(image, **settings))).numpy()
    told = corners.double().numpy()
    distances = np.linalg.norm(found[:, None] - told[None], axis=-1)
    assert distances.min(1).max() < 1.2, (found, told)
    assert sorted(distances.argmin(1)) == [0, 1, 2, 3]


def part(count: int = 4, **settings) -> OrientedImages:
    corners = corners_of(torch.tensor([BOX, (100.0, 15.0, 12.0, 6.0, 0.0)])).numpy()
    objects = [OrientedObjects.of(corners, [0, 1], **settings)] * count
    return OrientedImages([drawn()] * count, objects, range(count), [SIZE] * count, 2)


def start() -> tuple[torch.Tensor, dict]:
    image = torch.from_numpy(drawn()).permute(2, 0, 1)
    truth = part(1).truth(0)
    return image, {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in truth.items()}


def test_the_drawing_is_measured_well():
    image, target = start()
    agree(image, target["corners"][0])
    with pytest.raises(AssertionError):
        agree(image, target["corners"][0] + torch.tensor([2.0, 0.0]))


# ------------------------------------------------------------------ steps
@pytest.mark.parametrize(
    ("shares", "turned"), [((1, 0, 0), (True, False)), ((0, 1, 0), (False, True)), ((0, 0, 1), (True, True))]
)
def test_flips(shares, turned):
    image, target = start()
    moved, found = FlipCorners(shares)(image, target)
    agree(moved, found["corners"][0])
    expected = image.flip([axis for axis, flip in ((2, turned[0]), (1, turned[1])) if flip])
    assert torch.equal(moved, expected)


def test_flips_have_their_shares_and_exclude_each_other():
    image, target = start()
    step, counts = FlipCorners((0.25, 0.25, 0.25)), torch.zeros(4)
    kinds = [image, image.flip(2), image.flip(1), image.flip(1, 2)]
    for _ in range(400):
        moved, _ = step(image, target)
        counts[next(i for i, kind in enumerate(kinds) if torch.equal(moved, kind))] += 1
    assert (counts - 100).abs().max() < 35
    assert torch.equal(FlipCorners((0, 0, 0))(image, target)[0], image)


@pytest.mark.parametrize("angle", [-170.0, -90.0, -33.0, 10.0, 90.0, 180.0])
def test_turns(angle):
    image, target = start()
    moved, found = TurnCorners(1.0, (angle,), (0, 0, 0))(image, target)
    assert moved.shape == image.shape
    agree(moved, found["corners"][0])
    box = boxes_of(found["corners"])[0]
    apart = math.remainder(float(box[4]) - BOX[4] - math.radians(angle), math.pi)
    assert abs(apart) < 1e-4


def test_turns_remove_what_leaves_and_fill_with_the_mean():
    pixels = np.full((40, 120, 3), 200, np.uint8)
    corners = corners_of(torch.tensor([[110.0, 20.0, 10.0, 6.0, 0.0], [60.0, 20.0, 10.0, 6.0, 0.0]]))
    part = OrientedImages([pixels], [OrientedObjects.of(corners, [0, 1], [1, 0])], [7], [(40, 120)], 2)
    image, target = torch.from_numpy(pixels).permute(2, 0, 1), part.truth(0)
    moved, found = TurnCorners(1.0, (90.0,), (0.2, 0.4, 0.6))(image, target)
    assert found["labels"].tolist() == [1]
    assert found["difficult"].tolist() == [0]
    assert [len(found[name]) for name in ("corners", "area", "iscrowd")] == [1, 1, 1]
    assert found["image_id"] == 7
    assert moved[:, 20, 2].tolist() == [51, 102, 153]
    assert TurnCorners(0.0, None, (0, 0, 0))(image, target)[0] is image


def test_random_turns_reach_everywhere():
    image, target = start()
    step = TurnCorners(1.0, None, (0, 0, 0))
    angles = torch.cat([boxes_of(step(image, target)[1]["corners"])[:, 4] for _ in range(60)])
    assert angles.min() < -1.2
    assert angles.max() > 1.2


@pytest.mark.parametrize("short", [45, 180, 133])
def test_resizing(short):
    image, target = start()
    moved, found = ResizeCorners(ResizeSides((short,)))(image, target)
    assert min(moved.shape[1:]) == short
    agree(moved, found["corners"][0])


def test_crops_and_the_share_that_must_stay():
    image, target = start()
    kept = 0
    for _ in range(30):
        moved, found = CropCorners(SizeCrop((60, 80)), 0.7)(image, target)
        assert 60 <= min(moved.shape[1:]) <= max(moved.shape[1:]) <= 80
        share = (moved[0].double() - 20).sum() / (image[0].double() - 20).sum()
        assert (len(found["corners"]) == 1) == bool(share >= 0.7), share
        if share > 0.9999:
            agree(moved, found["corners"][0])
            kept += 1
    assert kept > 3


# ------------------------------------------------------------------ from file to network
def test_training():
    data = part(3, difficult=[False, True])
    settings = DenseAugmentation(short_sides=(90,), flips=(0.3, 0.3, 0.3), rotation=1.0, rotation_angles=(90.0, 20.0))
    set_inputs(data, PLAIN, Augmentation(dense=settings))
    for index in range(3):
        image, target = data[index]
        assert image.dtype == torch.float32
        assert target["boxes"].shape == (1, 5)
        assert "corners" not in target
        agree((image + 1) * 127.5, corners_of(target["boxes"])[0], threshold=150)  # what is filled has 128
        assert target["area"].tolist() == pytest.approx([44 * 16], rel=1e-3)
        assert -math.pi / 2 <= target["boxes"][0, 4] < math.pi / 2
        assert target["boxes"][0, 2] > target["boxes"][0, 3]


def test_what_is_trained_on():
    both = part(1, difficult=[False, True])
    for settings, labels in (
        ({"difficult": True}, [0, 1]),
        ({"difficult": True, "min_box": 7}, [0]),
        ({"difficult": False}, [0]),
        ({"difficult": True, "min_box": 20}, []),
    ):
        set_inputs(both, PLAIN, Augmentation(dense=DenseAugmentation(short_sides=(90,), **settings)))
        assert both[0][1]["labels"].tolist() == labels
        assert both[0][1]["boxes"].shape == (len(labels), 5)


def test_seeds_decide_and_batches_are_lists():
    data = part(6)
    set_inputs(data, PLAIN, Augmentation(dense=DenseAugmentation(rotation=1.0, random_crop=True, crop_range=(50, 70))))
    first, again, other = ([*training_loader(data, 2, seed=seed, workers=0)] for seed in (1, 1, 2))
    assert all(isinstance(images, list) and isinstance(targets, list) for images, targets in first)
    pairs = [(a[0][i], b[0][i]) for a, b in zip(first, again, strict=True) for i in range(2)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(
        a.shape != b[0][0].shape or not torch.equal(a, b[0][0]) for a, b in zip(first[0][0], other, strict=False)
    )


def test_evaluation():
    data = part(2, difficult=[False, True])
    set_inputs(data, PLAIN | {"test_size": (45, 400)})
    (images, targets), *_ = evaluation_loader(data, 2, workers=0)
    image, target = images[0], targets[0]
    assert image.shape == (3, 45, 60)
    assert (target["orig_size"].tolist(), target["scale"].tolist()) == ([90, 120], [0.5, 0.5])
    assert target["difficult"].tolist() == [0, 1]
    assert torch.allclose(target["orig_boxes"][0], torch.tensor(BOX), atol=1e-4)
    back = oriented_in_original_pixels({"boxes": target["boxes"], "labels": target["labels"]}, target)
    assert torch.allclose(back["boxes"], target["orig_boxes"], atol=1e-3)
    assert torch.equal(oriented_truth_in_original_pixels(target)["boxes"], target["orig_boxes"])
    set_inputs(data, PLAIN)
    assert "orig_boxes" not in data[0][1]
    assert oriented_truth_in_original_pixels(data[0][1])["boxes"].shape == (2, 5)


def test_unequal_scales_go_through_the_smallest_rectangle():
    boxes = torch.tensor([[30.0, 20, 20, 8, 0.0], [30, 20, 20, 8, math.pi / 4]])
    upright, turned = scaled(boxes, torch.tensor([2.0, 1.0]))
    assert torch.allclose(upright, torch.tensor([60.0, 20, 40, 8, 0]))
    corners = corners_of(boxes[1]) * torch.tensor([2.0, 1.0])
    assert torch.allclose(turned, boxes_of(corners), atol=1e-4)
    assert torch.equal(scaled(boxes, torch.tensor([2.0, 2.0]))[:, 4], boxes[:, 4])


def test_pictures_without_objects_and_pictures_in_memory():
    data = part(2)
    data.objects = [OrientedObjects.of([], [])] * 2
    crop = DenseAugmentation(random_crop=True, rotation=1.0)
    for augmentation in (None, Augmentation(dense=crop)):
        kept = kept_inputs(data, PLAIN | {"test_size": (45, 400)}, augmentation)
        target = kept[0][1]
        assert target["boxes"].shape == (0, 5)
        assert all(len(target[name]) == 0 for name in ("labels", "area", "iscrowd", "difficult"))


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match="hflip has no meaning for images with oriented boxes: see"):
        set_inputs(part(1), PLAIN, Augmentation(hflip=0.0))
    for settings in ({"flips": (0.5, 0.5, 0.5)}, {"flips": (1, 0)}, {"rotation": 2}, {"kept_share": -1}):
        with pytest.raises(ValueError, match=re.escape(next(iter(settings)))):
            DenseAugmentation(**settings)
    with pytest.raises(ValueError, match="rotation_angles"):
        DenseAugmentation(rotation_angles=())


def test_colours_are_swapped_after_the_turn_is_filled():
    data = part(1)
    swapped = PLAIN | {"mean": (0.2, 0.4, 0.6), "channel_order": "bgr"}
    transform = oriented_train_transform(swapped, DenseAugmentation(flips=(0, 0, 0), rotation=1, rotation_angles=(45,)))
    image, _ = transform(data.image(0), data.truth(0))
    assert image[:, 0, 0].abs().max() < 0.01


# ------------------------------------------------------------------ areas
def test_areas_inside_windows_are_those_of_shapely():
    shapely = pytest.importorskip("shapely")
    random = np.random.default_rng(0)
    corners = in_order(random.uniform(-20, 60, (300, 4, 2)))
    window = (3.0, 5.0, 41.0, 30.0)
    polygons = [shapely.Polygon(each).buffer(0) for each in corners]
    clipped = [each.intersection(shapely.box(*window)).area for each in polygons]
    assert np.allclose(areas_inside(corners, window), clipped, atol=1e-6)
    assert np.allclose(areas_of(corners), [each.area for each in polygons])


def test_shares():
    square = np.array([[(0, 0), (10, 0), (10, 10), (0, 10)]], float)
    crossed = square[:, [0, 2, 1, 3]]
    for corners in (square, crossed, square[:, ::-1]):
        assert shares_inside(corners, (5, 0, 20, 20)).tolist() == [0.5]
        assert shares_inside(corners, (2, 2, 4, 7)).tolist() == pytest.approx([0.1])
        assert shares_inside(corners, (10, 0, 20, 20)).tolist() == [0]
    assert shares_inside(np.zeros((1, 4, 2)), (0, 0, 5, 5)).tolist() == [0]
    assert shares_inside(np.zeros((0, 4, 2)), (0, 0, 5, 5)).shape == (0,)
