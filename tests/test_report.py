"""The report: a self-contained page that shows every run, with labels that can be read."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from deltalens.studies import plots
from deltalens.studies.labels import Box, place_labels, spread, text_width
from deltalens.studies.pictures import choose_pictures
from deltalens.studies.report import accuracy_interval, render_report, write_report
from deltalens.studies.results import (
    Comparison,
    Epoch,
    Picture,
    Prediction,
    RunResult,
    bytes_text,
    count_text,
    percent_text,
    seconds_text,
)
from deltalens.studies.terminal import comparison_table

VOID = {"meta", "img", "br", "link"}


def run(method="Mona", **changes) -> RunResult:
    result = RunResult(
        method=method,
        settings={"bottleneck": 16, "learning rate": 3e-3},
        adapter_parameters=105_216,
        head_parameters=1_930,
        backbone_parameters=2_710_080,
        accuracy=0.932,
        seconds=21.4,
        saved_bytes=31_000_000,
        adapter_bytes=450_000,
        epochs=[Epoch(2.3, 0.4), Epoch(1.1, 0.7), Epoch(0.3, 0.9)],
        predictions=[Prediction("three", 0.91), Prediction("eight", 0.55)],
        folder="mona",
    )
    return replace(result, **changes)


def comparison(runs=None, **changes) -> Comparison:
    rng = np.random.default_rng(0)
    pictures = [
        Picture(rng.integers(0, 255, (8, 8), dtype=np.uint8), "three"),
        Picture(rng.integers(0, 255, (32, 24, 3), dtype=np.uint8), "nine"),
    ]
    runs = runs or [run("Linear", adapter_parameters=0, accuracy=0.71, folder="linear"), run()]
    values = {"title": "A <small> test", "intro": "First.\n\nSecond & last.", "test_images": 500, "pictures": pictures}
    return Comparison(runs=runs, **values | {"conditions": {"Command": "deltalens demo", "Seed": "0"}} | changes)


class Page(HTMLParser):
    """Reads a page, refuses tags that are not closed in order, and keeps what the tests ask for."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += " " + data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_page_is_well_formed_and_escapes_text():
    page = Page(render_report(comparison()))
    assert "A <small> test" in page.text
    assert "Second & last." in page.text
    assert len([tag for tag, _ in page.tags if tag == "table"]) == 1
    assert len(page.all("svg")) == 4


def test_page_asks_for_nothing_from_outside():
    text = render_report(comparison())
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", text)
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    assert "<script" not in text


def test_table_has_every_number_of_every_run():
    page = Page(render_report(comparison()))
    for part in (
        "Linear",
        "Mona",
        "71.0",
        "93.2",
        "105,216",
        "107,146",
        "3.88 %",
        "21 s",
        "31 MB",
        "450 kB",
        "bottleneck 16",
    ):
        assert part in page.text, part
    assert "0 %" in page.text


def test_pictures_are_embedded_once_and_decode_to_what_was_given():
    given = comparison()
    page = Page(render_report(given))
    sources = [attrs["src"] for attrs in page.all("img")]
    assert len(sources) == len(given.pictures)
    first, second = (
        Image.open(io.BytesIO(base64.b64decode(src.removeprefix("data:image/png;base64,")))) for src in sources
    )
    assert first.mode == "L"
    assert min(first.size) >= 128
    assert second.mode == "RGB"
    assert second.height / second.width == pytest.approx(32 / 24, abs=0.01)
    shrunk = np.asarray(second.resize((24, 32), Image.Resampling.BOX)).astype(float)
    assert np.corrcoef(shrunk.ravel(), given.pictures[1].image.ravel())[0, 1] > 0.9


def test_right_and_wrong_answers_are_marked():
    text = render_report(comparison())
    assert len(re.findall(r'<li class="right">.*?✓.*?three.*?91 %', text)) == 2
    assert len(re.findall(r'<li class="wrong">.*?✗.*?eight.*?55 %', text)) == 2


def test_report_without_pictures_curves_and_folders_leaves_those_sections_out():
    bare = run(epochs=[], predictions=[], folder=None)
    page = Page(render_report(comparison([bare], pictures=[], conditions={})))
    assert len(page.all("svg")) == 2
    assert not page.all("img")
    assert "Use an adapter" not in page.text
    assert "What was run" not in page.text


def test_runs_must_fit_the_pictures_and_have_their_own_names():
    with pytest.raises(ValueError, match=r"Mona has 1 predictions, but there are 2 pictures"):
        comparison([run(predictions=[Prediction("three", 1.0)])])
    with pytest.raises(ValueError, match="its own name"):
        comparison([run(), run()])
    with pytest.raises(ValueError, match="at least one run"):
        render_report(Comparison("t", "i", [], 10))


def test_report_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "report.html"
    write_report(comparison(), target)
    before = target.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="at least one run"):
        write_report(Comparison("t", "i", [], 10), target)
    assert target.read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# ------------------------------------------------------------------ plots
@pytest.mark.parametrize("seed", range(20))
def test_labels_cover_neither_each_other_nor_points(seed):
    rng = np.random.default_rng(seed)
    frame = Box(52, 12, 446, 284)
    centre = rng.uniform((80, 40), (410, 260))
    points = [tuple(np.clip(centre + rng.normal(0, 12, 2), (54, 14), (444, 282))) for _ in range(8)]
    texts = ["Linear", "LoRA", "VPT-deep", "Mona", "Full", "BitFit", "Adapter", "Side-tuning"]
    boxes = place_labels(points, texts, frame)
    for i, box in enumerate(boxes):
        assert not box.outside(frame)
        assert box.right - box.left == pytest.approx(text_width(texts[i]))
        assert all(box.overlap(other) == 0 for other in boxes[i + 1 :])
        assert not any(box.left < x < box.right and box.top < y < box.bottom for x, y in points)


def test_spread_keeps_order_gap_and_range():
    given = [100.0, 101.0, 99.0, 250.0, 249.5]
    moved = spread(given, 16, 20, 250)
    assert np.array_equal(np.argsort(given), np.argsort(moved))
    assert np.diff(sorted(moved)).min() >= 16 - 1e-9
    assert min(moved) >= 20
    assert max(moved) <= 250
    assert spread([5.0, 200.0], 16, 0, 250) == [5.0, 200.0]
    crowded = spread([10.0] * 30, 16, 0, 100)
    assert min(crowded) >= -1e-9
    assert max(crowded) <= 100 + 1e-9


def test_scatter_puts_points_where_their_values_are():
    svg = plots.scatter(
        [plots.Point("a", 1_000, 0.5), plots.Point("b", 10_000, 0.75), plots.Point("c", 100_000, 1.0)],
        "x",
        "y",
        count_text,
    )
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)
    assert dots[0][1] - dots[1][1] == pytest.approx(dots[1][1] - dots[2][1], abs=0.2)
    assert dots[0][1] > dots[2][1]
    with pytest.raises(ValueError, match="positive"):
        plots.scatter([plots.Point("a", 0, 0.5)], "x", "y", count_text)


def test_curves_name_every_series_and_survive_a_single_epoch():
    svg = plots.curves([plots.Curve("one", [0.5], 0), plots.Curve("two", [0.7], 1)], "y", as_percent=True)
    assert ">one</text>" in svg
    assert ">two</text>" in svg
    long = plots.curves([plots.Curve("long", list(np.linspace(2, 0.1, 100)), 2)], "loss", as_percent=False)
    assert "<circle" not in long
    assert long.count('text-anchor="middle">') < 14


@pytest.mark.parametrize("values", [[1.0, 1.0], [1930, 2_712_010], [3e4, 3.6e7], [5.0], [1, 1e9]])
def test_log_axis_covers_its_values_with_ticks_inside(values):
    low, high, ticks = plots.log_axis(values)
    assert low < min(values)
    assert high > max(values)
    assert ticks
    assert all(low <= tick <= high for tick in ticks)
    assert len(ticks) <= 12


# ------------------------------------------------------------------ small things
def test_numbers_as_people_read_them():
    assert [percent_text(v) for v in (0, 0.021, 0.4251, 1.357, 12.24, 100.0, 99.97)] == [
        "0",
        "0.021",
        "0.43",
        "1.36",
        "12.2",
        "100",
        "100",
    ]
    assert [bytes_text(v) for v in (12, 999, 7_900, 304_000, 24_800_000, 2e9)] == [
        "12 B",
        "999 B",
        "7.9 kB",
        "304 kB",
        "24.8 MB",
        "2 GB",
    ]
    assert [seconds_text(v) for v in (0.84, 9.97, 84.2, 725)] == ["0.8 s", "10 s", "84 s", "12 min 5 s"]
    assert [count_text(v) for v in (950, 1000, 37_120, 999_800, 2_712_010)] == ["950", "1 k", "37.1 k", "1 M", "2.71 M"]


def test_accuracy_interval_is_that_of_a_share():
    assert accuracy_interval(0.9, 500) == pytest.approx(0.0264, abs=0.0005)
    assert 0 < accuracy_interval(1.0, 500) < 0.01
    assert accuracy_interval(0.9, 50) > 3 * accuracy_interval(0.9, 500)


def test_chosen_pictures_are_varied_and_tell_methods_apart():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 500)
    correct = rng.random((5, 500)) < np.array([0.7, 0.85, 0.85, 0.93, 0.9])[:, None]
    chosen = choose_pictures(correct, labels, 10)
    assert len(set(chosen)) == 10
    assert [bool(correct[:, i].all()) for i in chosen] == [True, True] + [False] * 8
    assert len({labels[i] for i in chosen}) == 10
    assert len({correct[:, i].tobytes() for i in chosen[2:]}) >= 6
    assert chosen == choose_pictures(correct, labels, 10)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_pictures_are_chosen_also_where_all_or_none_is_right(share):
    correct = np.full((3, 40), bool(share))
    assert len(choose_pictures(correct, np.arange(40) % 10, 10)) == 10
    assert len(choose_pictures(correct[:, :4], np.arange(4), 10)) == 4


def test_terminal_table_fits_80_columns():
    names = {"Linear": 0, "LoRA": 36_864, "VPT-deep": 11_520, "Mona": 105_216, "Full": 2_710_080}
    runs = [
        run(name, adapter_parameters=count, seconds=384.0, saved_bytes=35_900_000, adapter_bytes=10_900_000)
        for name, count in names.items()
    ]
    terminal = io.StringIO()
    Console(file=terminal, width=80).print(comparison_table(comparison(runs)))
    lines = terminal.getvalue().splitlines()
    assert "…" not in terminal.getvalue()
    assert [line.split()[0] for line in lines[-5:]] == list(names)
    assert "2,710,080" in lines[-1]
    assert "2,712,010" in lines[-1]
