"""Published numbers beside measured ones: read with their place, shown in every table, part of no mean and no mark."""

import csv
import io
import re

import pytest
from study_runs import study_text, table_of, write_study_folder
from test_study_report import page_of, section, table_rows

from deltalens.data.vtab1k import TASKS
from deltalens.studies.study_latex import to_latex
from deltalens.studies.study_reader import read_study

PUBLISHED = """\
published:
  source: Some paper & al.
  note: tested after every epoch.
  backbone: ViT-S
  scores:
    Full: {flowers: 99.5772, pets: 84.60, mean: 92.1}
    Mona: {flowers: {base: 97.5, novel: 75}}
  not_run:
    Prompts <2>: {flowers: 99.9}
"""


def markdown_row(text: str, title: str, label: str) -> list[str]:
    part = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return next(line for line in lines if line[0] == label)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    grid = write_study_folder(tmp_path_factory.mktemp("published"), study_text(extra=PUBLISHED))
    return grid, table_of(grid)


def test_columns_of_a_dataset(table):
    text = table[1].to_markdown()
    header = markdown_row(text, "ViT-S, flowers", "method")
    assert header[:5] == ["method", "test top-1", "published", "published, base", "published, novel"]
    row = {label: markdown_row(text, "ViT-S, flowers", label) for label in ("Full", "Mona", "LoRA", "Prompts <2>")}
    assert [row[label][2:5] for label in row] == [
        ["99.5772", "", ""],
        ["", "97.5", "75"],
        ["", "", ""],
        ["99.9", "", ""],
    ]
    assert row["Prompts <2>"][1] == row["Prompts <2>"][5] == ""
    assert re.fullmatch(r"\d\d\.\d ± \d\.\d", row["Full"][1])
    assert markdown_row(text, "ViT-S, textures", "method")[2] == "trained"
    assert markdown_row(text, "Swin-T, flowers", "method")[2] == "trained"  # another backbone's numbers
    assert "not measured here: Some paper & al., ViT-S (tested after every epoch)." in text


def test_rows_of_the_overview(table, tmp_path):
    text = table[1].to_markdown()
    header = markdown_row(text, "Test accuracy, %", "method")
    shown = dict(zip(header, markdown_row(text, "Test accuracy, %", "Full, published"), strict=True))
    assert (shown["ViT-S, flowers"], shown["ViT-S, pets"], shown["Swin-T, pets"]) == ("99.5772", "84.6", "-")
    assert shown["mean"] == "-"  # that of the paper is of one backbone
    assert markdown_row(text, "Test accuracy, %", "Mona, published, novel")[1] == "75"
    one = study_text(backbones={"ViT-S": 0}, extra=PUBLISHED)
    grid = write_study_folder(tmp_path / "one", one)
    assert markdown_row(table_of(grid).to_markdown(), "Test accuracy, %", "Full, published")[-1] == "92.1"


def test_nothing_measured_changes(table, tmp_path):
    """Without the field the same tables come out, but for what is marked as published; also the bold ones."""
    plain = write_study_folder(tmp_path / "plain")
    with_, without = table[1], table_of(plain)
    assert with_.cells == without.cells
    assert with_.rows == without.rows
    measured = [line for line in with_.to_markdown().splitlines() if "published" not in line.lower()]
    for line in without.to_markdown().splitlines():
        if line.startswith(("| LoRA", "| Full")) and line.count("±") > 1:  # the overview
            assert re.sub(r" +", " ", line) in [re.sub(r" +", " ", other) for other in measured]
    assert re.findall(r"\\mathbf{[\d.]+}", to_latex(with_)) == re.findall(r"\\mathbf{[\d.]+}", to_latex(without))
    page, other = page_of(table[0]), page_of(plain)
    assert re.findall(r'class="best">[^<]+', page) == re.findall(r'class="best">[^<]+', other)
    for title in ("Mean ranks", "Against Full"):
        assert section(page, title) == section(other, title)


def test_latex(table):
    first, second = to_latex(table[1]).split(r"\begin{table}")[1:]
    assert r"Full, published & -- & -- & $99.5772$ & $84.6$ & -- & $92.1$ & -- \\" in first
    assert r"Prompts \textless{}2\textgreater{}, published & -- & -- & $99.9$" in first
    assert r"Some paper \& al." in first
    assert "published" not in second
    widths = {line.count("&") for line in first.splitlines() if line.endswith(r"\\")}
    assert len(widths) == 1


def test_report(table):
    page = page_of(table[0])
    rows = table_rows(section(page, "ViT-S, flowers"))
    assert (rows["Full"][1], rows["Prompts <2>"][1], rows["Mona"][2]) == ("99.5772", "99.9", "97.5")
    assert table_rows(section(page, "Test top-1, %"))["Full, published"][:2] == ["99.5772", "84.6"]
    assert "Some paper &amp; al." in page
    assert page.count('<tr class="published">') == 5


def test_csv(table):
    rows = list(csv.DictReader(io.StringIO(table[1].to_csv())))
    lines = [row for row in rows if row["stage"] == "published"]
    assert {(row["method"], row["dataset"], row["metric"]): row["published"] for row in lines} == {
        ("Full", "flowers", ""): "0.995772",
        ("Full", "pets", ""): "0.846",
        ("Full", "mean", ""): "0.921",
        ("Mona", "flowers", "base"): "0.975",
        ("Mona", "flowers", "novel"): "0.75",
        ("Prompts <2>", "flowers", ""): "0.999",
    }
    assert {row["test_accuracy"] + row["val_accuracy"] for row in lines} == {""}
    assert {row["published"] for row in rows if row["stage"] != "published"} == {""}


def test_several_sources_are_told_apart(tmp_path):
    text = study_text(
        backbones={"ViT-S": 0},
        extra="published:\n- {source: A, scores: {Full: {pets: 90}}}\n- {source: B, scores: {Full: {pets: 91}}}\n",
    )
    found = table_of(write_study_folder(tmp_path, text)).to_markdown()
    assert markdown_row(found, "ViT-S, pets", "method")[2:4] == ["published [1]", "published [2]"]
    assert markdown_row(found, "ViT-S, pets", "Full")[2:4] == ["90", "91"]
    assert "not measured here: [1] A, ViT-S; [2] B, ViT-S." in found


@pytest.mark.parametrize("tasks", [list(TASKS), ["cifar", *(t for t in TASKS if TASKS[t].group != "Natural")]])
def test_group_means_of_vtab(tasks, tmp_path):
    """Of groups that are in the study as a whole."""
    lines = ["backbones: [{model: deltalens/vit-mini, label: ViT-S}]", "methods: {Full: full, Linear: linear}"]
    lines += ["datasets:", *(f"  {task}: {{path: v, format: vtab1k/{task}}}" for task in tasks)]
    lines += ["published: {source: P, scores: {Full: {Natural: 75.88, Structured: 47.64}}}", "seeds: [0]"]
    grid = write_study_folder(tmp_path, "\n".join(lines), accuracy=lambda run: 0.5)
    found = markdown_row(table_of(grid).to_markdown(), "VTAB-1k, ViT-S", "Full, published")
    assert found[2:5] == ["75.88" if len(tasks) == 19 else "-", "-", "47.64"]
    assert "75.88" in page_of(grid) or len(tasks) < 19


WRONG = {
    "published: {source: P}": r"line 4, published: has no numbers",
    "published: {scores: {Full: {a: 1}}}": r"line 4, published\.source: expected text",
    "published: {source: P, scores: {Ful: {a: 1}}}": r"scores\.Ful: expected a row: Full, Linear; rows that",
    "published: {source: P, scores: {Full: {d: 1}}}": r"published\.scores\.Full\.d: .*allowed: a, b, mean",
    "published: {source: P, scores: {Full: {Natural: 1}}}": r"Full\.Natural: .*allowed: a, b, mean",
    "published: {source: P, scores: {Full: {a: 101}}}": r"Full\.a: expected per cent, from 0 to 100, got 101",
    "published: {source: P, scores: {Full: {a: {base: x}}}}": r"Full\.a\.base: expected a number, got 'x'",
    "published: {source: P, scores: {Full: 99}}": r"published\.scores\.Full: expected a mapping",
    "published: {source: P, not_run: {Full: {a: 1}}}": r"not_run\.Full: is a row that is run",
    "published: {source: P, backbone: c, scores: {Full: {a: 1}}}": r"expected a backbone: vit-mini; got 'c'",
    "published: {sauce: P}": r"published\.sauce: .*did you mean source",
    "published:\n- {source: P, scores: {Full: {a: 1}}}\n- {source: Q}": r"line 6, published\.1: has no numbers",
    "published: 3": r"published: expected a mapping",
}


@pytest.mark.parametrize("text", WRONG)
def test_mistakes_are_named(text, tmp_path):
    start = "backbones: deltalens/vit-mini\nmethods: {Full: full, Linear: linear}\ndatasets: {a: x, b: y}\n"
    (tmp_path / "study.yaml").write_text(start + text)
    with pytest.raises(ValueError, match=WRONG[text]):
        read_study(tmp_path / "study.yaml")


def test_of_several_backbones_one_is_named(tmp_path):
    (tmp_path / "study.yaml").write_text(study_text(extra="published: {source: P, scores: {Full: {pets: 1}}}"))
    with pytest.raises(ValueError, match=r"published: needs backbone: .*ViT-S, Swin-T"):
        read_study(tmp_path / "study.yaml")
