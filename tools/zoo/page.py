"""docs/zoo.md from the results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs/zoo.md"
LIBRARIES = {"timm": "timm", "hf": "transformers", "torchvision": "torchvision", "open_clip": "open_clip"}


def write_page(results: Iterable[dict[str, Any]]) -> None:
    PAGE.write_text(page(list(results)), encoding="utf-8")


def adapts(result: dict[str, Any]) -> bool:
    return result["outcome"] == "adapts"


def page(results: list[dict[str, Any]]) -> str:
    results = sorted(results, key=lambda each: (list(LIBRARIES).index(each["key"].split("/")[0]), each["key"]))
    refusals = sorted({(row, message) for row, message in _refusals(results)})
    return TEMPLATE.format(
        extent=_extent(results),
        totals="\n".join(_total(library, results) for library in LIBRARIES),
        rows="\n".join(_row(each) for each in results),
        failures="\n".join(_failures(results)) or "None.",
        graphs="\n".join(_graphs(results)) or "None.",
        maps="\n".join(_maps(results)) or "None.",
        refusals="\n".join(f"| {row} | {message} |" for row, message in refusals),
    )


def _extent(results: list[dict[str, Any]]) -> str:
    """How far this walk went."""
    met = [each["methods"] for each in results if each.get("methods")]
    rows = list(dict.fromkeys(row for methods in met for row in methods))
    named = f" ({', '.join(rows)})" if len(rows) < 6 else ""
    full = all(len(methods) == len(rows) for methods in met)
    graphs = sum(each.get("compile") == each.get("export") == "yes" for each in results)
    met_by = "every model met" if full else "a model met up to"
    return (
        f"In this walk {met_by} {len(rows)} methods{named}; "
        f"{graphs} of {len(results)} models were compiled and exported."
    )


def _total(library: str, results: list[dict[str, Any]]) -> str:
    mine = [each for each in results if each["key"].startswith(f"{library}/")]
    good = [each for each in mine if adapts(each)]
    known = [each for each in good if each["families"] != ["fallback"]]
    share = 100 * len(good) / len(mine) if mine else 0
    kind = "modules" if library == "timm" else "models"
    return (
        f"| {LIBRARIES[library]} | {len(mine)} {kind} | {len(good)} ({share:.1f} %) | {len(known)} "
        f"| {len(good) - len(known)} |"
    )


def _row(result: dict[str, Any]) -> str:
    methods = result.get("methods", {})
    works = [row for row, each in methods.items() if not each.keys() & {"refused", "wrong"}]
    cells = [
        f"`{result['key']}`",
        f"{result.get('name', '')}" + (f" ({result['note']})" if result.get("note") else ""),
        str(result.get("size", "")),
        "yes" if adapts(result) else "**no**",
        ", ".join(result.get("families", [])),
        str(result.get("blocks", "")),
        str(len(result.get("slots", []))),
        f"{len(works)} of {len(methods)}",
        _short(result.get("compile")),
        _short(result.get("export")),
    ]
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _short(outcome: str | None) -> str:
    if outcome in ("yes", None):
        return outcome or ""
    return "the model itself does not" if outcome.startswith("not without") else "no"


def _failures(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for each in results:
        wrong = [f"{row}: {found['wrong']}" for row, found in each.get("methods", {}).items() if "wrong" in found]
        for message in wrong or ([] if adapts(each) else [each["outcome"]]):
            lines.append(f"* `{each['key']}`: {_cell(message)}")
    return lines


def _graphs(results: list[dict[str, Any]]) -> list[str]:
    return [
        f"* `{each['key']}`, {name}: {_cell(each[name])}"
        for each in results
        for name in ("compile", "export")
        if each.get(name, "yes") != "yes"
    ]


def _maps(results: list[dict[str, Any]]) -> list[str]:
    return [f"* `{each['key']}`: {'; '.join(each['why no map'])}" for each in results if each.get("why no map")]


def _refusals(results: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(method, keys) of the models that a method does not fit."""
    by_row: dict[str, list[str]] = {}
    for each in results:
        for row, found in each.get("methods", {}).items():
            if "refused" in found:
                by_row.setdefault(row, []).append(f"`{each['key']}`")
    return [(row, f"{len(keys)} | {_few(keys)}") for row, keys in by_row.items()]


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


TEMPLATE = """# The zoo

Made by `python -m tools.zoo walk`, then `python -m tools.zoo page`. Of every module of timm's models the smallest
architecture, and one small model of every listed family of the other libraries, with random weights and small images,
met methods of the test suite's table: attached, run forward and backward, saved, switched off, loaded, detached, which
gave the model back bit for bit. Then it was compiled (`fullgraph`, `aot_eager`) and exported with one adapter. A model
*adapts* if at least one method that inserts modules fits, and every method either does all of this or is refused with
the reason.

{extent}

| library | walked | adapt | with a family of their own | with the fallback |
|---|---|---|---|---|
{totals}

Where a model has no family, the fallback finds its blocks and offers one slot, at their output: Mona, SSF, BitFit,
NormTuning and others work there, LoRA with `target_modules`. `blocks=` chooses other blocks.

## Every model

"images" is the side of the images in pixels, "slots" the number of kinds of slots that the blocks offer.

| model | architecture | images | adapts | family | blocks | slots | methods | compile | export |
|---|---|---|---|---|---|---|---|---|---|
{rows}

## What goes wrong

{failures}

## Compile and export

{graphs}

## Blocks without a map

Methods with spatial modules (Mona, Convpass) need maps. Blocks of these models have none that could be proven:

{maps}

## What is refused

| method | models | which |
|---|---|---|
{refusals}
"""
