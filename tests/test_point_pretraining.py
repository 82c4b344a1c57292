"""What `python -m tools.pretrain points` draws its clouds from, and the weights that it made."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import deltalens as dl
from deltalens.backbones.points import mini
from deltalens.models.point_transformer import PointTransformer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.pretrain.points.augment import Augment, about_third_axis
from tools.pretrain.points.probe import largest_class, linear_svm
from tools.pretrain.points.voxels import FILE, SIDE, VoxelShapes, surfaces

DATA = Path(__file__).resolve().parents[2] / "shared/data/points/modelnet10_voxels"


def solids() -> np.ndarray:
    """A cube of 5, a plate and a bar, each in a grid, (3, 30, 30, 30) of bool."""
    grids = np.zeros((3, SIDE, SIDE, SIDE), bool)
    grids[0, 3:8, 3:8, 3:8] = grids[1, 5:25, 5:25, 9] = grids[2, 14, 14, :] = True
    return grids


@pytest.fixture
def folder(tmp_path):
    bits = np.packbits(solids().reshape(3, -1), axis=1)
    index = {"train_index": [0, 2], "val_index": [1], "test_index": [1]}
    arrays = {f"{part}_{what}": v for part in ("train", "test") for what, v in (("bits", bits), ("label", [0, 1, 1]))}
    np.savez(tmp_path / FILE, **{k: np.asarray(v, np.uint8) for k, v in arrays.items()}, **index)
    return tmp_path


def test_surface_voxels_have_an_empty_neighbour():
    found = surfaces(solids())
    assert [len(voxels) for voxels in found] == [5**3 - 3**3, 400, 30]
    assert not any((voxel == (5, 5, 5)).all() for voxel in found[0])


def test_clouds_are_seeded_and_lie_in_the_unit_ball(folder):
    shapes = VoxelShapes(folder, "train")
    clouds = shapes.clouds(torch.tensor([0, 1]), 100, seed=3)
    assert clouds.shape == (2, 100, 3)
    assert torch.equal(clouds, shapes.clouds(torch.tensor([0, 1]), 100, seed=3))
    assert not torch.equal(clouds, shapes.clouds(torch.tensor([0, 1]), 100, seed=4))
    torch.testing.assert_close(clouds.mean(1), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(clouds.norm(dim=2).amax(1), torch.ones(2))
    assert len(np.unique(clouds[1].numpy(), axis=0)) == 100  # 30 voxels, drawn more than once
    assert float(clouds[1, :, :2].abs().max()) < 0.05  # the bar is thin
    assert shapes.labels.tolist() == [0, 1]
    assert largest_class(VoxelShapes(folder, "val")) == 100.0


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/points/modelnet10_voxels")
def test_real_shapes_are_read_by_their_splits():
    val = VoxelShapes(DATA, "val")
    assert len(val) == len(val.labels) == 378
    assert val.clouds(torch.arange(4), 256, seed=0).isfinite().all()


def test_augmentation_turns_about_the_upright_axis():
    clouds = torch.randn(4, 10, 3)
    turned = Augment(scale=1.0, shift=0.0)(clouds)
    torch.testing.assert_close(turned[..., 2], clouds[..., 2])
    torch.testing.assert_close(turned.norm(dim=2), clouds.norm(dim=2))
    assert not torch.allclose(turned, clouds)
    quarter = about_third_axis(torch.tensor([torch.pi / 2]))
    torch.testing.assert_close(torch.tensor([[1.0, 0, 0]]) @ quarter[0], torch.tensor([[0.0, 1, 0]]), atol=1e-6, rtol=0)
    factors = (Augment(rotation=False, shift=0.0)(torch.ones(200, 1, 3))).flatten()
    assert 1 / 1.5 <= float(factors.min()) < 0.75
    assert 1.4 < float(factors.max()) <= 1.5


# ------------------------------------------------------------------ points-mini
def test_points_mini_comes_with_the_package():
    facts = json.loads(mini.WEIGHTS.with_suffix(".json").read_text())
    model = dl.create_backbone("deltalens/points-mini", num_classes=4)
    assert mini.WEIGHTS.stat().st_size <= 4 * 2**20
    without_head = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("cls_head"))
    assert without_head == facts["parameters"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.untrained == ()
    assert model(torch.randn(2, 300, 3)).shape == (2, 4)
    assert dl.preprocessing(model) == {"kind": "points", "num_points": 1024, "normalize": "unit_sphere"}
    assert facts["linear_svm"]["val"] > facts["linear_svm_untrained"]["val"] > facts["largest_class"]["val"]


def test_an_adapter_of_points_mini_is_rebuilt_by_its_name(tmp_path):
    model = dl.create_backbone("points-mini", num_classes=4)
    dl.attach(model, dl.AdaptFormerConfig(bottleneck=4))
    dl.save_pretrained(model, tmp_path)
    x = torch.randn(2, 300, 3)
    assert torch.equal(dl.from_pretrained(tmp_path)(x), model.eval()(x))


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/points/modelnet10_voxels")
def test_features_of_points_mini_tell_real_shapes_apart():
    facts = json.loads(mini.WEIGHTS.with_suffix(".json").read_text())
    model = dl.create_backbone("deltalens/points-mini", num_classes=0)
    found = linear_svm(model, VoxelShapes(DATA, "train"), {"val": VoxelShapes(DATA, "val")}, mini.NUM_POINTS)
    assert found["val"] == pytest.approx(facts["linear_svm"]["val"], abs=1.5)


def test_options_of_the_constructor_reach_points_mini():
    model = dl.create_backbone("deltalens/points-mini", num_classes=3, num_groups=16, pos_every_block=False)
    assert isinstance(model, PointTransformer)
    assert model.forward_features(torch.randn(1, 200, 3)).shape == (1, 17, 128)
