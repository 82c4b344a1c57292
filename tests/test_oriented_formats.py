"""The layouts of oriented boxes: what is read, what is put right, and what wrong files say."""

import math

import numpy as np
import pytest
import torch
from dense_folders import HEIGHT, VOC_LISTS, WIDTH, picture, voc, yolo
from PIL import Image
from reference import SHARED

from deltalens.data import ReadOptions, oriented_scenes, read_data, read_part
from deltalens.data.dota_txt import read_lines
from deltalens.data.formats import recognise
from deltalens.data.oriented_scenes import CLASSES, draw_oriented_scene, make_oriented_scenes
from deltalens.data.quadrilaterals import areas_inside
from deltalens.data.rolabelimg import read_xml
from deltalens.models.oriented_boxes import boxes_of

SQUARE = "1 2 9 2 9 8 1 8"


def dota(root, lines=None, labels: str = "labelTxt", sizes=(("train", 3), ("val", 2), ("test", 2)), above: str = ""):
    """lines: of pictures by their names; two objects where nothing is given."""
    for part, count in sizes:
        for i in range(count):
            name = f"{part}{i}"
            picture(root / part / above / "images" / f"{name}.png", i)
            text = (lines or {}).get(name, f"{SQUARE} ship 0\n4 0 14 4 10 10 0 6 small-vehicle 1\n")
            (root / part / above / labels).mkdir(parents=True, exist_ok=True)
            (root / part / above / labels / f"{name}.txt").write_text(text)
    return root


def fails(root, words, **settings) -> str:
    """The message of a ValueError."""
    with pytest.raises(ValueError, match=words) as error:
        read_data(root, **settings)
    return str(error.value)


def sizes(data) -> tuple[int, ...]:
    return tuple(0 if part is None else len(part) for part in (data.train, data.val, data.test))


# ------------------------------------------------------------------ DOTA
def test_dota(tmp_path):
    header = "imagesource:GoogleEarth\ngsd:0.146343590398\n"
    lines = {"train0": f"{header}{SQUARE} ship 2\n\n-3.5 0 5 0 5 5 -3.5 5 ship\n", "train1": header, "train2": ""}
    data = read_data(dota(tmp_path, lines))
    assert (data.task, data.class_names, sizes(data)) == ("oriented", ["ship", "small-vehicle"], (3, 2, 2))
    assert data.origin == {"format": "dota", "task": "oriented", "objects": 10, "metrics": "voc07"}
    image, target = data.train[0]
    assert (image.size, image.mode) == ((WIDTH, HEIGHT), "RGB")
    assert target["corners"].tolist()[0] == [[1, 2], [9, 2], [9, 8], [1, 8]]
    assert target["corners"][1, 0].tolist() == [-3.5, 0]
    assert target["corners"].dtype == target["area"].dtype == torch.float32
    assert [target[name].tolist() for name in ("labels", "difficult", "iscrowd")] == [[0, 0], [1, 0], [0, 0]]
    assert target["area"].tolist() == [48, 42.5]
    for empty in (data.train[1][1], data.train[2][1]):
        assert [tuple(empty[name].shape) for name in ("corners", "labels", "area")] == [(0, 4, 2), (0,), (0,)]
    assert [label.tolist() for label in data.train.labels] == [[1, 0], [0, 0], [0, 0]]
    assert len({target["image_id"] for part in (data.train, data.val, data.test) for _, target in part}) == 7
    both = data.train + data.val
    assert (len(both), len({target["image_id"] for _, target in both})) == (5, 5)
    other = data.val.renumbered([2, 0], 3)
    assert other[0][1]["labels"].tolist() == [2, 0]
    assert [each.tolist() for each in other.labels] == [[1, 0, 1]] * 2
    assert data.val.in_memory(10**6)[1][1]["corners"].tolist() == data.val[1][1]["corners"].tolist()
    assert data.train.tile(0) is None


def test_other_folders_of_dota(tmp_path):
    assert sizes(read_data(dota(tmp_path / "a", labels="annfiles"))) == (3, 2, 2)
    versions = dota(dota(tmp_path / "b", labels="labelTxt-v1.0"), {"train0": f"{SQUARE} ship 0"}, "labelTxt-v1.5")
    assert read_data(versions).origin["objects"] == 13
    assert read_data(versions, "dota/v1.0").origin["objects"] == 14
    fails(versions, "no variant 'v3'; it has dota/v1.0", format="dota/v3")
    nested = dota(tmp_path / "c", labels="labelTxt-v1.0/labelTxt")
    (nested / "train/labelTxt-v1.0/Train_hbb").mkdir()
    assert read_data(nested).origin["objects"] == 14
    dota(tmp_path / "d", sizes=(("train", 3), ("val", 2)))
    picture(tmp_path / "d/test/images/P1.png")
    assert sizes(read_data(tmp_path / "d")) == (3, 2, 0)
    joined = dota(tmp_path / "e", sizes=(("trainval", 10), ("test", 1)))
    assert sizes(read_data(joined, options=ReadOptions(val_fraction=0.2))) == (8, 2, 1)
    whole = dota(tmp_path / "f", sizes=(("all", 10),))
    (whole / "all").rename(tmp_path / "g")
    assert sum(sizes(read_data(tmp_path / "g"))) == 10


def test_names_of_classes(tmp_path):
    root = dota(tmp_path)
    (root / "classes.txt").write_text("small-vehicle\nplane\nship\n")
    data = read_data(root)
    assert data.class_names == ["small-vehicle", "plane", "ship"]
    assert data.train[0][1]["labels"].tolist() == [2, 0]
    part = read_part(root, "test", ["ship", "small-vehicle", "plane"], data.origin)
    assert part[0][1]["labels"].tolist() == [0, 1]
    (root / "classes.txt").unlink()
    (root / "test/labelTxt/test0.txt").write_text(f"{SQUARE} bridge 0")
    assert "ship, small-vehicle" in fails(root, r"test0.txt has an object of the unknown class 'bridge'")


@pytest.mark.parametrize(
    "line",
    ["1 2 9 2 9 8 1 ship 0", f"{SQUARE}", f"{SQUARE} large vehicle 0", f"{SQUARE} ship -1", f"{SQUARE} ship easy",
     "1 2 9 nan 9 8 1 8 ship 0", "1 2 9 inf 9 8 1 8 ship 0", f"{SQUARE} ship 0\ngsd:1"],
)  # fmt: skip
def test_lines_that_are_no_box(tmp_path, line):
    file = tmp_path / "P1.txt"
    file.write_text(f"imagesource:x\n{line}\n")
    with pytest.raises(ValueError, match=r"line \d of .*P1.txt is '.*', expected `x1 y1 .* one word"):
        read_lines(file)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "P1.txt").write_bytes(f"{SQUARE} fähre 0\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"P1.txt is no text in UTF-8 .*: save it as UTF-8"):
        read_lines(tmp_path / "P1.txt")


def test_objects_without_area_and_outside_are_dropped_and_counted(tmp_path):
    crossed = "1 2 9 8 9 2 1 8"
    bad = ["3 3 9 3 9 3 3 3 ship 0", "30 30 40 30 40 40 30 40 ship 0"]
    lines = {"train0": "\n".join([f"{SQUARE} ship 0", *bad, f"{crossed} ship 0"])}
    data = read_data(dota(tmp_path, lines))
    assert (data.origin["objects"], data.origin["dropped"]) == (14, 2)
    assert data.train[0][1]["area"].tolist() == [48, 48]
    lines = {name: "\n".join(bad * 2) for name in ("train0", "train1", "val0")}
    assert "train0.txt" in fails(dota(tmp_path / "more", lines), "12 of 20 boxes lie outside their pictures")
    nothing = {f"{part}{i}": "" for part in ("train", "val", "test") for i in range(3)} | {"val0": f"{SQUARE} ship 0"}
    fails(dota(tmp_path / "none", nothing), "no training picture has anything in it")


def test_missing_and_broken_files(tmp_path):
    root = dota(tmp_path)
    (root / "train/labelTxt/train1.txt").unlink()
    fails(root, "1 label files are missing in .*train1.txt; expected in")
    (root / "train/images/train1.png").unlink()
    (root / "val/images/val0.png").unlink()
    fails(root, "1 label files belong to no picture in .*val0.txt")
    (root / "val/labelTxt/val0.txt").unlink()
    whole = (root / "train/images/train0.png").read_bytes()
    (root / "train/images/train0.png").write_bytes(whole[: len(whole) // 2])
    fails(root, r"1 of 2 images cannot be read: .*train0.png")
    assert sizes(read_data(root, options=ReadOptions(skip_broken=True))) == (1, 1, 2)
    picture(root / "train/images/train0.png", mode="L")
    assert read_data(root).train[0][0].mode == "RGB"


def test_wrong_layouts_show_the_tree(tmp_path):
    (tmp_path / "train/images").mkdir(parents=True)
    for format in ("dota", "rolabelimg"):
        fails(tmp_path, "expected in", format=format)
        with pytest.raises(FileNotFoundError, match="expected in"):
            read_data(tmp_path / "nothing", format=format)
    said = fails(tmp_path, "is not laid out for oriented", task="oriented")
    assert "labelTxt" in said
    assert "robndbox" in said
    fails(yolo(tmp_path / "yolo"), "laid out for detection", task="oriented")
    fails(
        dota(tmp_path / "dota"), "the format dota is for oriented, not for detection", format="dota", task="detection"
    )
    assert recognise(dota(tmp_path / "dota")) == "dota"
    assert recognise(voc(tmp_path / "voc", VOC_LISTS), "detection") == "voc"


# ------------------------------------------------------------------ roLabelImg
def rolabelimg(root, count: int = 8, parts=("",), folders=("", ""), angle: float = 0.3):
    for part in parts:
        for i in range(count):
            picture(root / part / folders[0] / f"{part}p{i}.png", i)
            objects = (
                f"<object><type>robndbox</type><name>car</name><difficult>{i % 2}</difficult><robndbox><cx>8</cx>"
                f"<cy>6.5</cy><w>8</w><h>3</h><angle>{angle}</angle></robndbox></object>"
                "<object><type>bndbox</type><name>dog</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>6</xmax>"
                "<ymax>4</ymax></bndbox></object>"
            )
            file = root / part / folders[1] / f"{part}p{i}.xml"
            file.parent.mkdir(parents=True, exist_ok=True)
            size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
            file.write_text(f"<annotation>{size}{objects}</annotation>")
    return root


@pytest.mark.parametrize(
    ("parts", "folders"),
    [(("",), ("", "")), (("train", "val"), ("", "")), (("train", "val", "test"), ("images", "Annotations")),
     (("",), ("JPEGImages", "Annotations"))],
)  # fmt: skip
def test_rolabelimg(tmp_path, parts, folders):
    data = read_data(rolabelimg(tmp_path, parts=parts, folders=folders))
    assert (data.task, data.origin["format"], data.class_names) == ("oriented", "rolabelimg", ["car", "dog"])
    assert sum(sizes(data)) == 8 * len(parts)
    assert data.origin["objects"] == 16 * len(parts)
    target = data.train[0][1]
    boxes = boxes_of(target["corners"])
    assert torch.allclose(boxes[0], torch.tensor([8, 6.5, 8, 3, 0.3]), atol=1e-4)
    assert torch.allclose(boxes[1], torch.tensor([3.5, 3, 5, 2, 0]), atol=1e-4)
    front = (target["corners"][0, 1] + target["corners"][0, 2]) / 2  # of the side at the end of w
    assert front[1] > 6.5  # a positive angle turns clockwise, and y points down


def test_wrong_files_of_rolabelimg(tmp_path):
    root = rolabelimg(tmp_path)
    file = root / "p1.xml"
    text = file.read_text()
    for wrong, said in (
        (text.replace("<cx>8</cx>", ""), "without robndbox"),
        (text.replace("<name>dog</name>", ""), "without a name"),
        (text[:-5], "cannot read the annotation .*p1.xml"),
        (text.replace("<cx>8</cx>", "<cx>nan</cx>"), "a corner that is no number"),
        (text.replace(f"<width>{WIDTH}", "<width>99"), "is for a picture of 99 x 12 pixels"),
    ):
        file.write_text(wrong)
        fails(root, said)
    file.unlink()
    fails(root, "p1.xml is missing")
    (root / "p1.png").unlink()
    (root / "p2.png").unlink()
    fails(root, "1 annotations have no picture .*p2.xml")


# ------------------------------------------------------------------ real data
def test_tiles_of_dota():
    root = SHARED / "data/obb/dota_tiles"
    if not root.is_dir():
        pytest.skip("needs ../shared/data/obb/dota_tiles")
    data = read_data(root)
    assert (data.task, sizes(data), len(data.class_names)) == ("oriented", (32, 10, 11), 10)
    assert data.origin == {"format": "dota", "task": "oriented", "objects": 1713, "metrics": "voc07"}
    difficult = sum(
        int(objects.difficult.sum()) for part in (data.train, data.val, data.test) for objects in part.objects
    )
    assert difficult == 162
    sources = [{part.tile(i).source for i in range(len(part))} for part in (data.train, data.val, data.test)]
    assert sum(map(len, sources)) == len(set().union(*sources)) == 11
    ships = [data.train.objects[i].labels == data.class_names.index("ship") for i in range(32)]
    assert sum(map(np.sum, ships)) > 100


def test_samples_of_rolabelimg():
    root = SHARED / "data/obb/rolabelimg_samples"
    if not root.is_dir():
        pytest.skip("needs ../shared/data/obb/rolabelimg_samples")
    files = {file.stem: read_xml(file) for file in sorted(root.glob("*.xml"))}
    assert {name: len(said.names) for name, said in files.items()} == {"demo": 4, "demo2": 2, "demo3": 4}
    leg = boxes_of(torch.from_numpy(files["demo"].corners))[3]  # of the dog, from the upper right to the lower left
    assert leg.tolist() == pytest.approx([252.5622, 174.811, 125, 37, 2.434159 - math.pi], abs=1e-3)


# ------------------------------------------------------------------ scenes
def test_scenes_have_exact_boxes_and_seeds(monkeypatch):
    monkeypatch.setattr(oriented_scenes, "VAL_SCENES", 2)
    monkeypatch.setattr(oriented_scenes, "TEST_SCENES", 8)
    one, again = make_oriented_scenes(3, 64, 1), make_oriented_scenes(1, 64, 1)
    assert (one.task, one.class_names, len(one.train)) == ("oriented", list(CLASSES), 3)
    assert np.array_equal(one.val.pictures[0], again.val.pictures[0])
    assert np.array_equal(one.train.pictures[0], again.train.pictures[0])
    assert not np.array_equal(one.train.pictures[0], one.val.pictures[0])
    seen = {int(label) for objects in one.test.objects for label in objects.labels}
    assert seen == {0, 1, 2}
    for objects in one.test.objects:
        assert len(objects)
        assert np.allclose(areas_inside(objects.corners, (0, 0, 64, 64)), objects.areas, rtol=1e-3)
        boxes = boxes_of(torch.from_numpy(objects.corners))
        assert torch.allclose(boxes[:, 2] * boxes[:, 3], torch.from_numpy(objects.areas), rtol=1e-3)
    with pytest.raises(ValueError, match="from 64 pixels, got 0 and 64"):
        make_oriented_scenes(0, 64)


def test_boxes_of_scenes_lie_about_what_is_drawn(monkeypatch):
    """What differs from a ground without shadows and light is inside the boxes, and reaches all of their sides."""
    monkeypatch.setattr(oriented_scenes, "ground", lambda size, random: np.full((size, size, 3), 400.0))
    monkeypatch.setattr(oriented_scenes, "light", lambda size, random: np.ones((1, 1, 1)))
    monkeypatch.setattr(oriented_scenes, "blurred", lambda values, reach: np.zeros_like(values))
    for seed in range(4):
        scene = draw_oriented_scene(128, np.random.default_rng(seed))
        rows, columns = np.nonzero(scene.picture.min(2) < 235)
        points = np.stack([columns + 0.5, rows + 0.5], 1)
        left = np.ones(len(points), bool)
        for x, y, width, height, angle in boxes_of(torch.from_numpy(scene.corners)).tolist():
            turned = (points - (x, y)) @ np.array(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            )
            own = (np.abs(turned) < (width / 2 + 1, height / 2 + 1)).all(1)
            left &= ~own
            reach = np.stack([turned[own].min(0), turned[own].max(0)])
            assert np.abs(reach - np.array([[-width, -height], [width, height]]) / 2).max() < 2.5
        assert not left.any()


def test_pictures_turned_by_exif_are_upright(tmp_path):
    root = dota(tmp_path)
    path = root / "train/images/train0.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    assert read_data(root).train[0][0].size == (HEIGHT, WIDTH)
