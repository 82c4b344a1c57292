"""Transforms of masks and boxes: they go where the picture goes, and random numbers come from the loader's seed."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from deltalens.data.arrays import ArrayDataset
from deltalens.data.dense_items import IGNORED, MaskedImages, ObjectImages, Objects
from deltalens.data.dense_resizing import ClassCrop, PadTo, RandomScale, ResizeSides, SizeCrop, _Resize
from deltalens.data.dense_transforms import (
    DenseAugmentation,
    _photometric,
    detection_train_transform,
    in_original_pixels,
    segmentation_train_transform,
    truth_in_original_pixels,
)
from deltalens.data.inputs import Augmentation, kept_inputs, set_inputs
from deltalens.training.loaders import evaluation_loader, training_loader

PLAIN = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
STILL = DenseAugmentation(scale=(1, 1), max_class_share=1, photometric=False)


def scene(seed: int, height: int = 40, width: int = 60, box=(10, 8, 34, 28)):
    """A dark picture with a bright box, which is an object and class 1."""
    pixels = np.full((height, width, 3), 20, np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = 230 - seed
    return pixels, (pixels[..., 0] > 100).astype(np.uint8)


def masked(count: int = 6, **settings) -> MaskedImages:
    pixels, masks = zip(*(scene(i, **settings) for i in range(count)), strict=True)
    return MaskedImages(pixels, masks, np.arange(256, dtype=np.uint8), np.ones((count, 2)))


def boxed(count: int = 6, masks: bool = True, **flags) -> ObjectImages:
    pixels, filled = zip(*(scene(i) for i in range(count)), strict=True)
    small = np.zeros((40, 60), np.uint8)
    small[2:5, 50:53] = 1
    objects = [
        Objects.of([(10, 8, 34, 28), (50, 2, 53, 5)], [0, 1], outlines=[mask, small] if masks else (), **flags)
        for mask in filled
    ]
    return ObjectImages(pixels, objects, range(count), [(40, 60)] * count, 2, masks)


def bright(image: torch.Tensor) -> torch.Tensor:
    return image[0] > 0


# ------------------------------------------------------------------ segmentation
@pytest.mark.parametrize("size", [16, 32, 80])
def test_masks_go_with_the_picture(size):
    part = masked()
    set_inputs(part, PLAIN, Augmentation(dense=DenseAugmentation(crop_size=size, photometric=False)))
    images, masks = next(iter(training_loader(part, 6, 0)))
    assert (images.shape, masks.shape) == ((6, 3, size, size), (6, size, size))
    assert (images.dtype, masks.dtype, type(masks)) == (torch.float32, torch.int64, torch.Tensor)
    known = masks != IGNORED
    wrong = (bright(images.transpose(0, 1)) != (masks == 1)) & known
    assert wrong.sum() < 0.06 * known.sum()  # the edges of resized pictures
    assert bool((~known).any()) == (size > 20)  # the smallest pictures are 20 pixels high
    assert (images[:, 0][~known] == 0).all()  # the mean colour


def test_crops_are_mixed_where_they_can_be():
    mask = torch.zeros(100, 100, dtype=torch.int64)
    mask[:, 60:] = 1
    mask[:10] = IGNORED
    image = tv_tensors.Image(torch.zeros(3, 100, 100, dtype=torch.uint8))
    shares = {1.0: [], 0.75: []}
    for limit, found in shares.items():
        torch.manual_seed(0)
        for _ in range(100):
            cut = ClassCrop((20, 20), limit)(image, tv_tensors.Mask(mask))[1]
            assert cut.shape == (20, 20)
            counts = torch.bincount(cut.reshape(-1), minlength=256)[:2]
            found.append(float(counts.max() / counts.sum()))
    assert np.mean(np.array(shares[1.0]) < 0.75) < 0.25
    assert np.mean(np.array(shares[0.75]) < 0.75) > 0.6


def test_sizes_of_random_scales():
    image = tv_tensors.Image(torch.zeros(3, 40, 60, dtype=torch.uint8))
    torch.manual_seed(0)
    own = [RandomScale((0.5, 2))(image).shape[-2:] for _ in range(200)]
    heights = [size[0] for size in own]
    assert min(heights) in range(20, 23)
    assert max(heights) in range(77, 81)
    assert abs(np.mean(heights) - 50) < 3
    assert all(abs(width / height - 1.5) < 0.05 for height, width in own)
    assert RandomScale((1, 1), 512, 2048)(image).shape[-2:] == (512, 768)
    assert RandomScale((0.5, 0.5), 512, 600)(image).shape[-2:] == (200, 300)
    assert PadTo((50, 50))(image).shape[-2:] == (50, 60)


def test_evaluation_keeps_the_mask():
    part = masked()
    set_inputs(part, PLAIN)
    images, masks = next(iter(evaluation_loader(part, 2)))
    assert (type(images), images[0].shape, masks[0].shape) == (list, (3, 40, 60), (40, 60))
    assert (bright(images[0]) == (masks[0] == 1)).all()
    set_inputs(part, PLAIN | {"test_size": (20, 100)})
    image, mask = part[0]
    assert (image.shape, mask.shape) == ((3, 20, 30), (40, 60))
    set_inputs(part, PLAIN | {"test_size": (80, 90)})
    assert part[0][0].shape == (3, 60, 90)


def test_few_pictures_of_several_sizes_are_evaluated_together():
    part = masked(6)
    set_inputs(part, PLAIN)
    assert [len(images) for images, _ in evaluation_loader(part, 16)] == [4, 2]
    assert [len(images) for images, _ in evaluation_loader(part, 3)] == [3, 3]


def test_seeds_decide_and_colours_change():
    part = masked(4)
    set_inputs(part, PLAIN, Augmentation())
    one, two, other = (next(iter(training_loader(part, 4, seed))) for seed in (0, 0, 1))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])
    still, coloured = (
        segmentation_train_transform(PLAIN, augmentation, hflip=0)
        for augmentation in (STILL, DenseAugmentation(scale=(1, 1), max_class_share=1))
    )
    torch.manual_seed(0)
    pixels, mask = scene(0, 32, 32)
    changed = 0
    for _ in range(20):
        item = (Image.fromarray(pixels), tv_tensors.Mask(torch.from_numpy(mask).long()))
        assert torch.allclose(still(*item)[0], torch.from_numpy(pixels).permute(2, 0, 1) / 255 * 2 - 1, atol=1e-6)
        changed += not torch.equal(coloured(*item)[0], still(*item)[0])
    assert changed in range(10, 20)  # 1 in 16 is as it was, and grey has no hue


# ------------------------------------------------------------------ detection
@pytest.mark.parametrize(
    "augmentation",
    [
        DenseAugmentation(),
        DenseAugmentation(short_sides=(30, 50, 70), long_side=90),
        DenseAugmentation(short_sides=(40,), random_crop=True, crop_short_sides=(40, 60), crop_range=(20, 40)),
    ],
)
def test_boxes_and_masks_go_with_the_picture(augmentation):
    part = boxed(12)
    set_inputs(part, PLAIN, Augmentation(dense=augmentation))
    images, targets = next(iter(training_loader(part, 12, 0)))
    assert isinstance(images, list)
    for image, target in zip(images, targets, strict=True):
        size = image.shape[-2:]
        assert target["masks"].shape == (len(target["labels"]), *size)
        assert type(target["boxes"]) is torch.Tensor
        for box, mask, label, area in zip(*(target[key] for key in ("boxes", "masks", "labels", "area")), strict=True):
            left, top, right, bottom = box.tolist()
            rows, columns = torch.where(mask.any(1))[0], torch.where(mask.any(0))[0]
            found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert (torch.tensor(found) - box).abs().max() <= 1.5
            assert 0 <= left < right <= size[1]
            assert 0 <= top < bottom <= size[0]
            assert area == mask.sum()
            if label == 0:
                assert (bright(image) != mask.bool()).float().mean() < 0.05
    if augmentation.short_sides == (30, 50, 70):
        assert {tuple(image.shape[-2:]) for image in images} == {(30, 45), (50, 75), (60, 90)}
    if augmentation == DenseAugmentation():
        assert {tuple(image.shape[-2:]) for image in images} == {(40, 60)}
        assert {target["boxes"][0, 0].item() for target in targets} == {10, 26}  # flipped or not
    again = next(iter(training_loader(part, 12, 0)))[1]
    assert all(torch.equal(one["boxes"], two["boxes"]) for one, two in zip(targets, again, strict=True))


def drawn(random, height, width):
    """(picture, target) of three rectangles of their own grey, with exact boxes and masks."""
    pixels, boxes, masks = np.zeros((height, width, 3), np.uint8), [], []
    for grey in (90, 170, 250):
        left, top = (int(random.integers(0, side - 12)) for side in (width, height))
        right, bottom = int(random.integers(left + 12, width + 1)), int(random.integers(top + 12, height + 1))
        pixels[top:bottom, left:right] = grey
        mask = np.zeros((height, width), np.uint8)
        mask[top:bottom, left:right] = 1
        boxes.append((left, top, right, bottom))
        masks.append(mask)
    part = ObjectImages([pixels], [Objects.of(boxes, [0, 1, 2], outlines=masks)], [0], [(height, width)], 3, True)
    return part, boxes


def edges_of(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


@pytest.mark.parametrize("seed", range(6))
def test_edges_of_boxes_and_masks_agree_to_half_a_pixel(seed):
    """Rectangles of any size, flipped, resized and cropped: both edges lie where the true ones do."""
    random = np.random.default_rng(seed)
    crops = DenseAugmentation(short_sides=(37, 64), random_crop=True, crop_short_sides=(50,), crop_range=(30, 45))
    for augmentation in (DenseAugmentation(short_sides=(25, 41, 90), long_side=110), crops):
        height, width = (int(side) for side in random.integers(30, 90, 2))
        part, boxes = drawn(random, height, width)
        for hflip in (0, 1):
            torch.manual_seed(seed)
            set_inputs(part, PLAIN, Augmentation(hflip=hflip, dense=augmentation))
            image, target = part[0]
            assert len(target["boxes"]) or augmentation is crops
            for box, mask in zip(target["boxes"].numpy(), target["masks"].numpy(), strict=True):
                twice = 0.5 * 64 / 30 if augmentation is crops else 0  # resized, cut and resized again
                assert np.abs(edges_of(mask) - box).max() <= 0.5 + twice + 1e-3
            if augmentation is not crops:
                scale = np.array([image.shape[2] / width, image.shape[1] / height] * 2)
                true = np.array(boxes, float)
                true[:, [0, 2]] = width - true[:, [2, 0]] if hflip else true[:, [0, 2]]
                assert np.abs(target["boxes"].numpy() - true * scale).max() < 1e-3


def test_pixels_of_resized_masks_are_those_under_their_centres():
    mask = torch.arange(7 * 5).reshape(7, 5)
    for size in ((3, 4), (7, 5), (14, 10), (9, 13), (1, 1)):
        found = _Resize().transform(tv_tensors.Mask(mask), {"size": list(size)})
        assert isinstance(found, tv_tensors.Mask)
        for row in range(size[0]):
            for column in range(size[1]):
                centre = math.floor((row + 0.5) * 7 / size[0]), math.floor((column + 0.5) * 5 / size[1])
                assert found[row, column] == mask[centre]


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((375, 500), 600, 1000, (600, 800)),
        ((333, 500), 600, 1000, (600, 901)),
        ((500, 281), 600, 1000, (1000, 562)),
        ((4, 5), 2, 99, (2, 3)),  # 2.5, which Python rounds to 2
        ((4, 7), 2, 99, (2, 4)),
        ((1, 3), 600, 1, (1, 1)),
    ],
)
def test_sizes_are_rounded_as_in_mmcv(size, short, long, expected):
    image = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))
    assert ResizeSides((short,), long)(image).shape[-2:] == expected


def test_the_hue_turns_by_a_tenth_of_the_circle():
    """OpenCV counts 180 steps, and mmsegmentation turns by up to 18 of them: pure red stays within 36 degrees."""
    from torchvision.transforms.v2 import functional

    hue = next(step.transforms[0] for step in _photometric() if step.transforms[0].hue is not None)
    assert hue.hue == pytest.approx((-0.1, 0.1))
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(3, 1, 1)
    assert functional.adjust_hue(red, 18 / 180).flatten().tolist() == [255, 153, 0]  # 36 of 60 degrees to yellow


def test_what_is_not_trained_on():
    def kept(augmentation=None, **flags):
        part = boxed(1, **flags)
        set_inputs(part, PLAIN, Augmentation(hflip=0, dense=augmentation or DenseAugmentation()))
        return part[0][1]["labels"].tolist()

    assert kept() == [0, 1]
    assert kept(DenseAugmentation(min_box=4)) == [0]
    assert kept(crowd=[True, False]) == [1]
    assert kept(difficult=[True, False]) == [1]
    assert kept(DenseAugmentation(difficult=True), difficult=[True, False]) == [0, 1]
    assert kept(crowd=[True, True], masks=False) == []
    part = boxed(1, crowd=[True, True], difficult=[True, True])
    set_inputs(part, PLAIN)
    assert part[0][1]["labels"].tolist() == [0, 1]  # all are evaluated on


@pytest.mark.parametrize("masks", [True, False])
def test_pictures_without_objects(masks):
    part = ObjectImages([scene(0)[0]], [Objects.of([], [])], [5], [(40, 60)], 2, masks)
    for augmentation in (None, Augmentation(dense=DenseAugmentation(short_sides=(20,), random_crop=True))):
        set_inputs(part, PLAIN, augmentation)
        images, targets = next(iter(evaluation_loader(part, 1)))
        assert (targets[0]["boxes"].shape, targets[0]["labels"].shape, targets[0]["image_id"]) == ((0, 4), (0,), 5)
        assert not masks or targets[0]["masks"].shape == (0, *images[0].shape[-2:])


def test_evaluation_knows_the_way_back():
    part = boxed(2)
    set_inputs(part, PLAIN | {"test_size": (20, 25)})
    image, target = part[1]
    assert image.shape == (3, 17, 25)
    assert target["orig_size"].tolist() == [40, 60]
    assert target["scale"].tolist() == pytest.approx([25 / 60, 17 / 40])
    assert target["area"].tolist() == [480, 9]
    found = {"boxes": target["boxes"], "scores": torch.ones(2), "masks": target["masks"][:, None].float()}
    back = in_original_pixels(found, target)
    truth = truth_in_original_pixels(target)
    assert torch.allclose(back["boxes"], torch.tensor([[10.0, 8, 34, 28], [50, 2, 53, 5]]), atol=1e-4)
    assert torch.equal(truth["boxes"], torch.tensor([[10.0, 8, 34, 28], [50, 2, 53, 5]]))
    assert (back["masks"].shape, truth["masks"].shape) == ((2, 1, 40, 60), (2, 40, 60))
    assert ((back["masks"][0, 0] > 0.5) == truth["masks"][0].bool()).float().mean() > 0.95
    assert torch.equal(back["scores"], found["scores"])
    none = {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 1, 17, 25)}
    assert in_original_pixels(none, target)["masks"].shape == (0, 1, 40, 60)
    set_inputs(part, PLAIN)
    same = part[1][1]
    assert "orig_boxes" not in same
    assert torch.equal(truth_in_original_pixels(same)["boxes"], same["boxes"])


def test_large_pictures_are_shrunk_and_small_ones_are_not():
    image = tv_tensors.Image(torch.zeros(3, 40, 60, dtype=torch.uint8))
    assert ResizeSides((50,), 70, enlarge=False)(image).shape[-2:] == (40, 60)
    assert ResizeSides((50,), 45, enlarge=False)(image).shape[-2:] == (30, 45)
    assert SizeCrop((20, 30))(image).shape[-1] in range(20, 31)
    transform = detection_train_transform(PLAIN)
    large = Image.new("RGB", (2000, 1000))
    truth = boxed(1, masks=False).truth(0)
    truth["boxes"] = tv_tensors.BoundingBoxes(truth["boxes"], format="XYXY", canvas_size=(1000, 2000))
    assert transform(large, truth)[0].shape == (3, 667, 1333)  # 666.5, which mmcv rounds up


# ------------------------------------------------------------------ inputs
def test_kept_in_memory_is_the_same(tmp_path):
    for part in (masked(), boxed()):
        for i, pixels in enumerate(part.pictures):
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        part.pictures = [tmp_path / f"{i}.png" for i in range(len(part))]
        kept = kept_inputs(part, PLAIN, Augmentation())
        set_inputs(part, PLAIN, Augmentation())
        assert isinstance(kept.pictures[0], np.ndarray)
        assert kept.in_memory(10) is kept
        one, two = (next(iter(training_loader(each, 3, 0)))[0] for each in (part, kept))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_augmentation_of_another_kind_of_data():
    with pytest.raises(
        ValueError, match="min_crop has no meaning for images with masks or boxes: see hflip, crop_size"
    ):
        set_inputs(masked(), PLAIN, Augmentation(min_crop=0.3))
    labelled = ArrayDataset(np.zeros((2, 8, 8, 3), np.uint8), [0, 1])
    with pytest.raises(ValueError, match="crop_size has no meaning for images: see min_crop, hflip, rand_augment"):
        set_inputs(labelled, PLAIN, Augmentation(dense=DenseAugmentation(crop_size=16)))
    among = Augmentation.among({"hflip": 0.1, "crop_size": 16, "lr": 1, "scale": (1, 2)})
    assert among == Augmentation(hflip=0.1, dense=DenseAugmentation(crop_size=16, scale=(1, 2)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (2, 1)},
        {"scale": (0, 1)},
        {"max_class_share": 0},
        {"crop_size": 0},
        {"short_sides": ()},
        {"short_sides": (0,)},
        {"crop_range": (9, 5)},
        {"min_box": -1},
    ],
)
def test_wrong_augmentation(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}|sides of pictures"):
        DenseAugmentation(**wrong)
