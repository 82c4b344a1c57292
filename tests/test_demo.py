"""`deltalens demo` from the command line, on a tiny budget, and the digits it trains on."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import deltalens as dl
from deltalens.cli import demo as cli_demo
from deltalens.cli.main import main
from deltalens.data import digits as scans_of_digits
from deltalens.data.arrays import ArrayDataset
from deltalens.data.digits import enlarge, load_digits
from deltalens.data.transforms import eval_transform
from deltalens.studies import demo

TINY = ["--epochs", "1", "--train-images", "100"]


def take_few(patch):
    """Fewer images to validate and test on; which numbers a run gives is compared, not how good they are."""
    patch.setattr(scans_of_digits, "VAL_IMAGES", 60)
    patch.setattr(scans_of_digits, "TEST_IMAGES", 100)


@pytest.fixture
def few(monkeypatch):
    take_few(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, what the terminal showed) of one run of two methods."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as terminal:
        take_few(patch)
        patch.setenv("COLUMNS", "80")
        code = main(["demo", *TINY, "--methods", "linear", "lora", "--output", str(folder)])
    assert code == 0
    return folder, terminal.getvalue()


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished[0] / demo.RESULTS).read_text(encoding="utf-8"))


# ------------------------------------------------------------------ what a run leaves
def test_terminal_shows_a_row_for_each_method_and_the_report(finished, results):
    folder, shown = finished
    for run in results["runs"]:
        row = next(line for line in shown.splitlines() if line.startswith(run["method"]) and "test" not in line)
        assert f"{100 * run['accuracy']:.1f} %" in row
        assert f"{run['adapter_parameters']:,}" in row
        assert f"{run['adapter_parameters'] + run['head_parameters']:,}" in row
        assert "…" not in row
    assert max(len(line) for line in shown.splitlines() if str(folder) not in line) <= 80
    assert f"report: {folder / demo.REPORT}" in shown


def test_results_are_those_of_the_methods(results):
    linear, lora = results["runs"]
    assert (linear["method"], lora["method"]) == ("Linear", "LoRA")
    assert linear["adapter_parameters"] == 0
    assert linear["head_parameters"] == lora["head_parameters"] == 192 * 10 + 10
    assert lora["adapter_parameters"] == 6 * 2 * 8 * (192 + 192)  # blocks, parts, rank, in + out
    assert lora["percent"] == pytest.approx(100 * lora["adapter_parameters"] / lora["backbone_parameters"])
    assert 0 < linear["saved_bytes"] < lora["saved_bytes"] / 100
    assert all(
        len(run["epochs"]) == 1 and len(run["predictions"]) == len(results["pictures"]) for run in results["runs"]
    )


def test_report_names_every_method_and_stands_alone(finished, results):
    text = (finished[0] / demo.REPORT).read_text(encoding="utf-8")
    for run in results["runs"]:
        assert f">{run['method']}</span>" in text
        assert f"{100 * run['accuracy']:.1f} %" in text
    assert text.count("data:image/png;base64,") == len(results["pictures"]) == demo.PICTURES
    assert not re.search(r"https?://", text)
    assert "--epochs 1 --train-images 100" in text
    assert str(finished[0]) not in text


def test_saved_adapters_give_the_reported_accuracy_and_predictions(few, finished, results):
    folder, _ = finished
    digits = load_digits(32)
    assert len(digits.test) == 100
    for run in results["runs"]:
        model = dl.from_pretrained(folder / run["folder"])
        assert dl.class_names(model) == list(digits.class_names)
        assert dl.preprocessing(model)["input_size"] == [3, 32, 32]
        images = ArrayDataset(digits.test.images, digits.test.labels, eval_transform(dl.preprocessing(model)))
        with torch.no_grad():
            probabilities = model(torch.stack([images[i][0] for i in range(len(images))])).softmax(1)
        accuracy = (probabilities.argmax(1).numpy() == digits.test.labels).mean()
        assert accuracy == pytest.approx(run["accuracy"], abs=1e-6)
        assert dl.adapter_info(model)["metrics"]["test accuracy"] == pytest.approx(run["accuracy"])
        tensors = folder / run["folder"] / "adapter_model.safetensors"
        assert tensors.stat().st_size == run["adapter_bytes"]
        assert load_file(tensors)


def test_same_seed_same_numbers_and_an_earlier_demo_is_replaced(tmp_path, few, finished, results, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["demo", *TINY, "--methods", "lora", "--output", "again"]
    numbers = []
    for seed in ("0", "1"):
        assert main([*argv, "--seed", seed]) == 0
        run = json.loads((tmp_path / "again" / demo.RESULTS).read_text(encoding="utf-8"))["runs"][0]
        numbers.append((run["accuracy"], run["epochs"]))
    lora = results["runs"][1]
    assert numbers[0] == (lora["accuracy"], lora["epochs"])  # whatever was trained before it
    assert numbers[1] != numbers[0]


def test_tune_takes_the_rate_that_is_best_on_the_validation_images(tmp_path, few, monkeypatch):
    monkeypatch.setattr(demo, "RATES", (1e-6, 3e-2, 3e37))  # nearly nothing, a good one, one that diverges
    folder = tmp_path / "tuned"
    assert main(["demo", *TINY, "--methods", "linear", "--tune", "--output", str(folder)]) == 0
    content = json.loads((folder / demo.RESULTS).read_text(encoding="utf-8"))
    assert content["runs"][0]["settings"]["lr"] == 3e-2
    assert "found in this run" in content["conditions"]["Learning rates"]


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "linaer"], "linear"),
        (["--methods", "mona", "mona"], "once"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--train-images", "5"], "between 10"),
        (["--model", "deltalens/vit-mimi"], "vit-mini"),
        (["--img-size", "3"], "img-size 3"),
    ],
)
def test_bad_options_are_one_line_and_leave_no_folder(words, message, tmp_path, capsys):
    folder = tmp_path / "none"
    assert main(["demo", *words, "--output", str(folder)]) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not folder.exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert main(["demo", *TINY, "--methods", "linear", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "thesis.txt" in error
    assert "--output" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_a_stopped_demo_left_is_taken_over(tmp_path, few):
    (tmp_path / "linear").mkdir()
    (tmp_path / ".report.html.x1.tmp").write_text("half", encoding="utf-8")
    assert main(["demo", *TINY, "--methods", "linear", "--output", str(tmp_path)]) == 0
    assert (tmp_path / demo.REPORT).is_file()


def test_a_method_without_demo_settings_runs_with_its_own_defaults(monkeypatch):
    monkeypatch.delitem(demo.CONTENDERS, "bitfit")
    each = demo.contender("bitfit")
    assert each.label == "bitfit"
    assert each.learning_rate > 0


def test_command_names_what_is_not_default():
    class Options(dict):
        __getattr__ = dict.__getitem__

    given = Options({**cli_demo.DEFAULTS, "output": "elsewhere", "open": True})
    assert cli_demo.command_line(given) == "deltalens demo"
    given |= {"methods": ["mona", "vpt"], "seed": 3, "img_size": None, "tune": True}
    assert cli_demo.command_line(Options(given)) == "deltalens demo --img-size null --methods mona vpt --seed 3 --tune"


# ------------------------------------------------------------------ digits
def test_splits_are_disjoint_stratified_and_fixed():
    digits, again = load_digits(8), load_digits(8)
    parts = (digits.train, digits.val, digits.test)
    assert [len(part) for part in parts] == [1097, 200, 500]
    scans = [{image.tobytes() for image in part.images} for part in parts]
    assert sum(map(len, scans)) == len(set.union(*scans)) > 1790  # a few scans are the same to the pixel
    for part in parts:
        shares = np.bincount(part.labels, minlength=10) / len(part)
        assert np.all(np.abs(shares - 0.1) < 0.01)
    assert all(
        np.array_equal(a.images, b.images) for a, b in zip(parts, (again.train, again.val, again.test), strict=True)
    )
    assert not np.array_equal(load_digits(8, split_seed=1).test.images, digits.test.images)


@pytest.mark.parametrize("count", [10, 37, 400])
def test_fewer_training_images_are_the_beginning_of_more_and_balanced(count):
    few, all_of_them = load_digits(16, count), load_digits(16)
    assert np.array_equal(few.train.images, all_of_them.train.images[:count])
    assert np.array_equal(few.test.images, all_of_them.test.images)
    per_class = np.bincount(few.train.labels, minlength=10)
    assert per_class.max() - per_class.min() <= 1


def test_enlarged_scans_keep_their_strokes():
    scan = np.zeros((1, 8, 8))
    scan[0, 2, 5] = 16
    image = enlarge(scan, 40)[0]
    assert image.shape == (40, 40, 3)
    assert image.dtype == np.uint8
    row, column = np.unravel_index(image[..., 0].argmax(), (40, 40))
    assert (row // 4, column // 4) == (3, 6)  # a margin of one scan pixel on each side
    assert image[..., 0].max() > 200
    assert image[20:, :20].max() <= 2  # bicubic rings a little
    assert np.array_equal(image[..., 0], image[..., 2])


@pytest.mark.parametrize("wrong", [{"size": 4}, {"train_images": 9}, {"train_images": 1098}])
def test_impossible_digits_are_refused(wrong):
    with pytest.raises(ValueError, match=re.escape(str(next(iter(wrong.values()))))):
        load_digits(**wrong)
