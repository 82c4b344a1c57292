"""Detection and instance tasks: losses, what is left out, metrics against hand-made cases and COCO's, decoding."""

import math

import numpy as np
import pytest
import torch
from detectors import NAMES, Rectangles, small_detector, target_of
from torch import nn

import deltalens as dl
from deltalens.tasks import DetectionTask, InstanceTask, main_metric_of, task_class
from deltalens.tasks.box_metrics import PASSED_OVER, RIGHT, WRONG, judged, voc_average_precision


def found_of(boxes, labels, scores, size=None):
    found = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }
    if size is not None:
        found["masks"] = target_of(boxes, labels, size)["masks"].float()[:, None] * 0.9
    return found


def measured(task, found, targets, batches=1):
    """All metrics, given in so many batches."""
    metrics = task.new_metrics()
    for share in np.array_split(np.arange(len(found)), batches):
        batch = (None, [targets[i] for i in share])
        task.update_metrics(metrics, {"output": [found[i] for i in share]}, batch)
    return {name: float(value) for name, value in metrics.compute().items()}, task.per_class(metrics)


def flags(*values):
    return torch.tensor(values, dtype=torch.int64)


# ------------------------------------------------------------------ losses
@pytest.mark.parametrize(
    ("kind", "head"), [(DetectionTask, "retinanet"), (DetectionTask, "fcos"), (InstanceTask, "mask_rcnn")]
)
def test_losses_are_summed_in_training_and_absent_in_evaluation(kind, head):
    model = dl.attach(small_detector(head), dl.MonaConfig(bottleneck=4), backbone="backbone.pyramid.backbone")
    task = kind(model, NAMES)
    batch = Rectangles(4).batch()
    result = task.train()(batch)
    assert set(result) == {"loss", "output", "losses", "terms"}
    assert result["loss"].item() == pytest.approx(sum(float(term) for term in result["losses"].values()))
    assert not any(term.requires_grad for term in result["losses"].values())
    result["loss"].backward()
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert any(name.startswith("model.backbone.pyramid.backbone") for name in trained)
    assert all(p.grad is None for p in task.parameters() if not p.requires_grad)
    with torch.no_grad():
        result = task.eval()(batch)
    assert result["loss"] is None
    assert len(result["output"]) == 4


class Recorder(nn.Module):
    """Keeps the targets that it is trained with."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images, targets):
        self.targets = targets
        return {"size": self.weight * sum(len(target["labels"]) for target in targets)}


def test_crowds_and_difficult_boxes_are_left_out_of_training():
    boxes = [[0, 0, 10, 10], [10, 10, 20, 20], [20, 20, 40, 40]]
    target = target_of(boxes, [0, 1, 2], iscrowd=flags(0, 1, 0), difficult=flags(0, 0, 1))
    images = [torch.zeros(3, 64, 64)]
    for kind, difficult, expected in [
        (DetectionTask, False, [0]),
        (DetectionTask, True, [0, 2]),
        (InstanceTask, False, [0]),
    ]:
        task = kind(Recorder(), NAMES, train_difficult=difficult)
        task.train()((images, [target]))
        (given,) = task.model.targets
        assert given["labels"].tolist() == expected
        assert torch.equal(given["boxes"], target["boxes"][expected])
        assert set(given) == set(task.fields)
    assert torch.equal(given["masks"], target["masks"][:1])


class Penalised(dl.LinearConfig):
    """A frozen backbone with a loss term of its own."""

    name = "penalised"

    def losses(self, model, output, batch):
        return {"size": torch.tensor(2.5)}


def test_methods_add_their_losses():
    model = dl.attach(small_detector("retinanet"), Penalised(), backbone="backbone.pyramid.backbone")
    result = DetectionTask(model, NAMES).train()(Rectangles(2).batch())
    assert set(result["losses"]) == {"classification", "bbox_regression", "penalised.size"}
    assert result["loss"].item() == pytest.approx(sum(map(float, result["losses"].values())))


def test_wrong_targets_and_models_are_named():
    images = [torch.zeros(3, 64, 64)]
    task = DetectionTask(Recorder(), NAMES).train()
    with pytest.raises(ValueError, match=r"label 3 in image 7 names no class: there are 3, counted from 0"):
        task((images, [target_of([[0, 0, 9, 9]], [3], image_id=7)]))
    with pytest.raises(ValueError, match=r"box \[5.0, 5.0, 5.0, 9.0\] in image 0 has no area"):
        task((images, [target_of([[0, 0, 9, 9], [5, 5, 5, 9]], [0, 1])]))
    with pytest.raises(ValueError, match="detects 3 classes and the data have 2; pass num_classes=2"):
        DetectionTask(Recorder(), NAMES[:2])
    with pytest.raises(ValueError, match="coco, voc07, voc, got 'ap'"):
        DetectionTask(Recorder(), NAMES, metrics="ap")
    without = {key: value for key, value in target_of([[0, 0, 9, 9]], [0]).items() if key != "masks"}
    with pytest.raises(ValueError, match="need a mask for each object; image 0 has none"):
        InstanceTask(Recorder(), NAMES).train()((images, [without]))


# ------------------------------------------------------------------ VOC's average precision by hand
def test_detections_are_judged_as_in_voc():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
    labels, difficult = torch.tensor([0, 0, 1]), torch.tensor([False, True, False])
    found = found_of(
        [
            [0, 0, 10, 9],
            [0, 0, 10, 10],
            [20, 20, 30, 30],
            [21, 20, 30, 30],
            [40, 40, 50, 50],
            [40, 40, 50, 50],
            [0, 0, 10, 5],
            [0, 0, 10, 4.9],
        ],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0.6, 0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2],
    )
    # a double with a lower score, the object, a difficult one twice, another class right and wrong, a double with an
    # IoU of just 0.5, and one below
    expected = [WRONG, RIGHT, PASSED_OVER, PASSED_OVER, RIGHT, WRONG, WRONG, WRONG]
    assert judged(found, boxes, labels, difficult).tolist() == expected
    alone = found_of([[0, 0, 10, 5]], [0], [0.3])
    assert judged(alone, boxes, labels, difficult).tolist() == [RIGHT]
    assert judged(found, boxes[:0], labels[:0], difficult[:0]).tolist() == [WRONG] * 8
    assert judged(found_of([], [], []), boxes, labels, difficult).tolist() == []


def test_a_detection_belongs_to_what_it_overlaps_most_also_where_that_is_taken():
    """VOC does not give it the second best object, COCO would."""
    boxes, labels = torch.tensor([[0.0, 0, 10, 10], [0.0, 3, 10, 13]]), torch.tensor([0, 0])
    found = found_of([[0, 0, 10, 10], [0, 1, 10, 11]], [0, 0], [0.9, 0.8])
    assert judged(found, boxes, labels, torch.zeros(2, dtype=torch.bool)).tolist() == [RIGHT, WRONG]


def test_voc_average_precision_by_hand():
    """Right, wrong, right of 4 objects: precision 1, 1/2, 2/3 at recall 1/4, 1/4, 1/2."""
    scores, right = torch.tensor([0.5, 0.9, 0.7]), torch.tensor([True, True, False])
    assert voc_average_precision(scores, right, 4, False) == pytest.approx(0.25 * 1 + 0.25 * 2 / 3)
    assert voc_average_precision(scores, right, 4, True) == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)  # r = 0-.2, .3-.5
    assert voc_average_precision(scores, right, 0, True) != voc_average_precision(scores, right, 0, True)  # NaN
    assert voc_average_precision(scores[:0], right[:0], 4, True) == 0


def test_difficult_objects_neither_help_nor_harm():
    task = DetectionTask(nn.Identity(), NAMES, metrics="voc07")
    boxes, labels = [[0, 0, 10, 10], [20, 20, 40, 40]], [0, 0]
    targets = [target_of(boxes, labels, difficult=flags(0, 1))]
    for found in (found_of(boxes[:1], [0], [0.5]), found_of(boxes, labels, [0.5, 0.9])):
        values, per_class = measured(task, [found], targets)
        assert values["map50_voc07"] == values["map50_voc"] == values["map"] == pytest.approx(1)
        assert per_class["red"] == 1
        assert math.isnan(per_class["green"])
    targets = [target_of(boxes, labels)]
    values, _ = measured(task, [found_of(boxes[:1], [0], [0.5])], targets)
    assert values["map50_voc"] == pytest.approx(0.5)
    assert values["map50_voc07"] == pytest.approx(6 / 11)
    crowd = [target_of(boxes, labels, iscrowd=flags(0, 1))]
    values, _ = measured(task, [found_of([boxes[0], [22, 22, 30, 30]], labels, [0.5, 0.9])], crowd)
    assert values["map50"] == pytest.approx(1)  # inside the crowd


def random_scenes(count=40, seed=0):
    """Objects that do not overlap, detections that are shifted, doubled, missed and invented."""
    random = np.random.default_rng(seed)
    found, targets = [], []
    for _ in range(count):
        corners = random.permutation(16)[: random.integers(0, 5)]
        boxes = [[x * 60.0, y * 60.0, x * 60 + 40.0, y * 60 + 30.0] for x, y in ((c % 4, c // 4) for c in corners)]
        labels = random.integers(0, 3, len(boxes)).tolist()
        targets.append(target_of(boxes, labels, (240, 240)))
        guesses, classes = [], []
        for box, label in zip(boxes, labels, strict=True):
            for _ in range(random.integers(0, 3)):
                guesses.append((np.array(box) + random.normal(0, 4, 4)).tolist())
                classes.append(int(label if random.random() < 0.8 else random.integers(0, 3)))
        found.append(found_of(guesses, classes, random.permutation(1000)[: len(guesses)] / 1000))
    return found, targets


def test_where_all_conventions_agree_voc_is_coco_at_half():
    """Objects far apart, distinct scores: the area under VOC's curve and COCO's 101 points differ by less than .01."""
    found, targets = random_scenes()
    task = DetectionTask(nn.Identity(), NAMES)
    values, per_class = measured(task, found, targets)
    assert 0.3 < values["map50"] < 0.95
    assert values["map50_voc"] == pytest.approx(values["map50"], abs=0.01)
    assert values["map50_voc07"] == pytest.approx(values["map50"], abs=0.06)
    assert values["map75"] < values["map50"]
    assert {"map_medium"} <= set(values)
    assert "map_large" not in values  # no object of that size
    assert np.mean(list(per_class.values())) == pytest.approx(values["map"])
    in_parts, per_class_in_parts = measured(task, found, targets, batches=7)
    assert in_parts == pytest.approx(values)
    assert per_class_in_parts == pytest.approx(per_class)


def test_ap_of_each_class_is_its_own():
    """Only the last class is found, and the second has no object."""
    task = DetectionTask(nn.Identity(), NAMES)
    targets = [target_of([[0, 0, 40, 40], [50, 0, 62, 30]], [0, 2])]
    values, per_class = measured(task, [found_of([[50, 0, 62, 30], [0, 50, 9, 59]], [2, 1], [0.9, 0.8])], targets)
    assert (per_class["red"], per_class["blue"]) == (0, pytest.approx(1))
    assert math.isnan(per_class["green"])
    assert values["map"] == pytest.approx(0.5)


def test_no_object_anywhere():
    task = DetectionTask(nn.Identity(), NAMES)
    for found in (found_of([], [], []), found_of([[0, 0, 9, 9]], [1], [0.5])):
        values, per_class = measured(task, [found], [target_of([], [])])
        assert all(math.isnan(value) for value in (*values.values(), *per_class.values()))
        assert "map" in values


# ------------------------------------------------------------------ masks
def test_mask_ap_reads_masks():
    """Boxes are right, the mask of the second object is another's."""
    boxes, labels = [[0, 0, 40, 40], [10, 45, 60, 60]], [0, 1]
    targets = [target_of(boxes, labels), target_of([], [])]
    found = found_of(boxes, labels, [0.9, 0.8], (64, 64))
    task = InstanceTask(nn.Identity(), NAMES)
    nothing = found_of([], [], [], (64, 64))
    values, per_class = measured(task, [found, nothing], targets)
    assert values["map"] == values["mask_map"] == values["mask_map50"] == pytest.approx(1)
    found["masks"] = found["masks"].flip(0)
    values, per_class = measured(task, [found, nothing], targets)
    assert (values["map"], values["mask_map"]) == (pytest.approx(1), 0)
    assert per_class["red"] == per_class["green"] == 0
    found["masks"] = target_of(boxes, labels)["masks"].float()[:, None] * 0.5  # not above one half
    assert measured(task, [found, nothing], targets)[0]["mask_map"] == 0


# ------------------------------------------------------------------ with the readers' transforms
def test_metrics_are_in_pixels_of_the_picture_as_it_was():
    """A picture shrunk by half: what is found in it is doubled before it is compared, and its mask, too."""
    before = target_of([[0, 0, 40, 40], [10, 44, 60, 60]], [0, 1])
    target = target_of([[0, 0, 20, 20], [5, 22, 30, 30]], [0, 1], (32, 32), area=before["area"])
    target |= {f"orig_{name}": before[name] for name in ("boxes", "masks")}
    target |= {"orig_size": torch.tensor([64, 64]), "scale": torch.tensor([0.5, 0.5])}
    found = found_of(target["boxes"].tolist(), [0, 1], [0.9, 0.8], (32, 32))
    values, _ = measured(InstanceTask(nn.Identity(), NAMES), [found], [target])
    assert values["map"] == pytest.approx(1)
    assert values["map_medium"] == values["map_small"] == pytest.approx(1)  # 1600 and 800 pixels, not 400 and 200
    assert values["mask_map50"] == pytest.approx(1)


# ------------------------------------------------------------------ decoding, names
def test_decoding():
    output = [
        found_of([[0, 0, 4, 4], [1, 2, 3, 4], [0, 0, 1, 1]], [2, 0, 1], [0.6, 0.9, 0.2], (8, 8)),
        found_of([], [], []),
    ]
    first, second = DetectionTask(nn.Identity(), NAMES).decode(output)
    assert [(d.name, round(d.score, 4), d.box, d.mask) for d in first] == [
        ("red", 0.9, (1, 2, 3, 4), None),
        ("blue", 0.6, (0, 0, 4, 4), None),
    ]
    assert second == []
    task = InstanceTask(nn.Identity(), NAMES)
    ((best,),) = task.decode(output[:1], threshold=0.1, topk=1)
    assert best.name == "red"
    assert best.mask.nonzero().tolist() == [[2, 1], [2, 2], [3, 1], [3, 2]]


@pytest.mark.parametrize(
    ("name", "metrics", "main"),
    [
        ("detection", "voc07", "map50_voc07"),
        ("detection", None, "map"),
        ("instance", None, "mask_map"),
        ("instance", "voc", "map50_voc"),
        ("classification", None, "accuracy"),
    ],
)
def test_the_origin_of_the_data_says_what_choices_are_made_by(name, metrics, main):
    origin = {} if metrics is None else {"metrics": metrics}
    assert main_metric_of(name, origin) == main
    task = task_class(name)(nn.Identity(), NAMES, **origin)
    assert task.main_metric == main
    if name != "classification":
        assert main in measured(task, [found_of([], [], [], (64, 64))], [target_of([], [])])[0]
