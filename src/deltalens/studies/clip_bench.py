"""What adapting CLIP costs: MMA, CoOp and CoCoOp beside their published forms, zero-shot CLIP and full fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltalens as dl
from deltalens.backbones.unknown import input_size
from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.studies.bench_report import Report, Section, Target
from deltalens.studies.benchmarks import (
    FULL,
    Options,
    check_same_outputs,
    compare_inference,
    compare_training,
)
from deltalens.studies.plain_clip import PlainCLIP, plain_coop, plain_mma, trained_pairs

MODEL, TINY, TINY_SIZE = "open_clip/ViT-B-16", "a tiny CLIP", 32
BATCH, CLASSES, QUICK_CLASSES = 16, 100, 7
START = 5  # the first block with an adapter, as published
STEP_LIMIT, SAVED_LIMIT = 0.65, 0.6  # of the published formulation
FROZEN = "zero-shot, frozen"
CONDITIONED = 2  # images in a batch of CoCoOp, whose published form keeps a text tower for each


def bench_clip(options: Options) -> Report:
    """MMA from block 5 on, CoOp and CoCoOp on a CLIP with random weights.

    Published: the whole text tower on all 77 positions in every step, all rows of the last blocks, CoCoOp image by
    image. Ours: what `attach` gives. Outputs and gradients of both are checked to agree first.
    """
    if options.img_size is not None:
        raise ValueError("the part clip takes images of the model's own size: leave out --img-size")
    options = options.settled(MODEL, TINY, BATCH)
    options = replace(options, classes=options.classes or (QUICK_CLASSES if options.quick else CLASSES))
    torch.manual_seed(0)
    backbone, size = _backbone(options)
    images = torch.randn(options.batch_size, 3, size, size, device=options.device)
    labels = torch.randint(options.classes, (options.batch_size,), device=options.device)
    steps, speeds = _mma(backbone, images, labels, options)
    words = [
        _words("CoOp", dl.CoOpConfig(init="a photo of a"), backbone, images, labels, options),
        _words("CoCoOp", dl.CoCoOpConfig(), backbone, images[:CONDITIONED], labels[:CONDITIONED], options),
    ]
    longest = int(backbone.prompts().ends.max()) + 1
    notes = [f"{options.classes} classes, the longest text has {longest} tokens"]
    settings = options.describe(size) | {"classes": options.classes}
    return Report("CLIP", settings, [steps, speeds, *words], targets(options, size, steps), notes)


def targets(options: Options, size: int, steps: Section) -> list[Target]:
    """The promises, which are about one model, batch and number of classes; none elsewhere. steps: MMA's."""
    if (options.model, size, options.batch_size, options.classes) != (MODEL, 224, BATCH, CLASSES):
        return []
    return [
        Target("MMA: training step / published form", steps.row("deltalens").ratios["plain"], STEP_LIMIT),
        Target("MMA: bytes saved / published form", steps.saved_ratio("deltalens", "plain"), SAVED_LIMIT),
    ]


# ------------------------------------------------------------------ the parts
def _mma(backbone: ZeroShotClassifier, images: Tensor, labels: Tensor, options: Options) -> tuple[Section, Section]:
    ours = dl.attach(_sharing(backbone), dl.MMAConfig(start=2 if options.model == TINY else START))
    plain = plain_mma(_sharing(backbone).clip, ours)
    zero_shot = _sharing(backbone)
    check_same_outputs(images, {"plain": plain, "deltalens": ours})
    check_same_gradients(images[:2], labels[:2], plain, ours)
    full = PlainCLIP(copy.deepcopy(backbone.clip), backbone.prompts().ids).requires_grad_(True)
    plain_of = {"deltalens": "plain"}
    references = {"full": FULL, "zero-shot": FROZEN}
    steps = compare_training(
        {FULL: full, FROZEN: zero_shot, "plain": plain, "deltalens": ours},
        images,
        labels,
        options,
        plain_of,
        references,
        ("plain", "plain"),
    )
    steps = replace(steps, title="MMA, training step")
    speeds, _ = compare_inference(
        {FROZEN: zero_shot, "plain": plain, "deltalens": ours}, images, options, plain_of, {"zero-shot": FROZEN}
    )
    return steps, replace(speeds, title="MMA, inference")


def _words(
    name: str, method: dl.Method, backbone: ZeroShotClassifier, images: Tensor, labels: Tensor, options: Options
) -> Section:
    """A training step of a method that learns words. Where they depend on the image, ours image by image, too."""
    ours = dl.attach(_sharing(backbone), method)
    plain = plain_coop(_sharing(backbone).clip, ours)
    models: dict[str, nn.Module] = {"plain": plain, "deltalens": ours}
    (context,) = ours.live("text.context")
    if getattr(context, "reads_images", False):
        models["deltalens, image by image"] = ImageByImage(ours)
    check_same_outputs(images, models)
    check_same_gradients(images[:2], labels[:2], plain, ours)
    plain_of = {each: "plain" for each in models if each != "plain"}
    section = compare_training(models, images, labels, options, plain_of, {}, ("plain", "plain"))
    return replace(section, title=f"{name}, training step, batch {len(images)}")


class ImageByImage(nn.Module):
    """A model called with one image after another."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.model(image[None]) for image in images])


def check_same_gradients(
    images: Tensor, labels: Tensor, plain: PlainCLIP, ours: ZeroShotClassifier, tolerance: float = 1e-3
) -> None:
    """Raise RuntimeError where gradients of the two forms differ by more than a share of the largest one's norm."""
    pairs = trained_pairs(plain, ours)
    found = []
    for model, parameters in zip((plain, ours), zip(*pairs, strict=True), strict=True):
        found.append(torch.autograd.grad(F.cross_entropy(model.train()(images), labels), parameters))
    scale = max(gradient.norm() for gradient in found[0])
    error = max((one - other).norm() / scale for one, other in zip(*found, strict=True)).item()
    if not error <= tolerance:
        raise RuntimeError(f"gradients of the two forms differ by {error:.2g} of the largest: not the same function")


# ------------------------------------------------------------------ the model
def _backbone(options: Options) -> tuple[ZeroShotClassifier, int]:
    """A frozen classifier with random weights, and the edge of its images."""
    names = class_names(options.classes)
    if options.model == TINY:
        found, size = _tiny(names), TINY_SIZE
    else:
        found = dl.create_backbone(options.model, pretrained=False, class_names=names)
        size = input_size(found)[-1]
    return found.to(options.device).requires_grad_(False), size


def _tiny(names: Sequence[str]) -> ZeroShotClassifier:
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=4, width=64, head_width=32, patch_size=8, image_size=TINY_SIZE)
    clip = CLIP(32, vision, CLIPTextCfg(width=64, heads=2, layers=4))
    return ZeroShotClassifier(clip, open_clip.SimpleTokenizer(), names)


def class_names(count: int) -> list[str]:
    """So many of ImageNet's 1000 classes, spread over the list."""
    from torchvision.models import ResNet18_Weights

    names = ResNet18_Weights.DEFAULT.meta["categories"]
    if not 1 <= count <= len(names):
        raise ValueError(f"--classes must be 1 to {len(names)}, got {count}")
    return [names[i * len(names) // count] for i in range(count)]


def _sharing(backbone: ZeroShotClassifier) -> ZeroShotClassifier:
    """A copy with the frozen tensors of the original: many contenders, one CLIP in memory."""
    return copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()})
