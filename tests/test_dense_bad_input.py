"""What is wrong with boxes, masks, names and pictures of dense data: put right and counted, or named in one line."""

import json

import numpy as np
import pytest
from dense_folders import (
    HEIGHT,
    VOC_LISTS,
    WIDTH,
    change,
    coco,
    mask,
    masked_pairs,
    picture,
    voc,
    xml_of,
    yolo,
)
from PIL import Image

from deltalens.data import ReadOptions, read_data
from deltalens.data.image_folder import read_image


def fails(root, words, **settings):
    """The message, which must be one line."""
    with pytest.raises(ValueError, match=words) as error:
        read_data(root, **settings)
    return str(error.value)


# ------------------------------------------------------------------ boxes
def test_boxes_are_clipped_dropped_and_counted(tmp_path):
    objects = {
        "a0": [("dog", (-3, 2, 7, 99)), ("dog", (2, 2, 2, 9)), ("dog", (1, 1, 5, 5)), ("dog", (0, 0, WIDTH, HEIGHT))],
        "a1": [("dog", (20, 20, 30, 30)), *[("dog", (1, 1, 5, 5))] * 4],
    }
    data = read_data(voc(tmp_path, VOC_LISTS, objects, folder="ImageSets"))
    assert {name: data.origin[name] for name in ("objects", "clipped", "dropped")} == {
        "objects": 3 + 4 + 12,
        "clipped": 1,
        "dropped": 2,
    }
    assert data.train[0][1]["boxes"].tolist() == [[0, 2, 7, 12], [1, 1, 5, 5], [0, 0, 16, 12]]
    assert len(data.train[1][1]["labels"]) == 4


def test_boxes_of_other_pictures_are_an_error(tmp_path):
    objects = {name: [("dog", (100, 100, 130, 130))] for name in VOC_LISTS["train"]}
    said = fails(voc(tmp_path, VOC_LISTS, objects, folder="ImageSets"), "4 of 12 boxes lie outside their pictures")
    assert "a0.xml" in said


def test_no_objects_at_all(tmp_path):
    objects = {name: [] for names in VOC_LISTS.values() for name in names}
    root = voc(tmp_path, VOC_LISTS, objects, folder="ImageSets")
    (root / "classes.txt").write_text("dog\n")
    fails(root, "no training picture has anything in it")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation><object>", r"cannot read the annotation .*a0\.xml"),
        (xml_of([("dog", (1, 1, "x", 4))]), r"cannot read the annotation .*a0\.xml: could not convert"),
        (xml_of([("dog", (1, 1, "nan", 4))]), r"a0\.xml has a box with a coordinate that is no number"),
        ("<annotation><object><name>dog</name></object></annotation>", r"a0\.xml: an object without name or bndbox"),
        (xml_of([("dog", (1, 1, 4, 4))], width=99), r"a0\.xml is for a picture of 99 x 12 pixels.*has 16 x 12"),
    ],
)
def test_bad_annotations_of_voc(tmp_path, text, words):
    root = voc(tmp_path, VOC_LISTS, folder="ImageSets")
    (root / "Annotations/a0.xml").write_text(text)
    fails(root, words)


def test_unknown_names_of_voc(tmp_path):
    root = voc(tmp_path, VOC_LISTS, {"c0": [("dgo", (1, 1, 4, 4))]}, folder="ImageSets")
    assert "cat, dog" in fails(root, r"c0\.xml has an object of the unknown class 'dgo'")
    (root / "classes.txt").write_text("dog\ncat\ndgo\n")
    assert read_data(root).class_names == ["dog", "cat", "dgo"]
    (root / "Annotations/a0.xml").unlink()
    fails(root, r"a0\.xml is missing; expected")
    (root / "JPEGImages/a1.jpg").unlink()
    fails(root, "1 of 4 listed pictures are not in .*JPEGImages: a1")


# ------------------------------------------------------------------ COCO
@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda c: c["images"][1].update(id=1), r"instances_train\.json has the image id 1 twice"),
        (lambda c: c["annotations"][0].update(image_id=77), r"train\.json has annotations for 1 images.*id 77"),
        (lambda c: c["annotations"][0].update(category_id=5), r"annotation 1 of .* has the unknown category 5"),
        (lambda c: c["categories"][0].update(id=3), r"has the category id 3 twice"),
        (lambda c: c["categories"][0].update(name="ship"), r"has the category 'ship' twice"),
        (lambda c: c["images"][0].update(width=640), r"image 1 of .*json is for a picture of 640 x 12"),
        (lambda c: c["images"][0].update(file_name="gone.jpg"), r"1 of 4 images of .*json are missing: .*gone\.jpg"),
        (lambda c: c["annotations"][0].pop("bbox"), r"number 0 of annotations has no bbox"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), r"has a bbox of 2 numbers"),
        (lambda c: c.pop("categories"), r"instances_train\.json has no list of categories"),
        (lambda c: c["annotations"][1]["segmentation"].update(size=[5, 6]), r"image 1 .* has a mask of 6 x 5 pixels"),
        (lambda c: c["annotations"][1]["segmentation"].update(counts=[5, 6]), r"run lengths that sum to 11, not 192"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3]]), r"no list of three or more points"),
    ],
)  # fmt: skip
def test_bad_files_of_coco(tmp_path, how, words):
    root = coco(tmp_path)
    change(root / "annotations/instances_train.json", how)
    assert "\n" not in fails(root, words, task="instance").partition("; expected")[0]


def test_more_of_coco(tmp_path):
    root = coco(tmp_path)
    change(root / "annotations/instances_train.json", lambda c: c["annotations"][0].update(segmentation=[]))
    data = read_data(root, task="instance")
    assert (data.origin["without_mask"], len(data.train[0][1]["masks"])) == (1, 1)
    assert len(read_data(root, task="detection").train[0][1]["labels"]) == 2
    change(root / "annotations/instances_test.json", lambda c: c["categories"].append({"id": 1, "name": "sea"}))
    fails(root, r"instances_test\.json has the class 'sea', which the training file does not have", task="detection")
    (root / "annotations/instances_val.json").write_text("{")
    fails(root, r"instances_val\.json is no JSON", task="detection")


# ------------------------------------------------------------------ YOLO
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 0.5 0.5 0.2", r"line 1 of .*train0\.txt is '0 0\.5 0\.5 0\.2', expected"),
        ("0 0.5 0.5 0.2 0.1\n\nhat 0.5 0.5 0.2 0.1", r"line 3 of .*train0\.txt"),
        ("7 0.5 0.5 0.2 0.1", r"train0\.txt has the class 7, and there are 2 names: 0 to 1"),
        ("0 nan 0.5 0.2 0.1", r"train0\.txt has a box with a coordinate that is no number"),
    ],
)
def test_bad_lines_of_yolo(tmp_path, text, words):
    root = yolo(tmp_path)
    (root / "labels/train/train0.txt").write_text(text)
    fails(root, words)


def test_labels_without_a_picture(tmp_path):
    root = yolo(tmp_path)
    (root / "labels/train/other.txt").write_text("0 0.5 0.5 0.2 0.1")
    fails(root, r"1 label files belong to no picture.*other\.txt")


# ------------------------------------------------------------------ masks
def test_masks_that_do_not_fit(tmp_path):
    root = masked_pairs(tmp_path)
    file = root / "masks/train/train1.png"
    mask(file, np.zeros((5, 6)))
    fails(root, r"the mask .*train1\.png has 6 x 5 pixels and its picture .*train1\.jpg has 16 x 12")
    Image.new("RGB", (WIDTH, HEIGHT)).save(file)
    fails(root, r"cannot read the mask .*train1\.png: it is RGB, and a mask has one channel")
    Image.fromarray(np.full((HEIGHT, WIDTH), 300, np.uint16)).save(file)
    fails(root, r"the mask .*train1\.png has the value 300")
    Image.fromarray(np.full((HEIGHT, WIDTH), 2, np.uint16)).save(file)
    assert read_data(root).train[1][1].unique().tolist() == [2]
    (root / "classes.txt").write_text("a\nb\n")
    fails(root, r"the mask .*png has the value 2, none of the 2 classes \(0 to 1\)")
    (root / "classes.txt").write_text("a\na\n")
    fails(root, r"classes\.txt has the class 'a' twice")
    (root / "classes.txt").unlink()
    file.write_bytes(file.read_bytes()[:40])
    fails(root, r"cannot read the mask .*train1\.png")
    file.unlink()
    fails(root, r"1 of 4 pictures have no mask in .*: .*train1\.jpg; expected")


# ------------------------------------------------------------------ pictures
def test_broken_pictures_are_named_or_left_out(tmp_path):
    root = coco(tmp_path, {"train": 5, "val": 2})
    broken = root / "images/train1.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    fails(root, r"1 of 5 images cannot be read: .*train1\.jpg", task="detection")
    assert len(read_data(root, task="detection", options=ReadOptions(skip_broken=True)).train) == 4
    other = masked_pairs(tmp_path / "m")
    (other / "images/train/train2.jpg").write_bytes(b"no picture")
    fails(other, r"1 of 4 images cannot be read: .*train2\.jpg")
    assert len(read_data(other, options=ReadOptions(skip_broken=True)).train) == 3


@pytest.mark.parametrize(("mode", "end"), [("L", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("1", "png")])
def test_all_kinds_of_pictures_become_rgb(tmp_path, mode, end):
    root = voc(tmp_path, VOC_LISTS, folder="ImageSets")
    (root / "JPEGImages/a0.jpg").unlink()
    picture(root / f"JPEGImages/a0.{end}", mode=mode)
    assert read_data(root).train[0][0].mode == "RGB"


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    values = (np.arange(192).reshape(HEIGHT, WIDTH) * 256 + 77).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    read = np.asarray(read_image(tmp_path / "deep.png"))
    assert (read == (values >> 8)[..., None]).all()


def sideways(file, width=WIDTH, height=HEIGHT):
    """A picture that EXIF data says to turn by a quarter: stored as (width, height)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype("uint8")
    Image.fromarray(pixels).save(file, exif=exif, quality=95)


def test_the_frame_of_turned_pictures_is_that_of_their_annotations(tmp_path):
    root = voc(tmp_path / "a", VOC_LISTS, folder="ImageSets")
    sideways(root / "JPEGImages/a0.jpg")  # annotated as 16 x 12, which is how it is stored
    assert read_data(root).train[0][0].size == (WIDTH, HEIGHT)
    (root / "Annotations/a0.xml").write_text(xml_of([("dog", (1, 1, 12, 16))], width=HEIGHT, height=WIDTH))
    image, target = read_data(root).train[0]
    assert (image.size, target["boxes"].tolist()) == ((HEIGHT, WIDTH), [[1, 1, 12, 16]])
    masks = masked_pairs(tmp_path / "b")
    sideways(masks / "images/train/train0.jpg")
    image, truth = read_data(masks).train[0]
    assert image.size == truth.shape[::-1] == (WIDTH, HEIGHT)
    assert json.dumps(read_data(masks).origin)  # goes with the adapter
