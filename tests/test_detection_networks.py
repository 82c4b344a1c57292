"""`create_backbone(head=)` for detectors, and every method on them: files, switching, merging, what is trained."""

import copy
import functools
import warnings

import pytest
import timm
import torch
from detectors import NAMES, SMALL, WITH_MASKS, Rectangles
from timm.models.vision_transformer import VisionTransformer

import deltalens as dl
from deltalens.tasks import DetectionTask, InstanceTask

HEADS = list(SMALL)
SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"
SMALL_SWIN = {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
SMALL_VIT = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
BODIES = {"swin": (SWIN, SMALL_SWIN), "vit": (VIT, SMALL_VIT)}


@functools.cache
def built(head, body):
    return network(head, body, detections_per_image=5)


def network(head, body="swin", **options):
    if not options:
        return copy.deepcopy(built(head, body))
    name, sizes = BODIES[body]
    torch.manual_seed(0)
    given = {**SMALL[head], "score_threshold": 0.0, **options}
    return dl.create_backbone(name, num_classes=3, pretrained=False, head=head, head_options=given, **sizes)


def found_in(model, images):
    with torch.no_grad():
        return [{key: value.clone() for key, value in each.items()} for each in model.eval()(images)]


def same(one, other):
    return all(torch.equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in a)


def close(one, other):
    return all(
        a["boxes"].shape == b["boxes"].shape and torch.allclose(a["scores"], b["scores"], atol=1e-4)
        for a, b in zip(one, other, strict=True)
    )


def stir(model, seed=3):
    """Other values for everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("body", list(BODIES))
@pytest.mark.parametrize("head", HEADS)
def test_networks_by_name(head, body):
    model = network(head, body)
    backbone = model.get_submodule(model.adapted)
    assert isinstance(backbone, VisionTransformer) == (body == "vit")
    assert model.num_classes == 3
    images, targets = Rectangles(2, sizes=((64, 64), (48, 80))).batch()
    assert len(found_in(model, images)) == 2
    dl.attach(model, dl.MonaConfig(bottleneck=4))
    count = dl.count_parameters(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = [name for name in trained if name.startswith(f"{model.adapted}.")]
    assert count.adapter == sum(trained[name].numel() for name in inside) > 0
    assert count.head == sum(p.numel() for name, p in trained.items() if name not in inside) > 0
    assert count.backbone == sum(p.numel() for name, p in backbone.named_parameters() if "delta" not in name.split("."))
    task = (InstanceTask if head in WITH_MASKS else DetectionTask)(model, NAMES)
    task.train()((images, targets))["loss"].backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(trained[name].grad is not None for name in inside)
    has_fpn = any("fpn.inner_blocks" in name for name in trained)
    assert has_fpn == (body == "swin")  # ViTDet's simple pyramid stands in its place


@pytest.mark.parametrize("head", HEADS)
def test_files_detach_and_switching(head, tmp_path):
    model = network(head)
    images, _ = Rectangles(2).batch()
    plain, state = found_in(model, images), {name: value.clone() for name, value in model.state_dict().items()}
    dl.attach(model, dl.MonaConfig(bottleneck=4))
    stir(model)
    adapted = found_in(model, images)
    assert not same(plain, adapted)
    dl.save_pretrained(model, tmp_path / "adapter")
    other = network(head)
    dl.load_adapter(other, tmp_path / "adapter")
    assert same(found_in(other, images), adapted)
    with dl.disable_adapter(model):
        assert same(found_in(model, images), plain)
    dl.attach(model, dl.LoRAConfig(r=2), name="second")
    stir(model, 4)
    assert not same(found_in(model, images), adapted)
    dl.set_adapter(model, "default")
    assert same(found_in(model, images), adapted)
    dl.detach(model)
    assert same(found_in(model, images), plain)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


METHODS = {
    "full": dl.FullConfig(),
    "linear": dl.LinearConfig(),
    "bitfit": dl.BitFitConfig(),
    "normtuning": dl.NormTuningConfig(),
    "partial": dl.PartialConfig(),
    "adapter": dl.AdapterConfig(),
    "adaptformer": dl.AdaptFormerConfig(bottleneck=4),
    "lora": dl.LoRAConfig(r=2),
    "fact": dl.FacTConfig(),
    "ssf": dl.SSFConfig(),
    "repadapter": dl.RepAdapterConfig(),
    "convpass": dl.ConvpassConfig(),
    "lorand": dl.LoRandConfig(),
    "mona": dl.MonaConfig(bottleneck=4),
    "vpt": dl.VPTConfig(num_tokens=2),
    "adapter_x": dl.AdapterXConfig(),
}


FURTHER = ("partial", "fact", "ssf", "repadapter", "convpass", "adapter_x")


@pytest.mark.parametrize("body", list(BODIES))
@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] if name in FURTHER else []) for name in METHODS]
)
def test_every_method(method, body, tmp_path):
    """Trains, is saved and loaded, merged and detached under a RetinaNet."""
    model = network("retinanet", body)
    images, targets = Rectangles(2).batch()
    plain = found_in(model, images)
    dl.attach(model, METHODS[method])
    stir(model)
    result = DetectionTask(model, NAMES).train()((images, targets))
    result["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    adapted = found_in(model, images)
    assert not same(plain, adapted)
    dl.save_pretrained(model, tmp_path)
    other = dl.load_adapter(network("retinanet", body), tmp_path)
    assert same(found_in(other, images), adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert close(found_in(dl.merge_and_unload(other), images), adapted)
    assert same(found_in(dl.detach(model), images), plain)


def test_an_adapter_of_a_classifier_loads_into_a_detector_and_back(tmp_path):
    model = network("retinanet", "vit")
    classifier = timm.create_model(VIT, num_classes=4, dynamic_img_size=True, **SMALL_VIT).eval()
    classifier.load_state_dict(model.get_submodule(model.adapted).state_dict(), strict=False)
    dl.attach(classifier, dl.MonaConfig(bottleneck=4))
    stir(classifier)
    dl.save_pretrained(classifier, tmp_path / "classifier")
    images, _ = Rectangles(1).batch()
    plain = found_in(model, images)
    dl.load_adapter(model, tmp_path / "classifier")
    assert not same(found_in(model, images), plain)
    dl.save_pretrained(model, tmp_path / "detector")
    with torch.no_grad():
        expected = classifier.forward_features(images[0][None])
        dl.load_adapter(classifier, tmp_path / "detector", name="back")
        assert torch.equal(classifier.forward_features(images[0][None]), expected)


@pytest.mark.parametrize("body", list(BODIES))
@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_every_parameter(head, body):
    """No map is made that no head reads: several devices wait for the gradient of everything that is trained."""
    model = network(head, body).train()
    assert model.backbone.levels == list(range(len(model.backbone.pyramid.strides)))
    torch.manual_seed(0)
    sum(model(*Rectangles(2).batch()).values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_checkpointing_changes_nothing():
    gradients = []
    for enable in (False, True):
        model = network("retinanet")
        torch.manual_seed(1)
        dl.attach(model, dl.MonaConfig(bottleneck=4))
        model.set_grad_checkpointing(enable)
        DetectionTask(model, NAMES).train()(Rectangles(2).batch())["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(g, gradients[1][name], atol=1e-6) for name, g in gradients[0].items())


def test_bf16_training():
    model = dl.attach(network("mask_rcnn"), dl.MonaConfig(bottleneck=4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = InstanceTask(model, NAMES).train()(Rectangles(2).batch())["loss"]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_wrong_options_of_heads_by_name():
    with pytest.raises(ValueError, match=r"retinanet has no option 'anchor_scal'; did you mean anchor_scale\?.*blocks"):
        network("retinanet", anchor_scal=2)
    with pytest.raises(ValueError, match="num_classes"):
        dl.create_backbone(SWIN, pretrained=False, head="retinanet", **SMALL_SWIN)
    model = network("retinanet", strides=[8, 16], norms=None)
    assert model.backbone.strides == [8, 16, 32, 64]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("head", ["retinanet", "fcos"])
def test_maps_that_no_head_reads_are_not_made(head, body):
    """All that is trained has a gradient: several devices wait for one, and the finest map costs the most."""
    model = dl.attach(network(head, body), dl.LinearConfig())
    assert model.backbone.pyramid.strides == [8, 16, 32]
    images, targets = Rectangles(2).batch()
    sum(model.train()(images, targets).values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert network(head, body, levels=[0, 1]).backbone.pyramid.strides == [4, 8, 16, 32]  # counted from the finest
