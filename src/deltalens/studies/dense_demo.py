"""The demonstration of dense tasks: several methods teach a small backbone the shapes in generated scenes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import deltalens as dl
from deltalens.data.dense_transforms import DenseAugmentation
from deltalens.data.inputs import Augmentation, set_inputs
from deltalens.data.oriented_scenes import make_oriented_scenes
from deltalens.data.scenes import GROUND, make_scenes
from deltalens.data.splits import Splits
from deltalens.lifecycle.files import TENSORS
from deltalens.methods import AdaptFormerConfig, BitFitConfig, FullConfig, LinearConfig, LoRAConfig, MonaConfig
from deltalens.studies.demo import (
    RATES,
    Contender,
    DemoSettings,
    best_rate,
    check_output,
    contender,
    here_and_now,
    number_of_ways,
    one_thread,
    written,
)
from deltalens.studies.dense_answers import answers_section
from deltalens.studies.dense_measure import Found, examples_of
from deltalens.studies.dense_words import task_words
from deltalens.studies.measure import saved_bytes
from deltalens.studies.results import Comparison, Epoch, RunResult
from deltalens.studies.terminal import MethodBars
from deltalens.tasks import task_class
from deltalens.training import TrainingSettings, fit

BATCH_SIZE = 4  # small, so that few scenes and epochs give enough steps
PICTURES = 4
SHAPE, VEHICLE = "shape", "vehicle"
METRICS = {"segmentation": ("miou", "mIoU"), "detection": ("map50", "AP50"), "oriented": ("map50_voc", "AP50")}
"""Task -> the metric and its name."""
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "segmentation": ("upernet", {"channels": 64, "auxiliary": False}),
    "detection": ("retinanet", {"channels": 64, "group_norm": True, "anchor_scale": 2.0}),
    "oriented": (
        "oriented_rcnn",  # oriented_retinanet finds objects as soon, and how they lie only after thousands of steps
        {
            "channels": 64,
            "strides": [4, 8, 16],
            "anchor_scale": 4.0,
            "proposals": 60,
            "proposals_train": 100,
            "sampled_anchors": 64,
            "sampled_regions": 32,
            "box_width": 128,
            "canonical_scale": 112,
            "detections_per_image": 50,
        },
    ),
}
"""Task -> head and its settings: narrow, so that the backbone takes most of the time."""
WHAT = {
    "segmentation": "which pixels show shapes",
    "detection": "where shapes are",
    "oriented": "where ships, trucks and planes are and how they lie",
}

MakeNetwork = Callable[[int, str, dict[str, Any]], nn.Module]  # classes, head, its settings -> the network

# Usual rates, not the best of a search, which `deltalens demo --task segmentation --tune` makes.
RATE = {"segmentation": 1e-3, "detection": 3e-3, "oriented": 2e-3}
RATE_OF_FULL = {"segmentation": 3e-4, "detection": 1e-3, "oriented": 1e-3}
CONTENDERS = {
    task: {
        "linear": Contender("Head only", LinearConfig(), rate, {}),
        "bitfit": Contender("BitFit", BitFitConfig(), rate, {}),
        "lora": Contender("LoRA", LoRAConfig(r=8, alpha=8.0), rate, {"rank": 8}),
        "adaptformer": Contender("AdaptFormer", AdaptFormerConfig(bottleneck=16), rate, {"bottleneck": 16}),
        "mona": Contender("Mona", MonaConfig(bottleneck=16), rate, {"bottleneck": 16}),
        "full": Contender("Full", FullConfig(), RATE_OF_FULL[task], {}),
    }
    for task, rate in RATE.items()
}


@dataclass(frozen=True)
class DenseSettings(DemoSettings):
    """As for the other demonstrations; train_images counts scenes. size: their edge in pixels."""

    model: str = "deltalens/swin-mini"
    methods: tuple[str, ...] = ("linear", "lora", "adaptformer", "mona", "full")
    epochs: int = 6
    train_images: int = 100
    task: str = "segmentation"
    size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in METRICS:
            raise ValueError(f"task must be {' or '.join(METRICS)}, got {self.task!r}")


def scenes_of(settings: DenseSettings) -> Splits:
    """Generated scenes of the task, whose objects are all of one class."""
    if settings.task == "oriented":
        return objects_alone(make_oriented_scenes(settings.train_images, settings.size), VEHICLE)
    return objects_alone(make_scenes(settings.train_images, settings.size, 0, settings.task), SHAPE)


def objects_alone(scenes: Splits, called: str) -> Splits:
    """The scenes with one class in the place of several: which of them it is takes far more steps to learn than a
    demonstration has."""
    kept = [name for name in scenes.class_names if name == GROUND]
    index = [len(kept) if name != GROUND else 0 for name in scenes.class_names]
    names = [*kept, called]
    parts = {part: getattr(scenes, part).renumbered(index, len(names)) for part in ("train", "val", "test")}
    return replace(scenes, class_names=names, **parts)


class DenseContest:
    """What is the same for all methods: scenes, head, training, and how results are measured."""

    def __init__(self, settings: DenseSettings, make_network: MakeNetwork, bars: MethodBars):
        self.settings, self.make_network, self.bars = settings, make_network, bars
        self.metric, self.metric_name = METRICS[settings.task]
        self.scenes: Any = scenes_of(settings)

    def run(self, each: Contender, folder: Path) -> tuple[RunResult, list[Found]]:
        """Train a method, save its adapter, and say how it went and what it finds in a few test scenes."""
        rate = self.tuned_rate(each) if self.settings.tune else each.learning_rate
        task, results = self.fit(each, rate, test=True)
        self.bars.finish(each.label, f"test {100 * results['test'][self.metric]:.1f} % {self.metric_name}")
        dl.adapter_info(task.model).update(
            task=task.name,
            class_names=self.scenes.class_names,
            preprocessing=dl.preprocessing(task.model),
            metrics={f"{part} {self.metric}": results[part][self.metric] for part in ("val", "test")},
        )
        dl.save_pretrained(task.model, folder)
        count = dl.count_parameters(task.model)
        run = RunResult(
            method=each.label,
            settings={**each.shown, "lr": rate},
            adapter_parameters=count.adapter,
            head_parameters=count.head,
            backbone_parameters=count.backbone,
            accuracy=results["test"][self.metric],
            seconds=results["seconds"]["training"],
            saved_bytes=self._saved_bytes(task),
            adapter_bytes=(folder / TENSORS).stat().st_size,
            epochs=[Epoch(row["train_loss"], row[f"val_{self.metric}"]) for row in results["history"]],
            folder=folder.name,
        )
        return run, examples_of(task, self.scenes.test, PICTURES)

    def tuned_rate(self, each: Contender) -> float:
        """The rate with the best validation metric after the last epoch. The test scenes are not seen."""

        def metric(rate: float) -> float:
            return self.fit(each, rate, test=False, prefix=f"rate {rate:g}, ")[1]["val"][self.metric]

        return best_rate(metric)

    def fit(self, each: Contender, rate: float, test: bool, prefix: str = "") -> tuple[Any, dict[str, Any]]:
        """A trained task, and the runner's results."""
        settings, scenes = self.settings, self.scenes
        train_scenes, val_scenes = settings.epochs * len(scenes.train), len(scenes.val)
        torch.manual_seed(settings.seed)  # the same head, and the same adapter, whatever ran before
        head, options = HEADS[settings.task]
        network = dl.attach(self.make_network(len(scenes.class_names), head, options), each.config)
        self._prepare(dl.preprocessing(network))
        task = task_class(settings.task)(network, scenes.class_names)
        training = TrainingSettings(
            epochs=settings.epochs,
            batch_size=BATCH_SIZE,
            lr=rate,
            seed=settings.seed,
            accelerator="cpu",
            progress=False,
        )
        data = Splits(scenes.train, scenes.val, scenes.class_names, scenes.test if test else None, task=settings.task)
        with self.bars.watch(each.label, task, train_scenes, val_scenes, prefix):
            return task, fit(task, data, training)

    def _prepare(self, preprocessing: dict[str, Any]) -> None:
        """Training scenes are mirrored, and nothing else: the methods are to differ, not their training."""
        size = self.settings.size
        as_they_are = DenseAugmentation(crop_size=size, scale=(1.0, 1.0), max_class_share=1.0, photometric=False)
        dense = as_they_are if self.settings.task == "segmentation" else DenseAugmentation(short_sides=(size,))
        set_inputs(self.scenes.train, preprocessing, Augmentation(hflip=0.5, dense=dense))
        for part in (self.scenes.val, self.scenes.test):
            set_inputs(part, preprocessing)

    def _saved_bytes(self, task: nn.Module) -> int:
        """Of one training step on a full batch."""
        train = self.scenes.train
        batch = train.collate([train[i] for i in range(min(BATCH_SIZE, len(train)))])
        task.train()
        found = saved_bytes(lambda: task(batch)["loss"], [*task.parameters(), *task.buffers()])
        task.eval()
        return found


def run_dense_demo(
    settings: DenseSettings, make_network: MakeNetwork, output: str | os.PathLike[str], command: str, console: Console
) -> Comparison:
    """Train every method on scenes, and leave `report.html`, `results.json` and one folder per adapter in `output`.

    make_network: builds the pretrained backbone under a head. Otherwise as `deltalens.studies.demo.run_demo`.
    """
    chosen = {name: contender(name, CONTENDERS[settings.task]) for name in settings.methods}
    output = Path(output)
    check_output(output)
    runs: list[RunResult] = []
    answers: dict[str, list[Found]] = {}
    with one_thread(), MethodBars(console, [each.label for each in chosen.values()]) as bars:
        contest = DenseContest(settings, make_network, bars)
        for name, each in chosen.items():
            run, answers[each.label] = contest.run(each, output / name)
            runs.append(run)
    comparison = Comparison(
        title=f"{number_of_ways(len(runs))} to adapt one backbone for {task_words(settings.task)}",
        intro=_intro(settings, runs, contest.scenes, contest.metric_name),
        runs=runs,
        test_images=len(contest.scenes.test),
        conditions=_conditions(settings, contest.scenes, command),
        inputs="scenes",
        metric=contest.metric_name,
    )
    return written(comparison, output, answers_section(answers, contest.scenes.class_names))


def _intro(settings: DenseSettings, runs: list[RunResult], scenes: Any, metric: str) -> str:
    what = WHAT[settings.task]
    head, _ = HEADS[settings.task]
    best = max(runs, key=lambda run: run.accuracy)
    found = "; ".join(f"{run.method} {100 * run.accuracy:.1f} %" for run in runs)
    return (
        f"The backbone {settings.model} ({runs[0].backbone_parameters / 1e6:.1f} million parameters) was trained on "
        f"photographs. Under the head {head}, each method below taught it {what}, from {len(scenes.train):,} generated "
        f"scenes of {settings.size} × {settings.size} pixels: the same scenes and {settings.epochs} epochs for "
        f"all.\n\n{metric} on the test scenes: {found}. Best: {best.method}."
    )


def _conditions(settings: DenseSettings, scenes: Any, command: str) -> dict[str, str]:
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    chosen = (
        "usual ones, for each method the same, smaller for full fine-tuning; not searched: deltalens demo --task "
        f"{settings.task} --tune chooses each method's best on the validation scenes"
    )
    if settings.tune:
        chosen = f"each method's best of {rates} on the validation scenes, found in this run"
    head, options = HEADS[settings.task]
    said = ", ".join(f"{name} {value}" for name, value in options.items())
    mirrored = "mirrored in both directions" if settings.task == "oriented" else "mirrored"
    return {
        "Command": command,
        "Data": f"generated scenes; {len(scenes.train):,} training, {len(scenes.val)} validation and "
        f"{len(scenes.test)} test scenes, classes {', '.join(scenes.class_names)}",
        "Head": f"{head} ({said}); trained by every method",
        "Training": f"{settings.epochs} epochs, batches of {BATCH_SIZE}, AdamW, warm-up and cosine, {mirrored} at "
        f"random, seed {settings.seed}; the last epoch counts",
        "Learning rates": f"{chosen}; the test scenes have no part in it",
        "Measured": "saved for backward: distinct storages that autograd keeps for one step of "
        f"{BATCH_SIZE} scenes, head included, without parameters; time: training and validation, on a machine that may "
        "have had other work",
        **here_and_now(),
    }
