"""Confusion of boxes against hand-made cases, and drawn pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from deltalens.studies.dense_measure import Found
from deltalens.studies.dense_pictures import class_colours, drawn_mask, drawn_objects, palette, plot_sheet
from deltalens.tasks import Detection
from deltalens.tasks.box_confusion import BoxConfusion


def found(boxes, labels, scores):
    tensors = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(labels), torch.tensor(scores)
    return dict(zip(("boxes", "labels", "scores"), tensors, strict=True))


def truth(boxes, labels, **flags):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), **flags}


A, B, C = [0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]


def test_confusion_of_boxes():
    confusion = BoxConfusion(2, threshold=0.5)
    confusion.update(
        [found([A, A, B, C, C], [0, 1, 1, 0, 0], [0.9, 0.8, 0.7, 0.6, 0.4])],
        [truth([A, B], [0, 0])],
    )
    # A right; a second box on it of nothing; B taken for the other class; C where nothing is; the last is too faint
    assert confusion.counts.tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 0]]


def test_the_better_box_takes_the_object_and_missed_ones_are_nothing():
    confusion = BoxConfusion(2)
    confusion.update([found([A, A], [1, 0], [0.6, 0.9])], [truth([A, B], [0, 1])])
    assert confusion.counts.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_difficult_objects_and_crowds_are_passed_over():
    confusion = BoxConfusion(1)
    flags = {"difficult": torch.tensor([1, 0, 0]), "iscrowd": torch.tensor([0, 1, 0])}
    confusion.update([found([A, B], [0, 0], [0.9, 0.9])], [truth([A, B, C], [0, 0, 0], **flags)])
    assert confusion.counts.tolist() == [[0, 1], [0, 0]]
    confusion.update([found([], [], [])], [truth([], [])])
    assert confusion.counts.sum() == 1


def test_masks_are_drawn_in_the_colours_of_their_classes():
    mask = np.full((20, 30), 1)
    mask[:, 15:] = 255
    picture = Image.new("RGB", (30, 20), (100, 100, 100))
    drawn = np.asarray(drawn_mask(picture, mask, ["a", "b"])).astype(int)
    assert drawn.shape[1] == 480
    assert drawn.shape[0] > 320  # the legend
    expected = 0.45 * 100 + 0.55 * np.array(class_colours(2)[1])
    assert np.abs(drawn[100, 100] - expected).max() <= 1
    assert drawn[100, 400].tolist() == [100, 100, 100]


def test_the_legend_of_a_narrow_picture_is_whole():
    names = ["a name as long as names of classes are"]
    narrow = np.asarray(drawn_mask(Image.new("RGB", (6, 60), (100, 100, 100)), np.zeros((60, 6)), names))
    wide = np.asarray(drawn_mask(Image.new("RGB", (60, 60), (100, 100, 100)), np.zeros((60, 60)), names))
    assert wide.shape == (wide.shape[0], 480, 3)
    assert narrow.shape[1] > 200
    assert (narrow[:480, 48:] == 255).all()  # paper beside the picture
    legends = [(picture[480:] < 128).sum() for picture in (narrow, wide)]
    assert legends[0] == legends[1]  # no letter is cut off


def test_boxes_have_names_where_there_is_room():
    picture = Image.new("RGB", (480, 320), (100, 100, 100))
    large = drawn_objects(picture, [Detection("b", 0.9, (50.0, 60.0, 250.0, 260.0))], ["a", "b"])
    pixels, colour = np.asarray(large), class_colours(2)[1]
    assert tuple(pixels[60, 150]) == colour  # the box's edge
    assert tuple(pixels[45, 51]) == colour  # behind the name
    tiny = np.asarray(drawn_objects(picture, [Detection("b", 0.9, (50.0, 60.0, 54.0, 64.0))], ["a", "b"]))
    assert (tiny[30:58] == 100).all()
    assert len(tiny) > 320  # its name is below the picture
    assert len(pixels) == 320


def test_instances_have_masks_of_their_own_colours():
    picture = Image.new("RGB", (480, 320), (100, 100, 100))
    masks = torch.zeros(2, 320, 480, dtype=torch.bool)
    masks[0, 100:200, 100:200] = True
    masks[1, 100:200, 300:400] = True
    several = [Detection("a", 0.9, (100, 100, 200, 200), masks[0]), Detection("a", 0.8, (300, 100, 400, 200), masks[1])]
    pixels = np.asarray(drawn_objects(picture, several, ["a"])).astype(int)
    for place, colour in ((150, class_colours(2)[0]), (350, class_colours(2)[1])):
        assert np.abs(pixels[150, place] - (55 + 0.45 * np.array(colour))).max() <= 1


def test_colours_differ_and_fill_a_palette():
    assert len(set(class_colours(150))) == 150
    assert len(palette(20)) == 768
    assert palette(20)[-3:] == [255, 255, 255]


def test_sheets_hold_some_pictures(tmp_path):
    picture = drawn_objects(Found("a", Image.new("RGB", (64, 48))).picture, [], ["a"])
    plot_sheet([("a.jpg", picture), ("$b$.jpg", picture)], tmp_path / "sheet.svg")
    assert (tmp_path / "sheet.svg").read_text().count("<image") == 2
    with pytest.raises(ValueError, match="holds 1 to 500 pictures, and these are 501"):
        plot_sheet([("a", picture)] * 501, tmp_path / "sheet.svg")
