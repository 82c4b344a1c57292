"""The task of oriented boxes: measures against a plain evaluation with loops and shapely, by hand, what is refused, and
what is decoded."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from deltalens.tasks import DetectionTask, OrientedTask, main_metric_of, task_class
from deltalens.tasks.box_confusion import BoxConfusion
from deltalens.tasks.oriented_metrics import IOUS, OrientedAveragePrecision, overlaps

shapely = pytest.importorskip("shapely")

NAMES = ["ship", "plane", "harbour", "bridge"]


def found_of(boxes, labels, scores):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }


def target_of(boxes, labels, difficult=None, **more):
    none = torch.zeros(len(labels), dtype=torch.int64)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": none if difficult is None else torch.tensor(difficult, dtype=torch.int64),
        "iscrowd": none.clone(),
        "image_id": 0,
        **more,
    }


def measured(task, found, targets):
    metrics = task.new_metrics()
    task.update_metrics(metrics, {"output": found}, (None, targets))
    return {name: float(value) for name, value in metrics.compute().items()}, task.per_class(metrics)


# ------------------------------------------------------------------ the development kit, written again with loops
def polygon(box):
    cx, cy, w, h, angle = map(float, box)
    along, across = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
    middle = np.array([cx, cy])
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    return shapely.Polygon([middle + i * w / 2 * along + j * h / 2 * across for i, j in signs])


def shared(first, second):
    common = first.intersection(second).area
    return common / (first.area + second.area - common)


def kit(found, targets, label, threshold):
    """(AP over eleven recalls, area) of a class, detection by detection."""
    objects, count = [], 0
    for target in targets:
        own = [
            {"shape": polygon(box), "difficult": bool(hard), "taken": False}
            for box, name, hard in zip(target["boxes"], target["labels"], target["difficult"], strict=True)
            if name == label
        ]
        objects.append(own)
        count += sum(not each["difficult"] for each in own)
    if not count:
        return math.nan, math.nan
    guesses = []
    for image, each in enumerate(found):
        for box, name, score in zip(each["boxes"], each["labels"], each["scores"], strict=True):
            if name == label:
                guesses.append((float(score), image, polygon(box)))
    guesses.sort(key=lambda guess: -guess[0])
    right = wrong = 0
    curve = []
    for _, image, shape in guesses:
        best, match = -1.0, None
        for each in objects[image]:
            share = shared(shape, each["shape"])
            if share > best:
                best, match = share, each
        if best > threshold:
            if not match["difficult"]:
                if match["taken"]:
                    wrong += 1
                else:
                    right += 1
                    match["taken"] = True
        else:
            wrong += 1
        if right + wrong:
            curve.append((right / count, right / (right + wrong)))
    eleven = [max((p for r, p in curve if r >= level / 10 - 1e-9), default=0.0) for level in range(11)]
    area, before = 0.0, 0.0
    for place, (recall, _) in enumerate(curve):
        area += (recall - before) * max(p for _, p in curve[place:])
        before = recall
    return sum(eleven) / 11, area


def random_pictures(seed, count=12):
    """Objects that overlap, some difficult; detections shifted, turned, doubled, invented, or called another name.
    Nothing is a bridge, and harbours are all difficult or missing in places."""
    random = np.random.default_rng(seed)

    def rectangle():
        sides = np.sort(random.uniform(4, 40, 2))[::-1]
        return [*random.uniform(10, 90, 2), *sides, random.uniform(-math.pi / 2, math.pi / 2)]

    found, targets = [], []
    for _ in range(count):
        boxes = [rectangle() for _ in range(random.integers(0, 7))]
        labels = random.integers(0, 3, len(boxes)).tolist()
        targets.append(target_of(boxes, labels, (random.random(len(boxes)) < 0.3).astype(int)))
        guesses, names = [], []
        for box, label in zip(boxes, labels, strict=True):
            for _ in range(random.integers(0, 4)):
                guesses.append(np.array(box) + random.normal(0, [1.5, 1.5, 1.5, 1.0, 0.08]))
                guesses[-1][2:4] = np.maximum(guesses[-1][2:4], 0.5)
                names.append(int(label if random.random() < 0.9 else random.integers(0, 4)))
        for _ in range(random.integers(0, 3)):
            guesses.append(np.array(rectangle()))
            names.append(int(random.integers(0, 4)))
        found.append(found_of(np.array(guesses), names, random.permutation(1000)[: len(names)] / 1000))
    return found, targets


@pytest.mark.parametrize("seed", range(4))
def test_measures_are_those_of_the_kit(seed):
    found, targets = random_pictures(seed)
    task = OrientedTask(nn.Identity(), NAMES)
    values, per_class = measured(task, found, targets)
    plain = np.array([[kit(found, targets, label, iou) for label in range(4)] for iou in IOUS])  # IoU, class, kind
    assert values["map50_voc07"] == pytest.approx(np.nanmean(plain[0, :, 0]), abs=1e-6)
    assert values["map50_voc"] == pytest.approx(np.nanmean(plain[0, :, 1]), abs=1e-6)
    assert values["map75"] == pytest.approx(np.nanmean(plain[5, :, 1]), abs=1e-6)
    assert values["map"] == pytest.approx(np.nanmean(plain[..., 1].mean(0)), abs=1e-6)
    assert 0.1 < values["map"] < values["map50_voc"] < 0.95
    assert list(per_class.values())[:3] == pytest.approx(plain[0, :3, 0], abs=1e-6)
    assert math.isnan(per_class["bridge"])
    coco = OrientedTask(nn.Identity(), NAMES, metrics="coco")
    assert coco.main_metric == "map"
    assert list(measured(coco, found, targets)[1].values())[:3] == pytest.approx(plain[:, :3, 1].mean(0), abs=1e-6)


def test_overlaps_are_those_of_polygons():
    found, targets = random_pictures(9, 6)
    for each, target in zip(found, targets, strict=True):
        pairs = overlaps(each["boxes"], target["boxes"], each["labels"][:, None] == target["labels"])
        for i, box in enumerate(each["boxes"]):
            for j, true in enumerate(target["boxes"]):
                same = each["labels"][i] == target["labels"][j]
                expected = shared(polygon(box), polygon(true)) if same else -1
                assert float(pairs[i, j]) == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------ by hand
SHIP = [50.0, 50.0, 40.0, 10.0, math.pi / 6]


def test_the_angle_decides():
    """A long ship found at right angles overlaps by 10 x 10 of 2 x 400 - 100."""
    task = OrientedTask(nn.Identity(), NAMES)
    for turn, right in ((0, 1.0), (math.pi / 2, 0.0), (math.pi, 1.0)):
        box = [*SHIP[:4], SHIP[4] + turn]
        assert measured(task, [found_of([box], [0], [0.9])], [target_of([SHIP], [0])])[0]["map50_voc"] == right


def test_difficult_objects_and_doubles():
    """Right, a double, twice on a difficult one, and one missed: precision 1, 1/2 at a recall of 1/2 of two objects."""
    hard, missed = [20.0, 20.0, 20.0, 8.0, 1.0], [80.0, 80.0, 12.0, 6.0, -1.0]
    target = target_of([SHIP, hard, missed], [0, 0, 0], [0, 1, 0])
    found = found_of([hard, SHIP, hard, SHIP], [0, 0, 0, 0], [0.9, 0.8, 0.7, 0.6])
    task = OrientedTask(nn.Identity(), NAMES)
    values, per_class = measured(task, [found], [target])
    assert values["map50_voc"] == pytest.approx(0.5)
    assert [values["map50_voc07"], per_class["ship"]] == pytest.approx([6 / 11] * 2)
    crowd = target | {"difficult": torch.zeros(3), "iscrowd": torch.tensor([0, 1, 0])}
    assert measured(task, [found], [crowd])[0] == pytest.approx(values)
    worse = found_of([SHIP, SHIP, missed], [0, 0, 0], [0.9, 0.8, 0.7])  # right, wrong, right
    assert measured(task, [worse], [target])[0]["map50_voc"] == pytest.approx(0.5 + 0.5 * 2 / 3)
    of_others = target_of([SHIP, hard, missed], [0, 1, 0], [0, 1, 0])
    assert math.isnan(measured(task, [found], [of_others])[1]["plane"])  # difficult ones alone are no object


def test_a_difficult_object_is_no_excuse_at_a_higher_threshold():
    """A detection beside a difficult object, IoU 36 / 44: passed over up to 0.8, wrong from 0.85 on."""
    hard, near = [20.0, 20.0, 40.0, 8.0, 0.0], [24.0, 20.0, 40.0, 8.0, 0.0]
    target = target_of([hard, SHIP], [0, 0], [1, 0])
    metric = OrientedAveragePrecision(4)
    metric.update([found_of([near, SHIP], [0, 0], [0.9, 0.8])], [target])
    assert metric.average_precisions()[:, 0].tolist() == [1.0] * 7 + [0.5] * 3


def test_an_overlap_of_just_the_threshold_is_too_small():
    true, half = [20.0, 20.0, 40.0, 8.0, 0.0], [20.0, 20.0, 20.0, 8.0, 0.0]
    task = OrientedTask(nn.Identity(), NAMES)
    for box, value in ((half, 0.0), ([20.0, 20.0, 20.1, 8.0, 0.0], 1.0)):
        values, _ = measured(task, [found_of([box], [0], [0.9])], [target_of([true], [0])])
        assert values["map50_voc"] == value
        assert values["map75"] == 0


def test_nothing_anywhere_and_measured_in_parts():
    task = OrientedTask(nn.Identity(), NAMES)
    for found in (found_of([], [], []), found_of([SHIP], [1], [0.5])):
        values, per_class = measured(task, [found], [target_of([], [])])
        assert all(math.isnan(value) for value in (*values.values(), *per_class.values()))
    assert measured(task, [found_of([], [], [])], [target_of([SHIP], [0])])[0]["map"] == 0
    found, targets = random_pictures(5)
    whole, _ = measured(task, found, targets)
    first, second = OrientedAveragePrecision(4), OrientedAveragePrecision(4)  # as of two processes
    first.update(found[:5], targets[:5])
    second.update(found[5:], targets[5:])
    for name in ("scores", "labels", "outcomes"):
        setattr(first, name, [torch.cat(getattr(first, name)), torch.cat(getattr(second, name))])
    first.objects += second.objects
    assert {name: float(value) for name, value in first.compute().items()} == pytest.approx(whole)
    reductions = {name: how.__name__ for name, how in first._reductions.items()}
    assert reductions == {"objects": "dim_zero_sum"} | dict.fromkeys(("scores", "labels", "outcomes"), "dim_zero_cat")


def test_confusion_is_of_oriented_overlaps():
    crossed = [*SHIP[:4], SHIP[4] + math.pi / 2]
    task = OrientedTask(nn.Identity(), NAMES)
    confusion = BoxConfusion(4, overlaps=task.overlaps)
    confusion.update([found_of([SHIP, crossed], [1, 0], [0.9, 0.8])], [target_of([SHIP], [0])])
    assert confusion.counts.nonzero().tolist() == [[0, 1], [4, 0]]


# ------------------------------------------------------------------ training, decoding, names
class Recorder(nn.Module):
    num_classes = 4

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images, targets):
        self.targets = targets
        return {"size": self.weight * sum(len(target["labels"]) for target in targets)}


def test_what_is_trained_with_and_what_is_refused():
    images = [torch.zeros(3, 64, 64)]
    task = OrientedTask(Recorder(), NAMES, train_difficult=False).train()
    task((images, [target_of([SHIP, SHIP], [0, 1], [0, 1])]))
    assert task.model.targets[0]["boxes"].tolist() == [pytest.approx(SHIP)]
    task((images, [target_of([], [])]))
    for box, words in (
        ([50, 50, 0, 10, 0.3], r"box \[50.0, 50.0, 0.0, 10.0, 0.3.*\] in image 0 has no area or is not finite"),
        ([50, 50, 9, math.nan, 0.3], "has no area or is not finite"),
        ([50, math.inf, 9, 3, 0.3], "has no area or is not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            task((images, [target_of([SHIP, box], [0, 1])]))
    with pytest.raises(ValueError, match="label 4 in image 0 names no class: there are 4"):
        task((images, [target_of([SHIP], [4])]))
    upright = target_of([SHIP], [0]) | {"boxes": torch.tensor([[0.0, 0, 9, 9]])}
    with pytest.raises(ValueError, match="have 4 numbers each: oriented boxes are"):
        task((images, [upright]))
    with pytest.raises(ValueError, match=r"have 5 numbers each.*OrientedTask"):
        DetectionTask(Recorder(), NAMES).train()((images, [target_of([SHIP], [0])]))


def test_decoding_gives_the_box_and_the_upright_one_around_it():
    output = [found_of([SHIP, [10, 10, 8, 4, 0.0], SHIP], [0, 1, 2], [0.6, 0.9, 0.2]), found_of([], [], [])]
    (first, second), nothing = OrientedTask(nn.Identity(), NAMES).decode(output)
    assert (first.name, first.box, first.oriented) == ("plane", (6, 8, 14, 12), (10, 10, 8, 4, 0))
    assert second.oriented == pytest.approx(SHIP)
    assert second.box == pytest.approx(polygon(SHIP).bounds, abs=1e-4)
    assert nothing == []


def test_what_choices_are_made_by():
    assert task_class("oriented") is OrientedTask
    assert main_metric_of("oriented", {}) == OrientedTask(nn.Identity(), NAMES).main_metric == "map50_voc07"
    assert main_metric_of("oriented", {"metrics": "coco"}) == "map"
