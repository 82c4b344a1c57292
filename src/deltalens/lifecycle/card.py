"""The filled model card of an adapter."""

from __future__ import annotations

import json
from typing import Any

from deltalens.backbones.preprocessing import input_in_words

_TEMPLATE = """---
library_name: deltalens
{base}pipeline_tag: {tag}
tags:
- peft
- deltalens
{method_tags}
---

# {title}

{summary}

| | |
|---|---|
{rows}

## Use

```python
import deltalens as dl

model = dl.from_pretrained("path/to/this/folder")  # backbone, adapter, head, preprocessing, class names
```

```bash
deltalens predict path/to/this/folder {example}
```

{peft}## Settings

```json
{settings}
```
"""

_TAGS = {"classification": "image-classification"}


def _input_rows(preprocessing: dict[str, Any]) -> list[tuple[str, str]]:
    if preprocessing.get("kind") == "points":
        normalised = ", scaled into the unit sphere" if preprocessing.get("normalize") == "unit_sphere" else ""
        return [("input", input_in_words(preprocessing) + normalised)]
    return [
        ("input", input_in_words(preprocessing)),
        ("mean, std", f"{_numbers(preprocessing['mean'])}, {_numbers(preprocessing['std'])}"),
    ]


def model_card(config: dict[str, Any]) -> str:
    """README.md of an adapter, from its configuration alone."""
    base, info, count = config["base_model"], config.get("info") or {}, config.get("trained_parameters") or {}
    methods = [entry["method"] for entry in config["methods"]]
    name = base.get("id") or base.get("class")
    rows = [("method", ", ".join(methods)), ("backbone", name)]
    if base.get("checkpoint"):
        rows.append(("backbone weights", str(base["checkpoint"]).rpartition("/")[2]))
    if count:
        rows.append(("trained parameters", f"{count['adapter']:,} ({count['percent']:.3f} % of the backbone)"))
        rows.append(("with the head", f"{count['adapter'] + count['head']:,} ({count['percent_with_head']:.3f} %)"))
    preprocessing = {**base, **(info.get("preprocessing") or {})}
    rows += _input_rows(preprocessing)
    of_points = preprocessing.get("kind") == "points"
    if info.get("class_names"):
        shown = ", ".join(info["class_names"][:20]) + (" ..." if len(info["class_names"]) > 20 else "")
        rows.append((f"{len(info['class_names'])} classes", shown))
    for key, value in (info.get("metrics") or {}).items():
        rows.append((key, f"{value:.4f}" if isinstance(value, float) else value))
    return _TEMPLATE.format(
        base=_on_the_hub(name, base.get("library")),
        example="cloud.npy" if of_points else "image.jpg",
        tag="other" if of_points else _TAGS.get(info.get("task", "classification"), "image-feature-extraction"),
        method_tags="\n".join(f"- {method}" for method in methods),
        title=f"{' + '.join(methods)} adapter for {name}",
        summary="A parameter-efficient adapter: the frozen backbone is not part of this folder.",
        rows="\n".join(f"| {key} | {value} |" for key, value in rows),
        peft=_PEFT if config.get("peft_type") == "LORA" else "",
        settings=json.dumps(config["methods"], indent=2),
    )


def _on_the_hub(name: str, library: str | None) -> str:
    """The line that links the card with the backbone's repository, for names that are one."""
    if library not in ("timm", "hf") or "local-dir:" in name:
        return ""
    return f"base_model: {name.removeprefix('timm/').removeprefix('hf/').removeprefix('hf-hub:')}\n"


_PEFT = "The files are in peft's format too: `PeftModel.from_pretrained(backbone, folder)` loads them.\n\n"


def _numbers(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
