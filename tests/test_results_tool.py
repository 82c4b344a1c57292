"""The tables of docs/results.md: how the tool makes them of a study, and that every table of the page was made so."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from picture_folders import write_splits, write_tiny_backbone

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from deltalens.data import read_data  # noqa: E402
from tools.pretrain.points.voxels import FILE, SIDE  # noqa: E402
from tools.results import adapters  # noqa: E402
from tools.results.__main__ import main, make  # noqa: E402
from tools.results.clouds import write_clouds  # noqa: E402
from tools.results.page import END, Page  # noqa: E402
from tools.results.study import Table  # noqa: E402
from tools.results.tables import TABLES  # noqa: E402

STUDIES = {name: table for name, table in TABLES.items() if isinstance(table, Table)}

STUDY = """\
title: Colours
backbones: {model: MODEL, label: tiny}
methods:
  Linear: linear
  Biases: bitfit
seeds: SEEDS
lr: {relative: [1, 0.1]}
training: {epochs: 1, batch_size: 12, warmup_epochs: 0}
"""
TEXT = "# Results\n\nBefore.\n\n<!-- table colours: begin -->\nold\n<!-- end -->\n\nAfter | all.\n"
MADE = [name for name in TABLES if f"Made with `python -m tools.results {name} " in Page().file.read_text()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_splits(folder / "sets/photos", train=4, val=2, test=3)
    write_tiny_backbone(folder / "model")
    return folder


def study(place: Path, seeds: str) -> Table:
    file = place / "colours.yaml"
    file.write_text(STUDY.replace("MODEL", str(place / "model")).replace("SEEDS", seeds))
    return Table("colours", {"photos": "sets/photos"}, "a second", {"parameters": "Two & two"}, study=file)


def block(page: Page, name: str = "colours") -> str:
    text = page.file.read_text()
    return text[slice(*page.place(text, name))]


def test_a_table_is_made_completed_and_made_again(place):
    page = Page(place / "docs/results.md", "pictures")
    page.file.parent.mkdir()
    page.file.write_text(TEXT)
    stale = place / "docs/pictures/colours-parameters-older.svg"
    stale.parent.mkdir()
    stale.write_text("<svg/>")
    table = study(place, "[0]")
    make(table, place, place / "runs", page)
    made = block(page)
    before, after = TEXT.split("<!-- table")[0], TEXT.split(END)[1]
    assert page.file.read_text() == f"{before}<!-- table colours: begin -->\n{made}{END}{after}"
    assert "`python -m tools.results colours --data DATA --runs RUNS`" in made
    assert "deltalens compare colours.yaml --data photos=DATA/sets/photos --output RUNS/colours --threads 1\n" in made
    assert str(place) not in made
    assert re.search(r"\n\w+ \w+, \d+ CPU cores; \d+ \w+ 20\d\d; python [\d.]+, torch ", made)
    assert "Incomplete" not in made
    cells = {cell.variant.label: cell for cell in _cells(table, place)}
    for label, cell in cells.items():
        assert f"\n| {label} | {100 * cell.mean:.1f} | {cell.adapter_parameters:,} |" in made
    (drawn,) = (place / "docs/pictures").iterdir()
    assert f"![Two & two](pictures/{drawn.name})\n" in made
    assert drawn.name == "colours-parameters-tiny-photos.svg"
    assert "Linear: " in drawn.read_text()

    results = {file: file.stat().st_mtime_ns for file in (place / "runs").rglob("results.json")}
    table = study(place, "[0, 1, 2]")
    make(table, place, place / "runs", page, only_page=True)
    assert "**Incomplete:** 6 of 10 runs are finished. 1 of 3 seeds: every method." in block(page)
    make(table, place, place / "runs", page)
    assert "Incomplete" not in block(page)
    assert all(file.stat().st_mtime_ns == time for file, time in results.items())
    assert all(f"{100 * cell.mean:.1f} ± {100 * cell.std:.1f} |" in block(page) for cell in _cells(table, place))

    for file in results:  # as older versions left them
        file.write_text(re.sub(r' *"machine": .*\n', "", file.read_text()))
    make(table, place, place / "runs", page, only_page=True)
    assert f"; machine not recorded in {len(results)} of 10 runs; " in block(page)


def _cells(table: Table, place: Path):
    from deltalens.studies.study_table import read_table

    return read_table(table.grid(place, place / "runs/colours")).cells


def test_nothing_is_written_where_something_is_missing(place, tmp_path):
    page, table = Page(tmp_path / "results.md"), study(place, "[0]")
    page.file.write_text(TEXT)
    with pytest.raises(FileNotFoundError, match=r"the table colours needs .*sets/photos; see --list"):
        make(table, tmp_path, tmp_path / "runs", page)
    with pytest.raises(ValueError, match="has no finished run; the page is as it was"):
        make(table, place, tmp_path / "runs", page, only_page=True)
    assert page.file.read_text() == TEXT
    for text, message in (
        ("# Results\n", "needs one line <!-- table colours: begin -->"),
        (TEXT + TEXT, "needs one line <!-- table colours: begin -->"),
        (TEXT.replace(END, ""), "needs a line <!-- end --> behind"),
        (TEXT.replace("old", "<!-- table b: begin -->"), "needs a line <!-- end --> behind"),
    ):
        with pytest.raises(ValueError, match=message):
            page.place(text, "colours")


def test_adapters_are_trained_once_and_analysed_where_they_lie(place, tmp_path, monkeypatch):
    done = []

    def deltalens(words):
        done.append(words)
        if words[0] == "train":
            folder = Path(words[words.index("--output") + 1])
            folder.mkdir(parents=True)
            versions = {"torch": "2.15"}
            results = {
                "test": {"accuracy": 0.5},
                "machine": "a machine",
                "versions": versions,
                "finished": "2026-11-02",
            }
            (folder / "results.json").write_text(json.dumps(results))
        else:
            print("drawn in", words[words.index("--output") + 1] if "--output" in words else "no file")
        return 0

    monkeypatch.setattr(adapters, "deltalens", deltalens)
    page = Page(tmp_path / "docs/results.md", "pictures")
    page.file.parent.mkdir()
    page.file.write_text(TEXT.replace("colours", "adapters"))
    with pytest.raises(FileNotFoundError, match="needs a finished run in"):
        adapters.Adapters().make(place, tmp_path / "runs", page, only_page=True)
    for _ in range(2):
        adapters.Adapters().make(place, tmp_path / "runs", page)
    made = block(page, "adapters")
    assert [words[0] for words in done] == ["train"] * 5 + ["analyze"] * 6
    assert {file.parent.name for file in (tmp_path / "runs").rglob("results.json")} == set(adapters.TRAINED)
    assert made.count("\ndeltalens train --data DATA/cls/sign_digits --output RUNS/adapters/") == 5
    assert "a machine; 2 November 2026; torch 2.15." in made
    assert "\n| Mona, n = 16 | 50.0 |\n" in made
    assert "\ndrawn in adapters-embeddings.png\ndrawn in adapters/attention.png\ndrawn in no file\n" in made
    assert str(tmp_path) not in made
    monkeypatch.setattr(adapters, "deltalens", lambda words: 1)
    with pytest.raises(RuntimeError, match=r"analyze embeddings .* failed; the page is as it was"):
        adapters.Adapters().make(place, tmp_path / "runs", page)
    assert block(page, "adapters") == made


def test_the_list_names_studies_that_can_be_read(capsys, tmp_path):
    main(["--list"])
    printed = capsys.readouterr().out
    for name, table in TABLES.items():
        assert f"{name}\n  needs {', '.join(table.needs)} below --data\n  takes {table.time}" in printed
    for table in STUDIES.values():
        grid = table.grid(tmp_path, tmp_path)
        assert {dataset.source for dataset in grid.study.datasets} == set(table.data)
        assert grid.counts()["open"] > 5
    with pytest.raises(SystemExit):
        main(["methods"])
    assert "name a table and --data, or give --list" in capsys.readouterr().err


def test_a_study_can_read_what_a_tool_has_made_of_the_data(place, monkeypatch):
    asked, words = [], []

    def write(folder: Path, target: Path) -> Path:
        asked.append((folder, target))
        return target

    table = Table("colours", {"photos": "sets/raw"}, "a second", {}, study=study(place, "[0]").file, prepare=write)
    monkeypatch.setattr("tools.results.study.deltalens", lambda said: words.extend(said) or 1)
    with pytest.raises(RuntimeError, match="was not carried out"):
        table.make(place, place / "others", Page(place / "none.md"))
    assert asked == [(place / "sets/raw", place / "others/photos")]
    assert f"photos={place / 'others/photos'}" in words
    assert "--data photos=RUNS/photos --output RUNS/colours" in table._command()


def test_shapes_become_class_folders_of_clouds(tmp_path):
    grids = np.zeros((4, SIDE, SIDE, SIDE), bool)
    grids[:, 3:8, 3:8, 3:8] = True
    grids[2:, 3:8, 3:8, 8:28] = True
    bits = np.packbits(grids.reshape(4, -1), axis=1)
    index = {"train_index": [0, 3], "val_index": [1, 2], "test_index": [0, 1, 2, 3]}
    np.savez(
        tmp_path / FILE, train_bits=bits, test_bits=bits, train_label=[1, 1, 0, 0], test_label=[1, 1, 0, 0], **index
    )
    (tmp_path / "info.json").write_text('{"classes": ["bar", "box"]}')
    target = write_clouds(tmp_path, tmp_path / "clouds")
    data = read_data(target)
    assert data.class_names == ["bar", "box"]
    assert [len(part) for part in (data.train, data.val, data.test)] == [2, 2, 4]
    spread = {int(label): float(cloud.std(0).max() / cloud.std(0).min()) for cloud, label in data.train}
    assert spread[0] > 2 > spread[1]
    (target / "mine").touch()
    assert write_clouds(tmp_path, target) == target
    assert (target / "mine").exists()


def test_tables_that_are_not_made_say_so():
    for name, table in TABLES.items():
        assert (name in MADE) == ("Not made yet" not in block(Page(), name))
        assert f"`python -m tools.results {table.name} --data DATA --runs RUNS`" in block(Page(), name)


@pytest.mark.parametrize("name", MADE)
def test_every_table_of_the_page_says_how_it_was_made(name):
    made = block(Page(), name)
    assert f"Made with `python -m tools.results {name} --data DATA --runs RUNS`" in made
    assert re.search(r"```bash\ndeltalens \w+ .*(DATA/|--data \w+=RUNS/)", made)
    assert re.search(r"\d CPU cores|machine not recorded in \d+ of \d+ runs", made)
    assert re.search(r"; \d+ [A-Z][a-z]+ 20\d\d", made)
    assert re.search(r"torch \d", made)
    assert re.search(r"\n\| -+ \| -+:", made)
    for file in re.findall(r"!\[.+\]\((.+)\)", made):
        assert (ROOT / "docs" / file).is_file()


@pytest.mark.parametrize("name", [name for name in STUDIES if name in MADE])
def test_every_row_of_a_study_is_on_the_page(name):
    made = block(Page(), name)
    assert f"deltalens compare benchmarks/studies/{name}.yaml --data " in made
    labels = [variant.label for variant in STUDIES[name].grid(ROOT, ROOT).study.variants]
    assert [label for label in labels if f"\n| {label} | " not in made] == []


def test_every_plot_beside_the_page_is_on_it():
    text = Page().file.read_text()
    files = {file.name for file in (ROOT / "docs/images/results").iterdir()}
    assert files == set(re.findall(r"!\[.+\]\(images/results/(.+)\)", text))
