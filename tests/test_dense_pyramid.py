"""Pyramids of maps: shapes at any size, equal to timm's own maps, positions kept, errors."""

import pytest
import timm
import torch
import torch.nn.functional as F
from dense_models import BACKBONES, body, pictures
from torch import nn

from deltalens.backbones.dense.body import build
from deltalens.backbones.dense.pyramid import make_pyramid
from deltalens.backbones.dense.token_maps import TokenMaps

SIZES = [(64, 64), (101, 67), (33, 130), (1, 1)]


@pytest.mark.parametrize("kind", BACKBONES)
def test_maps_of_any_size(kind):
    pyramid = make_pyramid(body(kind)).eval()
    assert pyramid.strides == [4, 8, 16, 32]
    for size in SIZES:
        with torch.no_grad():
            maps = pyramid(pictures(*size, count=1))
        expected = [
            (1, width, -(-size[0] // stride), -(-size[1] // stride))
            for width, stride in zip(pyramid.channels, pyramid.strides, strict=True)
        ]
        assert [tuple(each.shape) for each in maps] == expected


@pytest.mark.parametrize("kind", ["swin", "convnext", "resnet"])
def test_unadapted_pyramid_equals_timms_features_only(kind):
    """With the same constructor's options: windows kept whole, as on larger images."""
    found = body(kind)
    pyramid = make_pyramid(found, norms=None).double().eval()
    name, sizes = BACKBONES[kind]
    whole = {"always_partition": True, "dynamic_img_size": True} if kind == "swin" else {}
    plain = timm.create_model(name, features_only=True, **sizes, **whole)
    plain.load_state_dict(found.module.state_dict())
    plain.double().eval()
    x = pictures(96, 64).double()
    maps = plain(x)[-4:]
    maps = [each.permute(0, 3, 1, 2) for each in maps] if kind == "swin" else maps
    for ours, theirs in zip(pyramid(x), maps, strict=True):
        assert torch.equal(ours, theirs)


def test_vit_maps_equal_forward_intermediates_with_interpolated_positions():
    found = body("vit")
    name, sizes = BACKBONES["vit"]
    plain = timm.create_model(name, num_classes=0, dynamic_img_size=True, **sizes)
    plain.load_state_dict(found.module.state_dict(), strict=False)
    plain.double().eval()
    maps = TokenMaps(found, (1, -1), norms=None).double()
    x = pictures(72, 40).double()
    theirs = plain.forward_intermediates(x, [1, 3], intermediates_only=True)
    assert [tuple(each.shape[-2:]) for each in theirs] == [(9, 5), (9, 5)]
    for ours, each in zip(maps.padded_maps(x), theirs, strict=True):
        assert torch.equal(ours, each)


def test_pyramid_of_a_vit_is_the_papers():
    """Two deconvolutions with a norm and GELU between, one, none, max-pooling; then 1x1 and 3x3 with norms."""
    pyramid = make_pyramid(body("vit", patch_size=16), out_channels=8)
    kinds = [[type(layer).__name__ for layer in level] for level in pyramid.levels]
    ends = ["Conv2d", "LayerNorm2d", "Conv2d", "LayerNorm2d"]
    assert kinds == [
        ["ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d", *ends],
        ["ConvTranspose2d", *ends],
        ends,
        ["MaxPool2d", *ends],
    ]
    assert [level[0].out_channels for level in pyramid.levels[:2]] == [12, 12]
    assert pyramid.levels[0][3].out_channels == 6


@pytest.mark.parametrize(("patch", "size"), [(14, (101, 67)), (14, (32, 64)), (12, (50, 50)), (32, (70, 40))])
def test_other_patches_keep_positions(patch, size):
    """The map of a ramp is a ramp at the same places, to within one position of the coarse map."""
    found = body("vit", patch_size=patch)
    pyramid = make_pyramid(found, out_channels=8).eval()
    maps = pyramid(pictures(*size, count=1))
    assert [each.shape[-1] for each in maps] == [-(-size[1] // stride) for stride in (4, 8, 16, 32)]
    height, width = pyramid.input_size(size)
    ramp = (torch.arange(width // patch) + 0.5) * patch  # the centres of the patches, in pixels
    on_grid = pyramid._on_grid(ramp.expand(1, 1, height // patch, -1))[0, 0, 0]
    centres = (torch.arange(len(on_grid)) + 0.5) * pyramid.grid
    inside = (centres > ramp[0]) & (centres < ramp[-1])
    torch.testing.assert_close(on_grid[inside], centres[inside])


def test_each_stride_may_read_a_block_of_its_own():
    pyramid = make_pyramid(body("vit"), blocks=(0, 1, 2, 3), out_channels=8).double().eval()
    one = make_pyramid(body("vit"), out_channels=8).double().eval()
    one.load_state_dict({k: v for k, v in pyramid.state_dict().items() if k in one.state_dict()}, strict=False)
    x = pictures().double()
    first, last = pyramid(x), one(x)
    assert (first[0] - last[0]).abs().max() > 1e-3
    assert torch.equal(first[3], last[3])


# ------------------------------------------------------------------ norms
def test_norms_switch():
    trained, frozen, none = (make_pyramid(body("swin"), norms=norms).eval() for norms in ("trained", "frozen", None))
    x = pictures()
    plain = none(x)
    assert [type(norm) for norm in none.norms] == [nn.Identity] * 4
    assert sum(p.numel() for p in trained.norms.parameters()) == 2 * sum(trained.channels)
    assert not list(frozen.norms.parameters())
    for norms in (trained, frozen):
        for ours, each in zip(norms(x), plain, strict=True):
            expected = F.layer_norm(each.permute(0, 2, 3, 1), each.shape[1:2], eps=1e-5).permute(0, 3, 1, 2)
            torch.testing.assert_close(ours, expected)


def test_norms_by_themselves_follow_the_backbone():
    assert all(isinstance(norm, nn.LayerNorm) for norm in make_pyramid(body("convnext")).norms)
    assert all(isinstance(norm, nn.Identity) for norm in make_pyramid(body("resnet")).norms)


def test_strides_are_chosen():
    pyramid = make_pyramid(body("resnet"), strides=(2, 16))
    assert pyramid.strides == [2, 16]
    assert len(pyramid(pictures())) == 2
    assert make_pyramid(body("vit"), strides=(8, 16), out_channels=8).strides == [8, 16]


# ------------------------------------------------------------------ networks of one image size
def test_networks_of_one_size_get_padded_images_up_to_it():
    found, _ = build(
        "beit_base_patch16_224", False, None, {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 80}
    )
    assert found.fixed_size == (80, 80)
    pyramid = make_pyramid(found, out_channels=8).eval()
    assert [tuple(each.shape[-2:]) for each in pyramid(pictures(67, 80))] == [(17, 20), (9, 10), (5, 5), (3, 3)]
    with pytest.raises(
        ValueError, match=r"Beit takes images of at most 80x80 pixels and got 81x80.*img_size=\(81, 80\)"
    ):
        pyramid(pictures(81, 80))


def test_swin_keeps_windows_whole_on_larger_images():
    """Made for 224 px, the last stage's map is as large as a window, and timm would never shift it."""
    found, _ = build(
        "swin_tiny_patch4_window7_224", False, None, {**BACKBONES["swin"][1], "window_size": 7, "depths": (1, 1, 1, 2)}
    )
    assert found.module.layers_3.blocks[1].shift_size == (3, 3)


# ------------------------------------------------------------------ errors
def test_errors():
    with pytest.raises(ValueError, match=r"norms must be 'auto', 'trained', 'frozen' or None, got 'both'"):
        make_pyramid(body("swin"), norms="both")
    with pytest.raises(ValueError, match=r"SwinTransformer has maps of the strides \[4, 8, 16, 32\], none .* \[64\]"):
        make_pyramid(body("swin"), strides=(64,))
    with pytest.raises(ValueError, match="chosen for plain networks such as ViTs, and SwinTransformer"):
        make_pyramid(body("swin"), blocks=(1,))
    with pytest.raises(ValueError, match=r"blocks must lie between -4 and 3 in this VisionTransformer, got \[4"):
        make_pyramid(body("vit"), blocks=(4,))
    with pytest.raises(ValueError, match=r"one for each of the strides \[4, 8, 16, 32\], got \[1, 2\]"):
        make_pyramid(body("vit"), blocks=(1, 2))
    with pytest.raises(ValueError, match=r"powers of two, got \[4, 6\]"):
        make_pyramid(body("vit"), strides=(4, 6))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(3, 8, 8\)"):
        make_pyramid(body("swin"))(torch.zeros(3, 8, 8))
