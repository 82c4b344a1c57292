"""Average precision and windows against forms written as plain loops, from the challenges' own descriptions."""

import math

import numpy as np
import pytest
import torch
from detectors import NAMES, target_of
from torch import nn

from deltalens.tasks import DetectionTask, InstanceTask
from deltalens.tasks.segmentation_inference import by_windows

THRESHOLDS, RECALLS = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0, 1, 101).tolist()
AREAS = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}
SIZE = 160


# ------------------------------------------------------------------ hard cases
def crowded(seed: int, images: int = 12):
    """Objects of three sizes that overlap, crowds, difficult ones, equal scores, doubles, images without anything, and
    a class that is found and never there."""
    random = np.random.default_rng(seed)
    found, targets = [], []
    for number in range(images):
        count = 0 if number % 5 == 4 else int(random.integers(1, 6))
        corners = random.integers(0, 60, (count, 2))
        sides = random.choice([14, 40, 99], (count, 1)) + random.integers(-4, 1, (count, 2))
        boxes = np.concatenate([corners, corners + sides], 1).tolist()
        labels = random.integers(0, 2, count).tolist()
        kinds = random.choice(3, count, p=(0.7, 0.15, 0.15))
        flags = {name: torch.tensor(kinds == kind).long() for kind, name in ((1, "iscrowd"), (2, "difficult"))}
        targets.append(target_of(boxes, labels, (SIZE, SIZE), **flags))
        guesses, classes = [], []
        for box, label in zip(boxes, labels, strict=True):
            for _ in range(int(random.integers(0, 4))):
                guesses.append(np.array(box) + random.integers(-5, 6, 4))
                classes.append(label if random.random() < 0.8 else 2 - label)
        for _ in range(int(random.integers(0, 3))):
            corner = random.integers(0, 60, 2)
            guesses.append([*corner, *(corner + random.integers(10, 90, 2))])
            classes.append(int(random.integers(0, 3)))
        guesses = np.array(guesses, np.float32).reshape(-1, 4).clip(0, SIZE)
        masks = target_of(guesses.tolist(), classes, (SIZE, SIZE))["masks"].float()[:, None] * 0.8
        masks[..., ::3, :] = 0  # not the boxes themselves
        found.append(
            {
                "boxes": torch.from_numpy(guesses),
                "labels": torch.tensor(classes, dtype=torch.int64),
                "scores": torch.tensor(random.integers(1, 9, len(guesses)) / 10, dtype=torch.float32),  # many are equal
                "masks": masks,
            }
        )
    return found, targets


def measured(task, found, targets):
    metrics = task.new_metrics()
    for each, target in zip(found, targets, strict=True):
        task.update_metrics(metrics, {"output": [each]}, (None, [target]))
    return {name: float(value) for name, value in metrics.compute().items()}


def overlap(one, other) -> tuple[float, float]:
    """(IoU, share of the first) of two boxes or two masks."""
    if len(one) == 4:
        width = min(one[2], other[2]) - max(one[0], other[0])
        height = min(one[3], other[3]) - max(one[1], other[1])
        both = max(width, 0) * max(height, 0)
        first, second = ((each[2] - each[0]) * (each[3] - each[1]) for each in (one, other))
    else:
        both, first, second = int((one & other).sum()), int(one.sum()), int(other.sum())
    whole = first + second - both
    return (both / whole if whole else 0.0), (both / first if first else 0.0)


# ------------------------------------------------------------------ PASCAL VOC
def voc_by_loops(found, targets, label: int, eleven: bool) -> float:
    """The development kit's way: detections of all images by falling score, each against what it overlaps most."""
    detections = [
        (-float(score), number, box.tolist())
        for number, each in enumerate(found)
        for box, kind, score in zip(each["boxes"], each["labels"], each["scores"], strict=True)
        if kind == label
    ]
    detections.sort(key=lambda one: one[0])
    objects, count = {}, 0
    for number, target in enumerate(targets):
        own = [i for i, kind in enumerate(target["labels"].tolist()) if kind == label]
        passed = [bool(target["difficult"][i] or target["iscrowd"][i]) for i in own]
        objects[number] = [[target["boxes"][i].tolist(), skip, False] for i, skip in zip(own, passed, strict=True)]
        count += len(own) - sum(passed)
    if not count:
        return math.nan
    right, outcome = 0, []
    for _, number, box in detections:
        best, chosen = -1.0, None
        for each in objects[number]:
            iou = overlap(box, each[0])[0]
            if iou > best:
                best, chosen = iou, each
        if best >= 0.5 and chosen[1]:
            continue
        hit = best >= 0.5 and not chosen[2]
        if hit:
            chosen[2] = True
        right += hit
        outcome.append((right / count, right / (len(outcome) + 1)))
    if eleven:
        levels = [number / 10 for number in range(11)]
        return sum(max((p for r, p in outcome if r >= level - 1e-12), default=0.0) for level in levels) / 11
    total, before = 0.0, 0.0
    for place, (recall, _) in enumerate(outcome):
        total += (recall - before) * max(p for _, p in outcome[place:])
        before = recall
    return total


@pytest.mark.parametrize("seed", range(3))
def test_voc_by_loops(seed):
    found, targets = crowded(seed)
    task = DetectionTask(nn.Identity(), NAMES)
    values = measured(task, found, targets)
    for name, eleven in (("map50_voc07", True), ("map50_voc", False)):
        each = [voc_by_loops(found, targets, label, eleven) for label in range(3)]
        assert math.isnan(each[2])
        assert values[name] == pytest.approx(sum(each[:2]) / 2, abs=1e-6)
        assert 0.05 < values[name] < 0.95


# ------------------------------------------------------------------ COCO
def matched(pieces, objects, threshold: float):
    """Of each detection of one image, best first: (score, right, passed over)."""
    free, outcome = [True] * len(objects), []
    for score, piece, outside in pieces:
        best, chosen = min(threshold, 1 - 1e-10), None
        for number, (shape, passed, crowd) in enumerate(objects):
            if not free[number] and not crowd:
                continue
            if chosen is not None and passed and not objects[chosen][1]:
                break
            iou = overlap(piece, shape)[1 if crowd else 0]
            if iou >= best:
                best, chosen = iou, number
        if chosen is None:
            outcome.append((score, False, outside))
        else:
            free[chosen] = False
            outcome.append((score, True, objects[chosen][1]))
    return outcome


def coco_by_loops(found, targets, label: int, area: tuple[float, float], threshold: float, masks: bool) -> float:
    name, outcome, count = "masks" if masks else "boxes", [], 0
    for each, target in zip(found, targets, strict=True):
        shapes = (each["masks"][:, 0] > 0.5).numpy() if masks else each["boxes"].tolist()
        order = sorted(
            (i for i, kind in enumerate(each["labels"].tolist()) if kind == label), key=lambda i: -each["scores"][i]
        )
        own = [shapes[i] for i in order]
        sizes = [int(s.sum()) if masks else (s[2] - s[0]) * (s[3] - s[1]) for s in own]
        pieces = [
            (float(each["scores"][i]), shape, not area[0] <= size <= area[1])
            for i, shape, size in zip(order, own, sizes, strict=True)
        ]
        objects = []
        for i, kind in enumerate(target["labels"].tolist()):
            crowd = bool(target["iscrowd"][i] or target["difficult"][i])
            passed = crowd or not area[0] <= float(target["area"][i]) <= area[1]
            if kind == label:
                shape = target[name][i].bool().numpy() if masks else target[name][i].tolist()
                objects.append((shape, passed, crowd))
        objects.sort(key=lambda each: each[1])
        count += sum(not passed for _, passed, _ in objects)
        outcome += matched(pieces, objects, threshold)
    if not count:
        return math.nan
    outcome.sort(key=lambda one: -one[0])
    right, curve = 0, []
    for place, (_, hit, _) in enumerate((one for one in outcome if not one[2]), 1):
        right += hit
        curve.append((right / count, right / place))
    return sum(max((p for r, p in curve if r >= level), default=0.0) for level in RECALLS) / len(RECALLS)


@pytest.mark.parametrize("masks", [False, True])
def test_coco_by_loops(masks):
    found, targets = crowded(5, 8)
    task = (InstanceTask if masks else DetectionTask)(nn.Identity(), NAMES)
    values, prefix = measured(task, found, targets), "mask_" if masks else ""
    wanted = {f"map{said}": (area, THRESHOLDS) for said, area in AREAS.items()}
    wanted |= {"map50": (AREAS[""], [0.5]), "map75": (AREAS[""], [0.75])}
    for name, (area, thresholds) in wanted.items():
        each = [
            coco_by_loops(found, targets, label, area, threshold, masks)
            for label in range(3)
            for threshold in thresholds
        ]
        known = [value for value in each if not math.isnan(value)]
        assert known, name
        assert values[prefix + name] == pytest.approx(sum(known) / len(known), abs=1e-5), name
    assert 0.05 < values[f"{prefix}map50"] < 0.95


def test_a_recall_of_just_a_fifth_reaches_its_threshold():
    """One of five objects is found: precision 1 at the recalls 0 to 0.20, which are 21 of 101; in float32 0.2 is more
    than a fifth. So it is with the IoU 0.6."""
    boxes = [[30.0 * number, 0.0, 30.0 * number + 10, 10.0] for number in range(5)]
    targets = [target_of(boxes, [0] * 5, (20, SIZE))]
    found = {"boxes": torch.tensor([[0.0, 0, 10, 6]]), "labels": torch.tensor([0]), "scores": torch.tensor([0.9])}
    values = measured(DetectionTask(nn.Identity(), NAMES), [found], targets)
    assert values["map50"] == pytest.approx(21 / 101, abs=1e-6)
    assert values["map"] == pytest.approx(3 / 10 * 21 / 101, abs=1e-6)


# ------------------------------------------------------------------ windows
class Neighbours(nn.Module):
    """A convolution that sees where its window ends."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 2, 3, padding=1).double()

    def forward(self, images):
        return {"out": self.layer(images)}


@pytest.mark.parametrize(
    ("size", "window", "stride"), [((17, 23), 8, 5), ((8, 8), 8, 3), ((9, 40), 16, 16), ((5, 30), 12, 7)]
)
def test_windows_by_loops(size, window, stride):
    """The grid as mmsegmentation lays it: the last window of a row is moved back to the edge."""
    model, images = Neighbours(), torch.randn(2, 3, *size, dtype=torch.float64)
    total, count = torch.zeros(2, 2, *size), torch.zeros(size)
    rows, columns = (max(side - window + stride - 1, 0) // stride + 1 for side in size)
    with torch.no_grad():
        for row in range(rows):
            for column in range(columns):
                bottom, right = min(row * stride + window, size[0]), min(column * stride + window, size[1])
                place = (..., slice(max(bottom - window, 0), bottom), slice(max(right - window, 0), right))
                total[place] += model(images[place])["out"].float()
                count[place] += 1
        torch.testing.assert_close(by_windows(model, images, window, stride), total / count)
