"""What deltalens costs: its fast forms beside their published forms, the frozen backbone and full fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltalens as dl
from deltalens.backbones.unknown import input_size
from deltalens.studies.bench_report import Report, Row, Section, Target
from deltalens.studies.measure import Clock, Timings, interleaved, peak_bytes, saved_bytes
from deltalens.studies.plain_forms import plain_mona, plain_vpt

FULL, FROZEN = "full fine-tuning", "frozen backbone"
VPT_MODEL, MONA_MODEL = "timm/vit_base_patch16_224", "timm/swin_tiny_patch4_window7_224"
VPT_LIMITS = {100: (1.05, 0.65), 200: (1.08, 0.55)}  # prompts -> inference / frozen backbone, step / plain form
MONA_LIMITS = {"normal": (0.82, 0.85), "low": (0.70, 0.95)}  # memory -> saved bytes / full, step / plain form
MONA_INFERENCE_LIMIT = 0.75  # merged overhead over the frozen backbone / the plain form's


@dataclass(frozen=True)
class Options:
    """How a benchmark runs.

    model, img_size, batch_size: None for the benchmark's own. quick: the small shipped backbones, batch 2 and 3 rounds
    at most. classes: texts of the part clip. head: of the part dense, None for all of its parts.
    """

    model: str | None = None
    img_size: int | None = None
    batch_size: int | None = None
    rounds: int = 7
    device: str = "cpu"
    clock: Clock = "wall"
    quick: bool = False
    classes: int | None = None
    head: str | None = None

    def settled(self, own_model: str, quick_model: str, own_batch: int = 4) -> Options:
        """With the benchmark's own model and batch filled in, and everything made small where quick."""
        batch_size = self.batch_size or own_batch
        if not self.quick:
            return replace(self, model=self.model or own_model, batch_size=batch_size)
        return replace(
            self,
            model=self.model or quick_model,
            batch_size=min(batch_size, 2),
            rounds=min(self.rounds, 3),
        )

    def describe(self, size: int) -> dict[str, object]:
        return {
            "model": self.model,
            "image size": size,
            "batch": self.batch_size,
            "interleaved rounds": self.rounds,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "clock": self.clock,
        }


# ------------------------------------------------------------------ the two benchmarks of methods
def bench_vpt(options: Options) -> Report:
    """VPT-deep: keys and values only, and the class row only in the last block, against prompts in the sequence."""
    options = options.settled(VPT_MODEL, "deltalens/vit-mini")
    backbone, images, labels = setup(options)
    training, inference = {FULL: full(backbone), FROZEN: frozen(backbone)}, {FROZEN: frozen(backbone)}
    for tokens in VPT_LIMITS:
        ours = dl.attach(copy.deepcopy(backbone), dl.VPTConfig(num_tokens=tokens))
        plain = plain_vpt(copy.deepcopy(backbone), ours)
        merged = dl.merge_and_unload(copy.deepcopy(ours))
        training |= {f"p={tokens} plain": plain, f"p={tokens} deltalens": ours}
        inference |= {f"p={tokens} plain": plain, f"p={tokens} deltalens": ours, f"p={tokens} merged": merged}
        check_same_outputs(images, {"plain": plain, "deltalens": ours, "merged": merged})
    plain_of = {f"p={p} {kind}": f"p={p} plain" for p in VPT_LIMITS for kind in ("deltalens", "merged")}
    steps = compare_training(training, images, labels, options, plain_of)
    speeds = compare_inference(inference, images, options, plain_of)[0]
    targets = []
    if _is_reference(options, VPT_MODEL, images):
        for p, (inference_limit, step_limit) in VPT_LIMITS.items():
            merged, step = speeds.row(f"p={p} merged"), steps.row(f"p={p} deltalens")
            targets += [
                Target(f"VPT-deep p={p}: merged inference / frozen backbone", merged.ratios["frozen"], inference_limit),
                Target(f"VPT-deep p={p}: training step / plain form", step.ratios["plain"], step_limit),
            ]
    return Report("VPT-deep", options.describe(images.shape[-1]), [steps, speeds], targets)


def bench_mona(options: Options) -> Report:
    """Mona: one depthwise kernel, and a down-projection that saves its input only, against the published order."""
    options = options.settled(MONA_MODEL, "deltalens/swin-mini")
    backbone, images, labels = setup(options)
    ours = dl.attach(copy.deepcopy(backbone), dl.MonaConfig(dropout=0.0))
    low = copy.deepcopy(ours)
    for module in low.modules():
        if isinstance(module, dl.MonaLayer):
            module.memory = "low"
    plain, merged = plain_mona(ours), dl.merge_and_unload(copy.deepcopy(ours))
    names = {"normal": "deltalens", "low": 'deltalens memory="low"'}
    training = {
        FULL: full(backbone),
        FROZEN: frozen(backbone),
        "plain": plain,
        names["normal"]: ours,
        names["low"]: low,
    }
    inference = {FROZEN: frozen(backbone), "plain": plain, "deltalens": ours, "merged": merged}
    check_same_outputs(images, {"plain": plain, "deltalens": ours, 'memory="low"': low, "merged": merged})
    plain_of = dict.fromkeys([*names.values(), "merged"], "plain")
    steps = compare_training(training, images, labels, options, plain_of)
    speeds, timings = compare_inference(inference, images, options, plain_of)
    overhead = timings.overhead_ratio("merged", "plain", FROZEN)
    notes = [f"merged inference costs {overhead:.3f} of what the plain form costs on top of the frozen backbone"]
    targets = []
    if _is_reference(options, MONA_MODEL, images):
        for memory, (saved_limit, step_limit) in MONA_LIMITS.items():
            name = names[memory]
            step = steps.row(name).ratios["plain"]
            targets += [
                Target(f"Mona {memory}: bytes saved / full fine-tuning", steps.saved_ratio(name, FULL), saved_limit),
                Target(f"Mona {memory}: training step / plain form", step, step_limit),
            ]
        targets.append(Target("Mona: merged overhead / plain form's overhead", overhead, MONA_INFERENCE_LIMIT))
    return Report("Mona", options.describe(images.shape[-1]), [steps, speeds], targets, notes)


def setup(options: Options) -> tuple[nn.Module, Tensor, Tensor]:
    """A backbone with random weights and without drop-path, and a batch of random images and labels."""
    torch.manual_seed(0)
    backbone = random_backbone(options, drop_path_rate=0.0)
    channels, *own_size = input_size(backbone)
    size = own_size if options.img_size is None else [options.img_size] * 2
    images = torch.randn(options.batch_size, channels, *size, device=options.device)
    labels = torch.randint(100, (options.batch_size,), device=options.device)
    return backbone.to(options.device), images, labels


def random_backbone(options: Options, **settings: Any) -> nn.Module:
    """The model of the options with random weights and 100 classes, built for the image size where it depends on it."""
    settings |= {"pretrained": False, "num_classes": 100}
    if options.img_size is None:
        return dl.create_backbone(options.model, **settings)
    try:
        return dl.create_backbone(options.model, img_size=options.img_size, **settings)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return dl.create_backbone(options.model, **settings)  # a network that takes images of any size


def _is_reference(options: Options, model: str, images: Tensor) -> bool:
    """Targets are promises about one model at one size."""
    return options.model == model and images.shape[-1] == 224


# ------------------------------------------------------------------ contenders and what they are compared in
def full(backbone: nn.Module) -> nn.Module:
    """A copy that trains everything."""
    return copy.deepcopy(backbone).requires_grad_(True)


def frozen(backbone: nn.Module) -> nn.Module:
    """A copy that trains the head and the first bias, which is the patch embedding's: the gradient passes through every
    frozen block, which is the least that a method reaching the first block can cost."""
    model = copy.deepcopy(backbone).requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    next(parameter for parameter in model.parameters() if parameter.ndim == 1).requires_grad_(True)
    return model


def check_same_outputs(images: Tensor, models: Mapping[str, nn.Module], tolerance: float = 1e-3) -> None:
    """Raise RuntimeError where models that should compute one function do not: their times would mean nothing."""
    with torch.inference_mode():
        outputs = {name: model.eval()(images) for name, model in models.items()}
    first, expected = next(iter(outputs.items()))
    for name, output in outputs.items():
        error = ((output - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerance:
            raise RuntimeError(f"{name} and {first} differ by {error:.2g} of the largest output: not the same function")


REFERENCES = MappingProxyType({"full": FULL, "frozen": FROZEN})  # label of a column -> the row that it compares with


def compare_training(
    models: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    options: Options,
    plain_of: Mapping[str, str],
    references: Mapping[str, str] = REFERENCES,
    memory_reference: tuple[str, str] = ("full", FULL),
) -> Section:
    """Forward and backward of a cross-entropy loss, without optimiser; bytes saved for backward; on a GPU the peak.

    A model without trained parameters has a forward only.
    """

    def loss_of(model: nn.Module) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(model(images), labels)

    def drop_gradients() -> None:
        for model in models.values():
            model.zero_grad(set_to_none=True)

    for model in models.values():
        model.train()
    losses = {name: loss_of(model) for name, model in models.items()}
    saved = {name: saved_bytes(losses[name], own_tensors(model)) for name, model in models.items()}
    steps = {name: (lambda loss=loss: _step(loss())) for name, loss in losses.items()}
    timings = interleaved(steps, options.rounds, between=drop_gradients, device=options.device, clock=options.clock)
    rows = []
    for name in models:
        peak = peak_bytes(steps[name], options.device)
        drop_gradients()
        rows.append(_row(name, timings, references, plain_of, saved[name], peak))
    return Section("training step", rows, memory_reference)


def _step(loss: Tensor) -> None:
    if loss.requires_grad:
        loss.backward()


def compare_inference(
    models: Mapping[str, nn.Module],
    images: Tensor,
    options: Options,
    plain_of: Mapping[str, str],
    references: Mapping[str, str] = MappingProxyType({"frozen": FROZEN}),
) -> tuple[Section, Timings]:
    """Forward in eval mode under inference_mode, in twice as many rounds: a forward is short and its ratios scatter."""

    def forward_of(model: nn.Module) -> Callable[[], None]:
        def forward() -> None:
            with torch.inference_mode():
                model(images)

        return forward

    for model in models.values():
        model.eval()
    forwards = {name: forward_of(model) for name, model in models.items()}
    timings = interleaved(forwards, 2 * options.rounds, device=options.device, clock=options.clock)
    return Section("inference", [_row(name, timings, references, plain_of) for name in models]), timings


def own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers: in memory whether autograd saves them or not."""
    yield from model.parameters()
    yield from model.buffers()


def _row(
    name: str,
    timings: Timings,
    references: Mapping[str, str],
    plain_of: Mapping[str, str],
    saved: int | None = None,
    peak: int | None = None,
) -> Row:
    references = dict(references) | ({"plain": plain_of[name]} if name in plain_of else {})
    ratios = {label: timings.ratio(name, reference) for label, reference in references.items()}
    return Row(name, timings.median(name), ratios, saved, peak)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use `count` threads of the processor within the context; None leaves them as they are."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
