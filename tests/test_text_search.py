"""Images found by text: against open_clip alone and against logits, kept features, the command."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
import torch
from hub_cache import write_open_clip
from picture_folders import write_pictures, write_tiny_backbone
from PIL import Image
from saved_clips import pixels, raw_cosines, write_adapter

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data.image_folder import image_files
from deltalens.lifecycle.state import state_of
from deltalens.methods import CLIPAdapterConfig, CoCoOpConfig, CoOpConfig, MaPLeConfig, MMAConfig, RPOConfig
from deltalens.studies.feature_file import model_digest
from deltalens.studies.text_search import image_features, search

QUERIES = ["a photo of a red_thing", "green {} leaves"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_tiny_backbone(root / "tiny")
    write_pictures(root / "flat", 3)
    return root


@pytest.fixture(scope="module")
def clip(world):
    """open_clip's own model of the folder `clip`."""
    return write_open_clip(world / "clip", depth=3)


@pytest.fixture(autouse=True)
def _in_world(world, clip, monkeypatch):
    monkeypatch.chdir(world)


def fails(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("deltalens: error: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def as_entries(capsys, *words: str) -> list[dict]:
    capsys.readouterr()
    assert main([*words, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------ ranking
def test_zero_shot_is_open_clips_ranking(clip, capsys):
    images = image_files(Path("flat"))
    wanted = raw_cosines(clip, pixels("clip", images), QUERIES)
    entries = as_entries(capsys, "search", "--model", "clip", json.dumps(QUERIES), "flat", "--topk", "4")
    assert [entry["query"] for entry in entries] == QUERIES
    for entry, cosines in zip(entries, wanted.T, strict=True):
        order = cosines.argsort(descending=True)[:4].tolist()
        assert [found["image"] for found in entry["images"]] == [str(images[i]) for i in order]
        given = torch.tensor([found["cosine"] for found in entry["images"]])
        torch.testing.assert_close(given, cosines[order], atol=1e-5, rtol=1e-5)


CONFIGS = {
    "mma": MMAConfig(start=2, bottleneck=4, alpha=0.5),
    "clip_adapter": CLIPAdapterConfig(towers="both", ratio=0.5),
    "coop": CoOpConfig(num_words=3),
    "maple": MaPLeConfig(init="a photo", depth=2),
    "rpo": RPOConfig(num_prompts=2),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_cosines_are_the_logits_of_classes_that_are_the_queries(name):
    model = dl.attach(dl.create_backbone("clip", class_names=["a", "b"]), CONFIGS[name]).eval()
    torch.manual_seed(0)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.add_(0.2 * torch.randn_like(parameter))
    images, queries = image_files(Path("flat")), ["a red car", "leaves"]
    features = image_features(model, images, batch_size=4)
    found = search(model, queries, features, topk=None)
    with dl.disable_adapter(model):
        plain = search(model, queries, image_features(model, images), topk=None)
    model.set_classes(queries, "{}")
    logits = model(pixels("clip", images)) / model.clip.logit_scale.exp()
    difference = 0.0
    for number, (ranked, unadapted) in enumerate(zip(found, plain, strict=True)):
        cosines = {each.image: each.cosine for each in ranked}
        assert [each.cosine for each in ranked] == sorted(cosines.values(), reverse=True)
        given = torch.tensor([cosines[image] for image in images])
        torch.testing.assert_close(given, logits[:, number], atol=1e-5, rtol=1e-4)
        difference = max(difference, *(abs(each.cosine - cosines[each.image]) for each in unadapted))
    assert difference > 1e-3


def test_equally_near_images_keep_their_order(world):
    model = dl.create_backbone("clip", class_names=["a"]).eval()
    for name in ("b.png", "a.png", "c.png"):
        Image.new("RGB", (32, 32), (9, 99, 200)).save(world / name)
    images = [world / "b.png", world / "a.png", world / "c.png"]
    found = search(model, ["a"], image_features(model, images), topk=2)[0]
    assert [each.image for each in found] == images[:2]


def test_texts_of_their_own(clip):
    model = dl.create_backbone("clip", class_names=["a"]).eval()
    for texts, message in [([], "got none"), (["a", " "], "an empty one"), (["a", "a"], "'a' twice")]:
        with pytest.raises(ValueError, match=message):
            model.text_features_of(texts)
    with pytest.raises(ValueError, match="longer than the 16 tokens"):
        model.text_features_of(["a " * 20])
    texts = dl.attach(model, CLIPAdapterConfig(towers="text")).train().text_features_of(["a dog", "a cat"])
    texts.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ------------------------------------------------------------------ what is refused
def test_adapters_without_features_of_texts(world, capsys):
    for name, config, message in [
        ("cocoop", CoCoOpConfig(), "ConditionalContext writes a text anew for each image"),
        (
            "per_class",
            CoOpConfig(num_words=2, per_class=True),
            "words of their own for 3 classes, and there are 1",
        ),
        ("tip", dl.TipAdapterConfig(passes=1), "FeatureCache acts on the logits of its own classes"),
    ]:
        write_adapter(world / name, "clip", config)
        assert message in fails(capsys, "search", name, "a red car", "flat")
    dl.save_pretrained(dl.attach(dl.create_backbone("tiny", num_classes=3), dl.LinearConfig()), world / "linear")
    assert "no text tower" in fails(capsys, "search", "linear", "a red car", "flat")
    assert "no text tower" in fails(capsys, "search", "--model", "deltalens/vit-mini", "a red car", "flat")


def test_wrong_words(capsys):
    begin = ("search", "--model", "clip")
    assert "number 1 of the 1 queries is empty" in fails(capsys, *begin, "", "flat")
    assert "'a' is twice" in fails(capsys, *begin, '["a", "a"]', "flat")
    assert "no images at nowhere" in fails(capsys, *begin, "a", "nowhere")
    assert "topk must be at least 1" in fails(capsys, *begin, "a", "flat", "--topk", "0")
    assert "ends with .png" in fails(capsys, *begin, "a", "flat", "--format", "sheet", "--output", "x.csv")


# ------------------------------------------------------------------ kept features
@pytest.fixture
def photos(tmp_path) -> Path:
    return write_pictures(tmp_path / "photos", 2)


def kept_and_computed(capsys, *words: str) -> tuple[str, list[int]]:
    """(the result, [images that were known, computed])."""
    capsys.readouterr()
    assert main(["search", *words, "--format", "json", "--topk", "99"]) == 0
    captured = capsys.readouterr()
    return captured.out, [int(word) for word in captured.err.replace(",", "").split() if word.isdigit()]


def test_kept_features_give_the_same_results(photos, capsys):
    file = photos.parent / "kept.safetensors"
    words = ("--model", "clip", "a red car", str(photos))
    plain, _ = kept_and_computed(capsys, *words)
    assert kept_and_computed(capsys, *words, "--features", str(file)) == (plain, [0, 6])
    assert kept_and_computed(capsys, *words, "--features", str(file)) == (plain, [6, 0])
    changed = photos / "red/000.jpg"
    Image.new("RGB", (40, 30), (0, 0, 255)).save(changed)
    (photos / "blue/001.png").unlink()
    assert kept_and_computed(capsys, *words, "--features", str(file))[1] == [4, 1]
    fresh, _ = kept_and_computed(capsys, *words)
    given, counts = kept_and_computed(capsys, *words, "--features", str(file))
    assert counts == [5, 0]
    one, other = ({e["image"]: e["cosine"] for e in json.loads(text)[0]["images"]} for text in (fresh, given))
    assert one == pytest.approx(other, abs=1e-6)
    time = changed.stat().st_mtime_ns + 1
    os.utime(changed, ns=(time, time))
    assert kept_and_computed(capsys, *words, "--features", str(file))[1] == [4, 1]


def test_kept_features_move_with_their_images(photos, capsys):
    words = ("--model", "clip", "a red car", str(photos), "--features", str(photos / "kept.safetensors"))
    kept_and_computed(capsys, *words)
    moved = photos.rename(photos.parent / "moved")
    words = ("--model", "clip", "a red car", str(moved), "--features", str(moved / "kept.safetensors"))
    assert kept_and_computed(capsys, *words)[1] == [6, 0]


def test_another_models_file_is_refused(world, photos, capsys):
    file = str(photos.parent / "kept.safetensors")
    kept_and_computed(capsys, "--model", "clip", "a", str(photos), "--features", file)
    before = Path(file).read_bytes()
    model = write_adapter(world / "with_mma", "clip", CONFIGS["mma"])
    assert "another model" in fails(capsys, "search", "with_mma", "a", str(photos), "--features", file)
    assert Path(file).read_bytes() == before
    own = photos.parent / "own.safetensors"
    assert kept_and_computed(capsys, "with_mma", "a", str(photos), "--features", str(own))[1] == [0, 6]
    assert kept_and_computed(capsys, "with_mma", "another", str(photos), "--features", str(own))[1] == [6, 0]
    for change in (
        lambda: model.get_parameter(next(iter(dict(trained(model))))).data.mul_(1.01),
        lambda: setattr(state_of(model).adapters["default"], "configs", [MMAConfig(start=2, bottleneck=4, alpha=0.6)]),
        lambda: dl.adapter_info(model).update(preprocessing={**dl.preprocessing(model), "mean": [0.1, 0.2, 0.3]}),
    ):
        digest = model_digest(model)
        change()
        assert model_digest(model) != digest
    with pytest.raises(ValueError, match="another model"):
        image_features(model, image_files(photos), own)
    digest = model_digest(model)
    model.set_classes(["other", "classes"])
    assert model_digest(model) == digest
    other = Path("clip/open_clip_model.safetensors")
    before = other.read_bytes()
    assert "no image features" in fails(capsys, "search", "--model", "clip", "a", "flat", "--features", str(other))
    assert other.read_bytes() == before
    damaged = photos.parent / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    assert "no readable file" in fails(capsys, "search", "--model", "clip", "a", "flat", "--features", str(damaged))


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def test_a_search_that_stops_keeps_what_it_has(photos, capsys):
    file = str(photos.parent / "kept.safetensors")
    (photos / "red/001.png").write_bytes(b"no picture")
    words = ("search", "--model", "clip", "a", str(photos), "--features", file, "--batch-size", "2")
    assert "001.png" in fails(capsys, *words)
    assert kept_and_computed(capsys, *words[1:], "--skip-broken", "true")[1][-2:] == [4, 1]
    entries = as_entries(capsys, *words, "--skip-broken", "true", "--topk", "99")
    assert len(entries[0]["images"]) == 5


# ------------------------------------------------------------------ forms
def test_forms(capsys, tmp_path):
    words = ("search", "--model", "clip", '["a red car", "leaves"]', "flat", "--topk", "2")
    entries = as_entries(capsys, *words)
    wanted = [(e["query"], i["image"], f"{i['cosine']:.6f}") for e in entries for i in e["images"]]
    assert main([*words, "--output", str(tmp_path / "r.csv")]) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
    assert [(row["query"], row["image"], row["cosine"]) for row in rows] == wanted
    assert [row["rank"] for row in rows] == ["1", "2", "1", "2"]
    (tmp_path / "queries.txt").write_text("a red car\nleaves\n")
    capsys.readouterr()
    assert main([*words[:3], str(tmp_path / "queries.txt"), "flat", "--topk", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[4]] == ["a red car", "leaves"]
    assert lines[1].split() == ["1", f"{entries[0]['images'][0]['cosine']:.4f}", entries[0]["images"][0]["image"]]


def test_a_sheet_shows_the_pictures(tmp_path):
    for name, colour in {"a": (250, 10, 20), "b": (10, 20, 250)}.items():
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name} $x$ {'long' * 9}.png")
    words = ["search", "--model", "clip", '["a red $car$", "leaves"]', str(tmp_path), "--output"]
    sheet = tmp_path.parent / "sheet.png"
    assert main([*words, str(sheet), "--topk", "1"]) == 0
    assert main([*words, str(tmp_path.parent / "sheet.svg")]) == 0
    one = Image.open(sheet).convert("RGB")
    assert main([*words, str(sheet)]) == 0
    both = Image.open(sheet).convert("RGB")
    assert both.size == one.size
    areas = {colour: count / both.width / both.height for count, colour in both.getcolors(1 << 24)}
    for colour in ((250, 10, 20), (10, 20, 250)):
        assert areas[colour] > 0.15  # twice a sixth of the sheet, less margins
