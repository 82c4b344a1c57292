"""`deltalens bench prompts`: plain and fast forms are one function, and the table has every contender."""

import copy

import pytest
import torch
from bench_models import ONCE, tiny_vit

import deltalens as dl
from deltalens.cli.main import main
from deltalens.studies import prompt_bench
from deltalens.studies.benchmarks import FROZEN, FULL
from deltalens.studies.plain_forms import plain_vpt


@pytest.mark.parametrize("deep", [True, False])
def test_vpt_shallow_and_deep_equal_their_plain_forms(float64, deep):
    torch.manual_seed(0)
    backbone = tiny_vit()
    ours = dl.attach(copy.deepcopy(backbone), dl.VPTConfig(num_tokens=4, deep=deep))
    plain = plain_vpt(copy.deepcopy(backbone), ours, deep)
    images = torch.randn(2, 3, 32, 32)
    prompts = [p for name, p in ours.named_parameters() if name.endswith("embedding")]
    for model in (ours, plain):
        model.train()(images).square().sum().backward()
    torch.testing.assert_close(ours(images), plain(images), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.stack([p.grad for p in prompts]), plain.prompts.grad, rtol=1e-10, atol=1e-10)
    assert plain.prompts.shape == (3 if deep else 1, 4, 24)


def test_bench_prompts_on_a_small_model(tmp_path):
    report = prompt_bench.bench_prompts(ONCE, lengths=(2, 40))
    steps, speeds = report.sections
    kinds = [f"{kind} p={p}" for p in (2, 40) for kind in (
        "shallow plain", "shallow deltalens", "deep plain", "deep deltalens", "prefix deltalens")]  # fmt: skip
    names = [row.name for row in steps.rows]
    assert names == [FULL, FROZEN, *prompt_bench.baselines(), *kinds]
    assert {"linear", "bias"} <= set(names)
    percents = {row.name: row.percent for row in steps.rows}
    backbone = dl.create_backbone("deltalens/vit-mini", num_classes=100)
    total, head, width, depth = sum(p.numel() for p in backbone.parameters()), 193 * 100, 192, 6
    for kind, count in (("shallow", width), ("deep", depth * width), ("prefix", 2 * depth * width)):
        trained = head + 40 * count
        found = percents[f"{kind} deltalens p=40"]
        assert found == pytest.approx(100 * trained / (total + 40 * count), rel=1e-6)
        assert percents.get(f"{kind} plain p=40", found) == pytest.approx(found, rel=1e-6)
    assert percents[FULL] == 100
    assert percents["linear"] == pytest.approx(100 * head / total)
    saved = {row.name: row.saved_bytes for row in steps.rows}
    assert saved["deep deltalens p=40"] < 0.7 * saved["deep plain p=40"]
    assert saved["deep plain p=2"] < saved["deep plain p=40"]
    assert saved["linear"] < 0.1 * saved[FULL]
    assert "trained %" in report.to_text()
    assert {"bias merged", "shallow merged p=40", "deep merged p=40"} <= {row.name for row in speeds.rows}
    assert prompt_bench.curve(steps, "deep plain", lambda row: row.saved_bytes) == [
        (2, saved["deep plain p=2"]),
        (40, saved["deep plain p=40"]),
    ]
    for name in ("figure.svg", "figure.png"):
        prompt_bench.plot_prompts(report, tmp_path / name)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "figure.svg").read_bytes()
    prompt_bench.plot_prompts(report, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes() == first


def test_contenders_share_the_frozen_backbone_and_not_their_heads():
    backbone = tiny_vit()
    one, other = (prompt_bench._sharing(backbone) for _ in range(2))
    ours = dl.attach(one, dl.VPTConfig(num_tokens=3))
    shrunk = prompt_bench.merged(ours)
    before = [p.clone() for p in backbone.parameters()]
    ours(torch.randn(1, 3, 32, 32)).sum().backward()
    for model in (one, other, shrunk):
        assert model.blocks[1].mlp.fc1.weight is backbone.blocks[1].mlp.fc1.weight
        assert model.head.weight is not backbone.head.weight
    assert not shrunk.head.weight.requires_grad
    assert ours.head.weight.requires_grad
    assert all(torch.equal(p, b) for p, b in zip(backbone.parameters(), before, strict=True))


def test_a_plot_needs_prompts_and_a_picture_file(capsys):
    assert main(["bench", "mona", "--plot", "x.svg"]) == 1
    assert "deltalens bench prompts --plot FILE" in capsys.readouterr().err
    assert main(["bench", "prompts", "--plot", "x.txt"]) == 1
    assert ".svg, .png, .pdf" in capsys.readouterr().err
