"""From clouds to inputs: farthest points, published pools and augmentations, seeds, memory, generated solids."""

import math

import numpy as np
import pytest
import torch
from cloud_folders import modelnet10, write_clouds
from reference import load

from deltalens.data import Augmentation, CloudArrays, CloudFiles, set_inputs
from deltalens.data.cloud_transforms import (
    RandomRotation,
    RandomScaleShift,
    augmentation_words,
    cloud_steps,
    farthest_points,
    pool_size,
    unit_sphere,
)
from deltalens.data.clouds import keep_clouds
from deltalens.data.inputs import kept_inputs
from deltalens.data.solids import CLASS_NAMES, NOISE, make_solids, solid_cloud
from deltalens.models import point_ops
from deltalens.studies.cloud_plots import cloud_picture, plot_predictions, seen
from deltalens.training.loaders import training_loader

PREPROCESSING = {"kind": "points", "num_points": 32, "normalize": "unit_sphere"}


def cloud(points: int = 100, seed: int = 0) -> torch.Tensor:
    return torch.randn(points, 3, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ sampling
def test_farthest_points_of_one_cloud_are_those_of_the_batched_operator():
    points = cloud(300)
    wanted = point_ops.farthest_points(points[None], 120, skip_origin=False)[0]
    assert torch.equal(farthest_points(points, 120), wanted)
    assert torch.equal(farthest_points(points, 50), wanted[:50])
    tensors, _ = load("fps_ring")
    assert farthest_points(tensors["points"][0], 12).tolist() == tensors["fps_idx_noskip"][0].tolist()


def test_no_point_is_taken_twice_even_where_points_coincide():
    points = cloud(5).repeat(4, 1)
    assert sorted(farthest_points(points, 20).tolist()) == list(range(20))
    with pytest.raises(ValueError, match="count must be 1 to 20"):
        farthest_points(points, 21)


def test_published_pools():
    assert [pool_size(n) for n in (1024, 2048, 4096, 8192)] == [1200, 2400, 4800, 8192]


def test_unit_sphere():
    points = unit_sphere(5 + 3 * cloud())
    assert points.mean(0).abs().max() < 1e-5
    assert float(points.norm(dim=1).max()) == pytest.approx(1)
    assert not unit_sphere(torch.ones(4, 3)).any()


# ------------------------------------------------------------------ the two pipelines
def test_the_test_takes_farthest_points_and_nothing_random():
    once, each = cloud_steps(PREPROCESSING)
    points = unit_sphere(cloud())
    assert torch.equal(each(once(cloud())), points[farthest_points(points, 32)])
    few = each(once(cloud(20)))
    assert torch.equal(few, unit_sphere(cloud(20))[torch.arange(32) % 20])
    raw, _ = cloud_steps(PREPROCESSING | {"normalize": None})
    assert torch.equal(raw(cloud(20)), cloud(20))
    with pytest.raises(ValueError, match="normalize is unit_sphere or None, got 'cube'"):
        cloud_steps(PREPROCESSING | {"normalize": "cube"})


def test_training_draws_any_of_a_pool():
    once, each = cloud_steps(PREPROCESSING, "rotate")
    pool = once(cloud())
    assert len(pool) == pool_size(32) == 38
    heights = {round(float(y), 5) for y in pool[:, 1]}
    torch.manual_seed(0)
    first, second = each(pool), each(pool)
    assert first.shape == (32, 3)
    assert not torch.equal(first, second)
    for drawn in (first, second):
        own = [round(float(y), 5) for y in drawn[:, 1]]
        assert set(own) <= heights  # turning about y keeps them
        assert len(set(own)) == 32


def test_scale_and_shift_have_the_published_ranges():
    torch.manual_seed(0)
    move = RandomScaleShift(True, True)
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    moved = torch.stack([move(corners) for _ in range(2000)])
    shifts, factors = moved[:, 0], moved[:, 1] - moved[:, 0]
    assert -0.2 <= float(shifts.min()) < -0.199
    assert 0.199 < float(shifts.max()) <= 0.2
    assert 2 / 3 - 1e-6 <= float(factors.min()) < 0.669
    assert 1.498 < float(factors.max()) <= 1.5 + 1e-6
    assert abs(np.corrcoef(factors[:, 0], factors[:, 1])[0, 1]) < 0.1  # each axis by itself


def test_rotations_are_about_y_by_any_angle():
    torch.manual_seed(0)
    turn = RandomRotation()
    turned = torch.stack([turn(torch.tensor([[1.0, 2.0, 0.0]]))[0] for _ in range(400)])
    assert torch.equal(turned[:, 1], torch.full((400,), 2.0))
    assert torch.allclose(turned[:, [0, 2]].norm(dim=1), torch.ones(400))
    quarters = torch.atan2(turned[:, 2], turned[:, 0]).div(math.pi / 2).floor().long() + 2
    assert torch.bincount(quarters, minlength=4).min() > 70
    square = cloud(4)
    moved = turn(square)
    assert torch.allclose(torch.cdist(moved, moved), torch.cdist(square, square), atol=1e-5)


def test_words_of_an_augmentation():
    assert augmentation_words("none") == ()
    assert augmentation_words("rotate + scale") == ("rotate", "scale")
    with pytest.raises(ValueError, match=r"unknown augmentation of clouds 'flip'; there are none, or scale, shift"):
        augmentation_words("flip")


# ------------------------------------------------------------------ datasets
def batches(data, seed: int, workers: int = 0) -> list[torch.Tensor]:
    loader = training_loader(data, 4, seed, workers)
    loader.sampler.set_epoch(1)
    return [clouds for clouds, _ in loader]


def test_random_numbers_depend_on_seed_epoch_and_cloud_alone():
    data = CloudArrays([cloud(60, seed) for seed in range(8)], [0] * 8)
    set_inputs(data, PREPROCESSING, Augmentation())
    here, again, processes, other = batches(data, 3), batches(data, 3), batches(data, 3, 2), batches(data, 4)
    for first, second, third, fourth in zip(here, again, processes, other, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        assert not torch.equal(first, fourth)


@pytest.mark.parametrize("augmentation", [None, Augmentation()])
def test_clouds_in_memory_give_the_same_inputs(tmp_path, augmentation):
    paths = sorted(write_clouds(tmp_path, 2, points=90).rglob("*.npy"))
    files = CloudFiles(paths, range(6))
    kept = kept_inputs(files, PREPROCESSING, augmentation)
    assert isinstance(kept, CloudArrays)
    assert files.transform is None
    set_inputs(files, PREPROCESSING, augmentation)
    for index in (0, 5):
        torch.manual_seed(1)
        wanted = files[index]
        torch.manual_seed(1)
        assert torch.equal(kept[index][0], wanted[0])
        assert kept[index][1] == index
    assert keep_clouds(files, lambda points: points, limit=6 * 90 * 12 - 1) is None
    assert keep_clouds(files, lambda points: points, limit=6 * 90 * 12) is not None


def test_augmentation_of_images_is_refused_for_clouds_and_the_other_way_round():
    Augmentation(min_crop=0.1, rand_augment=9).check("images")
    with pytest.raises(ValueError, match="rand_augment has no meaning for point clouds"):
        Augmentation(rand_augment=9).check("points")
    with pytest.raises(ValueError, match="cloud_augment has no meaning for images"):
        Augmentation(cloud_augment="rotate").check("images")


# ------------------------------------------------------------------ solids, pictures
def test_solids_are_on_their_surfaces_and_repeat():
    data = make_solids(20, 128)
    assert data.class_names == CLASS_NAMES
    assert (len(data.train), len(data.val), len(data.test)) == (20, 50, 200)
    assert np.bincount(data.test.labels).tolist() == [20] * 10
    more = make_solids(30, 128)
    assert torch.equal(data.train.cloud(7), more.train.cloud(7))
    assert torch.equal(data.test.cloud(7), more.test.cloud(7))
    assert not torch.equal(data.train.cloud(7), data.val.cloud(7))
    random = np.random.default_rng(0)
    sphere = solid_cloud("sphere", 4000, random)
    axes = np.linalg.lstsq(_quadric(sphere), np.ones(4000), rcond=None)[0]  # an ellipsoid, turned
    assert np.abs(_quadric(sphere) @ axes - 1).mean() < 4 * NOISE
    with pytest.raises(ValueError, match="at least 10, one of each class"):
        make_solids(9)


def _quadric(points: np.ndarray) -> np.ndarray:
    x, y, z = points.astype(np.float64).T
    return np.stack([x * x, y * y, z * z, x * y, y * z, x * z], 1)


def test_pictures_of_clouds(tmp_path):
    upright = torch.tensor([[0.0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    places = seen(upright)
    assert places[:, 2].tolist() == sorted(places[:, 2])  # far points first
    assert {(0.0, 1.0), (0.0, -1.0)} <= {tuple(place) for place in seen(upright, 0, 0)[:, :2].round(6).tolist()}
    picture = cloud_picture(cloud(500), 80)
    assert (picture.shape, picture.dtype) == ((80, 80, 3), np.uint8)
    assert 0.05 < (picture.min(2) < 250).mean() < 0.8
    assert len(seen(cloud(5000))) <= 1024
    with pytest.raises(ValueError, match="a figure holds 1 to 200 clouds, and these are 0"):
        plot_predictions([], [], tmp_path / "x.svg")


def test_the_shared_modelnet10():
    data, names = modelnet10("test", 20, 256)
    assert (len(data), len(names), data.cloud(0).shape) == (20, 10, (256, 3))
    assert len(set(data.labels)) > 5
    table = next(i for i in range(20) if names[data.labels[i]] == "table")
    points = unit_sphere(data.cloud(table))
    assert (points[:, 1] > points[:, 1].mean()).float().mean() > 0.5  # most of a table is its top
