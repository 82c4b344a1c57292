"""`deltalens demo --task clip` from the command line, on a tiny budget."""

import contextlib
import functools
import io
import json
import re

import pytest
import torch

import deltalens as dl
from deltalens.cli import demo as cli_demo
from deltalens.cli.main import main
from deltalens.data.arrays import ArrayDataset
from deltalens.data.drawn_classes import draw_classes
from deltalens.data.transforms import eval_transform
from deltalens.studies import clip_demo
from deltalens.studies.demo import REPORT, RESULTS

few = functools.partial(draw_classes, val_images=2, test_images=4)
TINY = ["demo", "--task", "clip", "--epochs", "1", "--shots", "2"]
METHODS = ["zero_shot", "clip_adapter", "tip_adapter", "mma"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, what the terminal showed) of one run."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as terminal:
        patch.setenv("COLUMNS", "80")
        patch.setattr(clip_demo, "draw_classes", few)
        code = main([*TINY, "--methods", *METHODS, "--output", str(folder)])
    assert code == 0
    return folder, terminal.getvalue()


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished[0] / RESULTS).read_text(encoding="utf-8"))


def test_terminal_shows_base_novel_and_their_mean(finished, results):
    folder, shown = finished
    for run in results["runs"]:
        row = next(line for line in shown.splitlines() if line.startswith(run["method"]) and "base" not in line)
        assert f"{100 * run['base']:.1f} %" in row
        assert f"{run['parameters']:,}" in row
        if run["novel"] is not None:
            mean = 2 * run["base"] * run["novel"] / (run["base"] + run["novel"])
            assert f"{100 * mean:.1f} %" in row
    assert max(len(line) for line in shown.splitlines() if str(folder) not in line) <= 80
    assert f"report: {folder / REPORT}" in shown


def test_only_tip_adapter_refuses_novel_classes(results):
    zero, _, tip, mma = results["runs"]
    assert (zero["parameters"], zero["folder"], zero["epochs"]) == (0, None, [])
    assert tip["novel"] is None
    assert "Tip-Adapter" in tip["refusal"]
    assert tip["parameters"] == 20 * 128
    assert {run["method"] for run in results["runs"] if run["novel"] is None} == {"Tip-Adapter-F"}
    assert mma["parameters"] == sum(2 * 16 * (a + b) + 2 * 16 + a + b + 16 * 17 for a, b in [(192, 128)] * 4)


def test_report_has_both_halves_and_stands_alone(finished, results):
    text = (finished[0] / REPORT).read_text(encoding="utf-8")
    for run in results["runs"]:
        assert f">{run['method']}</span>" in text
    shown = results["base_pictures"] + results["novel_pictures"]
    assert text.count("data:image/png;base64,") == len(shown) == 2 * clip_demo.PICTURES
    assert set(results["base_pictures"]) <= set(results["conditions"]["Base classes"].split(", "))
    assert set(results["novel_pictures"]) <= set(results["conditions"]["Novel classes"].split(", "))
    assert not re.search(r"https?://", text)
    assert "--task clip --methods" in text
    assert str(finished[0]) not in text


def test_saved_adapters_give_the_reported_accuracies(finished, results):
    data = few(48, 2)
    for run in results["runs"][1:]:
        model = dl.from_pretrained(finished[0] / run["folder"]).eval()
        assert dl.class_names(model) == list(data.class_names)
        assert accuracy(model, data.test) == pytest.approx(run["base"], abs=1e-6)
        if run["novel"] is not None:
            model.set_classes(data.novel_names)
            assert accuracy(model, data.novel) == pytest.approx(run["novel"], abs=1e-6)


def accuracy(model, part):
    images = ArrayDataset(part.images, part.labels, eval_transform(dl.preprocessing(model)))
    with torch.no_grad():
        found = model(torch.stack([images[i][0] for i in range(len(images))])).argmax(1)
    return (found.numpy() == part.labels).mean()


def test_predict_takes_such_a_folder(finished, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(few(48, 1).test.images[0]).save(tmp_path / "shape.png")
    assert main(["predict", str(finished[0] / "mma"), str(tmp_path / "shape.png")]) == 0
    shown = capsys.readouterr().out
    assert any(name in shown for name in few(48, 1).class_names)


# ------------------------------------------------------------------ options
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "mmma"], "mma"),
        (["--methods", "mma", "mma"], "once"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--shots", "0"], "shots must be at least 1"),
        (["--train-images", "100"], "--shots"),
        (["--model", "deltalens/vit-mini"], "no text tower"),
    ],
)
def test_bad_options_are_one_line_and_leave_no_folder(words, message, tmp_path, capsys):
    folder = tmp_path / "none"
    assert main(["demo", "--task", "clip", *words, "--output", str(folder)]) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not folder.exists()


def test_what_is_said_counts_more_than_the_tasks_defaults():
    assert cli_demo.translate(["--epochs", "3"]) == ["--epochs", "3"]
    given = ["--epochs", "3", "--task=clip"]
    translated = cli_demo.translate(given)
    assert translated[-3:] == given
    assert translated[: len(translated) - 3] == [
        "--model", "deltalens/clip-mini", "--img-size", "null",
        "--methods", *cli_demo.DEFAULTS_OF["clip"]["methods"], "--epochs", str(cli_demo.DEFAULTS_OF["clip"]["epochs"]),
    ]  # fmt: skip
    assert cli_demo.DEFAULTS_OF["clip"]["methods"] == list(clip_demo.ClipSettings().methods)
    assert cli_demo.DEFAULTS_OF["clip"]["epochs"] == clip_demo.ClipSettings().epochs
