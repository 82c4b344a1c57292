"""Image folders, arrays, transforms and loaders."""

import numpy as np
import pytest
import timm.data
import torch
from picture_folders import CLASSES, write_pictures, write_splits
from PIL import Image

from deltalens.data import (
    ArrayDataset,
    eval_transform,
    read_image_folder,
    read_split,
    stratified_split,
    train_transform,
)
from deltalens.data.image_folder import read_image
from deltalens.data.transforms import train_resize
from deltalens.training.loaders import evaluation_loader, training_loader

PREPROCESSING = {
    "input_size": [3, 32, 32],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.25],
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


def paths(dataset) -> set[str]:
    return {str(path) for path in dataset.paths}


# ------------------------------------------------------------------ reading folders
def test_split_folders(tmp_path):
    data = read_image_folder(write_splits(tmp_path, 8, 4, 3))
    assert data.class_names == ["blue", "green", "red"]
    assert (len(data.train), len(data.val), len(data.test)) == (24, 12, 9)
    image, label = data.test[8]
    assert image.size == (36, 32)
    assert label == 2


def test_valid_is_a_name_for_val_and_deeper_images_are_found(tmp_path):
    write_splits(tmp_path, 4, 2, 0)
    (tmp_path / "val").rename(tmp_path / "valid")
    deep = tmp_path / "train" / "red" / "more" / "still"
    deep.mkdir(parents=True)
    (tmp_path / "train" / "red" / "000.jpg").rename(deep / "x.JPG")
    (tmp_path / "train" / "red" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    data = read_image_folder(tmp_path)
    assert (len(data.train), len(data.val), data.test) == (12, 6, None)


def test_one_folder_is_split_by_seed(tmp_path):
    write_pictures(tmp_path, 20)
    first, again, other = (read_image_folder(tmp_path, seed=seed) for seed in (0, 0, 1))
    parts = [paths(part) for part in (first.train, first.val, first.test)]
    assert [len(part) for part in parts] == [42, 9, 9]
    assert len(set.union(*parts)) == 60
    for part in (first.train, first.val, first.test):
        assert np.bincount(part.labels).tolist() == [len(part) // 3] * 3
    assert paths(again.test) == parts[2]
    assert paths(other.test) != parts[2]


def test_val_is_split_off_train(tmp_path):
    data = read_image_folder(write_splits(tmp_path, 10, 0, 4), val_fraction=0.2)
    assert (len(data.train), len(data.val), len(data.test)) == (24, 6, 12)
    assert not paths(data.train) & paths(data.val)
    assert data.origin["val"] == "split off train"


def test_a_class_may_be_called_train(tmp_path):
    write_pictures(tmp_path, 10, classes={"bus": (200, 0, 0), "train": (0, 0, 200)})
    assert read_image_folder(tmp_path).class_names == ["bus", "train"]


@pytest.mark.parametrize("counts", [[1], [2, 2], [3, 9, 40], [100, 1, 5]])
def test_stratified_split_never_empties_the_first_part(counts):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    parts = stratified_split(labels, (0.3, 0.3), seed=3)
    assert sorted(i for part in parts for i in part) == list(range(len(labels)))
    for label, count in enumerate(counts):
        taken = [sum(labels[i] == label for i in part) for part in parts]
        assert taken[0] >= 1
        if count >= 3:
            assert min(taken) >= 1


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (-0.1, 0.2), (1.0,)])
def test_impossible_fractions(fractions):
    with pytest.raises(ValueError, match="sum to less than 1"):
        stratified_split([0, 0, 1, 1], fractions, 0)


# ------------------------------------------------------------------ what is wrong with a folder
def test_missing_and_empty_folders_show_the_expected_tree(tmp_path):
    with pytest.raises(FileNotFoundError, match="<class>"):
        read_image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no class folders(.|\n)*train/<class>"):
        read_image_folder(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"holds no images(.|\n)*train/<class>"):
        read_image_folder(tmp_path)


def test_an_empty_class_and_a_single_class(tmp_path):
    write_pictures(tmp_path, 4, classes={"only": (1, 2, 3)})
    with pytest.raises(ValueError, match="single class"):
        read_image_folder(tmp_path)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match=r"without images.*hollow"):
        read_image_folder(tmp_path)


def test_split_folders_inside_other_folders_are_no_classes(tmp_path):
    for kind in ("images", "labels"):
        write_splits(tmp_path / kind, 3, 3, 0)
    with pytest.raises(ValueError, match="train folders inside images, labels"):
        read_image_folder(tmp_path)


def test_class_folders_that_differ_are_listed(tmp_path):
    write_splits(tmp_path, 4, 3, 3)
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "Red")
    with pytest.raises(ValueError, match=r"only in val: Red; in train but not in val: red"):
        read_image_folder(tmp_path)


def test_missing_classes_can_be_allowed_but_unknown_ones_not(tmp_path):
    write_splits(tmp_path, 4, 3, 3)
    for file in (tmp_path / "val" / "blue").iterdir():
        file.unlink()
    (tmp_path / "val" / "blue").rmdir()
    with pytest.raises(ValueError, match="in train but not in val: blue"):
        read_image_folder(tmp_path)
    data = read_image_folder(tmp_path, allow_missing_classes=True)
    assert set(data.val.labels) == {1, 2}
    (tmp_path / "val" / "mauve").mkdir()
    with pytest.raises(ValueError, match="only in val: mauve"):
        read_image_folder(tmp_path, allow_missing_classes=True)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_broken_images_are_named_and_skipped_only_if_asked(tmp_path, damage, capsys):
    write_splits(tmp_path, 6, 3, 0)
    victim = tmp_path / "train" / "green" / "002.jpg"
    content = victim.read_bytes()
    victim.write_bytes({"truncated": content[: len(content) * 2 // 3], "empty": b"", "text": b"hello" * 99}[damage])
    with pytest.raises(ValueError, match=r"1 of 18 images cannot be read: .*green.002\.jpg") as caught:
        read_image_folder(tmp_path)
    assert "skip_broken" in str(caught.value)
    data = read_image_folder(tmp_path, skip_broken=True)
    assert len(data.train) == 17
    assert str(victim) not in paths(data.train)
    assert "left out 1 of 18 images" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"002\.jpg"):
        read_image(victim)


def test_images_of_any_mode_become_upright_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        file = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new("RGB", (8, 4), (255, 255, 255)).convert(mode).save(file)
        assert read_image(file).mode == "RGB"
        assert read_image(file).getpixel((0, 0))[0] > 250
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 8)


# ------------------------------------------------------------------ reading one split again
def test_read_split_gives_the_parts_of_training_again(tmp_path):
    write_pictures(tmp_path, 20)
    data = read_image_folder(tmp_path, seed=5)
    for split in ("train", "val", "test"):
        part = read_split(tmp_path, split, data.class_names, data.origin)
        assert paths(part) == paths(getattr(data, split))
    assert len(read_split(tmp_path, "all", data.class_names)) == 60
    with pytest.raises(ValueError, match="--split all"):
        read_split(tmp_path, "test", data.class_names)


def test_read_split_uses_the_models_order_of_classes(tmp_path):
    write_splits(tmp_path, 4, 3, 2)
    part = read_split(tmp_path, "test", ["red", "other", "blue", "green"])
    assert {path.parent.name: label for path, label in zip(part.paths, part.labels, strict=True)} == {
        "red": 0,
        "blue": 2,
        "green": 3,
    }
    with pytest.raises(ValueError, match="not among the 2 known classes: blue"):
        read_split(tmp_path, "test", ["red", "green"])
    with pytest.raises(ValueError, match="no val folder"):
        read_split(write_splits(tmp_path / "b", 4, 0, 2), "val", list(CLASSES))


# ------------------------------------------------------------------ transforms
@pytest.mark.parametrize("size", [(64, 48), (33, 90), (20, 20)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_eval_transform_is_timms(size, crop_mode):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).resize(
        (size[0] * 2, size[1] * 2)
    )
    ours = eval_transform({**PREPROCESSING, "crop_mode": crop_mode})(image)
    timms = timm.data.create_transform(
        (3, 32, 32),
        mean=PREPROCESSING["mean"],
        std=PREPROCESSING["std"],
        interpolation="bicubic",
        crop_pct=0.875,
        crop_mode=crop_mode,
    )(image)
    assert ours.shape == timms.shape == (3, 32, 32)
    assert (ours - timms).abs().max() < 4 / 255 / 0.2  # resampling of bytes rounds differently in PIL and torch
    assert (ours - timms).abs().mean() < 0.5 / 255 / 0.2


def test_train_transform_of_every_input_kind():
    picture = np.full((40, 50, 3), 128, np.uint8)
    for image in (Image.fromarray(picture), picture, torch.from_numpy(picture).permute(2, 0, 1)):
        x = train_transform(PREPROCESSING, rand_augment=9)(image)
        assert type(x) is torch.Tensor
        assert (x.shape, x.dtype) == ((3, 32, 32), torch.float32)


@pytest.mark.parametrize("crop_mode", ["squash", "center"])
def test_without_augmentation_training_sees_what_evaluation_sees(crop_mode):
    """Of a squashed image the whole, before and after it has been shrunk into memory."""
    picture = np.random.default_rng(0).integers(0, 255, (50, 120, 3), dtype=np.uint8)
    settings = {**PREPROCESSING, "crop_mode": crop_mode, "crop_pct": 1.0}
    expected = eval_transform(settings)(picture)
    train = train_transform(settings, min_crop=1, hflip=0)
    assert torch.equal(train(picture), expected)
    shrunk = train_resize(settings, 1.0)(torch.from_numpy(picture).permute(2, 0, 1))
    assert torch.equal(train(shrunk), expected)


@pytest.mark.parametrize("wrong", [{"min_crop": 0}, {"hflip": 1.5}, {"rand_augment": 31}])
def test_train_transform_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        train_transform(PREPROCESSING, **wrong)


# ------------------------------------------------------------------ arrays
def test_arrays_of_every_shape_agree():
    random = np.random.default_rng(0)
    gray = random.integers(0, 256, (5, 6, 7), dtype=np.uint8)
    labels = [0, 1, 2, 1, 0]
    expected = ArrayDataset(gray, labels)[3][0]
    assert expected.shape == (3, 6, 7)
    for same in (
        gray[..., None],
        torch.from_numpy(gray)[:, None],
        gray / np.float32(255),
        np.repeat(gray[..., None], 3, 3),
    ):
        assert torch.equal(ArrayDataset(same, labels)[3][0], expected)
    assert len(ArrayDataset(gray, labels).subset([4, 1])) == 2


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), [0], "2 images but 1 labels"),
        (np.zeros((2, 4), np.uint8), [0, 1], "must be numpy"),
        (np.full((2, 4, 4), 3.0), [0, 1], r"lie in \[0, 1\]"),
        (np.full((2, 4, 4), 300), [0, 1], "0 to 255"),
        (np.zeros((2, 4, 4), np.uint8), [0, -1], "labels must be"),
    ],
)
def test_wrong_arrays(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ArrayDataset(images, labels)


# ------------------------------------------------------------------ loaders
def noisy_dataset(count: int = 23) -> ArrayDataset:
    images = np.arange(count * 48, dtype=np.int64).reshape(count, 4, 4, 3) % 256
    return ArrayDataset(images, range(count), lambda image: image + torch.rand(()))


def batches(loader, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


def test_order_and_augmentation_follow_from_seed_and_epoch():
    loader = training_loader(noisy_dataset(), 5, seed=7)
    first = batches(loader, 0)
    torch.rand(100)  # the global random state has no part in it
    assert same(first, batches(loader, 0))
    assert not same(first, batches(loader, 1))
    assert not same(first, batches(training_loader(noisy_dataset(), 5, seed=8), 0))
    assert [len(labels) for _, labels in first] == [5, 5, 5, 5]
    state = torch.get_rng_state()
    batches(loader, 3)
    assert torch.equal(state, torch.get_rng_state())


def test_a_resumed_loader_gives_the_rest_of_its_epoch_and_whole_later_ones():
    whole = training_loader(noisy_dataset(), 5, seed=7)
    resumed = training_loader(noisy_dataset(), 5, seed=7, start=(2, 3))
    assert same(batches(resumed, 2), batches(whole, 2)[3:])
    assert same(batches(resumed, 3), batches(whole, 3))


def test_workers_change_nothing():
    assert same(
        batches(training_loader(noisy_dataset(), 5, 7, workers=1), 0),
        batches(training_loader(noisy_dataset(), 5, 7), 0),
    )


def test_processes_share_the_data():
    shares = [batches(training_loader(noisy_dataset(), 4, 0, rank=rank, world=2), 0) for rank in range(2)]
    labels = [set(torch.cat([labels for _, labels in share]).tolist()) for share in shares]
    assert [len(each) for each in labels] == [8, 8]
    assert not labels[0] & labels[1]
    seen = [labels for rank in range(2) for _, labels in evaluation_loader(noisy_dataset(), 4, rank=rank, world=2)]
    assert sorted(torch.cat(seen).tolist()) == list(range(23))


def test_data_smaller_than_a_batch_is_one_batch():
    assert [len(labels) for _, labels in batches(training_loader(noisy_dataset(3), 8, 0), 0)] == [3]
