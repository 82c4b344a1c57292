"""The CLIP whose weights travel with the package: its file, its name, and what it knows."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import deltalens as dl
from deltalens.backbones.open_clip import mini
from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.data.drawn_shapes import FLAT, HELD_OUT, Look, draw_all

DATA = Path(__file__).parents[2] / "shared/data/tiny_imagenet_48"
LEAST_TOP1, LEAST_DRAWN = 28.0, 40.0
UNSEEN = ["zeppelin", "kumquat", "theremin"]


@pytest.fixture(scope="module")
def facts():
    return json.loads(mini.WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def classifier():
    return dl.create_backbone(mini.NAME, class_names=["goldfish", "school bus", *UNSEEN]).eval()


# ------------------------------------------------------------------ file
def test_the_file_is_small_and_as_described(facts):
    assert mini.WEIGHTS.stat().st_size <= 8e6
    file = load_file(mini.WEIGHTS)
    assert {tensor.dtype for name, tensor in file.items() if name not in (mini.IDS, mini.SPREAD)} == {torch.float16}
    stored = sum(tensor.numel() for name, tensor in file.items() if name not in (mini.IDS, mini.SPREAD))
    assert stored == facts["stored_parameters"]
    assert len(file[mini.ROWS]) == len(file[mini.IDS]) == facts["stored_token_rows"]
    assert facts["config"] == json.loads(json.dumps(mini.CONFIG))
    card = mini.WEIGHTS.with_name("README.md").read_text(encoding="utf-8")
    assert f"{facts['test']['top1']:.1f} / {facts['test']['top5']:.1f} %" in card


def test_packing_keeps_all_but_the_rows_that_are_left_out():
    torch.manual_seed(0)
    weights = mini.untrained().state_dict()
    ids = torch.tensor([3, 5, 49407])
    again = mini.unpacked(mini.packed(weights, ids))
    assert again.keys() == weights.keys()
    for name in weights.keys() - {mini.TABLE}:
        assert torch.equal(again[name], weights[name])
    assert torch.equal(again[mini.TABLE][ids], weights[mini.TABLE][ids])
    rest = again[mini.TABLE][6:49407]
    assert rest.std() == pytest.approx(float(weights[mini.TABLE][ids].std()), rel=0.01)


def test_seen_rows_are_stored_and_unseen_ones_drawn_alike_each_time(classifier):
    table, file = classifier.clip.token_embedding.weight.detach(), load_file(mini.WEIGHTS)
    known = file[mini.IDS].long()
    goldfish = mini.tokenizer()(["goldfish"])[0]
    assert set(goldfish.tolist()) <= set(known.tolist())
    assert torch.equal(table[known], file[mini.ROWS].float())

    unseen = torch.ones(len(table), dtype=torch.bool)
    unseen[known] = False
    again = dl.create_backbone(mini.NAME, class_names=["goldfish"]).clip.token_embedding.weight.detach()
    assert torch.equal(table, again)
    assert table[unseen].std() == pytest.approx(float(table[known].std()), rel=0.02)
    assert len(torch.unique(table[unseen][:2000], dim=0)) == 2000


def test_unseen_names_stay_distinct(classifier):
    with torch.no_grad():
        texts = classifier.text_features()
    similar = texts @ texts.T - torch.eye(len(texts))
    assert similar.max() < 0.999


# ------------------------------------------------------------------ name
def test_it_is_open_clips_own_model_with_its_preprocessing(classifier):
    from open_clip.model import CLIP

    assert type(classifier) is ZeroShotClassifier
    assert type(classifier.clip) is CLIP
    preprocessing = dl.preprocessing(classifier)
    assert preprocessing["input_size"] == [3, 48, 48]
    assert preprocessing["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert classifier(torch.randn(2, 3, 48, 48)).shape == (2, 5)
    texts = mini.tokenizer()(["a photo of a goldfish."])
    with torch.no_grad():
        wanted = classifier.clip.encode_text(texts, normalize=True)
        torch.testing.assert_close(classifier.text_features()[:1], wanted, atol=1e-5, rtol=0)


def test_listed_and_built_as_other_names_are():
    assert mini.NAME in dl.list_models("deltalens/*")
    assert mini.NAME in dl.list_models("clip-mini")
    model = dl.create_backbone("clip-mini", num_classes=7, img_size=64)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert dl.preprocessing(model)["input_size"] == [3, 64, 64]
    adapted = dl.attach(model, dl.LoRAConfig(r=2))
    assert dl.count_parameters(adapted).adapter == 6 * 2 * 2 * (192 + 192)
    with pytest.raises(TypeError, match="no options but img_size, got precision"):
        dl.create_backbone(mini.NAME, num_classes=2, precision="fp16")


def test_a_checkpoint_takes_the_place_of_its_weights(tmp_path):
    torch.manual_seed(0)
    other = mini.untrained()
    torch.save(other.state_dict(), tmp_path / "other.pth")
    model = dl.create_backbone(mini.NAME, class_names=["goldfish"], checkpoint=tmp_path / "other.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.clip.parameters(), other.parameters(), strict=True))


def test_without_open_clip_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"clip-mini is a model of open_clip.*deltalens\[open-clip\]"):
        dl.create_backbone(mini.NAME, class_names=["goldfish"])
    assert mini.NAME not in dl.list_models("deltalens/*")


@pytest.mark.slow
def test_an_adapter_is_loaded_in_another_process(tmp_path):
    torch.manual_seed(0)
    model = dl.create_backbone(mini.NAME, class_names=["goldfish", UNSEEN[0]], templates="art of the {}.")
    dl.attach(model, dl.MMAConfig(start=3, bottleneck=4, alpha=0.5))
    dl.save_pretrained(model, tmp_path / "adapter")
    images = torch.randn(2, 3, 48, 48)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import deltalens, torch; from pathlib import Path\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "model = deltalens.from_pretrained(folder / 'adapter').eval()\n"
        "print(model(torch.load(folder / 'images.pt')).tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with torch.no_grad():
        wanted = model.eval()(images)
    torch.testing.assert_close(torch.tensor(json.loads(found.stdout)), wanted, atol=1e-4, rtol=0)


# ------------------------------------------------------------------ what it knows
@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/tiny_imagenet_48")
def test_zero_shot_on_real_pictures(facts):
    model = dl.create_backbone(mini.NAME, class_names=facts["class_names"], templates=facts["templates"]).eval()
    index, packed = np.load(DATA / "val.npz"), (DATA / "val-00.bin").read_bytes()
    pieces = zip(index["offset"][::10].astype(int), index["length"][::10].astype(int), strict=True)
    pictures = [np.asarray(Image.open(io.BytesIO(packed[o : o + n])).convert("RGB")) for o, n in pieces]
    labels = torch.from_numpy(index["label"][::10].astype(np.int64))
    assert accuracy(model, np.stack(pictures), labels) > LEAST_TOP1


def test_zero_shot_on_drawings_of_unseen_pairs():
    pairs = sorted(HELD_OUT)
    names = [Look("plain", *pair).name for pair in pairs]
    pictures = draw_all([Look("plain", *pair) for pair in pairs for _ in range(5)], FLAT, seed=77)
    model = dl.create_backbone(mini.NAME, class_names=names, templates="a drawing of a {}.").eval()
    assert accuracy(model, pictures, torch.arange(len(pairs)).repeat_interleave(5)) > LEAST_DRAWN


def accuracy(model, pictures, labels):
    """In per cent; pictures (N, 48, 48, 3) uint8."""
    preprocessing = dl.preprocessing(model)
    mean, std = (torch.tensor(preprocessing[part]) for part in ("mean", "std"))
    images = ((torch.from_numpy(pictures) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        return 100 * (model(images).argmax(1) == labels).float().mean().item()
