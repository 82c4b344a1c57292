"""Large pictures in tiles: windows, names, what objects become, folders, and results put together again."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from deltalens.cli.main import main
from deltalens.data import read_data
from deltalens.data.dota_txt import read_lines
from deltalens.data.oriented_items import OrientedObjects
from deltalens.data.tile_folders import Tiling, tile_folder
from deltalens.data.tile_results import merged
from deltalens.data.tiling import CUT, Tile, Window, objects_in, starts_of, windows_of
from deltalens.models.oriented_boxes import boxes_of, corners_of
from deltalens.models.oriented_iou import oriented_iou

NAMES = ("plane", "ship")


def large(folder, name: str, size: tuple[int, int] = (150, 230), seed: int = 0, labels: bool = True) -> torch.Tensor:
    """A picture of (height, width) with objects that do not overlap much, and their boxes."""
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 255, (*size, 3)).astype("uint8")).save(folder / "images" / f"{name}.png")
    grid = [(x, y) for y in range(14, size[0] - 10, 26) for x in range(16, size[1] - 10, 30)]
    boxes = torch.tensor([(x, y, 22.0, 9.0, random.uniform(-1.5, 1.5)) for x, y in grid])
    if labels:
        (folder / "labelTxt").mkdir(exist_ok=True)
        rows = [
            " ".join(f"{value:.2f}" for value in corners.reshape(-1).tolist()) + f" {NAMES[i % 2]} {int(i % 7 == 0)}"
            for i, corners in enumerate(corners_of(boxes))
        ]
        text = "\n".join(["imagesource:GoogleEarth", "gsd:0.1", *rows]) + "\n"
        (folder / "labelTxt" / f"{name}.txt").write_text(text)
    return boxes


# ------------------------------------------------------------------ windows and names
@pytest.mark.parametrize(
    ("length", "starts"), [(1024, [0]), (1025, [0, 1]), (1848, [0, 824]), (2000, [0, 824, 976]), (500, [0])]
)
def test_starts_are_those_of_the_kit(length, starts):
    assert starts_of(length, 1024, 200) == starts


@pytest.mark.parametrize(("height", "width"), [(100, 100), (64, 257), (30, 20), (129, 128)])
def test_windows_cover_every_pixel(height, width):
    seen = np.zeros((height, width), int)
    windows = windows_of(height, width, 64, 16)
    for left, top, right, bottom in windows:
        assert right - left == min(64, width)
        assert bottom - top == min(64, height)
        seen[top:bottom, left:right] += 1
    assert seen.min() == 1
    assert len(set(windows)) == len(windows)


def test_names():
    for tile in (Tile("P0001", 824, 0, 1.0), Tile("a__b", 0, 1648, 0.5), Tile("x", 3, 4, 1.5)):
        assert Tile.named(tile.name) == tile
    assert Tile("P0001", 824, 0).name == "P0001__1.0__824___0"
    assert Tile.named("P0001__1__824___0") == Tile("P0001", 824, 0)
    assert Tile.named("P1142__1024__0___824") == Tile("P1142", 0, 824)  # mmrotate's
    assert Tile.named("P1142__1024__0___824__512_412") == Tile("P1142", 512, 1236)
    assert Tile.named("P0706__599_670") == Tile("P0706", 599, 670)
    assert Tile.named("P0706") is None
    boxes = torch.tensor([[10.0, 20, 8, 4, 0.3]])
    assert torch.allclose(Tile("x", 100, 50, 0.5).in_source(boxes), torch.tensor([[220.0, 140, 16, 8, 0.3]]))


# ------------------------------------------------------------------ objects
def test_objects_of_a_window():
    corners = corners_of(torch.tensor([(x, 50.0, 20.0, 10.0, 0.0) for x in (50, 96, 98, 109, 111)])).numpy()
    kept, moved, difficult = objects_in(corners, np.array([1, 0, 0, 0, 0]), Window(40, 40, 100, 80), 0.7, False)
    assert kept.tolist() == [0, 1, 2, 3]  # shares inside: 1, .7, .6, .05
    assert difficult.tolist() == [1, 0, CUT, CUT]
    assert np.array_equal(moved, corners[:4] - np.array([40, 40]))
    kept, _, difficult = objects_in(corners, np.array([1, 0, 0, 0, 0]), Window(40, 40, 100, 80), 0.7, True)
    assert (kept.tolist(), difficult.tolist()) == ([0, 1], [1, 0])


# ------------------------------------------------------------------ folders
@pytest.fixture
def data(tmp_path):
    large(tmp_path / "dota/train", "P1", seed=1)
    large(tmp_path / "dota/train", "P2", (60, 70), seed=2)
    large(tmp_path / "dota/val", "P3", (90, 100), seed=3)
    large(tmp_path / "dota/test", "P4", (70, 130), seed=4, labels=False)
    return tmp_path / "dota"


def test_tiles_are_read_and_put_together_again(data, tmp_path):
    tiling = Tiling(80, 30, (1.0, 0.5))
    counts = tile_folder(data, tmp_path / "tiles", tiling, workers=2)
    splits = read_data(tmp_path / "tiles")
    assert (splits.task, splits.class_names, splits.test) == ("oriented", list(NAMES), None)
    assert {part: count["pictures"] for part, count in counts.items()} == {"train": 2, "val": 1, "test": 1}
    assert (counts["train"]["tiles"], counts["val"]["tiles"]) == (len(splits.train), len(splits.val))
    assert len([*(tmp_path / "tiles/test/images").iterdir()]) == counts["test"]["tiles"] == 3
    source = read_data(data)
    results = []
    for i in range(len(splits.train)):
        picture, target = splits.train[i]
        tile = splits.train.tile(i)
        assert max(picture.size) <= 80
        if tile.scale == 1:
            window = (tile.left, tile.top, tile.left + picture.width, tile.top + picture.height)
            whole = Image.open(data / "train/images" / f"{tile.source}.png").crop(window)
            assert np.array_equal(np.asarray(picture), np.asarray(whole))
        scores = torch.where(target["difficult"] > 0, 0.5, 0.9)
        results.append(
            (tile.name, {"boxes": boxes_of(target["corners"]), "labels": target["labels"], "scores": scores})
        )
    together = merged(results)
    assert list(together) == ["P1", "P2"]
    for i, found in enumerate(together.values()):
        truth = source.train[i][1]
        overlaps = oriented_iou(found["boxes"], boxes_of(truth["corners"]))
        assert overlaps.shape == (len(truth["labels"]),) * 2
        best, which = overlaps.max(1)
        assert best.min() > 0.95
        assert sorted(which.tolist()) == [*range(len(which))]
        assert torch.equal(found["labels"], truth["labels"][which])


def test_what_was_found_twice_is_left_out_class_by_class():
    box = torch.tensor([[60.0, 30, 20, 8, 0.5]])
    shifted = box - torch.tensor([[50.0, 0, 0, 0, 0]])
    results = [
        ("P1__1.0__0___0", {"boxes": box, "labels": torch.tensor([0]), "scores": torch.tensor([0.5])}),
        ("P1__1.0__50___0", {"boxes": shifted, "labels": torch.tensor([0]), "scores": torch.tensor([0.9])}),
        ("P2", {"boxes": torch.zeros(0, 5), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}),
        ("P1__1.0__50___50", {"boxes": shifted, "labels": torch.tensor([1]), "scores": torch.tensor([0.4])}),
        ("P1__1.0__50___0", {"boxes": shifted, "labels": torch.tensor([1]), "scores": torch.tensor([0.3])}),
    ]
    found = merged(results)
    assert found["P1"]["scores"].tolist() == pytest.approx([0.9, 0.4, 0.3])
    assert found["P1"]["labels"].tolist() == [0, 1, 1]
    assert len(found["P2"]["boxes"]) == 0


def test_the_command_goes_on_where_it_was_stopped(data, tmp_path, capsys):
    words = ["tile", str(data), "--output", str(tmp_path / "out"), "--size", "64", "--gap", "16", "--format", "jpg"]
    assert main(words) == 0
    assert "train: 2 pictures, " in capsys.readouterr().out
    info = json.loads((tmp_path / "out/info.json").read_text())
    assert info["classes"] == list(NAMES)
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.suffix in (".jpg", ".txt"))
    before = {path: path.read_bytes() for path in files}
    touched = {path: path.stat().st_mtime_ns for path in files[1:]}
    files[0].unlink()
    (tmp_path / "out/info.json").unlink()
    assert main(words) == 0
    assert {path: path.read_bytes() for path in files} == before
    assert all(path.stat().st_mtime_ns == time for path, time in touched.items())
    assert main([*words, "--kept-share", "0.5"]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_labels_cut_objects_and_empty_tiles(data, tmp_path):
    lines = read_lines(data / "train/labelTxt/P1.txt")
    for drop, empty in ((False, True), (True, False)):
        out = tmp_path / f"out{drop}"
        tile_folder(data, out, Tiling(60, 20, drop=drop, empty=empty))
        hard = [value for file in (out / "train/labelTxt").glob("P1*") for value in read_lines(file).difficult]
        assert (CUT in hard) != drop
        assert 1 in hard
        assert len(hard) > len(lines.names)
        pictures = {path.stem for path in (out / "train/images").iterdir()}
        labels = {path.stem: path.read_text() for path in (out / "train/labelTxt").iterdir()}
        assert pictures == labels.keys()
        assert empty or all(labels.values())


def test_folders_without_parts_and_wrong_calls(tmp_path, capsys):
    large(tmp_path / "a", "P1")
    counts = tile_folder(tmp_path / "a", tmp_path / "out", Tiling(100, 10))
    assert counts["all"]["tiles"] == len([*(tmp_path / "out/images").iterdir()]) == 2 * 3
    for words, said in (
        ([str(tmp_path / "a"), "--size", "10", "--gap", "10"], "gap below the size"),
        ([str(tmp_path / "a"), "--scales", "[1,1]"], "different factors"),
        ([str(tmp_path / "out/images")], "expected in"),
        ([str(tmp_path / "nothing")], "no data folder"),
        ([str(tmp_path / "a"), "--workers", "0"], "workers"),
    ):
        assert main(["tile", *words, "--output", str(tmp_path / "other")]) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    (tmp_path / "a/images/P1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read the image .*P1.png"):
        tile_folder(tmp_path / "a", tmp_path / "broken", Tiling(100, 10))


def test_tiles_of_one_picture_are_in_one_part(tmp_path):
    for i in range(6):
        large(tmp_path / "a/trainval", f"P{i}", (60, 90), seed=i)
    tile_folder(tmp_path / "a", tmp_path / "out", Tiling(50, 20))
    splits = read_data(tmp_path / "out")
    sources = [{part.tile(i).source for i in range(len(part))} for part in (splits.train, splits.val)]
    assert sources[0] | sources[1] == {f"P{i}" for i in range(6)}
    assert not sources[0] & sources[1]
    assert all(sources)
    assert splits.origin["drawn"] == "by source picture"


def test_areas_of_objects_out_of_the_picture():
    objects = OrientedObjects.of(corners_of(torch.tensor([[0.0, 0, 20, 10, math.pi / 4]])).numpy(), [0])
    assert objects.areas.tolist() == pytest.approx([200], rel=1e-4)


def test_a_version_of_labels_that_no_part_has(data, tmp_path, capsys):
    assert main(["tile", str(data), "--output", str(tmp_path / "tiles"), "--labels", "v1.5"]) == 1
    assert "no labels of the version v1.5, in no part" in capsys.readouterr().err
    assert not (tmp_path / "tiles").exists()


def test_tiles_need_a_folder(data, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("mine")
    assert main(["tile", str(data), "--output", str(tmp_path / "a.txt")]) == 1
    assert "a.txt is a file: tiles need a folder" in capsys.readouterr().err
