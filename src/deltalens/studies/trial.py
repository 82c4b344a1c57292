"""One run of a study: its folder, what it trains, and what it leaves there."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import deltalens as dl
from deltalens.data.formats import read_data
from deltalens.data.memory import keep_in_memory
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits
from deltalens.data.transforms import eval_resize, eval_transform, image_mode, train_resize, train_transform
from deltalens.lifecycle.atomic import write_text
from deltalens.studies.examples import examples_of, keep_pictures
from deltalens.studies.study import BackboneEntry, DatasetEntry, Study, Training, Variant
from deltalens.tasks import ClassificationTask, task_class
from deltalens.training import TrainingSettings, fit
from deltalens.training.callbacks import as_csv
from deltalens.training.frozen_prefix import FeaturesCannotBeKept
from deltalens.training.output import ADAPTER, Output
from deltalens.training.runner import quiet_lightning
from deltalens.training.settings import PRECISIONS

FAILED = "failed.json"
MakeBackbone = Callable[..., tuple[nn.Module, dict[str, Any]]]  # (name, classes, image size, **options)


@dataclass(frozen=True)
class Run:
    """One training. stage: "search" tries a learning rate and is not tested; "final" uses the chosen one and is.

    rate: of a search, or of a final run whose method has one candidate; None where a search chooses it.
    """

    stage: Literal["search", "final"]
    backbone: BackboneEntry
    dataset: DatasetEntry
    variant: Variant
    seed: int
    folder: Path
    rate: float | None = None

    @property
    def cell(self) -> tuple[str, str, str]:
        """What the runs of one method on one backbone and dataset share."""
        return self.backbone.label, self.dataset.name, self.variant.label

    @property
    def study_folder(self) -> Path:
        """The study's output, of which `folder` is runs/BACKBONE/DATASET/METHOD/NAME."""
        return self.folder.parents[4]

    @property
    def joined(self) -> bool:
        """Whether train and val are one: in final runs of the protocol "trainval"."""
        return self.stage == "final" and self.dataset.protocol == "trainval"

    def describe(self) -> str:
        what = f"search lr {self.rate:g}" if self.stage == "search" else f"seed {self.seed}"
        return f"{self.backbone.label}, {self.dataset.name}, {self.variant.label}, {what}"

    # ------------------------------------------------------------------ what the folder says
    @property
    def output(self) -> Output:
        return Output(self.folder)

    def results(self) -> dict[str, Any] | None:
        """results.json of a finished run, None of another."""
        return self.output.read_results() if self.output.finished else None

    def failure(self) -> str | None:
        """Why the run failed, None where it did not."""
        file = self.folder / FAILED
        return json.loads(file.read_text(encoding="utf-8"))["message"] if file.is_file() else None

    def note_failure(self, error: Exception) -> None:
        """Leave a record of the error."""
        message = " ".join(str(error).split()) or type(error).__name__
        record = {
            "error": type(error).__name__,
            "message": message,
            "traceback": "".join(traceback.format_exception(error)),
        }
        write_text(self.folder / FAILED, json.dumps(record, indent=2) + "\n")

    def forget_failure(self) -> None:
        (self.folder / FAILED).unlink(missing_ok=True)

    def drop_adapter(self) -> None:
        """Remove the tensors and what describes them; results stay."""
        for name in ADAPTER:
            (self.folder / name).unlink(missing_ok=True)

    def has_adapter(self) -> bool:
        return all((self.folder / name).is_file() for name in ADAPTER[:2])


class Workplace:
    """Carries out runs. Reads each dataset once, and keeps the images of the present backbone and dataset in memory
    where they are small.

    make_backbone: (name, number of classes, image size, pretrained=, checkpoint=, ...) -> (model, its preprocessing).
    features: a folder in which the features of frozen networks are kept for the methods that allow it, or None.
    """

    def __init__(
        self,
        study: Study,
        make_backbone: MakeBackbone,
        workers: int = 0,
        accelerator: str = "auto",
        features: str | None = None,
    ):
        self.study, self.make_backbone, self.workers, self.accelerator = study, make_backbone, workers, accelerator
        self.features = features
        self._read: dict[str, Splits] = {}
        self._checked: set[str] = set()
        self._present: tuple[tuple[str, str], dict[bool, Splits]] | None = None

    def check(self, runs: list[Run]) -> None:
        """Read every dataset and build every backbone of these runs once, so that what is wrong with them is said
        before anything is trained."""
        for run in runs:
            splits = self._splits(run.dataset)
            if run.backbone.label not in self._checked:
                self._model(run, len(splits.class_names))
                self._checked.add(run.backbone.label)

    def train(self, run: Run, rate: float, again: bool = False) -> dict[str, Any]:
        """Train, or go on with what was stopped; a final run is tested. again: begin anew. Returns the results."""
        if self.features is not None:
            with contextlib.suppress(FeaturesCannotBeKept):
                return self._fit(run, rate, again, self.features)
        return self._fit(run, rate, again, None)

    def _fit(self, run: Run, rate: float, again: bool, features: str | None) -> dict[str, Any]:
        splits = self._splits(run.dataset)
        model, preprocessing = self._model(run, len(splits.class_names))
        dl.attach(model, list(run.variant.methods))
        task, data = self._task(run, model, preprocessing)
        settings, config = self._settings(run, rate), run_config(self.study, run) | {"lr": rate}
        return fit(
            task,
            data,
            settings,
            run.folder,
            resume=not again,
            overwrite=again,
            config=config,
            cache_features=features,
            more_results=lambda: self._examples(run, task, data),
        )

    def test_trained(self, run: Run, trained: Run, rate: float) -> dict[str, Any]:
        """Finish a final run whose training is that of a search run: same rate, same seed. Only the test is left."""
        results = trained.output.read_results()
        model, preprocessing = self._model(run, results["data"]["classes"])
        dl.load_adapter(model, trained.folder)
        task, data = self._task(run, model, preprocessing)
        settings = self._settings(run, rate)
        output = run.output
        output.prepare(overwrite=True)
        output.write_config(run_config(self.study, run) | {"lr": rate})
        if data.test is not None:
            results["test"] = _tested(task, data, settings)
            results["data"]["test"] = len(data.test)
            measured = {f"test {name}": value for name, value in results["test"].items() if name != "loss"}
            dl.adapter_info(model)["metrics"] |= measured
        results |= self._examples(run, task, data)
        dl.save_pretrained(model, run.folder)
        write_text(output.metrics, as_csv(results["history"]))
        output.write_results(results | {"trained_in": trained.folder.name})
        return results

    def _examples(self, run: Run, task: ClassificationTask, data: Splits) -> dict[str, Any]:
        """What the task of a final run says about the example pictures, which are kept beside the runs."""
        if run.stage == "search":
            return {}
        keep_pictures(run.study_folder, run.dataset.source, self._splits(run.dataset))
        examples = examples_of(task.eval(), data)
        return {} if examples is None else {"examples": examples.to_dict()}

    # ------------------------------------------------------------------ model and data
    def _model(self, run: Run, classes: int) -> tuple[nn.Module, dict[str, Any]]:
        backbone = run.backbone
        torch.manual_seed(run.seed)  # the same head and adapter, whatever ran before
        return self.make_backbone(
            backbone.model,
            classes,
            backbone.img_size,
            pretrained=backbone.pretrained,
            checkpoint=backbone.checkpoint,
            **backbone.options,
        )

    def _task(self, run: Run, model: nn.Module, preprocessing: dict[str, Any]) -> tuple[ClassificationTask, Splits]:
        dl.adapter_info(model)["preprocessing"] = preprocessing
        data = self._data(run, preprocessing)
        task = task_class(data.task)(model, data.class_names, self.study.training.label_smoothing)
        return task, replace(data, test=None) if run.stage == "search" else data

    def _settings(self, run: Run, rate: float) -> TrainingSettings:
        return replace(self.study.training.settings(rate, run.seed, self.workers), accelerator=self.accelerator)

    def _splits(self, dataset: DatasetEntry) -> Splits:
        if dataset.source not in self._read:
            split = self.study.split
            self._read[dataset.source] = read_data(
                dataset.path,
                dataset.format,
                options=ReadOptions(
                    split.val_fraction,
                    split.test_fraction,
                    split.seed,
                    allow_missing_classes=True,
                    download=dataset.download,
                ),
            )
            if dataset.protocol == "trainval" and self._read[dataset.source].test is None:
                raise ValueError(f"{dataset.source} has no test images, and the protocol trainval leaves none for val")
        return self._read[dataset.source]

    def _data(self, run: Run, preprocessing: dict[str, Any]) -> Splits:
        """The dataset with its transforms for this backbone, and train and val together where the run asks for it."""
        key = (run.backbone.label, run.dataset.name)
        if self._present is None or self._present[0] != key:
            self._present = (key, {})  # let go of the images before others are read
        kept = self._present[1]
        if run.joined not in kept:
            training = augmentation(self.study.training, run.dataset)
            augment = train_transform(preprocessing, training.min_crop, training.hflip, training.rand_augment)
            judge = eval_transform(preprocessing)
            shrink, fit_in = train_resize(preprocessing, training.min_crop), eval_resize(preprocessing)
            splits, mode = self._splits(run.dataset), image_mode(preprocessing)

            def prepared(files, transform, resize):
                files = files.subset(range(len(files)))
                files.transform, files.mode = transform, mode
                return keep_in_memory(files, resize)

            splits = run.dataset.subset.take(splits.joined() if run.joined else splits)
            train = prepared(splits.train, augment, shrink)
            val = None if splits.val is None else prepared(splits.val, judge, fit_in)
            test = splits.test
            if kept:
                test = next(iter(kept.values())).test  # the same images, decoded already
            elif test is not None:
                test = prepared(test, judge, fit_in)
            kept[run.joined] = replace(splits, train=train, val=val, test=test)
        return kept[run.joined]


def score(values: dict[str, float]) -> float | None:
    """What runs are compared by: accuracy, or mAP where images have several labels."""
    return values.get("accuracy", values.get("mAP"))


def augmentation(training: Training, dataset: DatasetEntry) -> Training:
    """The study's training with what a dataset says otherwise."""
    own = {name: getattr(dataset, name) for name in ("min_crop", "hflip") if getattr(dataset, name) is not None}
    return replace(training, **own)


def run_config(study: Study, run: Run) -> dict[str, Any]:
    """All that decides a run's outcome but its learning rate: what config.yaml of its folder begins with."""
    return {
        "backbone": asdict(run.backbone),
        "dataset": run.dataset.name,
        **({} if run.dataset.subset.whole else {"training_subset": asdict(run.dataset.subset)}),
        "format": run.dataset.format,
        "protocol": run.dataset.protocol,
        "methods": run.variant.to_dict(),
        "training": asdict(augmentation(study.training, run.dataset)),
        "split": asdict(study.split),
        "stage": run.stage,
        "seed": run.seed,
    }


def _tested(task: nn.Module, data: Splits, settings: TrainingSettings) -> dict[str, float]:
    """The runner's test of a task that is trained already."""
    import lightning.pytorch as pl

    from deltalens.training.module import TaskModule

    with quiet_lightning():
        trainer = pl.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            precision=PRECISIONS[settings.precision],
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        module = TaskModule(task, data, settings)
        values = trainer.test(module, verbose=False)[0]
        module.cpu()
    return {name.removeprefix("test_"): value for name, value in values.items()}
