"""Adapter-X while it is trained and kept: balance, lifecycle, who uses which expert, commands."""

import copy
import csv
import pickle
from xml.etree import ElementTree

import pytest
import torch
from adapter_x_models import LABELS, adapted, config, layers, pools, task_of
from bench_models import ONCE
from matrix import assert_equal_states
from models import (
    CLASSES,
    assert_same,
    backward,
    gradients,
    images,
    randomize_adapter,
    tiny_vit,
)
from picture_folders import CLASSES as PICTURE_CLASSES
from picture_folders import write_splits, write_tiny_backbone

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data.splits import Splits
from deltalens.methods.adapter_x import BlockExperts
from deltalens.methods.expert_use import expert_use
from deltalens.methods.notes import note, notes_of, noting
from deltalens.studies.expert_bench import ADAPTFORMER, OURS, SERIAL, SORTED, bench_adapter_x
from deltalens.training import TrainingSettings, fit


# ------------------------------------------------------------------ the balance loss
def expected_balance(model, x):
    """From the plain network: mean over blocks 0 and 1; block 2 computes the class token alone."""
    read = []
    handles = [
        layer.pool.register_forward_pre_hook(lambda _, args: read.append(args[0])) for layer in layers(model)[:1]
    ]
    model(x)
    for handle in handles:
        handle.remove()
    values = []
    for layer, u in list(zip(layers(model), read, strict=True))[:2]:
        pool = layer.pool
        s = u.reshape(-1, u.shape[-1] // pool.heads)
        p = pool.router.probabilities(s @ pool.router.weight.T)
        shares = torch.bincount(p.argmax(-1), minlength=pool.experts).to(p) / len(p)
        values.append(pool.experts * (shares * p.mean(0)).sum())
    return torch.stack(values).mean()


def test_the_balance_loss_is_the_mean_over_the_blocks():
    model = adapted(balance=0.5).double()
    x = images("vit").double()
    result = task_of(model).train()((x, LABELS))
    assert set(result["losses"]) == {"cross_entropy", "adapter_x.balance"}
    expected = 0.5 * expected_balance(model, x)
    torch.testing.assert_close(result["losses"]["adapter_x.balance"].double(), expected.detach())
    router = pools(model)[0].router.weight
    (found,) = torch.autograd.grad(result["terms"]["adapter_x.balance"], router, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, router)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-8)


def test_no_balance_where_it_is_off():
    for settings in ({"balance": 0.0}, {"experts": 1}):
        assert set(task_of(adapted(**settings)).train()((images("vit"), LABELS))["losses"]) == {"cross_entropy"}
    assert set(task_of(adapted()).eval()((images("vit"), LABELS))["losses"]) == {"cross_entropy"}


def test_nothing_of_a_call_stays():
    model = adapted()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    task_of(model).train()((images("vit"), LABELS))
    model.train()(images("vit"))  # a forward outside a task, too
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert notes_of(config()) == []
    copy.deepcopy(model)


def test_notes_are_of_one_page():
    with noting():
        note("a", torch.ones(()))
        with noting():
            note("a", torch.zeros(()))
            assert [float(value) for value in notes_of("a")] == [0]
        assert [float(value) for value in notes_of("a")] == [1]
        assert notes_of("b") == []
    note("a", torch.ones(()))
    assert notes_of("a") == []


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.5, "jitter": 0.3}], ids=["plain", "random"])
def test_checkpointing_keeps_the_balance(settings):
    model = adapted(balance=0.5, **settings).double()
    x, results = images("vit").double(), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(3)
        result = task_of(model).train()((x, LABELS))
        result["loss"].backward()
        results.append((result["loss"].detach(), gradients(model)))
    (loss, expected), (found, grads) = results
    torch.testing.assert_close(found, loss, atol=1e-12, rtol=1e-12)
    assert_same(grads, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.slow
def test_compiled_training_has_the_balance():
    torch.compiler.reset()
    model, x = adapted(make=lambda: tiny_vit(depth=2), balance=0.5), images("vit")
    task = task_of(model).train()
    expected = task((x, LABELS))
    expected["loss"].backward()
    grads = gradients(model)
    model.zero_grad()
    model.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):  # the second call runs the graph without tracing
        model.zero_grad()
        found = task((x, LABELS))
        found["loss"].backward()
        for name, value in expected["losses"].items():
            torch.testing.assert_close(found["losses"][name], value, atol=1e-5, rtol=1e-4)
        assert_same(gradients(model), grads, atol=1e-4, rtol=1e-3)


def test_autocast_is_close():
    model, x = adapted(), images("vit")
    output, expected = backward(model, x)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert float((found.float() - output).norm() / output.norm()) < 0.05
    (found.float() * torch.randn(output.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    assert expected.keys() == gradients(model).keys()


# ------------------------------------------------------------------ lifecycle
def test_files_hold_the_pool_once(tmp_path):
    model, x = adapted(), images("vit")
    dl.save_pretrained(model.eval(), tmp_path)
    from safetensors.torch import load_file

    names = load_file(tmp_path / "adapter_model.safetensors")
    assert [name for name in names if name.endswith("pool.down")] == ["blocks.0.mlp_parallel.adapter_x.pool.down"]
    loaded = dl.from_pretrained(tmp_path, tiny_vit())
    assert torch.equal(loaded(x), model(x))
    assert len(pools(loaded)) == 1
    assert dl.adapter_info(loaded) is not None


def test_copies_share_within_themselves():
    model, x = adapted(), images("vit")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert len(pools(twin)) == 1
        assert pools(twin)[0] is not pools(model)[0]
        result = task_of(twin).train()((x, LABELS))
        assert "adapter_x.balance" in result["losses"]  # the copy's config is still its author


def test_detach_gives_the_backbone_back():
    model = tiny_vit()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(images("vit"))
    randomize_adapter(dl.attach(model, config()))
    assert not torch.equal(model(images("vit")), expected)
    dl.detach(model)
    assert_equal_states(model.state_dict(), plain)
    assert torch.equal(model(images("vit")), expected)


def test_combines():
    others = [dl.VPTConfig(num_tokens=2), dl.LoRAConfig(r=2), dl.VPTConfig(num_tokens=2, deep=False)]
    model = randomize_adapter(dl.attach(tiny_vit(), [config(), *others]))
    result = task_of(model).train()((images("vit"), LABELS))
    result["loss"].backward()
    gradients(model)
    merged = dl.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(merged(images("vit")), model.eval()(images("vit")), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ who uses which expert
def steered(expert):
    """A model whose router sends nearly all to one expert."""
    model = adapted()
    (pool,) = pools(model)
    with torch.no_grad():
        pool.router.experts.copy_(torch.eye(3, 5))
        pool.router.experts[:, 4] = -1.0
        pool.router.experts[expert, 4] = 1.0
        for layer in layers(model):
            layer.pool.router.weight.zero_()
        for block in model.blocks:
            block.norm2.weight.zero_()
            block.norm2.bias.fill_(1.0)
        pool.router.weight[4] = 1.0
    return model


def test_dead_experts_are_named():
    batch = [(images("vit"), LABELS)]
    use = expert_use(steered(1), batch, CLASSES)
    assert use.dead() == {0: [0, 2]}
    (text,) = use.warnings()
    assert "experts 0, 2 of 3 get less than 10% of an equal share" in text
    assert use.blocks == ["blocks.0", "blocks.1", "blocks.2"]
    assert torch.equal(use.of_blocks(), torch.tensor([[0.0, 1.0, 0.0]] * 3, dtype=torch.float64))
    assert use.of_classes().sum(1).tolist() == [1, 0, 0, 1, 0]
    assert expert_use(adapted(), batch).by_block.sum(1).tolist() == [2 * 17 * 2, 2 * 18 * 2, 2 * 1 * 2]


def test_counts_are_those_of_the_forward():
    model, x = adapted(shared=False), images("vit")
    seen = {}
    for path, layer in model.named_modules():
        if isinstance(layer, BlockExperts):
            layer.pool.register_forward_hook(lambda _, __, result, path=path: seen.update({path: result[1]}))
    use = expert_use(model, [(x, LABELS)])
    for row, probabilities in zip(use.by_block, seen.values(), strict=True):
        assert row.tolist() == torch.bincount(probabilities.argmax(-1), minlength=3).tolist()
    assert use.pools == [0, 1, 2]


def test_without_experts_there_is_nothing_to_count():
    for model in (tiny_vit(), adapted(experts=1)):
        with pytest.raises(ValueError, match="no experts to count"):
            expert_use(model, [(images("vit"), LABELS)])


def test_training_reports_the_balance_and_dead_experts(tmp_path):
    """A column of the history, and a warning at the end; a run that goes on has the same column."""
    task, data = task_of(steered(2)), Splits(Random(), None, [str(i) for i in range(CLASSES)])
    settings = TrainingSettings(epochs=2, batch_size=4, lr=1e-6, progress=False, accelerator="cpu")
    with pytest.warns(UserWarning, match="experts 0, 1 of 3 get less than 10%"):
        results = fit(task, data, settings, tmp_path)
    first, second = results["history"]
    assert first["train_loss"] == pytest.approx(first["train_cross_entropy"] + first["train_adapter_x.balance"])
    assert 0.02 < second["train_adapter_x.balance"] < 0.0301  # weight 0.01, nearly all to one of three
    assert "train_adapter_x.balance" in (tmp_path / "metrics.csv").read_text().splitlines()[0]


class Random:
    """Eight random images with labels."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return images("vit", batch=1, seed=index)[0], index % CLASSES


# ------------------------------------------------------------------ pictures and commands
def test_experts_command(tmp_path, capsys):
    write_splits(tmp_path / "photos", train=2, val=2, test=3)
    write_tiny_backbone(tmp_path / "model")
    names = sorted(PICTURE_CLASSES)
    for name, settings in {"one": {}, "own": {"shared": False}}.items():
        model = dl.create_backbone(str(tmp_path / "model"), num_classes=3)
        randomize_adapter(dl.attach(model, config(**settings)))
        dl.adapter_info(model)["class_names"] = names
        dl.save_pretrained(model, tmp_path / name)
        figure = tmp_path / f"{name}.svg"
        words = [
            "analyze",
            "experts",
            str(tmp_path / name),
            "--data",
            str(tmp_path / "photos"),
            "--output",
            str(figure),
        ]
        assert main([*words, "--batch-size", "4"]) == 0
        ElementTree.parse(figure)
        rows = list(csv.DictReader(figure.with_suffix(".csv").open()))
        depth, count = len(layers(model)), len(pools(model))
        assert len(rows) == 3 * (depth + 3 * count)
        for of, name_, pool in {(row["of"], row["name"], row["pool"]) for row in rows}:
            same = [row for row in rows if (row["of"], row["name"], row["pool"]) == (of, name_, pool)]
            assert sum(float(row["share"]) for row in same) == pytest.approx(1, abs=1e-5)
        of_blocks = sum(int(row["sub_tokens"]) for row in rows if row["of"] == "block")
        assert of_blocks == sum(int(row["sub_tokens"]) for row in rows if row["of"] == "class") > 0
        assert f"pool {count - 1}, " in capsys.readouterr().out
    assert main(["analyze", "experts", str(tmp_path / "one"), "--data", str(tmp_path / "photos")]) == 1
    assert "needs --output" in capsys.readouterr().err


def test_bench_on_a_small_model():
    report = bench_adapter_x(ONCE)
    steps, speeds = report.sections
    assert {OURS, SORTED, SERIAL, ADAPTFORMER} < {row.name for row in steps.rows}
    assert {OURS, SORTED, SERIAL, ADAPTFORMER} < {row.name for row in speeds.rows}
    assert set(steps.row(OURS).ratios) == {"full", "frozen", "adaptformer", "plain"}
    assert not report.targets
