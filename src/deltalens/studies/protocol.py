"""What a study did to be fair, or not: facts of the study in sentences, for its table and its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltalens.studies.candidates import SearchPlan, short_name, value_text
from deltalens.studies.search_space import Choice, Parameter
from deltalens.studies.study import Study, Training, Variant

PROTOCOLS = {
    None: "",
    "fair": "Protocol: fair, the same search and training for every method. ",
    "published": "Protocol: published, methods may have the settings of their papers. ",
}


def protocol_text(study: Study) -> str:
    """Protocol, training, budget, what was chosen on which data, what is reported, and rows with settings of their
    own."""
    own = [f"{variant.label} ({_own_text(variant)})" for variant in study.variants if variant.own_fields]
    return PROTOCOLS[study.protocol] + " ".join(
        [
            _training_text(study),
            _search_text(study),
            *([f"With settings of their own: {'; '.join(own)}."] if own else []),
            _data_text(study),
            *_classes_text(study),
            f"{_measured(study)} in per cent: mean ± sample standard deviation over seeds.",
        ]
    )


def _measured(study: Study) -> str:
    """What the table's numbers are, and under which head."""
    head = ", ".join(dict.fromkeys(str(backbone.options.get("head")) for backbone in study.backbones))
    of_dense = {
        "segmentation": f"Segmentation under {head}, which every method trains. Mean IoU",
        "detection": f"Detection under {head}, which every method trains. Average precision",
        "oriented": f"Oriented boxes under {head}, which every method trains. Average precision at IoU 0.5",
        "instance": f"Instances under {head}, which every method trains. Average precision of masks",
    }
    return of_dense.get(study.task or "", "Top-1 accuracy")


def searches_rates_only(study: Study) -> bool:
    """Whether searches choose learning rates, and nothing else."""
    return all(
        name == "lr" for variant in study.variants for each in study.candidates(variant) for name in each.searched
    )


def _training_text(study: Study) -> str:
    training = study.training
    said = [
        counted(training.epochs, "epoch"),
        f"batches of {training.batch_size}",
        training.optimizer,
        f"weight decay {training.weight_decay:g}",
    ]
    if training.no_decay is not None:
        said.append(f"but none on {', '.join(training.no_decay)}" if training.no_decay else "on all that is trained")
    said.append(_schedule_text(training))
    said += [f"gradients clipped at {training.clip_grad:g}"] if training.clip_grad else []
    said += [f"label smoothing {training.label_smoothing:g}"] if training.label_smoothing else []
    return f"{', '.join(said)}; {'seed' if len(study.seeds) == 1 else 'seeds'} {', '.join(map(str, study.seeds))}."


def _schedule_text(training: Training) -> str:
    warmup = f"warm-up of {training.warmup_epochs:g}"
    warmup += f" at {training.warmup_lr:g}" if training.warmup_lr is not None and training.warmup_epochs else ""
    changed = ", changed once an epoch" if training.schedule == "epoch" else ""
    return f"{warmup} and {_decay_text(training)}{changed}"


def _decay_text(training: Training) -> str:
    if training.decay_at:
        return f"a tenth of the rate from each of the epochs {', '.join(f'{each:g}' for each in training.decay_at)} on"
    curve = "line" if training.decay == "linear" else training.decay
    return f"a {curve} to {100 * training.min_lr:g} % of the rate"


# ------------------------------------------------------------------ search
def _search_text(study: Study) -> str:
    groups: dict[tuple[str, str], list[str]] = {}
    for variant in study.variants:
        plan, count = study.search_of(variant), len(study.candidates(variant))
        searched = plan is not None and count > 1
        budget = counted(count, "trial") if searched else ""
        groups.setdefault((budget, plan_text(plan) if searched else _rate_text(study, variant)), []).append(
            variant.label
        )
    if len(groups) == 1:
        ((budget, how),) = groups
        if not budget:
            return f"No search; learning rate: {how}."
        return f"Search: {budget} for every method ({how}). {_JUDGED}"
    said = [
        f"{budget or 'none'} for {', '.join(labels)} ({how if budget else f'learning rate: {how}'})"
        for (budget, how), labels in groups.items()
    ]
    searched = any(budget for budget, _ in groups)
    return f"Search: {'; '.join(said)}. {_JUDGED}" if searched else f"No search; learning rate: {_rates(groups)}."


_JUDGED = (
    "Trials were trained on the training data with the first seed, and the best on the validation data after the last "
    "epoch was chosen."
)


def _rates(groups: Mapping[tuple[str, str], list[str]]) -> str:
    return "; ".join(f"{how} for {', '.join(labels)}" for (_, how), labels in groups.items())


def _rate_text(study: Study, variant: Variant) -> str:
    said = next((entry for entry in (variant, study) if (entry.lr, entry.base_lr) != (None, None)), None)
    if said is None and study.search_of(variant) is None:
        return "the method's own default"
    if said is variant or study.search_of(variant) is not None:
        return f"{study.candidates(variant)[0].values['lr']:g}"
    return f"{said.lr:g}" if said.lr is not None else f"{said.base_lr:g} for 256 images a step"


def plan_text(plan: SearchPlan) -> str:
    """ "random: lr 0.1 to 10 times the method's own, weight_decay 0 or 0.01; fixed: optimizer sgd"."""
    space = plan.space
    said = ", ".join(f"{short_name(name)} {_parameter_text(each)}" for name, each in space.space.items())
    fixed = ", ".join(f"{short_name(name)} {value_text(value)}" for name, value in space.fixed.items())
    return f"{space.sampler}: {said}" + (f"; fixed: {fixed}" if fixed else "")


def _parameter_text(parameter: Parameter) -> str:
    if isinstance(parameter, Choice):
        text = ", ".join(map(value_text, parameter.values))
    else:
        text = f"{value_text(parameter.low)} to {value_text(parameter.high)}"
    return text + (" times the method's own" if parameter.relative else "")


# ------------------------------------------------------------------ rows and data
def _own_text(variant: Variant) -> str:
    said: dict[str, Any] = {name: value for name in ("lr", "base_lr") if (value := getattr(variant, name)) is not None}
    said |= {**variant.training, **variant.backbone}
    texts = [f"{name} {_setting_text(value)}" for name, value in said.items()]
    texts += ["settings for single datasets"] if variant.datasets else []
    return ", ".join(texts + (["its own search"] if variant.search else ["no search"] if variant.own_search else []))


def _setting_text(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else value_text(value)


def _data_text(study: Study) -> str:
    joined = [dataset.name for dataset in study.datasets if dataset.protocol == "trainval"]
    apart = [dataset.name for dataset in study.datasets if dataset.protocol != "trainval"]
    text = "Every run reports its last epoch; test data are looked at once, after it."
    if joined:
        text += f" Final runs on {', '.join(joined)} train on training and validation data together"
        return text + (f", on {', '.join(apart)} on the training data alone." if apart else ".")
    return text + " Final runs train on the training data alone."


def _classes_text(study: Study) -> list[str]:
    """Few samples, half of the classes, other datasets."""
    shots = sorted({dataset.shots for dataset in study.datasets if dataset.shots})
    said = []
    if shots:
        said.append(
            f"{', '.join(map(str, shots))} training samples of each class and at most 4 for validation, drawn by each "
            "run's seed."
        )
    if study.base_to_novel:
        said.append("Runs are trained on the first half of the classes; test accuracy is that of this half.")
    return said


def counted(number: int, noun: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
