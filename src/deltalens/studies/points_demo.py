"""The demonstration of point clouds: several methods teach one small point transformer ten generated solids."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from deltalens.data.clouds import CloudArrays
from deltalens.data.inputs import POINTS, kept_inputs, kind_of
from deltalens.data.solids import CLASS_NAMES, Solids, make_solids
from deltalens.methods import AdapterXConfig, AdaptFormerConfig, FullConfig, LinearConfig, LoRAConfig, VPTConfig
from deltalens.studies.cloud_plots import cloud_picture
from deltalens.studies.demo import (
    RATES,
    Contender,
    Contest,
    DemoSettings,
    MakeBackbone,
    check_output,
    contender,
    finding,
    here_and_now,
    number_of_ways,
    one_thread,
    shown_answers,
    written,
)
from deltalens.studies.results import Comparison, Picture, Prediction, RunResult
from deltalens.studies.terminal import MethodBars

BATCH_SIZE = 10  # small, so that few clouds and epochs give enough steps

# Learning rates, with the defaults below and seed 0: the best on the validation clouds of two of RATES, of three for
# Adapter-X, next to each other; the smallest of equals. Full's was not searched. `deltalens demo --task points --tune`
# tries all of them.
CONTENDERS = {
    "linear": Contender("Linear", LinearConfig(), 3e-2, {}),
    "lora": Contender("LoRA", LoRAConfig(r=8, alpha=8.0), 1e-2, {"rank": 8}),
    "vpt": Contender("VPT-deep", VPTConfig(num_tokens=10), 3e-2, {"prompts": 10}),
    "adaptformer": Contender("AdaptFormer", AdaptFormerConfig(bottleneck=16), 3e-2, {"bottleneck": 16}),
    "adapter_x": Contender("Adapter-X", AdapterXConfig(), 1e-2, {"experts": AdapterXConfig().experts}),
    "full": Contender("Full", FullConfig(), 1e-3, {}),
}


@dataclass(frozen=True)
class PointsSettings(DemoSettings):
    """As for the other demonstration; train_images counts clouds."""

    model: str = "deltalens/points-mini"
    methods: tuple[str, ...] = ("linear", "lora", "vpt", "adaptformer", "adapter_x", "full")
    epochs: int = 10
    train_images: int = 150


class PointsContest(Contest):
    """Training as for the other demonstration, on clouds. features: a folder for the features that Linear keeps; where
    only the head is trained, the network's answers are the same in every epoch, and most of the time is theirs."""

    batch_size = BATCH_SIZE

    def __init__(self, *args: Any, features: Path | None = None):
        super().__init__(*args)
        self.features = features

    def features_folder(self, each: Contender) -> Path | None:
        return self.features if isinstance(each.config, LinearConfig) else None

    def _dataset(self, part: CloudArrays) -> Any:  # type: ignore[override]
        """Without augmentation, resampled once."""
        return kept_inputs(part, self.preprocessing)


def run_points_demo(
    settings: PointsSettings, make_backbone: MakeBackbone, output: str | os.PathLike, command: str, console: Console
) -> Comparison:
    """Train every method on solids, and leave `report.html`, `results.json` and one folder per adapter in `output`.

    As `deltalens.studies.demo.run_demo`. Raises ValueError for a model that takes no clouds.
    """
    chosen = {name: contender(name, CONTENDERS) for name in settings.methods}
    output = Path(output)
    check_output(output)
    _, preprocessing = make_backbone(len(CLASS_NAMES))
    if kind_of(preprocessing) != POINTS:
        raise ValueError(f"{settings.model} takes images: --task points needs a model of points, deltalens/points-mini")
    solids = make_solids(settings.train_images, preprocessing["num_points"])
    labels = [each.label for each in chosen.values()]
    with one_thread(), tempfile.TemporaryDirectory() as features, MethodBars(console, labels) as bars:
        contest = PointsContest(settings, make_backbone, preprocessing, solids, bars, features=Path(features))
        runs, answers = contest.run_all(chosen, output)
    return written(_comparison(settings, runs, answers, solids, command), output)


def _comparison(
    settings: PointsSettings, runs: list[RunResult], answers: list[list[Prediction]], solids: Solids, command: str
) -> Comparison:
    labels = np.array(solids.test.labels)
    truth = np.array(solids.class_names)[labels]
    shown, choice = shown_answers(answers, truth, labels)
    return Comparison(
        title=f"{number_of_ways(len(runs))} to adapt one point transformer",
        intro=_intro(settings, runs, solids),
        runs=[replace(run, predictions=[answer[i] for i in shown]) for run, answer in zip(runs, answers, strict=True)],
        test_images=len(solids.test),
        pictures=[Picture(cloud_picture(solids.test.cloud(index)), str(truth[index])) for index in shown],
        pictures_note="Test clouds, near points dark, each with every method's answer and its probability. " + choice,
        conditions=_conditions(settings, solids, command),
        inputs="clouds",
    )


def _intro(settings: PointsSettings, runs: list[RunResult], solids: Solids) -> str:
    return (
        f"The backbone {settings.model} ({runs[0].backbone_parameters / 1e6:.1f} million parameters) takes clouds of "
        f"points. Each method below taught it {len(solids.class_names)} kinds of generated solids, stretched, turned, "
        f"tilted, cut and noisy, from {len(solids.train):,} clouds: the same clouds and {settings.epochs} epochs for "
        f"all.\n\n{finding(runs, 'clouds')}"
    )


def _conditions(settings: PointsSettings, solids: Solids, command: str) -> dict[str, str]:
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    chosen = "each method's best of two or three on the validation clouds, found beforehand; Full's 0.001 and those of "
    chosen += "methods that are not in the default demo are usual ones (deltalens demo --task points --tune searches)"
    if settings.tune:
        chosen = f"each method's best of {rates} on the validation clouds; the test clouds have no part in it"
    return {
        "Command": command,
        "Data": f"generated solids of {len(solids.train.cloud(0)):,} points; {len(solids.train):,} training, "
        f"{len(solids.val)} validation and {len(solids.test)} test clouds",
        "Training": f"{settings.epochs} epochs, batches of {BATCH_SIZE}, AdamW, warm-up and cosine, no augmentation, "
        f"seed {settings.seed}; the last epoch counts",
        "Learning rates": chosen,
        "Measured": "saved for backward: distinct storages that autograd keeps for one step of "
        f"{BATCH_SIZE} clouds, without parameters; time: training and validation, Linear's with features that are "
        "computed once and kept; on a machine that may have had other work",
        **here_and_now(),
    }
