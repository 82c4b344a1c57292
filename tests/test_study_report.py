"""What `deltalens compare` writes beside table.md: the report, its ranks and tests, and the table in LaTeX."""

import csv
import itertools
import re
import statistics
from html import unescape
from xml.etree import ElementTree

import numpy as np
import pytest
from study_runs import BACKBONES, DATASETS, FAILURE, METHODS, made_up_accuracy, study_text, table_of, write_study_folder
from test_report import Page

from deltalens.cli.main import main
from deltalens.studies.figure import page_colours
from deltalens.studies.plots import COLOURS, Curve, Point, curves, scatter
from deltalens.studies.report import STYLE
from deltalens.studies.results import count_text
from deltalens.studies.study_details import read_details
from deltalens.studies.study_latex import to_latex
from deltalens.studies.study_reader import read_study
from deltalens.studies.study_report import render_study_report
from deltalens.studies.study_report_plots import mean_curve


def page_of(grid) -> str:
    return render_study_report(table_of(grid), grid.study, read_details(grid))


def section(page: str, title: str) -> str:
    return next(part for part in page.split("<section>") if f"<h2>{title}</h2>" in part)


def table_rows(html: str) -> dict[str, list[str]]:
    """Method -> the cells of its row, as text."""
    rows = {}
    for row in re.findall(r"<tr[^>]*>(<td>.*?)</tr>", html):
        first, *rest = (unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row))
        rows[first] = rest
    return rows


def svgs(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


# ------------------------------------------------------------------ the command
def test_the_command_writes_all_of_it_and_says_where(study, capsys):
    grid, _ = study
    place = grid.output.parent
    assert main(["compare", str(place / "study.yaml"), "--output", str(grid.output), "--only-table"]) == 0
    printed = capsys.readouterr().out
    assert f"the report is {grid.output / 'report.html'}" in printed
    assert (grid.output / "report.html").read_text(encoding="utf-8") == page_of(grid)
    assert (grid.output / "table.tex").read_text(encoding="utf-8") == to_latex(table_of(grid))
    rows = list(csv.DictReader((grid.output / "runs.csv").open()))
    assert {row["peak_memory_bytes"] for row in rows} == {"3400000000", ""}
    assert len(list((grid.output / "plots").glob("*.svg"))) == 6 + 3 + 2  # every task, sizes of backbones, storage


# ------------------------------------------------------------------ the page
def test_the_page_is_well_formed_and_asks_for_nothing_from_outside(study):
    text = page_of(study[0])
    page = Page(text)
    assert not re.search(r"https?:|url\(|@import|<script|\ssrc=", text)
    links = [attrs["href"] for attrs in page.all("a")]
    assert links
    assert all((study[0].output / link).is_dir() for link in links)
    assert all("href" not in attrs for tag, attrs in page.tags if tag != "a")
    assert "default-src 'none'" in text


def test_the_head_says_what_was_compared(study):
    said = Page(page_of(study[0])).text
    assert "5 methods × 2 backbones × 3 datasets × 3 seeds: 90 final runs." in said
    assert "89 of 90 runs are finished, 1 failed. Trained from 2026-03-01 to 2026-03-03" in said
    assert "on Linux x86_64, 8 CPU cores" in said
    assert "12 epochs" in said
    assert "by seed 0: 15 % for validation, 15 % for the test" in said


def test_accuracies_on_the_page_are_the_tables(study):
    grid, table = study
    page = page_of(grid)
    overview = table_rows(section(page, "Test top-1, %"))
    assert list(overview) == list(METHODS)
    for label, cells in overview.items():
        own = [cell for cell in table.cells if cell.variant.label == label]
        assert cells[:-1] == [cell.accuracy_text() for cell in own]
        assert cells[-1] == f"{100 * statistics.fmean(cell.mean for cell in own):.1f}"
    assert overview["VPT-deep"][4].endswith("(1 failed)")
    for backbone, dataset in itertools.product(BACKBONES, DATASETS):
        rows = table_rows(section(page, f"{backbone}, {dataset}"))
        for cell in table.cells:
            if (cell.backbone, cell.dataset) == (backbone, dataset):
                row = rows[cell.variant.label]
                assert row[:3] == [cell.accuracy_text(), f"{cell.adapter_parameters:,}", f"{cell.with_head:,}"]
                assert row[-1] == "3.4 GB"


def test_the_best_of_a_column_is_marked(study):
    grid, table = study
    marked = re.findall(r'<td class="value" data-label="ViT-S, pets"><span class="best">(.*?)</span>', page_of(grid))
    best = max((c for c in table.cells if (c.backbone, c.dataset) == ("ViT-S", "pets")), key=lambda cell: cell.mean)
    assert marked == [best.accuracy_text()]


def test_failed_runs_are_listed_with_their_message_escaped(study):
    part = section(page_of(study[0]), "Failed runs")
    assert part.count("<li>") == 1
    assert 'href="runs/Swin-T/pets/VPT-deep/seed-2/"' in part
    assert FAILURE not in part
    assert FAILURE in unescape(part)


def test_plots_show_the_numbers_of_the_table(study):
    grid, table = study
    page = page_of(grid)
    means = {(c.backbone, c.dataset, c.variant.label): c.mean for c in table.cells}
    plots = svgs(section(page, "Accuracy against trained parameters"))
    assert len(plots) == 2 + 6
    tips = [element.text for element in plots[2].iter("title")]
    for label, tip in zip(METHODS, tips, strict=True):
        assert tip.startswith(f"{label}: ")
        assert tip.endswith(f", {100 * means['ViT-S', 'flowers', label]:.1f} %")
    overall = statistics.fmean(means["Swin-T", name, "Mona"] for name in DATASETS)
    assert f"Mona {100 * overall:.1f} %" in plots[1].get("aria-label")


def test_two_tasks_have_full_as_dashed_lines(study):
    grid, table = study
    plots = svgs(section(page_of(grid), "Two tasks: flowers and pets"))
    assert len(plots) == 2
    means = {(c.dataset, c.variant.label): c.mean for c in table.cells if c.backbone == "Swin-T"}
    tips = [element.text for element in plots[1].iter("title")]
    assert tips == [f"{m}: {100 * means['flowers', m]:.1f} %, {100 * means['pets', m]:.1f} %" for m in METHODS]
    (lines,) = (e for e in plots[1].iter("path") if "reference" in e.get("class"))
    (full,) = (e for e in plots[1].iter("circle") if e[0].text.startswith("Full:"))
    across, up = re.fullmatch(r"M52 ([\d.]+)H446.*M([\d.]+) 12V\d+", lines.get("d")).groups()
    assert (float(up), float(across)) == (float(full.get("cx")), float(full.get("cy")))


def test_a_method_has_one_colour_everywhere(study):
    page = page_of(study[0])
    for number, label in enumerate(METHODS):
        tips = re.findall(rf'class="(c\d) dot"[^>]*><title>{label}[:,]', page)
        assert len(tips) > 6
        names = re.findall(rf'class="(c\d) name"[^>]*>{label}<', page)
        assert len(names) == 8 + 3 + 2 + 2 + 1 + 6  # parameters, sizes, storage, two tasks, ranks, curves
        rows = re.findall(rf'<tr class="(c\d)"><td><span class="method">{label}<', page)
        assert len(rows) == 1 + 6 + 2 + (label != "Full")
        assert set(tips + names + rows) == {f"c{number}"}


def test_a_missing_method_does_not_shift_the_colours(tmp_path):
    grid = write_study_folder(tmp_path, accuracy=lambda r: "no" if r.variant.label == "Linear" else made_up_accuracy(r))
    plots = section(page_of(grid), "Accuracy against trained parameters")
    assert set(re.findall(r'class="(c\d) dot"[^>]*><title>Mona:', plots)) == {"c3"}
    assert "Linear" not in plots


def test_validation_curves_are_means_over_seeds(study):
    grid, _ = study
    details = read_details(grid)
    runs = details.curves["Swin-T", "pets", "VPT-deep"]
    assert len(runs) == 2  # the third failed
    curve = mean_curve("a", runs, 2)
    assert curve.values == pytest.approx(np.mean(runs, 0))
    assert curve.band == pytest.approx(np.std(runs, 0, ddof=1))
    assert mean_curve("a", runs[:1], 2).band is None
    plots = svgs(section(page_of(grid), "Validation accuracy during training"))
    assert len(plots) == 6
    assert sum("band" in e.get("class") for e in plots[0].iter("path")) == 5
    assert f"epoch 12: {100 * np.mean(details.curves['ViT-S', 'flowers', 'Mona'], 0)[-1]:.1f} %" in page_of(grid)


# ------------------------------------------------------------------ small and broken studies
def test_names_are_escaped(tmp_path):
    methods = {'<b>M</b> & "x"': METHODS["Mona"], "Linear": METHODS["Linear"]}
    text = study_text(methods, {"<i>": 0}, {"a<script>": 0, "b&c": 0}).replace("small sets", "<u>small</u> sets")
    grid = write_study_folder(tmp_path, text, lambda run: 0.5 + 0.01 * run.seed, methods=methods)
    html = page_of(grid)
    page = Page(html)
    assert not {"b", "i", "u", "script"} & {tag for tag, _ in page.tags}
    for name in ('<b>M</b> & "x"', "<i>", "a<script>", "b&c", "<u>small</u>"):
        assert name in page.text
    assert all((grid.output / attrs["href"]).is_dir() for attrs in page.all("a"))


def test_one_seed_one_dataset_and_no_test_images(tmp_path):
    methods = {name: METHODS[name] for name in ("Linear", "Mona")}
    text = study_text(methods, {"ViT-S": 0}, {"flowers": 0}, seeds=[4])
    grid = write_study_folder(tmp_path, text, made_up_accuracy, tested=False)
    table, html = table_of(grid), page_of(grid)
    page = Page(html)
    for missing in ("Two tasks", "Mean ranks", "<h2>Test top-1", "Failed runs", "test accuracy", "±"):
        assert missing not in html.replace("mean ± sample", ""), missing
    assert "There are too few runs for a test." in page.text
    rows = table_rows(section(html, "ViT-S, flowers"))
    assert rows["Mona"][0] == f"{100 * table.cells[1].mean:.1f}"
    assert 'data-label="Validation top-1, %"' in html
    assert table_rows(section(html, "Against Linear"))["Mona"][2:] == ["1", "too few runs", "-", "-"]
    assert "validation top-1 accuracy in per cent" in to_latex(table)
    assert "| validation top-1 |" in table.to_markdown()


@pytest.mark.parametrize("outcome", [None, "everything failed"])
def test_a_study_without_a_result_has_a_page(tmp_path, outcome):
    grid = write_study_folder(tmp_path, accuracy=lambda _: outcome)
    html = page_of(grid)
    page = Page(html)
    assert not page.all("svg")
    assert ("90 failed" if outcome else "90 are to come") in page.text
    assert len(page.all("a")) == (180 if outcome else 0)
    assert ("failed" if outcome else "--") in to_latex(table_of(grid))


def test_searches_are_counted_apart_and_linked(tmp_path):
    methods = {name: METHODS[name] for name in ("Linear", "Mona")}
    text = study_text(methods, {"ViT-S": 0}, {"pets": 0}, [0], extra="lr: {relative: [0.5, 1]}")
    grid = write_study_folder(tmp_path, text, lambda r: "diverged" if r.rate == 0.0015 else made_up_accuracy(r))
    html = page_of(grid)
    page = Page(html)
    assert "2 final runs, and 4 that choose learning rates." in page.text
    assert "best of 2 (0.5, 1 times" in page.text
    assert table_rows(section(html, "ViT-S, pets"))["Mona"][4] == "0.003 *"
    assert 'href="runs/ViT-S/pets/Mona/lr-0.0015/">ViT-S, pets, Mona, search, lr 0.0015</a>: diverged' in html


def test_many_tasks_show_means_only(tmp_path):
    methods = {name: METHODS[name] for name in ("Linear", "Mona")}
    text = study_text(methods, {"ViT-S": 0}, {f"d{i}": 0 for i in range(13)}, [0])
    grid = write_study_folder(tmp_path, text, lambda run: 0.5 + METHODS[run.variant.label][2])
    html = page_of(grid)
    assert "Plots of single tasks are in plots/." in html
    assert len(svgs(section(html, "Accuracy against trained parameters"))) == 1
    (plot,) = svgs(section(html, "Validation accuracy during training"))
    curves_of = read_details(grid).curves
    mean = np.mean([runs[0] for (_, _, label), runs in curves_of.items() if label == "Mona"], 0)[0]
    tips = [tip.text for tip in plot.iter("title")]
    assert f"Mona, epoch 1: {100 * mean:.1f} %" in tips


def test_vtab_tasks_have_their_summary(tmp_path):
    methods = {name: METHODS[name] for name in ("Linear", "Full")}
    text = study_text(methods, {"ViT-S": 0}, {"a": 0, "b": 0}, [0])
    text = text.replace('"a": nowhere/0', '"a": {path: nowhere, format: vtab1k/dtd}')
    text = text.replace('"b": nowhere/1', '"b": {path: nowhere, format: vtab1k/eurosat}')
    grid = write_study_folder(tmp_path, text, lambda r: 0.7 if (r.variant.is_full or r.dataset.name == "a") else 0.6)
    rows = table_rows(section(page_of(grid), "VTAB-1k, ViT-S"))
    assert rows["Linear"][1:] == ["70.00 (0)", "60.00 (0)", "65.00", "65.00"]
    assert rows["Full"][1:] == ["70.00", "70.00", "70.00", "70.00"]


def test_long_names_are_cut_in_plots_only(tmp_path):
    names = [f"LoRA on every linear layer of the network, r = {r}" for r in (4, 8)]
    methods = dict.fromkeys(names, METHODS["LoRA"])
    text = study_text(methods, {"ViT-S": 0}, {"pets": 0, "flowers": 0}, [0])
    grid = write_study_folder(tmp_path, text, lambda run: 0.6, methods=methods)
    html = page_of(grid)
    assert list(table_rows(section(html, "Test top-1, %"))) == names
    for plot in svgs(html):
        texts = [text.text for text in plot.iter("text")]
        assert {"LoRA on ever…work, r = 4", "LoRA on ever…work, r = 8"} <= set(texts)
        width = float(plot.get("viewBox").split()[2])
        assert all(0 <= float(text.get("x")) <= width for text in plot.iter("text"))


# ------------------------------------------------------------------ the study file
WRONG = {
    "reference: Fll": r"reference: expected a row: Linear, LoRA, VPT-deep, Mona, Full; got 'Fll'",
    "scatter: [flowers]": r"scatter: expected two of the datasets flowers, pets, textures; got \['flowers'\]",
    "scatter: [flowers, flowers]": r"scatter: expected two of the datasets",
    "scatter: [flowers, birds]": r"scatter: expected two of the datasets",
    "scatter: flowers": r"scatter: expected two of the datasets",
    "scatter: [[a], b]": r"scatter: expected two of the datasets",
}


@pytest.mark.parametrize("extra", WRONG)
def test_mistakes_in_fields_of_the_report_are_named(extra, tmp_path):
    (tmp_path / "study.yaml").write_text(study_text(extra=extra))
    with pytest.raises(ValueError, match=rf"line \d+, {WRONG[extra]}"):
        read_study(tmp_path / "study.yaml")


def test_reference_and_scatter_are_the_files_or_the_defaults(tmp_path):
    def read(**options):
        (tmp_path / "study.yaml").write_text(study_text(**options))
        return read_study(tmp_path / "study.yaml")

    own = read(extra="reference: Mona\nscatter: [textures, flowers]")
    assert (own.reference_label, own.scatter_datasets) == ("Mona", ("textures", "flowers"))
    assert (read().reference_label, read().scatter_datasets) == ("Full", ("flowers", "pets"))
    small = read(methods={"Mona": METHODS["Mona"], "Linear": METHODS["Linear"]}, datasets={"pets": 0})
    assert (small.reference_label, small.scatter_datasets) == ("Mona", None)


# ------------------------------------------------------------------ colours and forms
DEFICIENCIES = {  # Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear_rgb(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(linear: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt(np.maximum(TO_XYZ @ np.clip(linear, 0, 1) / [0.9505, 1, 1.089], 1e-3))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_methods_are_told_apart_by_the_colour_blind(scheme):
    style = STYLE.read_text(encoding="utf-8")
    dark = dict(re.findall(r"--([\w-]+): (#\w+);", style.partition("@media")[2]))
    colours = page_colours() if scheme == "light" else dark
    methods = [linear_rgb(colours[f"c{i}"]) for i in range(COLOURS)]
    for name, matrix in DEFICIENCIES.items():
        seen = [lab(np.array(matrix) @ rgb) for rgb in methods]
        nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
        assert nearest > 12, name
    card = TO_XYZ[1] @ linear_rgb(colours["card"])
    for rgb in methods:
        low, high = sorted((card, TO_XYZ[1] @ rgb))
        assert (high + 0.05) / (low + 0.05) > 3.5  # marks need 3


def test_more_methods_than_colours_differ_in_form():
    svg = scatter([Point(f"m{i}", 10.0**i, 0.5, number=8 * i) for i in range(1, 4)], "x", "y", count_text)
    marks = re.findall(r'<(\w+) class="c0 dot"([^>]*)>', svg)
    assert [kind for kind, _ in marks] == ["path", "path", "circle"]
    assert [place.count("L") for _, place in marks[:2]] == [3, 2]  # a square, a triangle


def test_a_band_lies_around_its_curve():
    svg = curves([Curve("a", [0.4, 0.6], 0, [0.1, 0.05])], "y", as_percent=True, to_hundred=False)
    band = re.search(r'band" d="M(.*?)Z"', svg).group(1)
    line = re.search(r'c0 line" d="M(.*?)"', svg).group(1)
    points = [tuple(map(float, p.split())) for p in band.split("L")]
    path = [tuple(map(float, p.split())) for p in line.split("L")]
    for (x, y), upper, lower in zip(path, points[:2], points[:1:-1], strict=True):
        assert upper[0] == lower[0] == x
        assert y - upper[1] == pytest.approx(lower[1] - y, abs=0.2)
    assert points[3][1] - points[0][1] == pytest.approx(2 * (points[2][1] - points[1][1]), abs=0.3)
