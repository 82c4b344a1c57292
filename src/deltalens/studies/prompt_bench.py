"""What prompts cost: VPT shallow, deep and as prefixes for several lengths, beside the methods of VPT's cost table."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

import deltalens as dl
from deltalens.methods import Method
from deltalens.studies.bench_report import Report, Section
from deltalens.studies.benchmarks import (
    FROZEN,
    FULL,
    VPT_MODEL,
    Options,
    check_same_outputs,
    compare_inference,
    compare_training,
    frozen,
    full,
    setup,
)
from deltalens.studies.figure import new_figure, page_colours, save_figure
from deltalens.studies.plain_forms import plain_vpt

LENGTHS = (1, 10, 50, 100, 200)
CURVES = {  # start of a row's name: what the plot calls it
    "shallow plain": "shallow, plain",
    "shallow deltalens": "shallow, deltalens",
    "deep plain": "deep, plain",
    "deep deltalens": "deep, deltalens",
    "prefix deltalens": "prefix",
}


def bench_prompts(options: Options, lengths: Sequence[int] = LENGTHS) -> Report:
    """The cost table of VPT's paper (its Table 12 and Figs. 18, 19) as ratios within one run.

    Training: step against full fine-tuning, and bytes saved for backward; inference: against the frozen backbone.
    Plain forms have the prompts in the sequence; ours are checked to give the same outputs.
    """
    options = options.settled(VPT_MODEL, "deltalens/vit-mini")
    backbone, images, labels = setup(options)
    training: dict[str, nn.Module] = {FULL: full(backbone), FROZEN: frozen(backbone)}
    inference: dict[str, nn.Module] = {FROZEN: training[FROZEN]}
    plain_of: dict[str, str] = {}
    for name, method in baselines().items():
        training[name] = dl.attach(_sharing(backbone), method)
        if name != "linear":  # which is the frozen backbone at inference
            inference |= {name: training[name], f"{name} merged": merged(training[name])}
    for p in lengths:
        for kind, method in prompted(p).items():
            ours = dl.attach(_sharing(backbone), method)
            forms = {"deltalens": ours}  # a prefix is what merging would make of prompts, and has no other form
            if kind != "prefix":
                plain = plain_vpt(_sharing(backbone), ours, deep=kind == "deep")
                forms = {"plain": plain, "deltalens": ours, "merged": merged(ours)}
            check_same_outputs(images, forms)
            named = {f"{kind} {form} p={p}": model for form, model in forms.items()}
            inference |= named
            training |= {name: model for name, model in named.items() if "merged" not in name}
            if kind != "prefix":
                plain_of |= {f"{kind} {form} p={p}": f"{kind} plain p={p}" for form in ("deltalens", "merged")}
    percents = {name: percent_trained(model) for name, model in training.items()}
    steps = compare_training(training, images, labels, options, plain_of)
    steps = replace(steps, rows=[replace(row, percent=percents[row.name]) for row in steps.rows])
    speeds, _ = compare_inference(inference, images, options, plain_of)
    return Report("Prompts", options.describe(images.shape[-1]), [steps, speeds])


def baselines() -> dict[str, Method]:
    """The methods without prompts: name -> configuration."""
    found: dict[str, Method] = {"linear": dl.LinearConfig(), "bias": dl.BitFitConfig()}
    if "adapter" in dl.list_methods():
        found["adapter 64"] = dl.make_config("adapter", bottleneck=64)
    return found


def prompted(p: int) -> dict[str, Method]:
    """Kind -> configuration with p prompts."""
    return {
        "shallow": dl.VPTConfig(num_tokens=p, deep=False),
        "deep": dl.VPTConfig(num_tokens=p),
        "prefix": dl.VPTConfig(num_tokens=p, location="prefix"),
    }


def merged(model: nn.Module) -> nn.Module:
    """A copy for inference that shares the frozen tensors: merging prompts, biases and bottlenecks changes none of
    them."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return dl.merge_and_unload(copy.deepcopy(model, shared))


def percent_trained(model: nn.Module) -> float:
    """100 * trained / all parameters, head included in both, as VPT's paper counts."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 100 * trained / sum(p.numel() for p in model.parameters())


def _sharing(backbone: nn.Module) -> nn.Module:
    """A copy with the frozen tensors of the original and a head of its own: many contenders, one backbone in memory."""
    backbone.requires_grad_(False)
    head = {id(p) for p in backbone.get_classifier().parameters()}
    return copy.deepcopy(backbone, {id(p): p for p in backbone.parameters() if id(p) not in head})


# ------------------------------------------------------------------ the plot
def plot_prompts(report: Report, path: str | os.PathLike) -> None:
    """Step time and bytes saved for backward against the number of prompts, full fine-tuning as a line across."""
    steps, speeds = report.sections
    figure, axes = new_figure(1, 3)
    panels = (
        ("training step / full fine-tuning", steps, lambda row: row.ratios["full"], 1.0),
        ("saved for backward, MB", steps, lambda row: row.saved_bytes / 1e6, steps.row(FULL).saved_bytes / 1e6),
        ("inference / frozen backbone", speeds, lambda row: row.ratios["frozen"], 1.0),
    )
    colours = page_colours()
    for axis, (title, section, value, reference) in zip(axes, panels, strict=True):
        axis.axhline(reference, color=colours["soft"], linewidth=1, linestyle=":")
        for number, (start, label) in enumerate(CURVES.items()):
            points = curve(section, start, value)
            style = {"color": colours[f"c{number}"], "linestyle": "--" if "plain" in label else "-"}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=label, **style)
        axis.set_title(title)
        axis.set_xlabel("prompts, p")
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def curve(section: Section, start: str, value: Any) -> list[tuple[int, float]]:
    """(p, value) of the rows "<start> p=<p>", ascending."""
    rows: Mapping[int, Any] = {
        int(row.name.rpartition("p=")[2]): row for row in section.rows if row.name.startswith(f"{start} p=")
    }
    return [(p, value(rows[p])) for p in sorted(rows)]
