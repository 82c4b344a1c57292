"""The demonstration: several methods adapt one small backbone to handwritten digits, on equal terms."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import nn

import deltalens as dl
from deltalens.data.arrays import ArrayDataset
from deltalens.data.digits import Digits, Images, load_digits
from deltalens.data.drawn_classes import DrawnClasses
from deltalens.data.solids import Solids
from deltalens.data.splits import Splits
from deltalens.data.transforms import eval_transform
from deltalens.lifecycle.atomic import write_text
from deltalens.lifecycle.files import TENSORS
from deltalens.methods import BitFitConfig, FullConfig, LinearConfig, LoRAConfig, Method, MonaConfig, VPTConfig
from deltalens.studies.measure import saved_bytes
from deltalens.studies.pictures import choose_pictures
from deltalens.studies.report import write_report
from deltalens.studies.results import Comparison, Epoch, Picture, Prediction, RunResult
from deltalens.studies.terminal import MethodBars
from deltalens.tasks import ClassificationTask
from deltalens.training import TrainingSettings, fit
from deltalens.training.callbacks import NonFiniteLossError
from deltalens.training.optim import default_learning_rate

REPORT, RESULTS = "report.html", "results.json"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # every method's choice is from these
BATCH_SIZE = 32
PICTURES = 10

MakeBackbone = Callable[[int], tuple[nn.Module, dict[str, Any]]]  # number of classes -> (model, its preprocessing)


@dataclass(frozen=True)
class Contender:
    """A method as the demo runs it. shown: the settings worth naming."""

    label: str
    config: Method
    learning_rate: float
    shown: dict[str, Any]


# Learning rates: the best of RATES on the validation images, as found by `deltalens demo --tune` with seed 0.
CONTENDERS = {
    "linear": Contender("Linear", LinearConfig(), 1e-1, {}),
    "bitfit": Contender("BitFit", BitFitConfig(), 3e-2, {}),
    "lora": Contender("LoRA", LoRAConfig(r=8, alpha=8.0), 1e-2, {"rank": 8}),
    "vpt": Contender("VPT-deep", VPTConfig(num_tokens=10), 1e-2, {"prompts": 10}),
    "mona": Contender("Mona", MonaConfig(bottleneck=16), 1e-2, {"bottleneck": 16}),
    "full": Contender("Full", FullConfig(), 3e-4, {}),
}


def contender(name: str, known: Mapping[str, Contender] = CONTENDERS) -> Contender:
    """A demo's settings of a method; for others than the known ones their own defaults. ValueError with the nearest
    names for an unknown one."""
    if name in known:
        return known[name]
    config = dl.make_config(name)
    return Contender(name, config, default_learning_rate([config]), {})


@dataclass(frozen=True)
class DemoSettings:
    """What is compared, and with how much training. tune: look for every method's learning rate instead of taking the
    known ones."""

    model: str = "deltalens/vit-mini"
    methods: tuple[str, ...] = ("linear", "lora", "vpt", "mona", "full")
    epochs: int = 12
    train_images: int = 400
    seed: int = 0
    tune: bool = False

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods is empty; name at least one, such as linear or mona")
        if len(set(self.methods)) != len(self.methods):
            raise ValueError(f"a method can take part once, got {', '.join(self.methods)}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")


def run_demo(
    settings: DemoSettings, make_backbone: MakeBackbone, output: str | os.PathLike, command: str, console: Console
) -> Comparison:
    """Train every method, and leave `report.html`, `results.json` and one folder per adapter in `output`.

    make_backbone: builds the pretrained model for a number of classes; called afresh for every method. command: what
    the report names as the command. Runs on one thread: the tensors are so small that more gain little and, on a busy
    machine, wait for each other; and the same settings then give the same accuracies however many cores there are.

    Raises FileExistsError where the folder holds something that is not an earlier demo.
    """
    chosen = {name: contender(name) for name in settings.methods}
    output = Path(output)
    check_output(output)
    _, preprocessing = make_backbone(len(Digits.class_names))
    digits = load_digits(preprocessing["input_size"][-1], settings.train_images)
    with one_thread(), MethodBars(console, [each.label for each in chosen.values()]) as bars:
        runs, answers = Contest(settings, make_backbone, preprocessing, digits, bars).run_all(chosen, output)
    return written(_comparison(settings, runs, answers, digits, command), output)


def best_rate(trained_with: Callable[[float], float]) -> float:
    """The learning rate among `RATES` that gives the largest value; the smallest of equals. A rate at which the loss
    becomes infinite is out; where all are, the last one's error is raised."""
    found: dict[float, float] = {}
    for rate in RATES:
        try:
            found[rate] = trained_with(rate)
        except NonFiniteLossError:
            if rate == RATES[-1] and not found:
                raise
    return max(found, key=lambda rate: (found[rate], -rate))


def written(comparison: Comparison, output: Path, answers: str = "") -> Comparison:
    """The comparison, after `results.json` and `report.html` were written. answers: a section of the report."""
    write_text(output / RESULTS, json.dumps(comparison.to_dict(), indent=2) + "\n")
    write_report(comparison, output / REPORT, answers)
    return comparison


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the context torch uses one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------ one method
class Budget(Protocol):
    """What a contest reads of a demonstration's settings."""

    @property
    def epochs(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def tune(self) -> bool: ...


class Contest:
    """What is the same for all methods: images, training, and how results are measured."""

    batch_size = BATCH_SIZE

    def __init__(
        self,
        settings: Budget,
        make_backbone: MakeBackbone,
        preprocessing: dict[str, Any],
        data: Digits | DrawnClasses | Solids,
        bars: MethodBars,
    ):
        self.settings, self.make_backbone, self.bars = settings, make_backbone, bars
        self.preprocessing, self.class_names = preprocessing, list(data.class_names)
        self.train, self.val, self.test = (self._dataset(part) for part in (data.train, data.val, data.test))

    def _dataset(self, part: Images) -> ArrayDataset:
        """Without augmentation: the images are few, and the methods are to differ, not their training."""
        return ArrayDataset(part.images, part.labels.tolist(), eval_transform(self.preprocessing))

    def run_all(self, chosen: Mapping[str, Contender], output: Path) -> tuple[list[RunResult], list[list[Prediction]]]:
        """Results and answers of all methods, whose adapters go to folders of their names."""
        found = [self.run(each, output / name) for name, each in chosen.items()]
        return [run for run, _ in found], [answers for _, answers in found]

    def run(self, each: Contender, folder: Path) -> tuple[RunResult, list[Prediction]]:
        """Train a method, save its adapter, and say how it went and what it answers for every test image."""
        rate = self.tuned_rate(each) if self.settings.tune else each.learning_rate
        task, results = self.fit(each, rate, self.test)
        self.bars.finish(each.label, f"test {100 * results['test']['accuracy']:.1f} %")
        self._save(task, results, folder)
        count = dl.count_parameters(task.model)
        answers = self._answers(task, self.test)
        run = RunResult(
            method=each.label,
            settings={**each.shown, "lr": rate},
            adapter_parameters=count.adapter,
            head_parameters=count.head,
            backbone_parameters=count.backbone,
            accuracy=results["test"]["accuracy"],
            seconds=results["seconds"]["training"] + results.get("features", {}).get("seconds", 0.0),
            saved_bytes=self._saved_bytes(task),
            adapter_bytes=(folder / TENSORS).stat().st_size,
            epochs=[Epoch(row["train_loss"], row["val_accuracy"]) for row in results["history"]],
            folder=folder.name,
        )
        return run, answers

    def tuned_rate(self, each: Contender) -> float:
        """The rate with the best validation accuracy after the last epoch. The test images are not seen."""

        def accuracy(rate: float) -> float:
            return self.fit(each, rate, None, prefix=f"rate {rate:g}, ")[1]["val"]["accuracy"]

        return best_rate(accuracy)

    def fit(
        self, each: Contender, rate: float, test: ArrayDataset | None, prefix: str = ""
    ) -> tuple[ClassificationTask, dict[str, Any]]:
        """A trained task, and the runner's results."""
        settings = self.settings
        torch.manual_seed(settings.seed)  # the same head, and the same adapter, whatever ran before
        model, _ = self.make_backbone(len(self.class_names))
        task = ClassificationTask(dl.attach(model, each.config), self.class_names)
        training = TrainingSettings(
            epochs=settings.epochs,
            batch_size=self.batch_size,
            lr=rate,
            seed=settings.seed,
            accelerator="cpu",
            progress=False,
        )
        data = Splits(self.train, self.val, self.class_names, test)
        with self.bars.watch(each.label, task, settings.epochs * len(self.train), len(self.val), prefix):
            return task, fit(task, data, training, cache_features=self.features_folder(each))

    def features_folder(self, each: Contender) -> Path | None:
        """Where features of a frozen network are kept, for methods that can; None to compute them in every epoch."""
        return None

    def _save(self, task: ClassificationTask, results: dict[str, Any], folder: Path) -> None:
        dl.adapter_info(task.model).update(
            task=task.name,
            class_names=self.class_names,
            preprocessing=self.preprocessing,
            metrics={f"{part} accuracy": results[part]["accuracy"] for part in ("val", "test")},
        )
        dl.save_pretrained(task.model, folder)

    @torch.no_grad()
    def _answers(self, task: ClassificationTask, images: ArrayDataset) -> list[Prediction]:
        """The most probable class of every image."""
        task.eval()
        found = []
        for start in range(0, len(images), 250):
            stop = min(start + 250, len(images))
            batch = torch.stack([images[i][0] for i in range(start, stop)])
            found += [Prediction(*best[0]) for best in task.decode(task.model(batch))]
        return found

    def _saved_bytes(self, task: ClassificationTask) -> int:
        """Of one training step on a full batch."""
        images, labels = zip(*(self.train[i] for i in range(min(self.batch_size, len(self.train)))), strict=True)
        batch = torch.stack(images), torch.tensor(labels)
        task.train()
        return saved_bytes(lambda: task(batch)["loss"], [*task.parameters(), *task.buffers()])


# ------------------------------------------------------------------ all of them
def check_output(output: Path) -> None:
    """Refuse a folder with anything but what a demo, finished or stopped, has left there; before anything slow."""
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; --output must be a folder")
    own = {REPORT, RESULTS, *dl.list_methods()}
    others = (
        sorted(p.name for p in output.iterdir() if p.name not in own and p.suffix != ".tmp") if output.exists() else []
    )
    if others:
        raise FileExistsError(
            f"{output} holds files that are no demo's ({', '.join(others[:3])}); name another --output"
        )


def _comparison(
    settings: DemoSettings, runs: list[RunResult], answers: list[list[Prediction]], digits: Digits, command: str
) -> Comparison:
    truth = np.array([digits.class_names[label] for label in digits.test.labels])
    shown, choice = shown_answers(answers, truth, np.asarray(digits.test.labels))
    return Comparison(
        title=f"{number_of_ways(len(runs))} to adapt one backbone",
        intro=_intro(settings, runs, digits),
        runs=[replace(run, predictions=[answer[i] for i in shown]) for run, answer in zip(runs, answers, strict=True)],
        test_images=len(digits.test),
        pictures=[Picture(digits.test.images[index], str(truth[index])) for index in shown],
        pictures_note="Test images as the backbone sees them, each with every method's answer and its probability. "
        + choice,
        conditions=_conditions(settings, digits, command),
    )


def shown_answers(answers: list[list[Prediction]], truth: np.ndarray, labels: np.ndarray) -> tuple[list[int], str]:
    """(test inputs that the report shows, how they were chosen)."""
    correct = np.array([[said.name == name for said, name in zip(answer, truth, strict=True)] for answer in answers])
    shown = choose_pictures(correct, labels, PICTURES)
    easy = sum(correct[:, index].all() for index in shown)
    return shown, (
        f"{easy} of them every method gets right; the other {len(shown) - easy} are chosen to tell the methods apart, "
        "so errors are more frequent here than in the table."
    )


def _intro(settings: DemoSettings, runs: list[RunResult], digits: Digits) -> str:
    edge, backbone = digits.train.images.shape[1], runs[0].backbone_parameters
    return (
        f"The backbone {settings.model} ({backbone / 1e6:.1f} million parameters) was trained on photographs. Each "
        f"method below taught it handwritten digits from {len(digits.train):,} scans of 8 × 8 pixels, enlarged to "
        f"{edge} × {edge}: the same images and {settings.epochs} epochs for all.\n\n{finding(runs)}"
    )


def finding(runs: list[RunResult], inputs: str = "images") -> str:
    """The best method in one sentence, beside the baselines. inputs: what was classified."""
    best = max((run for run in runs if run.percent < 100), key=lambda run: run.accuracy, default=runs[0])
    text = f"{best.method} classified {100 * best.accuracy:.1f} % of the test {inputs} correctly"
    if best.adapter_parameters:
        text += f" by training {best.percent:.1f} % of the backbone's parameters"
    baselines = {
        "a linear classifier on frozen features": [run for run in runs if run.adapter_parameters == 0],
        "full fine-tuning": [run for run in runs if run.percent >= 100],
    }
    for what, found in baselines.items():
        text += "".join(f"; {what} {100 * run.accuracy:.1f} %" for run in found if run is not best)
    return f"{text}."


def _conditions(settings: DemoSettings, digits: Digits, command: str) -> dict[str, str]:
    found = "in this run" if settings.tune else "beforehand with deltalens demo --tune"
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    return {
        "Command": command,
        "Data": f"scikit-learn's handwritten digits; {len(digits.train):,} training, {len(digits.val)} validation and "
        f"{len(digits.test)} test images, split once, classes in proportion",
        "Training": f"{settings.epochs} epochs, batches of {BATCH_SIZE}, AdamW, warm-up and cosine, no augmentation, "
        f"seed {settings.seed}; the last epoch counts",
        "Learning rates": f"each method's best of {rates} on the validation images, found {found}; the test images "
        "have no part in it",
        "Measured": "saved for backward: distinct storages that autograd keeps for one step of "
        f"{BATCH_SIZE} images, without parameters; time: training and validation, on a machine that may have had "
        "other work",
        **here_and_now(),
    }


def here_and_now() -> dict[str, str]:
    """Versions, machine and date, as conditions of a comparison."""
    versions = {"deltalens": dl.__version__, "torch": torch.__version__, "Python": platform.python_version()}
    today = datetime.now()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Machine": f"{platform.system()}, {platform.machine()}, {cores} CPU cores, of which one was used",
        "Date": f"{today.day} {today:%B %Y}",
    }


def number_of_ways(count: int) -> str:
    words = ("One way", "Two ways", "Three ways", "Four ways", "Five ways", "Six ways")
    return words[count - 1] if count <= len(words) else f"{count} ways"
