"""The demonstration of CLIP: methods learn half of the classes from few pictures, and are asked for the other half."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

import deltalens as dl
from deltalens.data.arrays import ArrayDataset
from deltalens.data.drawn_classes import BASE, NOVEL, DrawnClasses, draw_classes
from deltalens.lifecycle.atomic import write_text
from deltalens.lifecycle.cache_search import search_cache
from deltalens.lifecycle.files import TENSORS
from deltalens.methods import CLIPAdapterConfig, CoOpConfig, LoRAConfig, MMAConfig, TipAdapterConfig
from deltalens.studies.clip_demo_report import write_clip_report
from deltalens.studies.clip_demo_results import ClipComparison, ClipRun, share_text
from deltalens.studies.demo import (
    BATCH_SIZE,
    RATES,
    REPORT,
    RESULTS,
    Contender,
    Contest,
    MakeBackbone,
    check_output,
    contender,
    here_and_now,
    number_of_ways,
    one_thread,
)
from deltalens.studies.pictures import choose_pictures
from deltalens.studies.results import Epoch, Picture, Prediction
from deltalens.studies.terminal import MethodBars
from deltalens.tasks import ClassificationTask

TEMPLATE = "a photo of a {}."
ZERO_SHOT, ZERO_SHOT_LABEL = "zero_shot", "Zero-shot CLIP"
PICTURES = 5  # of each half

MakeClip = Callable[
    [list[str], str], tuple[nn.Module, dict[str, Any]]
]  # class names, template -> (model, preprocessing)

# Learning rates: the best of two or three of RATES on the base classes' validation pictures, the smaller where they
# differ by one picture of the hundred; `--tune` tries all.
CONTENDERS = {
    "coop": Contender("CoOp", CoOpConfig(init="a photo of a"), 1e-1, {"words": 4}),
    "clip_adapter": Contender("CLIP-Adapter", CLIPAdapterConfig(ratio=0.6), 1e-2, {"ratio": 0.6}),
    "tip_adapter": Contender("Tip-Adapter-F", TipAdapterConfig(train_keys=True, passes=1), 1e-2, {}),
    "lora": Contender("CLIP-LoRA", LoRAConfig.clip(), 1e-2, {"rank": 2}),
    "mma": Contender("MMA", MMAConfig(start=1, bottleneck=16, alpha=0.1), 3e-2, {"bottleneck": 16, "alpha": 0.1}),
}


@dataclass(frozen=True)
class ClipSettings:
    """What is compared. methods: "zero_shot" trains nothing. shots: training pictures of each base class. tune: look
    for every method's learning rate instead of taking the known ones."""

    model: str = "deltalens/clip-mini"
    methods: tuple[str, ...] = (ZERO_SHOT, "coop", "clip_adapter", "tip_adapter", "lora", "mma")
    epochs: int = 10
    shots: int = 16
    seed: int = 0
    tune: bool = False

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods is empty; name at least one, such as zero_shot or mma")
        if len(set(self.methods)) != len(self.methods):
            raise ValueError(f"a method can take part once, got {', '.join(self.methods)}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if self.shots < 1:
            raise ValueError(f"shots must be at least 1, got {self.shots}")


def run_clip_demo(
    settings: ClipSettings, make_clip: MakeClip, output: str | os.PathLike, command: str, console: Console
) -> ClipComparison:
    """Train every method on the base classes, ask all for base and novel classes, and leave `report.html`,
    `results.json` and one folder per adapter in `output`.

    make_clip: builds the pretrained model for class names and a template; called afresh for every method. command: what
    the report names as the command. One thread, as in `run_demo`. Raises FileExistsError where the folder holds
    something that is not an earlier demo, TypeError for a model without texts.
    """
    chosen = {name: contender(name, CONTENDERS) for name in settings.methods if name != ZERO_SHOT}
    output = Path(output)
    check_output(output)
    names = [look.name for look in BASE]
    _, preprocessing = make_clip(names, TEMPLATE)
    data = draw_classes(preprocessing["input_size"][-1], settings.shots)
    labels = [ZERO_SHOT_LABEL if name == ZERO_SHOT else chosen[name].label for name in settings.methods]
    with one_thread(), MethodBars(console, labels) as bars:
        contest = BaseToNovel(settings, lambda _: make_clip(names, TEMPLATE), preprocessing, data, bars)
        found = [
            contest.zero_shot() if name == ZERO_SHOT else contest.learn(chosen[name], output / name)
            for name in settings.methods
        ]
    comparison = _comparison(settings, found, data, command)
    write_text(output / RESULTS, json.dumps(comparison.to_dict(), indent=2) + "\n")
    write_clip_report(comparison, output / REPORT)
    return comparison


class BaseToNovel(Contest):
    """Training as for the other demonstration; the test is on two halves of classes."""

    def __init__(
        self,
        settings: ClipSettings,
        make_backbone: MakeBackbone,
        preprocessing: dict[str, Any],
        data: DrawnClasses,
        bars: MethodBars,
    ):
        super().__init__(settings, make_backbone, preprocessing, data, bars)
        self.novel, self.novel_names = self._dataset(data.novel), list(data.novel_names)
        self.base_labels = np.array(data.class_names)[data.test.labels]
        self.novel_labels = np.array(data.novel_names)[data.novel.labels]

    def zero_shot(self) -> ClipRun:
        """CLIP as it is."""
        model, _ = self.make_backbone(len(self.class_names))
        backbone = sum(parameter.numel() for parameter in model.parameters())
        return self._asked(ZERO_SHOT_LABEL, ClassificationTask(model, self.class_names), {}, 0, backbone)

    def learn(self, each: Contender, folder: Path) -> ClipRun:
        """Train a method, save its adapter, and ask it for both halves."""
        rate = self.tuned_rate(each) if self.settings.tune else each.learning_rate
        task, results = self.fit(each, rate, None)
        shown = {**each.shown, "lr": rate}
        if isinstance(each.config, TipAdapterConfig):
            best = search_cache(task.model, [self._all(self.val)])
            shown |= {"alpha": round(best.alpha, 2), "beta": round(best.beta, 2)}
            results["val"] = {"accuracy": best.accuracy}
        count = dl.count_parameters(task.model)
        run = self._asked(each.label, task, shown, count.adapter, count.backbone)
        results["test"] = {"accuracy": run.base}
        self._save(task, results, folder)
        return replace(
            run,
            seconds=results["seconds"]["training"],
            adapter_bytes=(folder / TENSORS).stat().st_size,
            epochs=[Epoch(row["train_loss"], row["val_accuracy"]) for row in results["history"]],
            folder=folder.name,
        )

    def _asked(
        self, label: str, task: ClassificationTask, shown: dict[str, Any], parameters: int, backbone: int
    ) -> ClipRun:
        """Answers on both halves; the model has the base classes again afterwards."""
        model: Any = task.model
        base, novel, refusal = self._answers(task, self.test), None, None
        try:
            model.set_classes(self.novel_names)
            novel = self._answers(ClassificationTask(model, self.novel_names), self.novel)
        except ValueError as error:  # what belongs to its classes says so
            refusal = re.sub(r" \([^)]*\)", "", str(error).partition(":")[0])  # without the names in brackets
        model.set_classes(self.class_names)
        run = ClipRun(
            method=label,
            settings=shown,
            parameters=parameters,
            backbone_parameters=backbone,
            base=_accuracy(base, self.base_labels),
            novel=None if novel is None else _accuracy(novel, self.novel_labels),
            seconds=0.0,
            adapter_bytes=0,
            base_answers=base,
            novel_answers=novel or [],
            refusal=refusal,
        )
        self.bars.finish(label, f"base {share_text(run.base)}, novel {share_text(run.novel)}")
        return run

    @staticmethod
    def _all(images: ArrayDataset) -> tuple[torch.Tensor, torch.Tensor]:
        pictures, labels = zip(*(images[i] for i in range(len(images))), strict=True)
        return torch.stack(pictures), torch.tensor(labels)


def _accuracy(answers: list[Prediction], truth: np.ndarray) -> float:
    return float(np.mean([said.name == name for said, name in zip(answers, truth, strict=True)]))


# ------------------------------------------------------------------ all of them
def _comparison(settings: ClipSettings, runs: list[ClipRun], data: DrawnClasses, command: str) -> ClipComparison:
    base_names = np.array(data.class_names)[data.test.labels]
    novel_names = np.array(data.novel_names)[data.novel.labels]
    base = _chosen([run.base_answers for run in runs], base_names, data.test.labels)
    answering = [run.novel_answers for run in runs if run.novel is not None]
    novel = _chosen(answering, novel_names, data.novel.labels) if answering else []
    return ClipComparison(
        title=f"{number_of_ways(len(runs))} to adapt CLIP with few pictures",
        intro=_intro(settings, runs, data),
        runs=[
            replace(
                run,
                base_answers=[run.base_answers[i] for i in base],
                novel_answers=[run.novel_answers[i] for i in novel] if run.novel is not None else [],
            )
            for run in runs
        ],
        base_images=len(data.test),
        novel_images=len(data.novel),
        base_pictures=[Picture(data.test.images[i], str(base_names[i])) for i in base],
        novel_pictures=[Picture(data.novel.images[i], str(novel_names[i])) for i in novel],
        pictures_note="Test pictures as the model sees them, each with every method's answer among the classes of its "
        "half and its probability. Most are chosen to tell the methods apart, so that errors are more frequent here "
        "than in the table.",
        conditions=_conditions(settings, data, command),
    )


def _chosen(answers: list[list[Prediction]], names: np.ndarray, labels: np.ndarray) -> list[int]:
    right = np.array([[said.name == name for said, name in zip(each, names, strict=True)] for each in answers])
    return choose_pictures(right, labels, PICTURES)


def _intro(settings: ClipSettings, runs: list[ClipRun], data: DrawnClasses) -> str:
    classes = len(data.class_names)
    return (
        f"{settings.model} ({runs[0].backbone_parameters / 1e6:.1f} million parameters) compares pictures with texts. "
        "It was trained on photographs and on clean drawings of shapes. Here the shapes are chalk-like, on dark "
        "ground, and in combinations of colour and shape that it has not seen. Each method learned "
        f"{classes} classes from {settings.shots} pictures of each, and was then asked for these (base) and for "
        f"{classes} others (novel), of which it was given the names alone.\n\n{_finding(runs)}"
    )


def _finding(runs: list[ClipRun]) -> str:
    before = next((run for run in runs if not run.parameters), None)
    trained = [run for run in runs if run.parameters and run.novel is not None]
    if before is None or not trained:
        return ""
    best = max(trained, key=lambda run: run.mean or 0.0)
    return (
        f"Untrained, CLIP recognised {share_text(before.base)} of the base and {share_text(before.novel)} of the novel "
        f"pictures; with {best.method}, which trains {best.percent:.1f} % of its parameters, it is "
        f"{share_text(best.base)} and {share_text(best.novel)}."
    )


def _conditions(settings: ClipSettings, data: DrawnClasses, command: str) -> dict[str, str]:
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    found = f"the best of {rates}, found in this run" if settings.tune else "best of two or three, chosen beforehand"
    return {
        "Command": command,
        "Base classes": ", ".join(data.class_names),
        "Novel classes": ", ".join(data.novel_names),
        "Data": f"drawn by deltalens.data.drawn_classes; of each base class {settings.shots} training, "
        f"{len(data.val) // len(BASE)} validation and {len(data.test) // len(BASE)} test pictures, of each novel class "
        f"{len(data.novel) // len(NOVEL)} test pictures",
        "Texts": f"“{TEMPLATE}”, but for methods that learn words of their own",
        "Training": f"{settings.epochs} epochs, batches of {BATCH_SIZE}, AdamW, warm-up and cosine, no augmentation, "
        f"seed {settings.seed}; the last epoch counts",
        "Learning rates": f"each method's {found} on the base classes' validation pictures; "
        "Tip-Adapter's alpha and beta likewise, in each run; test pictures and novel classes have no part in it",
        "Measured": "shares are of both towers with the whole token table; time: training and validation, on "
        "a machine that may have had other work",
        **here_and_now(),
    }
