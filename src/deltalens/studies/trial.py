"""One run of a study: its folder, what it trains, and what it leaves there."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import deltalens as dl
from deltalens.data.dense_formats import DENSE_TASKS
from deltalens.data.prompts import class_texts
from deltalens.data.splits import Splits
from deltalens.lifecycle.atomic import write_text
from deltalens.studies.candidates import Candidate, Values, values_text
from deltalens.studies.examples import examples_of, keep_pictures
from deltalens.studies.run_data import RunData
from deltalens.studies.study import BackboneEntry, DatasetEntry, Study, Training, Variant
from deltalens.studies.transfer import tested_elsewhere
from deltalens.tasks import ClassificationTask, task_class
from deltalens.tasks.made import make_task
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
    """One training. stage: "search" tries a candidate and is not tested; "final" uses the chosen one and is.

    candidate: of a search, or of a final run whose method has but one; None where a search chooses it.
    """

    stage: Literal["search", "final"]
    backbone: BackboneEntry
    dataset: DatasetEntry
    variant: Variant
    seed: int
    folder: Path
    candidate: Candidate | None = None

    @property
    def values(self) -> Values | None:
        """The candidate's values by name."""
        return None if self.candidate is None else self.candidate.values

    @property
    def rate(self) -> float | None:
        """The candidate's learning rate."""
        return None if self.values is None else self.values["lr"]

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

    @property
    def backbone_options(self) -> dict[str, Any]:
        """For the backbone's constructor: its own and those of the row."""
        return {**self.backbone.options, **self.variant.backbone}

    def describe(self) -> str:
        what = f"search {values_text(self.candidate.shown)}" if self.stage == "search" else f"seed {self.seed}"
        return f"{self.backbone.label}, {self.dataset.name}, {self.variant.label}, {what}"

    # ------------------------------------------------------------------ what the folder says
    @property
    def output(self) -> Output:
        return Output(self.folder)

    def results(self) -> dict[str, Any] | None:
        """results.json of a finished run, None of another."""
        try:
            return self.output.read_results()
        except FileNotFoundError:  # also where another process begins the run anew just now
            return None

    def failure(self) -> str | None:
        """Why the run failed, None where it did not."""
        try:
            return json.loads((self.folder / FAILED).read_text(encoding="utf-8"))["message"]
        except FileNotFoundError:
            return None

    def done_with(self, values: Values | None) -> bool:
        """Whether the finished or failed run was one of these values. Runs of earlier versions searched the rate only,
        and do not say of what rate a failure was."""
        results = self.results()
        if results is not None:
            return results.get("values", {"lr": results["settings"]["lr"]}) == values
        try:
            return json.loads((self.folder / FAILED).read_text(encoding="utf-8")).get("values", values) == values
        except FileNotFoundError:  # another process begins the run anew just now
            return False

    def goes_on_with(self, values: Values) -> bool:
        """Whether what the folder holds of a run that was stopped was trained with these values."""
        earlier = self.output.read_config()
        return not self.output.finished and (
            earlier is None or earlier.get("values", {"lr": earlier.get("lr")}) == values
        )

    def note_failure(self, error: Exception, candidate: Candidate | None = None) -> None:
        """Leave a record of the error. candidate: that the run was trained with, where it is not its own."""
        candidate = candidate or self.candidate
        message = " ".join(str(error).split()) or type(error).__name__
        record = {
            "error": type(error).__name__,
            "message": message,
            "traceback": "".join(traceback.format_exception(error)),
            "values": None if candidate is None else dict(candidate.values),
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
    """Carries out runs.

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
        self.data = RunData(study)
        self._checked: set[tuple[str, str]] = set()

    def check(self, runs: list[Run]) -> None:
        """Read every dataset and build every backbone of these runs once, so that what is wrong with them is said
        before anything is trained."""
        for run in runs:
            splits = self.data.splits(run)
            self.data.elsewhere(run)
            built = (run.backbone.label, json.dumps(run.variant.backbone, sort_keys=True))
            if built not in self._checked:
                self._model(run, splits.class_names)
                self._checked.add(built)

    def train(self, run: Run, values: Values, again: bool = False) -> dict[str, Any]:
        """Train with the values of a candidate, or go on with what was stopped; a final run is tested. again: begin
        anew. Returns the results."""
        if self.features is not None:
            with contextlib.suppress(FeaturesCannotBeKept):
                return self._fit(run, values, again, self.features)
        return self._fit(run, values, again, None)

    def _fit(self, run: Run, values: Values, again: bool, features: str | None) -> dict[str, Any]:
        model, preprocessing = self._model(run, self.data.splits(run).class_names)
        dl.attach(model, self.study.methods_of(run.variant, values), tower=run.variant.tower)
        task, data = self._task(run, model, preprocessing, values)
        return fit(
            task,
            data,
            self._settings(run, values),
            run.folder,
            resume=not again,
            overwrite=again,
            config=run_config(self.study, run, values),
            cache_features=features,
            more_results=lambda: (
                {"values": dict(values)} | _measured_by(task) | self._at_the_end(run, values, task, data, preprocessing)
            ),
        )

    def test_trained(self, run: Run, trained: Run) -> dict[str, Any]:
        """Finish a final run whose training is that of a search run: same values, same seed. Only the test is left."""
        results, values = trained.output.read_results(), trained.values
        model, preprocessing = self._model(run, self.data.splits(run).class_names)
        dl.load_adapter(model, trained.folder)
        task, data = self._task(run, model, preprocessing, values)
        settings = self._settings(run, values)
        output = run.output
        output.prepare(overwrite=True)
        output.write_config(run_config(self.study, run, values))
        if data.test is not None:
            results["test"] = _tested(task, data, settings)
            results["data"]["test"] = len(data.test)
            measured = {f"test {name}": value for name, value in results["test"].items() if name != "loss"}
            dl.adapter_info(model)["metrics"] |= measured
        results |= self._at_the_end(run, values, task, data, preprocessing)
        dl.save_pretrained(model, run.folder)
        if results["history"]:
            write_text(output.metrics, as_csv(results["history"]))
        output.write_results(results | {"values": dict(values), "trained_in": trained.folder.name})
        return results

    def _at_the_end(
        self,
        run: Run,
        values: Values,
        task: ClassificationTask,
        data: Splits,
        preprocessing: dict[str, Any],
    ) -> dict[str, Any]:
        """What else is measured of a final run: what it says about the example pictures, which are kept beside the
        runs, and how good it is elsewhere."""
        if run.stage == "search" or data.task in DENSE_TASKS:
            return {}
        keep_pictures(run.study_folder, run.dataset.source, self.data.splits(run))
        examples = examples_of(task.eval(), data)
        found: dict[str, Any] = {} if examples is None else {"examples": examples.to_dict()}
        others = self.data.prepared_elsewhere(run, preprocessing)
        if others:
            settings = self._settings(run, values)
            found["transfer"] = tested_elsewhere(task, others, lambda task, data: _tested(task, data, settings))
        return found

    # ------------------------------------------------------------------ model and data
    def _model(self, run: Run, classes: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
        """The backbone with a head for these classes; where its options have templates or a file of descriptions, a
        classifier made of their names. A row's `templates: null` is a head again."""
        backbone = run.backbone
        options = dict(run.backbone_options)
        texts = class_texts(classes, options.pop("templates", None), options.pop("descriptions", None))
        torch.manual_seed(run.seed)  # the same head and adapter, whatever ran before
        return self.make_backbone(
            backbone.model,
            len(classes),
            backbone.img_size,
            pretrained=backbone.pretrained,
            checkpoint=backbone.checkpoint,
            **texts,
            **options,
        )

    def _task(
        self, run: Run, model: nn.Module, preprocessing: dict[str, Any], values: Values
    ) -> tuple[ClassificationTask, Splits]:
        dl.adapter_info(model)["preprocessing"] = preprocessing
        training = self.study.training_of(run.variant, run.dataset, values)
        if "test_size" in training.dense:
            preprocessing["test_size"] = list(training.dense["test_size"])
        data = self.data.prepared(run, preprocessing, training)
        if data.task in DENSE_TASKS:
            task = dense_task(model, preprocessing, data, training)
        else:
            task = task_class(data.task)(model, data.class_names, training.label_smoothing)
        return task, replace(data, test=None) if run.stage == "search" else data

    def _settings(self, run: Run, values: Values) -> TrainingSettings:
        training = self.study.training_of(run.variant, run.dataset, values)
        return replace(training.settings(values["lr"], run.seed, self.workers), accelerator=self.accelerator)


def dense_task(model: nn.Module, preprocessing: dict[str, Any], data: Splits, training: Training) -> nn.Module:
    """The task of pixels, boxes, instances or oriented boxes on an adapted network, measured as its data are."""
    inference = {name: training.dense[name] for name in ("window", "stride") if name in training.dense}
    info = dl.adapter_info(model) | {"split": dict(data.origin)} | ({"inference": inference} if inference else {})
    dl.adapter_info(model).update(info)
    weight = {name: training.dense[name] for name in ("auxiliary_weight",) if name in training.dense}
    return make_task(model, data.class_names, str(data.task), info, **weight)


def _measured_by(task: nn.Module) -> dict[str, Any]:
    """What results say of the metric that runs are compared by, where the task alone does not tell it."""
    return {"main_metric": task.main_metric} if task.name in DENSE_TASKS else {}


def run_config(study: Study, run: Run, values: Values) -> dict[str, Any]:
    """All that decides a run's outcome: config.yaml of its folder."""
    backbone, training = asdict(run.backbone), study.training_of(run.variant, run.dataset, values)
    return {
        "backbone": backbone | {"options": dict(run.backbone_options)},
        **({"task": study.task} if study.task else {}),
        "dataset": run.dataset.name,
        **({} if run.dataset.subset.whole else {"training_subset": asdict(run.dataset.subset)}),
        **({"shots": run.dataset.shots} if run.dataset.shots else {}),
        "base_to_novel": study.base_to_novel,
        "targets": sorted(target.name for target in study.targets),
        "format": run.dataset.format,
        "protocol": run.dataset.protocol,
        "methods": [json.loads(json.dumps(method.to_dict())) for method in study.methods_of(run.variant, values)],
        **({"tower": run.variant.tower} if run.variant.tower else {}),
        "training": json.loads(json.dumps(asdict(training))),
        "split": asdict(study.split),
        "stage": run.stage,
        "seed": run.seed,
        "lr": values["lr"],
        "values": dict(values),
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
