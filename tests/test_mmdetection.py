"""mmdetection's Cascade Mask R-CNN checkpoints: every name, every shape, and numbers where they belong."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectors import Rectangles
from mmdetection_files import cascade, filled, resnet, swin

import deltalens as dl
from deltalens.backbones.dense import body as bodies
from deltalens.backbones.dense import cascade_rcnn, mmdetection

SWIN = "swin_tiny_patch4_window7_224"
NARROW = {"img_size": 128, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
SMALL = {"channels": 16, "box_width": 24, "mask_width": 16, "proposals": 20, "score_threshold": 0.0}
AS_THERE = {"aligned": True, "sampling_ratio": 0, "rounded_anchors": False}


def narrow_file(form="stages", classes=3, convs=True, mask=True):
    maps = [16, 32, 64, 128]
    body = swin(16, (1, 1, 2, 1), (1, 1, 2, 2), 4, form)
    return filled(body, cascade(maps, classes, 16, 24, convs, mask))


def saved(weights, path):
    torch.save({"meta": {"CLASSES": ("a", "b", "c"), "epoch": 36}, "state_dict": weights}, path)
    return path


def narrow_network(path, head="cascade", num_classes=3, box_head="4conv1fc", **options):
    sizes = {name: value for name, value in SMALL.items() if head == "cascade" or name != "mask_width"}
    given = {**sizes, **AS_THERE, "box_head": box_head, **options}
    return dl.create_backbone(SWIN, num_classes=num_classes, head=head, head_options=given, checkpoint=path, **NARROW)


PUBLISHED = {
    "r50": ("resnet50", {}, "2fc", lambda: (resnet(), cascade([256, 512, 1024, 2048]))),
    **{
        f"swin-t-{form}": (
            SWIN,
            {},
            "4conv1fc",
            lambda form=form: (
                swin(96, (2, 2, 6, 2), (3, 6, 12, 24), 7, form),
                cascade([96, 192, 384, 768], convs=True),
            ),
        )
        for form in ("layers", "stages")
    },
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_networks_name_by_name(name):
    """Every tensor of ours has its own of theirs, of its shape, and none of theirs is left over."""
    backbone, options, box_head, shapes = PUBLISHED[name]
    with torch.device("meta"):
        body, _ = bodies.build(backbone, False, None, options)
        network = cascade_rcnn.build(body, 80, box_head=box_head)
    weights = filled(*shapes(), device="meta")
    found = mmdetection.translated(weights)
    own = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in found.items()} == own
    assert len(found) == len([key for key in weights if not key.endswith("relative_position_index")])


def test_classes_boxes_and_masks_are_what_they_were(tmp_path):
    """The stages computed from the file's own tensors, by hand, and by the network that was made from it."""
    weights = narrow_file(convs=False)
    network = narrow_network(saved(weights, tmp_path / "a.pth"), box_head="2fc").eval()
    random = torch.Generator().manual_seed(1)
    pooled = torch.randn(5, 16, 7, 7, generator=random)
    for number, stage in enumerate(network.roi_heads.stages):
        own = {k.removeprefix(f"roi_head.bbox_head.{number}."): v for k, v in weights.items()}
        hidden = pooled.flatten(1)
        for layer in ("shared_fcs.0", "shared_fcs.1"):
            hidden = F.relu(F.linear(hidden, own[f"{layer}.weight"], own[f"{layer}.bias"]))
        scores = F.linear(hidden, own["fc_cls.weight"], own["fc_cls.bias"])
        logits, changes = stage(pooled)
        assert torch.allclose(logits[:, 0], scores[:, 3], rtol=1e-4)
        assert torch.allclose(logits[:, 1:], scores[:, :3], rtol=1e-4)
        assert torch.allclose(changes, F.linear(hidden, own["fc_reg.weight"], own["fc_reg.bias"]), rtol=1e-4)
        own = {k.removeprefix(f"roi_head.mask_head.{number}."): v for k, v in weights.items()}
        hidden = pooled
        for layer in range(4):
            hidden = F.relu(F.conv2d(hidden, own[f"convs.{layer}.conv.weight"], own[f"convs.{layer}.conv.bias"], 1, 1))
        hidden = F.relu(F.conv_transpose2d(hidden, own["upsample.weight"], own["upsample.bias"], 2))
        masks = F.conv2d(hidden, own["conv_logits.weight"], own["conv_logits.bias"])
        assert torch.allclose(stage.masks(pooled)[:, 1:], masks, rtol=1e-4, atol=1e-3)


def test_convolutions_of_box_heads_are_what_they_were(tmp_path):
    weights = narrow_file()
    network = narrow_network(saved(weights, tmp_path / "a.pth")).eval()
    pooled = torch.randn(2, 16, 7, 7, generator=torch.Generator().manual_seed(1))
    own = {k.removeprefix("roi_head.bbox_head.1."): v for k, v in weights.items()}
    hidden = pooled
    for number in range(4):
        path = f"shared_convs.{number}"
        hidden = F.conv2d(hidden, own[f"{path}.conv.weight"], padding=1)
        norm = [own[f"{path}.bn.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        hidden = F.relu(F.batch_norm(hidden, *norm, eps=1e-5))
    hidden = F.relu(F.linear(hidden.flatten(1), own["shared_fcs.0.weight"], own["shared_fcs.0.bias"]))
    assert torch.allclose(network.roi_heads.stages[1].box_head(pooled), hidden, rtol=1e-3, atol=1e-3)


def test_patches_are_merged_as_there(tmp_path):
    """mmdetection: nn.Unfold of 2 x 2 cells, LayerNorm, Linear; the fork: four slices side by side."""
    maps = torch.randn(1, 8, 6, 16, generator=torch.Generator().manual_seed(1))
    for form in ("stages", "layers"):
        weights = narrow_file(form)
        network = narrow_network(saved(weights, tmp_path / f"{form}.pth"))
        path = f"backbone.{form}.0.downsample"
        if form == "stages":
            cells = torch.nn.Unfold(2, stride=2)(maps.permute(0, 3, 1, 2)).transpose(1, 2)
        else:
            slices = [maps[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            cells = torch.cat(slices, -1).flatten(1, 2)
        normed = F.layer_norm(cells, (64,), weights[f"{path}.norm.weight"], weights[f"{path}.norm.bias"])
        expected = F.linear(normed, weights[f"{path}.reduction.weight"]).reshape(1, 4, 3, 32)
        found = network.get_submodule(network.adapted).layers_1.downsample(maps)
        assert torch.allclose(found, expected, atol=1e-4), form


def test_what_is_loaded_detects_and_is_remembered(tmp_path):
    path = saved(narrow_file(), tmp_path / "a.pth")
    network = narrow_network(path)
    norms = network.backbone.pyramid.norms
    assert torch.equal(norms[2].weight, narrow_file()["backbone.norm2.weight"])
    images, _ = Rectangles(1).batch()
    with torch.no_grad():
        found = network.eval()(images)[0]
    assert len(found["boxes"]) > 0
    dl.attach(network, dl.LoRAConfig(r=2))
    dl.save_pretrained(network, tmp_path / "adapter")
    with torch.no_grad():
        again = dl.from_pretrained(tmp_path / "adapter").eval()(images)[0]
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_other_classes_and_no_masks(tmp_path):
    path = saved(narrow_file(), tmp_path / "a.pth")
    ours, theirs = narrow_network(path, num_classes=5), narrow_network(path)
    state, published = ours.state_dict(), theirs.state_dict()
    fresh = {name for name in state if state[name].shape != published[name].shape}
    assert {name.split(".", 3)[3] for name in fresh} == {
        f"{layer}.{leaf}"
        for layer in ("box_predictor.cls_score", "mask_predictor.mask_fcn_logits")
        for leaf in ("weight", "bias")
    }
    assert all(torch.equal(state[name], published[name]) for name in state.keys() - fresh)
    boxes = narrow_network(path, "cascade_rcnn")
    assert all(torch.equal(value, published[name]) for name, value in boxes.state_dict().items())


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({}, {"box_head": "2fc"}, "of another network.*box_head='4conv1fc'"),
        ({"mask": False}, {}, "mask_head.* is absent there and"),
        ({}, {"num_classes": 5, "class_agnostic": False}, r"bbox_pred.weight is \(4, 24\) there and \(24, 24\) here"),
        ({"without": "rpn_head.rpn_reg"}, {"num_classes": 5}, "rpn.head.bbox_pred.weight is absent there and"),
        ({"without": "roi_head.bbox_head.1.fc_reg"}, {"num_classes": 5}, "stages.1.*bbox_pred.weight is absent there"),
        ({}, {"norms": None}, r"pyramid.norms.0.weight is \(16,\) there and absent here"),
    ],
)
def test_files_of_other_networks(weights, options, message, tmp_path):
    left_out = weights.get("without", "nothing")
    file = narrow_file(**{name: value for name, value in weights.items() if name != "without"})
    path = saved({name: t for name, t in file.items() if not name.startswith(left_out)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        narrow_network(path, **options)


def test_files_of_detectors_under_other_heads(tmp_path):
    path = saved(narrow_file(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"MaskRCNNDetector is no Cascade R-CNN.*head='cascade'"):
        dl.create_backbone(SWIN, num_classes=3, head="mask_rcnn", head_options=SMALL, checkpoint=path, **NARROW)


def test_unknown_names_and_untrusted_files(tmp_path):
    with pytest.raises(ValueError, match=r"roi_head\.mask_iou_head\.fc\.weight is no part"):
        mmdetection.translated({**narrow_file(), "roi_head.mask_iou_head.fc.weight": torch.zeros(1)})
    path = tmp_path / "a.pth"
    torch.save({"state_dict": narrow_file(), "history": np.random.default_rng(0)}, path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        narrow_network(path)


def test_weights_of_a_backbone_alone_load_as_before(tmp_path):
    first = dl.create_backbone(SWIN, num_classes=3, pretrained=False, **NARROW)
    torch.save(first.state_dict(), tmp_path / "swin.pth")
    network = dl.create_backbone(
        SWIN, num_classes=3, head="cascade", head_options=SMALL, checkpoint=tmp_path / "swin.pth", **NARROW
    )
    assert torch.equal(network.get_submodule(network.adapted).patch_embed.proj.weight, first.patch_embed.proj.weight)
