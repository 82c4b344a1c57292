"""Segmentation networks: outputs, heads as in their papers, what is refused."""

import pytest
import timm
import torch
import torch.nn.functional as F
from dense_models import BACKBONES, CLASSES, body, loss_of, network, pictures
from torch import nn

import deltalens as dl
from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.fcn import build as build_fcn
from deltalens.backbones.dense.segmentation import to_pixels
from deltalens.backbones.dense.setr_pup import build as build_setr_pup

PAIRS = [(kind, head) for kind in BACKBONES for head in ("upernet", "fcn")] + [("vit", "dpt"), ("vit", "setr_pup")]
AUXILIARY = {"upernet": 1, "fcn": 0, "dpt": 0, "setr_pup": 3}


@pytest.mark.parametrize(("kind", "head"), PAIRS)
def test_logits_for_every_pixel(kind, head):
    model, x = network(kind, head), pictures(45, 67)
    with torch.no_grad():
        assert model(x).keys() == {"out"}
        assert model(x)["out"].shape == (2, CLASSES, 45, 67)
    found = model.train()(x)
    further = found.pop("aux", [])
    further = further if isinstance(further, list) else [further]
    assert [tuple(each.shape) for each in further] == [(2, CLASSES, 45, 67)] * AUXILIARY[head]


@pytest.mark.parametrize(("kind", "head"), [("convnext", "fcn"), ("vit", "dpt"), ("vit", "setr_pup")])
def test_padding_moves_nothing(kind, head):
    """Logits of a padded image are those of the same image with zeros around it, cut: no pixel is stretched."""
    model, x = network(kind, head).double(), pictures(45, 67).double()
    size = model.maps.padded_size((45, 67))
    larger = F.pad(x, (0, size[1] - 67, 0, size[0] - 45))
    with torch.no_grad():
        assert torch.equal(model(x)["out"], model(larger)["out"][..., :45, :67])


def test_pixels_are_bilinear_with_corners_not_aligned():
    logits = torch.randn(1, 2, 3, 3)
    expected = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(to_pixels(logits, (12, 12), (10, 11)), expected[..., :10, :11])


# ------------------------------------------------------------------ heads
def test_upernet_is_the_librarys_on_our_pyramid():
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    model, x = network("swin", "upernet", norms="trained"), pictures()
    theirs = UPerNetDecoder([0, 0, *model.maps.channels], 5, 8)
    own = model.head.decoder.state_dict()
    theirs.load_state_dict(own, strict=False)
    theirs.feature_norms = nn.ModuleList(model.maps.norms)  # theirs are the same, but for eps 1e-6
    plain = network("swin", "upernet", norms=None).maps(x)
    expected = F.interpolate(model.head.classify(theirs.eval()([x, x, *plain])), size=(64, 64), mode="bilinear")
    torch.testing.assert_close(model(x)["out"], expected)
    assert {name for name in theirs.state_dict() if "feature_norms" not in name} == own.keys()


def test_auxiliary_head_reads_the_third_map():
    model = network("swin", "upernet").train()
    (auxiliary,) = model.auxiliary
    assert auxiliary.levels == [2]
    assert auxiliary.convs[0][0].in_channels == model.maps.channels[2]
    assert not network("swin", "upernet", auxiliary=False).auxiliary


def test_fcn_puts_resized_maps_side_by_side():
    model, x = build_fcn(body("convnext"), CLASSES, levels=(0, 3), convs=0, norms=None).eval(), pictures()
    first, _, _, last = model.maps(x)
    side_by_side = torch.cat([first, F.interpolate(last, size=(16, 16), mode="bilinear")], 1)
    expected = F.interpolate(model.head.classify[1](side_by_side), size=(64, 64), mode="bilinear")
    torch.testing.assert_close(model(x)["out"], expected)


def test_dpt_reads_the_class_token_of_four_blocks():
    model, x = network("vit", "dpt"), pictures()
    assert model.maps.indices == [0, 1, 2, 3]
    before, (maps, prefixes) = model(x)["out"], model.maps.padded_maps(x)
    assert [tuple(each.shape) for each in maps] == [(2, 24, 8, 8)] * 4
    assert [tuple(each.shape) for each in prefixes] == [(2, 2, 24)] * 4  # class token and one register
    torch.testing.assert_close(
        model.head.decoder(maps, [p[:, :1] for p in prefixes]), model.head.decoder(maps, prefixes)
    )
    ignoring = network("vit", "dpt", readout="ignore")(x)["out"]
    assert not torch.allclose(before, ignoring)


def test_setr_upsamples_four_times_and_has_three_auxiliary_heads():
    model = network("vit", "setr_pup").train()
    assert model.maps.indices == [1, 2, 3]  # 10, 15, 20 and 24 of 24, of four blocks
    assert model.maps.taken == [0, 0, 1, 2]
    scales = [layer.scale_factor for layer in model.head.steps if isinstance(layer, nn.Upsample)]
    assert scales == [2, 2, 2, 2]
    assert [layer.scale_factor for head in model.auxiliary for layer in head.steps[1::2]] == [4, 4] * 3
    assert len(network("vit", "setr_pup", auxiliary=False).maps.indices) == 1


def test_setr_is_as_large_as_in_vpts_paper():
    """ViT-L, 150 classes: 13.18 M with the head alone in VPT's table."""
    with torch.device("meta"):
        vit = timm.create_model("vit_large_patch16_224", depth=4)
        found = Body("ViT", vit, True, (1024,) * 4, (16,) * 4, None, 16, (224, 224))
        model = build_setr_pup(found, 150)
    backbone = sum(p.numel() for p in model.maps.backbone.parameters())
    expected = 13_143_640 - 2 * 1024  # two of the four maps are of one block here, and share a norm
    assert sum(p.numel() for p in model.parameters()) - backbone == expected


def test_gradients_reach_every_parameter():
    for kind, head in (("vit", "dpt"), ("vit", "setr_pup"), ("swin", "upernet"), ("vit", "fcn")):
        model = network(kind, head).train()
        loss_of(model(pictures())).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None], (kind, head)


# ------------------------------------------------------------------ errors
def create(name="timm/resnet18", **options):
    return dl.create_backbone(name, pretrained=False, **options)


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="unknown head 'unet'; the dense heads are upernet, fcn, dpt, setr_pup"):
        create(num_classes=2, head="unet")
    with pytest.raises(ValueError, match="head 'upernet' has no option 'width'; it has channels, dropout, auxiliary"):
        create(num_classes=2, head="upernet", head_options={"width": 3})
    for count in (None, 0, True):
        with pytest.raises(ValueError, match="head='fcn' needs num_classes, the number of classes without background"):
            create(num_classes=count, head="fcn")
    with pytest.raises(ValueError, match="head_options were given without a head"):
        create(head_options={"channels": 3})
    with pytest.raises(ValueError, match="features_only and out_indices are chosen by the head"):
        create(num_classes=2, head="fcn", features_only=True)


def test_backbones_without_maps_are_refused():
    with pytest.raises(TypeError, match=r"head='upernet' needs a timm network .* deltalens/points-mini is of another"):
        create("deltalens/points-mini", num_classes=2, head="upernet")
    with pytest.raises(TypeError, match="head='fcn' needs a timm network"):
        create("deltalens/clip-mini", num_classes=2, head="fcn")
    with pytest.raises(TypeError, match=r"Gemma4VitClassifier gives no maps: .* needs a timm network that has feat"):
        create("gemma4_vit_167m", num_classes=2, head="fcn", depth=1)


def test_heads_that_do_not_fit_are_refused():
    for head in ("dpt", "setr_pup"):
        with pytest.raises(TypeError, match=rf"head='{head}' reads the tokens of several blocks of a ViT.*Swin"):
            network("swin", head)
    with pytest.raises(ValueError, match="upernet needs maps of at least two strides, and this backbone gives 1"):
        network("swin", "upernet", strides=(8,))
    with pytest.raises(ValueError, match="needs at least 2 images a batch in training, got 1"):
        network("swin", "upernet").train()(pictures(count=1))
    with pytest.raises(ValueError, match="readout must be one of cat, add, ignore, got 'mean'"):
        network("vit", "dpt", readout="mean")
    with pytest.raises(ValueError, match="dpt reads four blocks"):
        network("vit", "dpt", blocks=(1, 2))
    with pytest.raises(ValueError, match="levels must lie between -4 and 3, got \\[4\\]"):
        network("swin", "fcn", levels=(4,))


def test_the_library_may_be_missing(monkeypatch):
    def without(name, *args, **kwargs):
        if name.startswith("segmentation_models_pytorch"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    import importlib

    original = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ImportError, match=r"head='upernet' needs segmentation_models_pytorch: pip install 'deltalens"):
        network("swin", "upernet")
