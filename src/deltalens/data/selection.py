"""What is used of a dataset: a few images of every class, and all classes or the base or the new half of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deltalens.data.assemble import Images
from deltalens.data.few_shot import few_shot
from deltalens.data.options import ReadOptions
from deltalens.data.splits import Splits

SUBSETS = ("all", "base", "new")


def subset_classes(count: int, subset: str) -> range:
    """The labels of a subset of `count` classes: "base" is the first half, with the middle one of an odd number, "new"
    the others. Raises ValueError for another subset."""
    if subset not in SUBSETS:
        raise ValueError(f"unknown classes {subset!r}; there are {', '.join(SUBSETS)}")
    half = (count + 1) // 2
    return {"all": range(count), "base": range(half), "new": range(half, count)}[subset]


def few_shot_parts(parts: dict[str, Images], options: ReadOptions) -> tuple[dict[str, Images], dict[str, Any]]:
    """The parts with few-shot train and val, and what `Splits.origin` says of it. All of them without `options.shots`
    and for data that has no train."""
    if options.shots is None or not parts.get("train"):
        return parts, {}
    val = parts.get("val")
    positions = few_shot(
        parts["train"].labels, None if val is None else val.labels, options.shots, options.sampling_seed
    )
    sampled = {part: parts[part].subset(each) for part, each in zip(("train", "val"), positions, strict=True) if each}
    return parts | sampled, {"shots": options.shots, "shots_seed": options.sampling_seed, "shots_from": "drawn"}


def subset_parts(
    parts: dict[str, Images], class_names: Sequence[str], subset: str
) -> tuple[dict[str, Images], list[str], dict[str, Any]]:
    """The parts with the items of a subset of classes, labels from 0, its class names, and what `Splits.origin` says
    of it."""
    kept = subset_classes(len(class_names), subset)
    if subset == "all":
        return parts, list(class_names), {}
    if len(kept) < 2:
        raise ValueError(f"the data has {len(class_names)} classes, of which {subset} leaves {len(kept)}; it needs two")
    chosen = {}
    for name, part in parts.items():
        chosen[name] = part.subset([i for i, label in enumerate(part.labels) if label in kept])
        chosen[name].labels = [label - kept.start for label in chosen[name].labels]
    return chosen, [class_names[label] for label in kept], {"class_subset": subset}


def select(splits: Splits, options: ReadOptions) -> Splits:
    """Splits as a reader gives them with what the options choose of them, unless the reader has done so itself."""
    shots = None if "shots" in splits.origin else options.shots
    subset = "all" if "class_subset" in splits.origin else options.subset
    if shots is None and subset == "all":
        return splits
    if splits.task != "classification":
        raise ValueError(f"shots and base or new classes need images with one label each; the data is {splits.task}")
    parts = {name: getattr(splits, name) for name in ("train", "val", "test")}
    parts = {name: part for name, part in parts.items() if part is not None}
    parts, facts = few_shot_parts(parts, replace(options, shots=shots))
    parts, names, more = subset_parts(parts, splits.class_names, subset)
    return replace(
        splits,
        train=parts["train"],
        val=parts.get("val"),
        test=parts.get("test"),
        class_names=names,
        origin=splits.origin | facts | more,
    )
