"""`fit`: train a task on some data with Lightning, and leave an adapter and its results in a folder."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from deltalens.data.splits import Splits
from deltalens.lifecycle.count import count_parameters
from deltalens.lifecycle.files import save_pretrained
from deltalens.lifecycle.info import adapter_info
from deltalens.lifecycle.prepare import has_choices
from deltalens.lifecycle.state import KEY
from deltalens.lifecycle.storage import stored_bytes
from deltalens.training.feature_cache import cached_features
from deltalens.training.optim import trains_nothing
from deltalens.training.output import Output, is_main_process
from deltalens.training.settings import PRECISIONS, TrainingSettings


def fit(
    task: nn.Module,
    data: Splits,
    settings: TrainingSettings = TrainingSettings(),  # noqa: B008  (frozen)
    output: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    config: dict[str, Any] | None = None,
    cache_features: str | os.PathLike | None = None,
    after_epoch: Callable[[dict[str, float]], None] | None = None,
    more_results: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train the trainable parameters of a task in place. Returns the results, which are also `results.json`.
    The task is left on the CPU, in eval mode.

    data: datasets with their transforms; validation, where there is one, is measured after every epoch and the last
    epoch's values are reported, or those of a last look where a method chooses settings on these images
    (`Method.finish`). Where there is nothing to train (Tip-Adapter) no epoch is run, and there is no history. test,
    where there is one, is measured once, at the end. output: a folder for the adapter (`task.model` must have one),
    `metrics.csv`, `results.json` and a checkpoint per epoch; None writes nothing. resume: go on from the folder's
    checkpoint; the continued run equals an uninterrupted one, on one CPU thread bit for bit, on several and on a GPU
    with `settings.deterministic`. See `Output.check` for what is refused. config: written to `config.yaml`.
    cache_features: a folder in which the features of a network that is frozen up to its last blocks or its head are
    kept and read from, instead of being computed in every epoch (see `deltalens.training.feature_cache`); nothing may
    be augmented then. after_epoch: called with the row of every finished epoch, before its checkpoint is written; what
    it raises ends the training. more_results: called when the task is trained and tested; what it gives is added to the
    results.

    Results: "val" and "test" (metric -> value), "chosen" (method -> setting -> value, where a method has chosen some),
    "history" (one row per epoch), "parameters", "data", "seconds" (all epochs and the last start; what a stop has lost
    does not count), "device", "machine", "finished" (date and time, UTC), "settings", "versions", "peak_memory_bytes"
    of training on a GPU (None elsewhere), "features" where they were kept, and "bytes" where there is a folder (see
    `deltalens.lifecycle.storage.stored_bytes`).

    Raises NonFiniteLossError where the loss becomes NaN or infinite: the checkpoint before it stays. Raises
    FeaturesCannotBeKept with cache_features where something is trained or random from the start.
    """
    if not len(data.train):
        raise ValueError("the data has nothing to train on; data with a test part alone is for evaluate")
    place = None if output is None else Output(output)
    if place is not None:
        if KEY not in task.model.__dict__:
            raise ValueError(
                "the task's model has no adapter to save: call deltalens.attach first, or pass output=None"
            )
        if resume and not overwrite and place.finished:
            place.tidy()
            return place.read_results()
    started = time.perf_counter()
    features: dict[str, Any] = {}
    with quiet_lightning(), _determinism_restored(), contextlib.ExitStack() as stack:
        inputs = data
        if cache_features is not None:
            inputs, features["features"] = stack.enter_context(cached_features(task, data, settings, cache_features))
        if place is not None and is_main_process():
            place.prepare(resume, overwrite)
            if config is not None:
                place.write_config(config)
        history, measured, chosen, device, peak = _train(task, inputs, settings, place, resume, after_epoch)
    rows = history.rows
    results = {
        "val": _metrics(measured, "val_"),
        "test": _metrics(measured, "test_"),
        **({"chosen": chosen} if chosen else {}),
        "parameters": _parameters(task.model),
        "data": _counts(data),
        "seconds": {
            "total": history.earlier_seconds + time.perf_counter() - started,
            "training": sum(row["seconds"] for row in rows),
        },
        "device": device,
        "machine": machine_text(device),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "peak_memory_bytes": peak,
        "settings": {name: list(each) if isinstance(each, tuple) else each for name, each in vars(settings).items()},
        "versions": _versions(),
        **features,
        "history": rows,
    }
    results |= more_results() if more_results else {}
    if place is not None and is_main_process():
        _describe(task, data, results)
        save_pretrained(task.model, place.folder)
        results["bytes"] = stored_bytes(task.model, place.folder)
        place.write_results(results)
    return results


def _train(task, data, settings: TrainingSettings, place: Output | None, resume: bool, after_epoch):
    """(history, last metrics of validation and test, what methods have chosen, device name, most memory of the GPU
    while training or None)."""
    import lightning.pytorch as pl

    from deltalens.training.callbacks import History, KeepLast, StopOnBadLoss, WholeCheckpoints
    from deltalens.training.module import PROGRESS, TaskModule
    from deltalens.training.progress import StepBar

    checkpoint = place.checkpoint if place is not None and resume and place.checkpoint.is_file() else None
    resumed_at = (0, 0)
    if checkpoint is not None:
        progress = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)[PROGRESS]
        resumed_at = (progress["epoch"], progress["batches"])
    torch.manual_seed(settings.seed)
    module = TaskModule(task, data, settings, resumed_at)
    bar = StepBar()
    history = History(place.metrics if place else None, bar.print if settings.progress else None, after_epoch)
    callbacks = [StopOnBadLoss(place.checkpoint if place else None), history]
    callbacks += [bar] if settings.progress else []
    callbacks += [KeepLast(place.checkpoint, settings.checkpoint_every_steps)] if place else []
    if settings.compile:
        task.model.compile()
    trainer = pl.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        precision=PRECISIONS[settings.precision],
        max_epochs=0 if trains_nothing(task) else settings.epochs,
        gradient_clip_val=settings.clip_grad or None,
        deterministic=settings.deterministic or None,
        callbacks=callbacks,
        plugins=[WholeCheckpoints()],
        default_root_dir=place.folder if place else None,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        limit_val_batches=0 if data.val is None else None,
    )
    if trainer.max_epochs == 0 and trainer.world_size > 1:
        raise ValueError("there is nothing to train, which takes one device: set devices=1")
    on_gpu = trainer.strategy.root_device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
    try:
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stopped:  # what Lightning makes of Ctrl-C
        goes_on = "; the same command with --resume goes on" if place else ""
        raise KeyboardInterrupt(f"training was stopped{goes_on}") from stopped
    peak = torch.cuda.max_memory_allocated(trainer.strategy.root_device) if on_gpu else None
    module.remark()
    measured = dict(history.rows[-1]) if history.rows else {}
    if data.val is not None and (has_choices(task.model) or not history.rows):
        module.finishing = True
        measured |= trainer.validate(module, verbose=False)[0]
    if data.test is not None:
        measured |= trainer.test(module, verbose=False)[0]
    device = str(module.device)
    module.cpu()
    task.eval()
    return history, measured, module.chosen, device, peak


@contextlib.contextmanager
def _determinism_restored() -> Iterator[None]:
    """Lightning asks torch for deterministic algorithms in the whole process, and for good: take that back."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips, and its remarks on things that are so on purpose."""
    loggers = [
        logging.getLogger(name)
        for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for remark in (
                ".*does not have many workers.*",
                ".*in eval mode at the start of training.*",
                ".*your dataloader is not resumable.*",
                ".*this fit will run with no optimizer.*",
                ".*GPU available but not used.*",
                ".*MPS available but not used.*",
                ".*LeafSpec.* is deprecated.*",
                ".*recommended to use `self.log.*sync_dist=True.*",  # torchmetrics has already joined the processes
            ):
                warnings.filterwarnings("ignore", remark)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ------------------------------------------------------------------ what is reported
def _metrics(values: dict[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _parameters(model: nn.Module) -> dict[str, float]:
    if KEY not in model.__dict__:
        return {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    count = count_parameters(model)
    return {
        "adapter": count.adapter,
        "head": count.head,
        "backbone": count.backbone,
        "percent": count.percent,
        "percent_with_head": count.percent_with_head,
    }


def _counts(data: Splits) -> dict[str, Any]:
    return {
        "train": len(data.train),
        "val": 0 if data.val is None else len(data.val),
        "test": 0 if data.test is None else len(data.test),
        "classes": len(data.class_names),
        **data.origin,
    }


def machine_text(device: str) -> str:
    """The kind of machine, without its name: "Linux x86_64, 8 CPU cores", with the GPU where training ran on one."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores{gpu}"


def _versions() -> dict[str, str]:
    names = ("deltalens", "torchvision", "timm", "lightning")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return versions | {name: version(name) for name in names}


def _describe(task: nn.Module, data: Splits, results: dict[str, Any]) -> None:
    """Write what the adapter should know about itself into its info."""
    info = adapter_info(task.model)
    info["task"] = task.name
    info["class_names"] = list(data.class_names)
    info["split"] = data.origin
    info["metrics"] = {
        f"{part} {name}": results[part][name] for part in ("val", "test") for name in results[part] if name != "loss"
    }
