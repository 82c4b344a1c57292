"""`deltalens bench`: what is measured is counted right, and the forms that are compared are one function."""

import copy
import json

import pytest
import torch
from bench_models import ONCE, assert_same_function, tiny_pooling_vit, tiny_swin, tiny_vit
from torch import nn
from torch.utils.checkpoint import checkpoint

import deltalens as dl
from deltalens.cli.main import main
from deltalens.studies import benchmarks, measure
from deltalens.studies.bench_report import Report, Row, Section, Target, to_json
from deltalens.studies.benchmarks import FROZEN, FULL, Options, bench_mona, bench_vpt, check_same_outputs
from deltalens.studies.lifecycle_bench import bench_lifecycle
from deltalens.studies.measure import Timings, interleaved, saved_bytes
from deltalens.studies.plain_forms import plain_mona, plain_vpt


# ------------------------------------------------------------------ bytes saved for backward
def test_saved_bytes_by_hand():
    weight = nn.Parameter(torch.randn(3, 5))
    x = torch.randn(4, 3)

    def run():
        h = (x @ weight).exp()  # the product saves x, 4*3 floats; exp saves its result, 4*5 floats
        return h[:2].t().square().sum()  # square saves a view of that result: no new storage

    assert saved_bytes(run, [weight]) == 4 * (4 * 3 + 4 * 5)


def test_saved_bytes_leave_out_what_exists_anyway():
    weight, x = nn.Parameter(torch.randn(3, 3)), torch.randn(4, 3, requires_grad=True)

    def run():
        return (x @ weight.t()).sum()  # saves x for the weight's gradient and a view of the weight for x's

    assert saved_bytes(run) == 4 * (4 * 3 + 3 * 3)
    assert saved_bytes(run, [weight]) == 4 * 4 * 3
    assert saved_bytes(run, [weight, x]) == 0


def test_saved_bytes_count_whole_storages():
    x = torch.randn(10, 8, requires_grad=True)

    def run():
        return (x * 2)[:1].square().sum()  # a row is saved, and it keeps all ten in memory

    assert saved_bytes(run) == 4 * 10 * 8


def test_saved_bytes_of_a_checkpoint_are_its_input():
    x = torch.randn(6, 7, requires_grad=True)

    def deep(x):
        return x.exp().exp().exp()

    assert saved_bytes(lambda: deep(x).sum()) == 3 * 4 * 6 * 7
    assert saved_bytes(lambda: checkpoint(deep, x, use_reentrant=False).sum(), []) == 4 * 6 * 7


def test_saved_bytes_of_nothing():
    assert saved_bytes(lambda: torch.randn(3, 3).exp().sum()) == 0


# ------------------------------------------------------------------ interleaving
def test_interleaved_takes_turns_and_drops_the_warm_up(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setitem(measure.CLOCKS, "wall", lambda: now[0])

    def contender(name, durations):
        durations = iter(durations)

        def run():
            calls.append(name)
            now[0] += next(durations)

        return run

    def between():
        calls.append("-")
        now[0] += 1000

    timings = interleaved({"a": contender("a", [50, 1, 2]), "b": contender("b", [70, 4, 6])}, 2, between=between)
    assert calls == ["a", "-", "b", "-"] * 3
    assert timings.seconds == {"a": [1, 2], "b": [4, 6]}


def test_ratios_by_hand():
    timings = Timings({"floor": [1.0, 2.0, 10.0], "plain": [2.0, 4.0, 20.0], "ours": [1.5, 2.5, 15.0]})
    assert timings.median("ours") == 2.5
    assert timings.ratio("ours", "floor") == 1.5  # median of 1.5, 1.25, 1.5; the ratio of medians would be 1.25
    assert timings.overhead_ratio("ours", "plain", "floor") == 0.5


# ------------------------------------------------------------------ what is compared is one function


def test_vpt_equals_its_plain_form(float64):
    torch.manual_seed(0)
    backbone = tiny_vit()
    ours = dl.attach(copy.deepcopy(backbone), dl.VPTConfig(num_tokens=4))
    plain = plain_vpt(copy.deepcopy(backbone), ours)
    images = torch.randn(2, 3, 32, 32)
    prompts = [block.delta.attention_prompts.adapter_default.vpt.embedding for block in ours.blocks]
    ours.train()(images).square().sum().backward()
    plain.train()(images).square().sum().backward()
    torch.testing.assert_close(ours(images), plain(images), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.stack([p.grad for p in prompts]), plain.prompts.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.head.weight.grad, plain.backbone.head.weight.grad, rtol=1e-10, atol=1e-10)
    assert plain.prompts.grad.flatten(1).norm(dim=1).min() > 0
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert trained == {"prompts", "backbone.head.weight", "backbone.head.bias"}


def test_plain_vpt_refuses_other_networks():
    adapted = dl.attach(tiny_vit(), dl.VPTConfig(num_tokens=2))
    with pytest.raises(ValueError, match="SwinTransformer"):
        plain_vpt(tiny_swin(), adapted)
    with pytest.raises(ValueError, match="class token that the head reads"):
        plain_vpt(tiny_pooling_vit(), adapted)


@pytest.mark.parametrize("build", [tiny_swin, tiny_pooling_vit])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory": "low"},
        {"norm_position": "bottleneck"},
        {"norm": None, "kernels": (3, 7), "reduce": "sum"},
        {"norm": "batch", "memory": "low"},
    ],
    ids=str,
)
def test_mona_equals_its_plain_form(float64, build, settings):
    torch.manual_seed(0)
    ours = dl.attach(build(), dl.MonaConfig(bottleneck=6, dropout=0.0, **settings))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "delta" in name.split("."):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    plain = plain_mona(ours)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (ours, plain)]
    assert_same_function(ours, plain, *trained, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_mona_layer_compiles_in_one_graph(memory):
    torch.manual_seed(0)
    layer = dl.MonaLayer(12, bottleneck=8, dropout=0.0, memory=memory)
    x = torch.randn(2, 7, 5, 12, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (layer, compiled):
        (g,) = torch.autograd.grad(function(x).square().sum(), x)
        gradients.append(g)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("spread", "mean"), [(0.0, 0.0), (0.0, 5.0), (0.02, 20.0), (0.1, 20.0)])
def test_mona_layer_in_bfloat16_is_no_worse_than_its_plain_form(spread, mean):
    """Relative error of the layer's update and of its input's gradient, for inputs with large means too."""
    ratios = []
    for seed in range(4):
        torch.manual_seed(seed)
        layer = dl.MonaLayer(48, bottleneck=32, dropout=0.0)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter) * spread)
        exact = copy.deepcopy(layer).double()
        x, weights = torch.randn(2, 14, 14, 48) + mean, torch.randn(2, 14, 14, 48)
        expected = _update_and_gradient(exact.plain, x.double(), weights.double(), autocast=False)
        fast = _update_and_gradient(layer, x, weights, autocast=True)
        plain = _update_and_gradient(layer.plain, x, weights, autocast=True)
        for mine, other, right in zip(fast, plain, expected, strict=True):
            ratios.append(((mine - right).norm() / (other - right).norm()).item())
    assert max(ratios) <= 1.1
    assert sum(ratios) / len(ratios) <= 1


def _update_and_gradient(function, x, weights, autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = function(x)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    return y.detach().double() - x.detach(), gradient.double() - weights


def test_only_what_trains_gets_gradients():
    """project1 frozen piece by piece: the fused function returns a gradient for what asks for one, and no more."""
    torch.manual_seed(0)
    layer = dl.MonaLayer(12, bottleneck=8, dropout=0.0)
    layer.project1.weight.requires_grad_(False)
    layer(torch.randn(2, 5, 5, 12)).square().sum().backward()
    assert layer.project1.weight.grad is None
    assert layer.project1.bias.grad.abs().sum() > 0
    layer.zero_grad()
    layer.project1.bias.requires_grad_(False)
    layer(torch.randn(2, 5, 5, 12)).square().sum().backward()
    assert layer.project1.bias.grad is None
    assert layer.gammax.grad.abs().sum() > 0


def test_different_functions_are_not_compared():
    images = torch.randn(2, 3, 32, 32)
    model = tiny_vit()
    check_same_outputs(images, {"one": model, "same": copy.deepcopy(model)})
    other = copy.deepcopy(model)
    nn.init.normal_(other.head.weight)
    with pytest.raises(RuntimeError, match="other and one differ"):
        check_same_outputs(images, {"one": model, "other": other})
    broken = copy.deepcopy(model)
    nn.init.constant_(broken.head.bias, float("nan"))
    with pytest.raises(RuntimeError, match="broken and one differ"):
        check_same_outputs(images, {"one": model, "broken": broken})


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_frozen_backbone_sends_the_gradient_through_every_block(build):
    model = benchmarks.frozen(build())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained[0] == "patch_embed.proj.bias"
    assert len(trained) == 3
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert model.patch_embed.proj.bias.grad.abs().sum() > 0


# ------------------------------------------------------------------ the benchmarks run
def test_bench_vpt_on_a_small_model():
    report = bench_vpt(ONCE)
    steps, speeds = report.sections
    kinds = [f"p={p} {kind}" for p in (100, 200) for kind in ("plain", "deltalens")]
    assert [row.name for row in steps.rows] == [FULL, FROZEN, *kinds]
    assert {row.name for row in speeds.rows} == {FROZEN, *kinds, "p=100 merged", "p=200 merged"}
    for p in (100, 200):
        assert set(steps.row(f"p={p} deltalens").ratios) == {"full", "frozen", "plain"}
        assert steps.saved_ratio(f"p={p} deltalens", f"p={p} plain") < 0.6
    assert steps.row(FULL).ratios["full"] == 1
    assert report.targets == []  # they are promises about ViT-B/16 at 224


def test_bench_mona_on_a_small_model():
    report = bench_mona(ONCE)
    steps, speeds = report.sections
    saved = {row.name: row.saved_bytes for row in steps.rows}
    assert saved['deltalens memory="low"'] < saved["deltalens"] < saved["plain"]
    assert saved[FROZEN] < saved['deltalens memory="low"'] < saved[FULL]
    assert {row.name for row in speeds.rows} == {FROZEN, "plain", "deltalens", "merged"}
    assert report.targets == []
    assert all(row.seconds > 0 for row in [*steps.rows, *speeds.rows])


def test_bench_mona_on_a_network_that_takes_any_size():
    report = bench_mona(Options(model="timm/convnext_atto", img_size=32, quick=True, rounds=1))
    assert report.settings["image size"] == 32
    assert {row.name for row in report.sections[1].rows} == {FROZEN, "plain", "deltalens", "merged"}


def test_bench_lifecycle_on_a_small_model():
    report = bench_lifecycle(ONCE)
    names = [row.name for row in report.sections[0].rows]
    assert {"attach", "save_pretrained", "load_adapter", "detach", "merge_and_unload", "torch.save"} <= set(names)
    assert report.targets == []


def test_targets_and_report():
    row = Row("ours", 0.5, {"plain": 0.8}, saved_bytes=3_000_000)
    section = Section("training step", [Row("full", 1.0, {}, saved_bytes=4_000_000), row], ("full", "full"))
    report = Report("Both", {"batch": 2}, [section], [Target("kept", 0.5, 0.5), Target("broken", 0.51, 0.5)])
    text = report.to_text().splitlines()
    assert next(line for line in text if line.startswith("ours")).split() == ["ours", "0.5000", "0.800", "3.0", "0.750"]
    assert [line.split()[-1] for line in text if "<=" in line] == ["met", "MISSED"]
    stored = json.loads(to_json([report]))
    assert [target["met"] for target in stored["reports"][0]["targets"]] == [True, False]
    assert stored["environment"]["torch"] == torch.__version__


def test_command(tmp_path, capsys):
    before = torch.get_num_threads()
    words = ["bench", "mona", "--quick", "--rounds", "1", "--threads", "1", "--device", "cpu"]
    assert main([*words, "--json", str(tmp_path / "bench.json")]) == 0
    assert "saved MB" in capsys.readouterr().out
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert [report["title"] for report in stored["reports"]] == ["Mona"]
    assert stored["reports"][0]["settings"]["threads"] == 1
    assert torch.get_num_threads() == before


def test_command_fails_on_a_missed_target_only_if_asked(monkeypatch, capsys):
    report = Report("Mona", {}, [Section("step", [Row("ours", 1.0)])], [Target("fast", 2.0, 1.0)])
    monkeypatch.setattr(benchmarks, "bench_mona", lambda options: report)
    assert main(["bench", "mona"]) == 0
    assert main(["bench", "mona", "--check"]) == 1
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["everything"], 2, "'vpt', 'mona', 'lifecycle'"),
        (["--rounds", "0"], 1, "--rounds must be at least 1"),
        (["--json", "."], 1, "is a folder"),
        (["vpt", "--quick", "--model", "deltalens/swin-mini"], 1, "VisionTransformer with one class token"),
        (["mona", "--model", "timm/swin_tny"], 1, "did you mean"),
        (["mona", "--quick", "--device", "cuda"], 1, "torch finds no GPU here"),
    ],
)
def test_command_says_what_is_wrong(words, code, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *words]) == code
    assert said in capsys.readouterr().err
