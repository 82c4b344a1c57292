"""Every method x family: it works from attach to detach, or it is refused by name. See docs/compatibility.md."""

import re

import pytest
from matrix import (
    CLIP_HEADINGS,
    CLIP_MODELS,
    CLIP_ROWS,
    HEADINGS,
    LABELS,
    NEEDS_POINTS,
    NEEDS_TEXTS,
    PAGE,
    POINT_ROWS,
    ROWS,
    export,
    refusal,
    walk,
    walk_or_refusal,
)
from models import MODELS, images

import deltalens as dl
from deltalens.methods import method_class

CELLS = [(family, row) for row in ROWS for family in HEADINGS]


def printed() -> dict[tuple[str, str], str]:
    """(row, family) -> "yes" or "no", as the page says."""
    table = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(HEADINGS) + 1 and cells[0] in ROWS:
            table |= {(cells[0], family): word for family, word in zip(HEADINGS, cells[1:], strict=True)}
    return table


@pytest.mark.parametrize(("family", "row"), CELLS)
def test_cell(family, row, tmp_path):
    _, message = walk_or_refusal(MODELS[family], images(family, batch=len(LABELS)), row, tmp_path)
    assert printed()[row, family] == ("yes" if message is None else "no")
    if message is not None:
        assert re.search(r"slot|map|layer|part|size|block|channel", message), message
        assert message in PAGE.read_text().replace("\\|", "|")


@pytest.mark.parametrize("family", CLIP_HEADINGS)
@pytest.mark.parametrize("row", CLIP_ROWS)
def test_with_classes_of_texts(family, row, tmp_path):
    assert f"| {row} |{' yes |' * len(CLIP_HEADINGS)}" in PAGE.read_text()
    walk(CLIP_MODELS[family], images("vit", batch=len(LABELS)), row, tmp_path)


@pytest.mark.parametrize("family", HEADINGS)
@pytest.mark.parametrize("row", NEEDS_TEXTS)
def test_without_texts(family, row):
    message = refusal(MODELS[family], row)
    assert message is not None
    assert re.search(r"class_names|text tower", message), message
    assert f"they need a text tower: {', '.join(NEEDS_TEXTS)}." in PAGE.read_text()


@pytest.mark.parametrize("family", HEADINGS)
@pytest.mark.parametrize("row", NEEDS_POINTS)
def test_without_clouds(family, row):
    message = refusal(MODELS[family], row)
    assert "take a point transformer" in (message or "")
    assert f"they need patches of a point cloud: {', '.join(NEEDS_POINTS)}." in PAGE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "row"), CELLS)
def test_export(family, row, tmp_path):
    loaded, message = walk_or_refusal(MODELS[family], images(family, batch=len(LABELS)), row, tmp_path)
    if message is None:
        export(loaded, images(family))


def test_every_method_has_a_row():
    shown = set()
    for make in [*ROWS.values(), *CLIP_ROWS.values(), *POINT_ROWS.values()]:
        config = make()
        shown |= {method.name for method in (config if isinstance(config, list) else [config])}
    shipped = {m for m in dl.list_methods() if method_class(m).__module__.startswith("deltalens.")}
    untrained = {"zero_shot"}  # test_zero_shot_row.py
    assert {m for m in shipped if not m.startswith("peft/")} - shown == untrained
