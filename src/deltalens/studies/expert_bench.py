"""What Adapter-X costs: its wide products beside sorting and looping over experts, and beside AdaptFormer."""

from __future__ import annotations

import copy

from torch import nn

import deltalens as dl
from deltalens.methods.smoa import SMoA
from deltalens.studies.bench_report import Report, Target
from deltalens.studies.benchmarks import (
    FROZEN,
    FULL,
    REFERENCES,
    VPT_MODEL,
    Options,
    check_same_outputs,
    compare_inference,
    compare_training,
    frozen,
    full,
    setup,
)
from deltalens.studies.plain_forms import sorted_adapter_x

ADAPTFORMER, OURS, SORTED, SERIAL = "AdaptFormer n=64", "deltalens", "sort and loop", "deltalens, serial"
STILL = "deltalens, class token frozen"
STEP_LIMIT = 1.15  # step / AdaptFormer's


def bench_adapter_x(options: Options) -> Report:
    """A step and a forward of Adapter-X's preset for ViT-B/16 in both placements, of the same pool with sub-tokens
    sorted by expert, and of AdaptFormer. The experts have random values, so that equal outputs mean something.

    A trained class token makes the gradient pass through the first block, too, which AdaptFormer's does not: a step
    with the class token frozen shows what the pool and the prompts alone cost."""
    options = options.settled(VPT_MODEL, "deltalens/vit-mini")
    backbone, images, labels = setup(options)
    settings = {"dropout": 0.0, "last_prompt": True}
    ours = _with_values(dl.attach(copy.deepcopy(backbone), dl.AdapterXConfig(**settings)))
    serial = _with_values(dl.attach(copy.deepcopy(backbone), dl.AdapterXConfig(placement="serial", **settings)))
    still = _with_values(dl.attach(copy.deepcopy(backbone), dl.AdapterXConfig(class_token=False, **settings)))
    adaptformer = dl.attach(copy.deepcopy(backbone), dl.AdaptFormerConfig(dropout=0.0))
    by_sorting = sorted_adapter_x(ours)
    check_same_outputs(images, {OURS: ours, SORTED: by_sorting})
    adapted = {ADAPTFORMER: adaptformer, OURS: ours, SERIAL: serial, SORTED: by_sorting}
    plain_of, references = {OURS: SORTED}, {"adaptformer": ADAPTFORMER}
    training = {FULL: full(backbone), FROZEN: frozen(backbone), **adapted, STILL: still}
    steps = compare_training(training, images, labels, options, plain_of, {**REFERENCES, **references})
    inference = {FROZEN: frozen(backbone), **adapted}
    speeds, _ = compare_inference(inference, images, options, plain_of, {"frozen": FROZEN, **references})
    targets = []
    if options.model == VPT_MODEL and images.shape[-1] == 224:
        ratio = steps.row(OURS).ratios["adaptformer"]
        targets.append(Target("Adapter-X: training step / AdaptFormer's (n = 64)", ratio, STEP_LIMIT))
    return Report("Adapter-X", options.describe(images.shape[-1]), [steps, speeds], targets)


def _with_values(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, SMoA):
            nn.init.normal_(module.up, std=0.02)
    return model
