"""Every layout of dense data: what is read, which task a folder serves, and what wrong layouts say."""

import json

import numpy as np
import pytest
import torch
from dense_folders import (
    HEIGHT,
    SIZES,
    VOC_LISTS,
    WIDTH,
    block,
    change,
    coco,
    coco_content,
    mask,
    masked_pairs,
    picture,
    rle,
    voc,
    yolo,
)
from PIL import Image

from deltalens.data import ReadOptions, TrainingSubset, read_data, read_part
from deltalens.data.outlines import filled


def sizes(data) -> tuple[int, ...]:
    return tuple(0 if part is None else len(part) for part in (data.train, data.val, data.test))


# ------------------------------------------------------------------ VOC
def test_voc_boxes(tmp_path):
    data = read_data(voc(tmp_path, VOC_LISTS, {"a1": []}, folder="ImageSets"))
    assert (data.task, data.class_names, sizes(data)) == ("detection", ["cat", "dog"], (4, 2, 2))
    assert data.origin == {"format": "voc", "task": "detection", "objects": 14, "metrics": "voc07"}
    image, target = data.train[0]
    assert (image.size, image.mode) == ((WIDTH, HEIGHT), "RGB")
    assert target["boxes"].tolist() == [[1, 2, 7, 9], [4, 4, 14, 11]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1, 0]
    assert target["difficult"].tolist() == [0, 1]
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["area"].tolist() == [42, 70]
    empty = data.train[1][1]
    assert [tuple(empty[name].shape) for name in ("boxes", "labels", "area")] == [(0, 4), (0,), (0,)]
    assert len({target["image_id"] for part in (data.train, data.val, data.test) for _, target in part}) == 8
    assert [label.tolist() for label in data.train.labels] == [[1, 1], [0, 0], [1, 1], [1, 1]]


def test_voc_of_both_years_is_their_union_tested_on_2007(tmp_path):
    voc(tmp_path / "VOCdevkit/VOC2007", VOC_LISTS)
    lists = {
        "train": ["2012_0", "2012_1"],
        "val": ["2012_2"],
        "test": ["2012_9"],
        "trainval": ["2012_0", "2012_1", "2012_2"],
    }
    voc(tmp_path / "VOCdevkit/VOC2012", lists, first=9)
    (tmp_path / "VOCdevkit/VOC2012/Annotations/2012_9.xml").unlink()  # the annotations of 2012's test are secret
    for root in (tmp_path, tmp_path / "VOCdevkit"):
        data = read_data(root, task="detection")
        assert (sizes(data), data.origin["years"]) == ((6, 3, 2), ["VOC2007", "VOC2012"])
    joined = read_data(tmp_path, task="detection", protocol="trainval")
    assert sizes(joined) == (9, 0, 2)
    assert len(set(joined.train.ids)) == 9
    assert read_data(tmp_path).task == "multilabel"  # as it was read before


def test_voc_of_other_classes_than_the_challenges_is_detection(tmp_path):
    names = [name for listed in VOC_LISTS.values() for name in listed]
    own = read_data(voc(tmp_path / "own", VOC_LISTS, {name: [("raccoon", (1, 2, 7, 9))] for name in names}))
    assert (own.task, own.class_names) == ("detection", ["raccoon"])
    official = read_data(voc(tmp_path / "official", VOC_LISTS))
    assert (official.task, len(official.class_names)) == ("multilabel", 20)


def test_voc_with_trainval_alone_or_without_lists(tmp_path):
    one = read_data(voc(tmp_path / "a", {"trainval": [f"x{i}" for i in range(8)]}), "voc")
    assert (sizes(one), one.origin["val"]) == ((7, 1, 0), "split off train")
    other = voc(tmp_path / "b", {"train": [f"x{i}" for i in range(9)]})
    (other / "ImageSets/Main/train.txt").unlink()
    (other / "ImageSets/Main").rmdir()
    (other / "ImageSets").rmdir()
    assert sizes(read_data(other)) == (7, 1, 1)


def test_voc_masks(tmp_path):
    root = voc(tmp_path, VOC_LISTS)
    (root / "ImageSets/Segmentation").mkdir()
    for part, names in VOC_LISTS.items():
        (root / f"ImageSets/Segmentation/{part}.txt").write_text("\n".join(names))
        for name in names if part != "test" else ():
            values = np.full((HEIGHT, WIDTH), 20)
            values[:2], values[2:4] = 0, 255
            mask(root / f"SegmentationClass/{name}.png", values, palette=True)
    data = read_data(root, task="segmentation")
    assert (len(data.class_names), data.class_names[0], data.class_names[20]) == (21, "background", "tvmonitor")
    assert (sizes(data), data.origin["test"]) == ((3, 1, 2), "val")
    assert data.train[0][1].unique().tolist() == [0, 20, 255]
    assert sizes(read_data(root, task="segmentation", protocol="trainval")) == (4, 0, 2)
    (root / "ImageSets/Main").rename(tmp_path / "lists")
    for file in (tmp_path / "lists").iterdir():
        file.rename(root / "ImageSets" / file.name)
    with pytest.raises(ValueError, match="serves segmentation, detection: say which task"):
        read_data(root)
    assert read_data(root, task="detection").origin["format"] == "voc"


# ------------------------------------------------------------------ COCO
@pytest.mark.parametrize(("year", "folder"), [("", "images"), ("2017", "split")])
def test_coco(tmp_path, year, folder):
    root = coco(tmp_path, SIZES if not year else {"train": 7, "val": 2}, year, folder)
    with pytest.raises(ValueError, match=r"serves detection, instance: say which task \(--task detection\)"):
        read_data(root)
    data = read_data(root, task="instance")
    assert sizes(data) == ((6, 1, 2) if year else (4, 2, 2))
    assert data.origin.get("test") == ("instances_val2017.json" if year else None)
    assert (data.task, data.class_names, data.origin["category_ids"]) == ("instance", ["ship", "tree"], [3, 90])
    target = data.train[0][1]
    assert target["boxes"].tolist() == [[2, 1, 8, 6], [5, 3, 14, 10]]
    assert (target["labels"].tolist(), target["iscrowd"].tolist(), target["area"].tolist()) == (
        [1, 0],
        [0, 1],
        [30, 30],
    )
    assert target["masks"].dtype == torch.uint8
    assert target["masks"].tolist() == [block(2, 1, 8, 6).tolist(), block(5, 3, 14, 10).tolist()]
    nothing = data.test[1][1]
    assert (nothing["masks"].shape, nothing["boxes"].shape) == ((0, HEIGHT, WIDTH), (0, 4))
    boxes = read_data(root, task="detection")
    assert (boxes.task, "masks" in boxes.train[0][1]) == ("detection", False)


def roboflow(root, parts=("train", "valid", "test")):
    for part in parts:
        names = [f"{part}{i}.jpg" for i in range(3)]
        content = coco_content(names)
        content["categories"] = [{"id": 0, "name": "things", "supercategory": "none"}] + [
            each | {"supercategory": "things"} for each in content["categories"]
        ]
        for i, name in enumerate(names):
            picture(root / part / name, i)
        (root / part / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def test_coco_as_roboflow_exports_it(tmp_path):
    data = read_data(roboflow(tmp_path / "whole"), task="instance")
    assert (data.class_names, sizes(data)) == (["ship", "tree"], (3, 3, 3))
    assert data.origin["category_ids"] == [3, 90]
    assert data.train[0][1]["boxes"].tolist() == [[2, 1, 8, 6], [5, 3, 14, 10]]
    assert data.val.name(0).endswith("valid/valid0.jpg")
    alone = read_data(roboflow(tmp_path / "alone", ("train",)), task="detection")
    assert sizes(alone) == (2, 1, 0)
    change(tmp_path / "whole/train/_annotations.coco.json", lambda c: c["annotations"][0].update(category_id=0))
    assert read_data(tmp_path / "whole", task="detection").class_names == ["things", "ship", "tree"]  # with an object
    (tmp_path / "alone/train/train1.jpg").unlink()
    with pytest.raises(ValueError, match=r"(?s)1 of 3 images .*expected in .*_annotations\.coco\.json, valid"):
        read_data(tmp_path / "alone", task="detection")


def test_coco_without_outlines_is_detection(tmp_path):
    root = coco(tmp_path, with_masks=False)
    assert read_data(root).task == "detection"
    with pytest.raises(ValueError, match="is not laid out for instance; it is laid out for detection"):
        read_data(root, task="instance")
    with pytest.raises(ValueError, match="has no masks of objects, only boxes"):
        read_data(root, "coco", task="instance")


def test_all_outlines_are_filled_as_coco_fills_them():
    from faster_coco_eval.core import mask as library

    values = (np.random.default_rng(0).random((20, 30)) > 0.7).astype("uint8")
    code = rle(values)
    compressed = library.frPyObjects(code, 20, 30)
    text = {"size": [20, 30], "counts": compressed["counts"].decode()}
    polygons = [[1, 1, 9, 1, 9, 9], [20, 10, 28, 10, 28, 18, 20, 18]]
    masks = filled([code, compressed, text, values, None, polygons], 20, 30)
    for each in masks[:4]:
        assert (each == values).all()
    assert masks[4].sum() == 0
    assert (masks[5, 10:18, 20:28] == 1).all()
    assert masks[5, :10, :10].sum() == pytest.approx(32, abs=5)
    assert masks[5].sum() == masks[5, :10, :10].sum() + 64


# ------------------------------------------------------------------ YOLO
@pytest.mark.parametrize("inside", [False, True])
def test_yolo(tmp_path, inside):
    data = read_data(yolo(tmp_path, inside=inside))
    assert (data.task, data.class_names, sizes(data)) == ("detection", ["hat", "shoe"], (4, 2, 2))
    target = data.train[0][1]
    assert target["boxes"].tolist() == [[6, 3, 10, 9], [0, 0, 8, 6]]
    assert target["labels"].tolist() == [1, 0]
    assert len(data.train[3][1]["labels"]) == 0  # without a text file


def test_yolo_polygons(tmp_path):
    root = yolo(tmp_path, lines="0 0.125 0.25 0.5 0.25 0.5 0.75 0.125 0.75\n")
    with pytest.raises(ValueError, match="serves detection, instance"):
        read_data(root)
    target = read_data(root, task="instance").train[0][1]
    assert target["boxes"].tolist() == [[2, 3, 8, 9]]
    assert target["masks"][0].tolist() == block(2, 3, 8, 9).tolist()
    (root / "data.yaml").unlink()
    assert read_data(root, task="detection").class_names == ["0"]


# ------------------------------------------------------------------ masks
@pytest.mark.parametrize("kind", ["masks", "labels", "annotations"])
def test_mask_folders(tmp_path, kind):
    root = masked_pairs(tmp_path, kind=kind)
    data = read_data(root)
    assert (data.task, data.class_names, sizes(data)) == ("segmentation", ["0", "1", "2"], (4, 2, 2))
    image, truth = data.train[0]
    assert (image.size, truth.dtype, tuple(truth.shape)) == ((WIDTH, HEIGHT), torch.int64, (HEIGHT, WIDTH))
    assert truth.tolist() == np.asarray(Image.open(root / kind / "train/train0.png")).tolist()
    (root / "info.json").write_text('{"classes": ["road", "void", "car"]}')
    named = read_data(root)
    assert named.class_names == ["road", "car"]
    assert named.train[0][1].tolist() == [[{0: 0, 1: 255, 2: 1}[value] for value in row] for row in truth.tolist()]
    (root / "info.json").unlink()
    (root / "classes.txt").write_text("road\ntree\ncar\n")
    ignoring = read_data(root, options=ReadOptions(ignore_index=2))
    assert ignoring.class_names == ["road", "tree"]
    assert sorted(ignoring.train[0][1].unique().tolist()) == [0, 1, 255]


def test_masks_by_a_manifest_or_without_parts(tmp_path):
    root = masked_pairs(tmp_path / "a", {"train": 8}, kind="labels", palette=True)
    lines = [f"{'train' if i < 6 else 'test'},images/train/train{i}.jpg,labels/train/train{i}.png" for i in range(8)]
    (root / "manifest.csv").write_text("\n".join(["split,image,label", *lines]))
    data = read_data(root)
    assert (data.origin["format"], sizes(data)) == ("masks", (5, 1, 2))
    flat = tmp_path / "b"
    for i in range(10):
        picture(flat / f"images/{i}.jpg", i)
        mask(flat / f"masks/{i}_mask.png", seed=i)
    assert sizes(read_data(flat)) == (6, 2, 2)


def test_masks_of_0_and_255(tmp_path):
    root = masked_pairs(tmp_path)
    for file in (root / "masks").rglob("*.png"):
        mask(file, block(2, 2, 9, 9) * 255)
    with pytest.raises(ValueError, match=r"values \[0, 255\], and 255 is no class"):
        read_data(root)
    (root / "info.json").write_text('{"classes": ["ground", "thing"], "values": [0, 255]}')
    assert read_data(root).train[0][1].tolist() == block(2, 2, 9, 9).tolist()


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for part, folder, count in (("train", "training", 8), ("val", "validation", 2)):
        for i in range(count):
            picture(root / f"images/{folder}/ADE_{part}_{i:08d}.jpg", i)
            values = np.full((HEIGHT, WIDTH), 150)
            values[0], values[1] = 0, 1
            mask(root / f"annotations/{folder}/ADE_{part}_{i:08d}.png", values)
    data = read_data(tmp_path)
    assert (data.origin["format"], data.origin["test"], sizes(data)) == ("ade20k", "validation", (7, 1, 2))
    assert (len(data.class_names), data.class_names[0], data.class_names[44], data.class_names[149]) == (
        150, "wall", "chest of drawers", "flag",
    )  # fmt: skip
    assert [row[0] for row in data.train[0][1].tolist()[:3]] == [255, 0, 149]
    assert sizes(read_data(root, protocol="trainval")) == (8, 0, 2)


@pytest.mark.parametrize("numbered", [True, False])
def test_cityscapes(tmp_path, numbered):
    for part, count in (("train", 8), ("val", 2)):
        for i in range(count):
            name = f"aachen_{i:06d}_000019"
            picture(tmp_path / f"leftImg8bit/{part}/aachen/{name}_leftImg8bit.png", i)
            values = np.full((HEIGHT, WIDTH), 0 if numbered else 7)
            values[0], values[1] = (255, 18) if numbered else (4, 33)
            end = "labelTrainIds" if numbered else "labelIds"
            mask(tmp_path / f"gtFine/{part}/aachen/{name}_gtFine_{end}.png", values)
    data = read_data(tmp_path)
    assert (sizes(data), len(data.class_names), data.class_names[18]) == ((7, 1, 2), 19, "bicycle")
    assert data.origin["labels"] == ("labelTrainIds" if numbered else "labelIds")
    assert [row[0] for row in data.train[0][1].tolist()[:3]] == [255, 18, 0]
    next((tmp_path / "gtFine/val").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match=r"1 pictures have no mask: .* is missing; expected"):
        read_data(tmp_path)


# ------------------------------------------------------------------ tasks and parts
def test_the_task_decides_and_wrong_tasks_show_the_tree(tmp_path):
    root = coco(tmp_path)
    for part, count in SIZES.items():
        for i in range(count):
            mask(root / f"semantic/{part}/{part}{i}.png", seed=i)
    lines = [f"{part},images/{part}{i}.jpg,semantic/{part}/{part}{i}.png" for part in SIZES for i in range(SIZES[part])]
    (root / "manifest.csv").write_text("\n".join(["split,image,semantic_label", *lines]))
    with pytest.raises(ValueError, match="serves segmentation, detection, instance: say which task"):
        read_data(root)
    for task, format in (("segmentation", "masks"), ("detection", "coco"), ("instance", "coco")):
        data = read_data(root, task=task)
        assert (data.task, data.origin["format"], data.origin["task"], sizes(data)) == (task, format, task, (4, 2, 2))
    with pytest.raises(ValueError, match="the format masks is for segmentation, not for detection"):
        read_data(root, "masks", task="detection")
    with pytest.raises(ValueError, match="the format folder has one label or several"):
        read_data(root, "folder", task="detection")
    with pytest.raises(ValueError, match="unknown task 'boxes'"):
        read_data(root, task="boxes")


@pytest.mark.parametrize("task", ["segmentation", "detection", "instance"])
def test_a_wrong_layout_shows_the_expected_trees(tmp_path, task):
    with pytest.raises(FileNotFoundError, match="no data folder"):
        read_data(tmp_path / "absent", task=task)
    picture(tmp_path / "train/cat/a.jpg")
    tree = {"segmentation": "masks/train/a.png", "detection": "Annotations/*.xml", "instance": "instances_train.json"}
    with pytest.raises(ValueError, match=f"not laid out for {task}") as error:
        read_data(tmp_path, task=task)
    assert tree[task] in str(error.value)
    formats = {
        "segmentation": ("masks", "ade20k", "cityscapes", "voc-masks"),
        "detection": ("voc",),
        "instance": ("coco", "yolo"),
    }
    for format in formats[task]:
        with pytest.raises(ValueError, match=r"expected in .*\n    "):
            read_data(tmp_path, format, task=task)


def test_protocols_fractions_and_shots(tmp_path):
    root = coco(tmp_path, {"train": 11, "val": 3, "test": 2})
    data = read_data(root, task="instance")
    joined = data.joined()
    assert (len(joined.train), joined.val) == (14, None)
    assert len(set(joined.train.ids)) == 14
    part = TrainingSubset(0.5, 1).take(data)
    assert len(part.train) == 6  # half of ten with objects, and the empty one
    assert [path.name for path in read_part(root, "train", data.class_names, part.origin).pictures] == [
        path.name for path in part.train.pictures
    ]
    with pytest.raises(ValueError, match="the data is detection"):
        read_data(root, task="detection", options=ReadOptions(shots=2))


def test_reading_a_part_with_the_labels_of_the_model(tmp_path):
    root = coco(tmp_path)
    data = read_data(root, task="instance")
    part = read_part(root, "test", ["rock", "tree", "ship"], data.origin)
    assert (part.task, part.classes) == ("instance", 3)
    assert part[0][1]["labels"].tolist() == [1, 2]
    assert part.labels[0].tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="other classes than the 1 of the model: ship"):
        read_part(root, "test", ["tree"], data.origin)
    masks = masked_pairs(tmp_path / "m")
    origin = read_data(masks).origin
    moved = read_part(masks, "test", ["2", "1", "0"], origin)
    plain = read_part(masks, "test", ["0", "1", "2"], origin)
    assert (moved[0][1] == 2 - plain[0][1]).all()
    assert moved.labels[0].tolist() == [1, 1, 1]


def test_coco_ids_with_gaps_in_other_parts(tmp_path):
    root = coco(tmp_path)

    def renumber(content):
        content["categories"] = [{"id": 7, "name": "tree"}]
        content["annotations"] = [each | {"category_id": 7} for each in content["annotations"]]

    change(root / "annotations/instances_test.json", renumber)
    assert read_data(root, task="detection").test[0][1]["labels"].tolist() == [1, 1]
    assert json.loads((root / "annotations/instances_test.json").read_text())["categories"][0]["id"] == 7
