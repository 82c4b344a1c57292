"""The zoo: a sample of its models lives through every step, and its page says what the walk found."""

import re
import sys
from pathlib import Path

import pytest
from matrix import ROWS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.zoo import models  # noqa: E402
from tools.zoo.life import live  # noqa: E402
from tools.zoo.page import PAGE, page  # noqa: E402
from tools.zoo.results import append, latest  # noqa: E402

SAMPLE = [
    "timm/dla", "timm/nfnet", "timm/mambaout", "timm/vision_transformer", "hf/swin", "hf/deit-with-teacher",
    "torchvision/resnet18", "open_clip/vit",
]  # fmt: skip
FEW = ["Mona", "Adapter, Pfeiffer", "VPT-deep"]


@pytest.mark.parametrize("key", SAMPLE)
def test_a_sample_adapts(key):
    result = live(key, FEW, graphs=False)
    assert result["outcome"] == "adapts", result
    assert result["blocks"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("key", models.all_keys())
def test_every_model_adapts(key):
    result = live(key)
    if result["outcome"] != "adapts":
        assert f"| `{key}` | " in PAGE.read_text(encoding="utf-8")
        row = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{key}` |"))
        assert "**no**" in row, f"the page says that {key} adapts: {result['outcome']}"


def test_what_goes_wrong_is_told(monkeypatch):
    def broken(key):
        raise RuntimeError("out of\n order")

    monkeypatch.setattr("tools.zoo.life.build", broken)
    assert live("timm/dla")["outcome"] == "RuntimeError: out of order"


def test_results_resume_and_the_last_one_counts(tmp_path):
    file = tmp_path / "new/results.jsonl"
    assert latest(file) == {}
    for key, outcome in (("timm/a", "no"), ("timm/b", "adapts"), ("timm/a", "adapts")):
        append(file, {"key": key, "outcome": outcome})
    assert {key: each["outcome"] for key, each in latest(file).items()} == {"timm/a": "adapts", "timm/b": "adapts"}


RESULT = {
    "key": "timm/a", "name": "a_tiny", "size": 64, "note": "", "families": ["fallback"], "blocks": 3, "layouts": [],
    "slots": ["block.stream"], "why no map": ["unproven"], "compile": "yes", "export": "Error: a | b",
    "methods": {"Mona": {"inserts": True}, "LoRA": {"refused": "TypeError: no"}}, "outcome": "adapts",
}  # fmt: skip


def test_the_page_of_some_results():
    wrong = {**RESULT, "key": "timm/b", "methods": {"Mona": {"wrong": "it | broke"}}, "outcome": "Mona: it | broke"}
    text = page([wrong, RESULT])
    assert "In this walk a model met up to 2 methods (Mona, LoRA); 0 of 2 models were compiled and exported." in text
    assert "| timm | 2 modules | 1 (50.0 %) | 0 | 1 |" in text
    assert "| `timm/a` | a_tiny | 64 | yes | fallback | 3 | 1 | 1 of 2 | yes | no |" in text
    assert "* `timm/b`: Mona: it \\| broke" in text
    assert "* `timm/a`, export: Error: a \\| b" in text
    assert "* `timm/a`: unproven" in text
    assert "| LoRA | 1 | `timm/a` |" in text


def test_the_published_page_is_whole_and_claims_nineteen_of_twenty():
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/[^`]+` \|.*$", text, re.MULTILINE)
    columns = {len(re.split(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| `")}
    assert columns == {12}
    assert "{" not in text
    totals = re.findall(
        r"^\| (timm|transformers|torchvision|open_clip) \| (\d+) \w+ \| (\d+) \(([\d.]+) %\)", text, re.M
    )
    names = {"timm": "timm", "hf": "transformers", "torchvision": "torchvision", "open_clip": "open_clip"}
    for library, walked, adapting, share in totals:
        mine = [key for key in rows if names[key] == library]
        assert len(mine) == int(walked)
        assert float(share) == pytest.approx(100 * int(adapting) / max(int(walked), 1), abs=0.05)
    assert float(totals[0][3]) >= 95
    assert len(totals) == 4


def test_every_family_that_is_listed_is_walked():
    keys = set(models.all_keys())
    assert len([key for key in keys if key.startswith("timm/")]) >= 90
    assert {"hf/clip", "hf/dinov3-vit", "torchvision/swin_v2_t", "open_clip/modified-resnet"} <= keys
    assert "Mona" in ROWS
