"""Commands with classes that are texts: predict --classes, evaluate --class-names, zero-shot models."""

import json
from pathlib import Path

import pytest
import torch
from hub_cache import write_open_clip
from picture_folders import write_pictures, write_splits, write_tiny_backbone
from saved_clips import CLASSES, pixels, raw_cosines, write_adapter, write_siglip

import deltalens as dl
from deltalens.cli.main import main
from deltalens.cli.word_lists import read_words
from deltalens.data.image_folder import image_files
from deltalens.methods import CoOpConfig, MMAConfig

OTHERS = ["red", "a dog, asleep", "yellow"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_pictures(root / "flat", 2)
    write_splits(root / "split", 2, 1, 2)
    write_pictures(root / "colours/test", 2, classes={"pink": (250, 180, 190), "red": (200, 40, 50)})
    write_tiny_backbone(root / "tiny")
    return root


@pytest.fixture(scope="module")
def clip(world):
    return write_open_clip(world / "clip", depth=3)


@pytest.fixture(scope="module")
def adapted(world, clip):
    """MMA with random weights, in the folder `adapted`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        return write_adapter(world / "adapted", "clip", MMAConfig(start=2, bottleneck=4, alpha=0.5))


@pytest.fixture(autouse=True)
def _in_world(world, clip, monkeypatch):
    monkeypatch.chdir(world)


def predicted(capsys, *words: str) -> list[dict[str, float]]:
    """Class -> probability of each image."""
    capsys.readouterr()
    assert main(["predict", *words, "--format", "json", "--topk", "9"]) == 0
    entries = json.loads(capsys.readouterr().out)
    return [{each["class"]: each["probability"] for each in entry["predictions"]} for entry in entries]


def fails(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip()


def close(found: list[dict[str, float]], names: list[str], probabilities: torch.Tensor) -> None:
    given = torch.tensor([[row[name] for name in names] for row in found])
    torch.testing.assert_close(given, probabilities, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ predict
@torch.no_grad()
def test_other_classes_of_an_adapter(adapted, capsys, tmp_path):
    images = image_files(Path("flat"))
    model = dl.from_pretrained("adapted")
    own = model(pixels("clip", images)).softmax(1)
    model.set_classes(OTHERS)
    others = model(pixels("clip", images)).softmax(1)
    close(predicted(capsys, "adapted", "flat"), CLASSES, own)
    (tmp_path / "names.txt").write_text("\ufeffred\n a dog, asleep\nyellow\n\n", encoding="utf-8")
    for given in (json.dumps(OTHERS), str(tmp_path / "names.txt")):
        close(predicted(capsys, "adapted", "flat", "--classes", given), OTHERS, others)
    (tmp_path / "options.yaml").write_text(json.dumps({"classes": OTHERS, "images": ["flat"]}))
    close(predicted(capsys, "adapted", "--config", str(tmp_path / "options.yaml")), OTHERS, others)
    model.set_classes(["red", "blue"], ["a drawing of a {}.", "itap of a {}."])
    wanted = model(pixels("clip", images)).softmax(1)
    templates = ("--templates", '["a drawing of a {}.", "itap of a {}."]')
    close(predicted(capsys, "adapted", "flat", "--classes", "red, blue", *templates), ["red", "blue"], wanted)
    model.set_classes(CLASSES, "itap of a {}.")
    wanted = model(pixels("clip", images)).softmax(1)
    close(predicted(capsys, "adapted", "flat", "--templates", "itap of a {}."), CLASSES, wanted)
    assert (own - wanted).abs().max() > 1e-3


def test_zero_shot_is_open_clips(clip, capsys):
    images = image_files(Path("flat"))
    texts = [f"an image of {name}" for name in OTHERS]
    wanted = (clip.logit_scale.exp().detach() * raw_cosines(clip, pixels("clip", images), texts)).softmax(1)
    words = ("--classes", json.dumps(OTHERS), "--templates", "an image of {}")
    close(predicted(capsys, "--model", "clip", "flat", *words), OTHERS, wanted)
    close(predicted(capsys, "flat", *words, "--model=clip"), OTHERS, wanted)
    close(predicted(capsys, *words, "--model", "clip", "flat/blue", "flat/green", "flat/red"), OTHERS, wanted)


def test_siglip_asks_for_each_class_by_itself(world, capsys):
    siglip = write_siglip(world / "siglip")
    images, words = image_files(Path("flat")), ("flat", "--classes", "red, blue, dog")
    cosines = raw_cosines(siglip, pixels("siglip", images), [f"a photo of a {n}." for n in ("red", "blue", "dog")])
    logits = siglip.logit_scale.exp().detach() * cosines - 2.0
    close(predicted(capsys, "--model", "siglip", *words), ["red", "blue", "dog"], logits.softmax(1))
    found = predicted(capsys, "--model", "siglip", *words, "--task", "multilabel", "--threshold", "0")
    close(found, ["red", "blue", "dog"], logits.sigmoid())
    middle = float(logits.sigmoid().flatten().sort().values[8:10].mean())
    found = predicted(capsys, "--model", "siglip", *words, "--task", "multilabel", "--threshold", str(middle))
    assert [len(row) for row in found] == (logits.sigmoid() >= middle).sum(1).tolist()
    assert "--task multilabel is for SigLIP" in fails(
        capsys, "predict", "--model", "clip", *words, "--task", "multilabel"
    )


def test_what_predict_refuses(world, adapted, capsys):
    dl.save_pretrained(dl.attach(dl.create_backbone("tiny", num_classes=3), dl.LinearConfig()), world / "linear")
    write_adapter(world / "coop", "clip", CoOpConfig(num_words=2))
    write_adapter(world / "per_class", "clip", CoOpConfig(num_words=2, per_class=True))
    write_adapter(world / "tip", "clip", dl.TipAdapterConfig(passes=1))
    for message, words in {
        "outputs of a head that was trained for them": ["linear", "flat", "--classes", "a, b"],
        "words of their own for 3 classes": ["per_class", "flat", "--classes", "a, b, c"],
        "Tip-Adapter's images are of 3 classes": ["tip", "flat", "--classes", "a, b, c"],
        "learned words in the place of templates ('X X {}.')": ["coop", "flat", "--templates", "a {}."],
        "'red' is twice among the classes": ["adapted", "flat", "--classes", "red, blue, red"],
        "number 2 of the 3 classes is empty": ["adapted", "flat", "--classes", "red, , blue"],
        "names no classes": ["adapted", "flat", "--classes", "[]"],
        "no file classes.txt": ["adapted", "flat", "--classes", "classes.txt"],
        "is no list of classes": ["adapted", "flat", "--classes", "[red, 3]"],
        "'red' alone is always certain": ["adapted", "flat", "--classes", "red"],
        "has {} where the name": ["adapted", "flat", "--templates", "a photo"],
        "name them with --classes": ["--model", "clip", "flat"],
        "--checkpoint is for --model": ["adapted", "flat", "--checkpoint", "x.pth"],
        "has no text tower": ["--model", "deltalens/vit-mini", "flat", "--classes", "a, b"],
        "got neither": ["", "flat"],
    }.items():
        assert message in fails(capsys, "predict", *words)
    assert predicted(capsys, "per_class", "flat", "--classes", ",".join(CLASSES)) == predicted(
        capsys, "per_class", "flat"
    )
    assert predicted(capsys, "coop", "flat/red", "--classes", "a, b")
    capsys.readouterr()
    Path("both.yaml").write_text("model: clip\nadapter: adapted\nimages: [flat]\n")
    assert main(["predict", "adapted", "--config", "both.yaml"]) == 1
    assert "got both" in capsys.readouterr().err


def test_described_classes_have_no_others(world, capsys):
    model = dl.create_backbone("clip", class_names=["red", "blue"], descriptions={"red": ["a red."], "blue": ["sky."]})
    dl.save_pretrained(dl.attach(model, MMAConfig(start=2, bottleneck=4)), world / "described")
    assert "it has none for dog: pass --templates" in fails(
        capsys, "predict", "described", "flat", "--classes", "red, dog"
    )
    words = ("described", "flat/red", "--classes", "red, dog", "--templates", "a {}.")
    assert {frozenset(row) for row in predicted(capsys, *words)} == {frozenset({"red", "dog"})}


def test_words_of_an_option():
    assert read_words(None, "classes") is None
    assert read_words("a, b", "queries") == ["a, b"]
    assert read_words(" a ,b ", "classes", commas=True) == ["a", "b"]
    assert read_words(("a, b", "c"), "classes", commas=True) == ["a, b", "c"]


# ------------------------------------------------------------------ evaluate
def measured(tmp_path, *words: str) -> dict:
    assert main(["evaluate", *words, "--output", str(tmp_path / "e.json")]) == 0
    return json.loads((tmp_path / "e.json").read_text())


@torch.no_grad()
def test_the_classes_of_other_data(adapted, capsys, tmp_path):
    images = image_files(Path("colours/test"))
    labels = torch.tensor([["pink", "red"].index(image.parent.name) for image in images])
    model = dl.from_pretrained("adapted")
    model.set_classes(["pink", "red"])
    wanted = torch.nn.functional.cross_entropy(model(pixels("clip", images)), labels)
    words = ("adapted", "--data", "colours")
    error = fails(capsys, "evaluate", *words)
    assert "not among the 3 known classes: pink" in error
    assert "--class-names data" in error
    results = measured(tmp_path, *words, "--class-names", "data")
    assert results["loss"] == pytest.approx(float(wanted), rel=1e-4)
    assert results["images"] == 4
    assert "holds class folders; pass --split all" in fails(
        capsys, "evaluate", "adapted", "--data", "flat", "--class-names", "data"
    )
    dl.save_pretrained(dl.attach(dl.create_backbone("tiny", num_classes=3), dl.LinearConfig()), "linear")
    error = fails(capsys, "evaluate", "linear", "--data", "colours", "--class-names", "data")
    assert "outputs of a head" in error
    assert "no text" in error


def test_a_zero_shot_model_is_measured(clip, capsys, tmp_path):
    images = image_files(Path("split/test"))
    labels = torch.tensor([CLASSES.index(image.parent.name) for image in images])
    logits = clip.logit_scale.exp().detach() * raw_cosines(
        clip, pixels("clip", images), [f"a {name}" for name in CLASSES]
    )
    words = ("--model", "clip", "--data", "split", "--templates", "a {}")
    results = measured(tmp_path, *words)
    assert results["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert results["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert (results["model"], results["images"], "adapter" in results) == ("clip", 6, False)
    rows = [f"{image},{image.parent.name}" for image in image_files(Path("flat"))]
    Path("table.csv").write_text("\n".join(["image,label,split", *(f"{row},test" for row in rows)]))
    rows = [f"{image},{image.parent.name},train" for image in image_files(Path("split/train"))]
    Path("table.csv").write_text(Path("table.csv").read_text() + "\n" + "\n".join(rows) + "\n")
    results = measured(tmp_path, "--model", "clip", "--data", "table.csv")
    assert results["images"] == 6
    assert "has no classes of its own" in fails(capsys, "evaluate", *words, "--class-names", "adapter")
