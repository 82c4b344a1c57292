"""Ranks and paired tests of a study, and its table in LaTeX."""

import math
import re
import statistics

import numpy as np
import pytest
from scipy import stats
from study_runs import BACKBONES, DATASETS, METHODS, study_text, table_of, write_study_folder
from test_study_report import page_of, section, table_rows

from deltalens.studies.significance import (
    compare_with,
    critical_distance,
    holm,
    paired_p,
    rank_methods,
)
from deltalens.studies.study_latex import escape_latex, to_latex
from deltalens.studies.study_report import p_text


# ------------------------------------------------------------------ ranks and tests
def accuracies_of(table, label) -> np.ndarray:
    return np.array([cell.mean for cell in table.cells if cell.variant.label == label])


def test_ranks_are_scipys(study):
    grid, table = study
    ranking = rank_methods(table.cells)
    values = np.array([accuracies_of(table, label) for label in METHODS])
    ranks = stats.rankdata(-values, axis=0)
    assert {row.label: row.mean for row in ranking.rows} == pytest.approx(
        dict(zip(METHODS, ranks.mean(1), strict=True))
    )
    assert {row.label: row.std for row in ranking.rows} == pytest.approx(
        dict(zip(METHODS, ranks.std(1, ddof=1), strict=True))
    )
    assert ranking.friedman == pytest.approx(stats.friedmanchisquare(*values).pvalue)
    assert ranking.distance is None  # two backbones, three datasets
    assert [row.mean for row in ranking.rows] == sorted(row.mean for row in ranking.rows)
    part = section(page_of(grid), "Mean ranks")
    for row in ranking.rows:
        assert f"{row.label}: mean rank {row.mean:.2f} ± {row.std:.2f}" in part
    assert f"p = {p_text(ranking.friedman)}" in part
    assert "critical distance" not in part


def test_the_critical_distance_needs_ten_datasets(tmp_path):
    """Demsar 2006: for alpha 0.05, q is 2.728 for five methods and 2.343 for three."""
    assert critical_distance(5, 1) / math.sqrt(5 * 6 / 6) == pytest.approx(2.728, abs=1e-3)
    assert critical_distance(3, 14) == pytest.approx(2.343 * math.sqrt(3 * 4 / (6 * 14)), abs=1e-3)
    methods = {name: METHODS[name] for name in ("Linear", "LoRA", "Mona")}
    for count in (9, 10):
        text = study_text(methods, {"ViT-S": 0}, {f"d{i}": 0 for i in range(count)}, seeds=[0])
        grid = write_study_folder(
            tmp_path / str(count), text, lambda r: 0.5 + METHODS[r.variant.label][2] + 0.01 * int(r.dataset.name[1:])
        )
        ranking = rank_methods(table_of(grid).cells)
        expected = critical_distance(3, 10) if count == 10 else None
        assert ranking.distance == expected
        assert ("critical distance" in page_of(grid)) == (count == 10)


def test_tests_over_tasks_are_scipys_wilcoxon(study):
    grid, table = study
    found = compare_with("Full", table.rows, table.cells)
    assert (found.unit, [test.label for test in found.rows]) == ("task", [m for m in METHODS if m != "Full"])
    for test in found.rows:
        if test.label == "VPT-deep":
            continue
        differences = accuracies_of(table, test.label) - accuracies_of(table, "Full")
        assert test.differences == pytest.approx(differences)
        assert (test.pairs, test.test) == (6, "Wilcoxon")
        assert test.p == pytest.approx(stats.wilcoxon(differences.round(12)).pvalue)
    rows = table_rows(section(page_of(grid), "Against Full"))
    mona = next(test for test in found.rows if test.label == "Mona")
    assert rows["Mona"] == [
        f"{100 * mona.mean:+.1f}", "6 of 6", "6", "Wilcoxon", p_text(mona.p), p_text(mona.adjusted),
    ]  # fmt: skip
    assert mona.p == 2 / 2**6
    assert "after the correction none can be below 0.05" in section(page_of(grid), "Against Full")


def test_a_failed_run_takes_its_partner_out_of_the_pair(study):
    """The mean over seeds that both have finished."""
    _, table = study
    vpt = next(t for t in compare_with("Full", table.rows, table.cells).rows if t.label == "VPT-deep")
    finals = {
        row.seed: row.accuracy
        for row in table.rows
        if (row.backbone, row.dataset, row.method) == ("Swin-T", "pets", "VPT-deep")
    }
    full = {r.seed: r.accuracy for r in table.rows if (r.backbone, r.dataset, r.method) == ("Swin-T", "pets", "Full")}
    assert finals[2] is None
    assert vpt.differences[4] == pytest.approx(statistics.fmean(finals[s] - full[s] for s in (0, 1)))


@pytest.mark.parametrize(("seeds", "name"), [(2, "too few runs"), (4, "paired t"), (7, "Wilcoxon")])
def test_with_few_tasks_the_pairs_are_seeds(tmp_path, seeds, name):
    text = study_text(backbones={"ViT-S": 0}, seeds=range(seeds), extra="reference: LoRA")
    grid = write_study_folder(tmp_path, text)
    table = table_of(grid)
    found = compare_with(grid.study.reference_label, table.rows, table.cells)
    assert (found.reference, found.unit) == ("LoRA", "seed")
    values = {label: np.zeros(seeds) for label in METHODS}
    for row in table.rows:
        values[row.method][row.seed] += row.accuracy / 3
    for test in found.rows:
        differences = values[test.label] - values["LoRA"]
        assert (test.test, test.pairs) == (name, seeds)
        assert test.differences == pytest.approx(differences)
        if name == "paired t":
            assert test.p == pytest.approx(stats.ttest_rel(values[test.label], values["LoRA"]).pvalue, rel=1e-6)
        elif name == "Wilcoxon":
            assert test.p == pytest.approx(stats.wilcoxon(differences.round(12)).pvalue)
        else:
            assert (test.p, test.adjusted) == (None, None)


def test_paired_p_of_what_scipy_cannot_say():
    assert paired_p([0.0] * 8) == ("all equal", 1.0)
    assert paired_p([0.01] * 3) == ("no spread", None)
    assert paired_p([0.01, 0.02]) == ("too few runs", None)
    assert paired_p([]) == ("too few runs", None)


def test_holm_is_the_textbooks():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


# ------------------------------------------------------------------ LaTeX
def read_latex(text: str) -> list[list[list[str]]]:
    """The cells of every tabular; checks that groups, environments, math and the number of columns are right."""
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        stack.append(name) if kind == "begin" else stack.pop() == name or pytest.fail(name)
    assert stack == []
    bare = re.sub(r"\\\\|\\[&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    tables = []
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        assert re.fullmatch(r"\\toprule\n.*\\midrule\n.*\\bottomrule\n", body, re.DOTALL)
        lines = [line for line in body.splitlines() if not re.fullmatch(r"\\(top|mid|bottom)rule", line)]
        assert all(line.endswith(r" \\") for line in lines)
        rows = [re.split(r" (?<!\\)& ", line.removesuffix(r" \\")) for line in lines]
        assert {len(row) for row in rows} == {len(columns)}
        tables.append(rows)
    return tables


def test_latex_read_back_has_the_numbers_of_the_table(study):
    _, table = study
    text = to_latex(table)
    tables = read_latex(text)
    assert len(tables) == 2
    for backbone, (header, *rows) in zip(BACKBONES, tables, strict=True):
        assert header == ["Method", "Params", "With head", *DATASETS, "Mean", "Time (s)", "Memory"]
        assert [row[0] for row in rows] == list(METHODS)
        for row in rows:
            cells = [c for c in table.cells if (c.backbone, c.variant.label) == (backbone, row[0])]
            assert row[1] == f"{cells[0].adapter_parameters:,}"
            assert row[2] == f"{round(statistics.fmean(c.with_head for c in cells)):,}"
            for printed, cell in zip(row[3:6], cells, strict=True):
                found = re.fullmatch(
                    r"\$(\\mathbf\{)?([\d.]+)\}?_\{\\pm ([\d.]+)\}\$(\\textsuperscript\{\\dag\})?", printed
                )
                assert found.group(2, 3) == (f"{100 * cell.mean:.1f}", f"{100 * cell.std:.1f}")
                top = max(c.mean for c in table.cells if (c.backbone, c.dataset) == (backbone, cell.dataset))
                assert bool(found.group(1)) == (found.group(2) == f"{100 * top:.1f}")
                assert bool(found.group(4)) == (not cell.complete)
            mean = statistics.fmean(cell.mean for cell in cells)
            assert row[6].strip("$").removeprefix(r"\mathbf{").rstrip("}") == f"{100 * mean:.1f}"
            assert float(row[7]) == pytest.approx(statistics.fmean(c.seconds for c in cells), rel=0.01)
            assert row[8] == "3.4 GB"
        assert sum("mathbf" in row[6] for row in rows) == 1
    assert text.count("not all seeds") == 1


def test_latex_escapes_names(tmp_path):
    label = r"a_b & 50% $x$ #1 {y} \z ~ ^ [w] *"
    methods = {label: METHODS["Mona"], "Linear": METHODS["Linear"]}
    text = study_text(methods, {"ViT_S": 0}, {"d_1": 0}, seeds=[0])
    grid = write_study_folder(tmp_path, text, lambda _: 0.5, methods=methods)
    ((header, first, second),) = read_latex(to_latex(table_of(grid)))
    assert first[0] == (
        r"a\_b \& 50\% \$x\$ \#1 \{y\} \textbackslash{}z \textasciitilde{} \textasciicircum{} {[}w{]} {*}"
    )
    assert header[3] == r"d\_1"
    assert first[3] == second[3] == r"$\mathbf{50.0}$"  # equal bests are both bold; one seed has no deviation
    assert "Memory" not in header
    assert "Mean" not in header
    assert escape_latex("two\nlines") == "two lines"
