"""Adapter-X: the wide form against the loop, prompts, what is trained, balance, lifecycle, who uses which expert."""

import copy
import csv
import math
import pickle
from xml.etree import ElementTree

import pytest
import torch
from bench_models import ONCE
from matrix import assert_equal_states
from models import (
    CLASSES,
    MODELS,
    assert_same,
    backward,
    gradients,
    images,
    randomize_adapter,
    tiny_convnext,
    tiny_resnet,
    tiny_swin,
    tiny_vit,
)
from picture_folders import CLASSES as PICTURE_CLASSES
from picture_folders import write_splits, write_tiny_backbone
from torch import nn

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data.splits import Splits
from deltalens.methods.adapter_x import BlockExperts
from deltalens.methods.expert_use import expert_use
from deltalens.methods.notes import note, notes_of, noting
from deltalens.methods.smoa import ScaleAndShift, SmallMLP, SMoA, balance
from deltalens.studies.expert_bench import ADAPTFORMER, OURS, SERIAL, SORTED, bench_adapter_x
from deltalens.studies.plain_forms import SortedSMoA, looped_smoa
from deltalens.tasks import ClassificationTask
from deltalens.training import TrainingSettings, fit

SMALL = {"experts": 3, "bottleneck": 4, "router_width": 5}
LABELS = torch.tensor([0, 3])


def config(**settings):
    return dl.AdapterXConfig(**{**SMALL, "dropout": 0.0, **settings})


def adapted(family="vit", make=None, **settings):
    model = dl.attach((make or MODELS[family])(), config(**settings))
    return randomize_adapter(model)


def task_of(model):
    return ClassificationTask(model, [str(i) for i in range(CLASSES)])


def pools(model):
    return list({id(m): m for m in model.modules() if isinstance(m, SMoA)}.values())


def layers(model):
    return [m for m in model.modules() if isinstance(m, BlockExperts)]


# ------------------------------------------------------------------ the pool
def random_pool(**settings):
    torch.manual_seed(0)
    pool = SMoA(24, settings.pop("heads", 2), settings.pop("experts", 4), 3, 5, **settings).double()
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.5)
    return pool


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"heads": 4, "activation": "gelu", "scale": 0.3},
        {"bias": False},
        {"dense": True, "bias": False},
        {"dense": True},
        {"experts": 1},
        {"normalize_tokens": True, "temperature": 0.3},
        {"temperature": 2.0, "learn_temperature": True},
    ],
    ids=str,
)
def test_the_wide_form_is_the_loop(settings):
    pool = random_pool(**settings)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 24, dtype=torch.float64)
    results = []
    for form in (lambda: pool(x)[0], lambda: looped_smoa(pool, x)):
        y = form()
        grads = torch.autograd.grad((y * weights).sum(), [x, *pool.parameters()])
        results.append([y.detach(), *grads])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    assert all(float(gradient.abs().max()) > 0 for gradient in results[0])
    if "dense" not in settings and pool.experts > 1:
        assert len(pool(x)[1].argmax(-1).unique()) > 1  # several experts take part


def test_sorting_gives_the_same():
    pool, x = random_pool(activation="gelu"), torch.randn(2, 5, 24, dtype=torch.float64)
    expected, probabilities = pool(x)
    pool.__class__ = SortedSMoA
    found, same = pool(x)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert torch.equal(same, probabilities)


def test_starts():
    pool = SMoA(24, 2, 4, 3, 5)
    assert not any(tensor.any() for tensor in (pool.up, pool.up_bias, pool.down_bias))
    assert float(pool.down.detach().abs().max()) <= 1 / math.sqrt(
        12
    )  # Kaiming-uniform of each expert, not of all as one
    assert float(pool.down.detach().abs().max()) > 0.8 / math.sqrt(12)
    products = pool.router.experts @ pool.router.experts.T
    torch.testing.assert_close(products, 0.32**2 * torch.eye(4), atol=1e-6, rtol=0)
    assert not pool(torch.randn(1, 3, 24))[0].any()


def test_jitter_and_dropout_act_in_training_only():
    pool = random_pool(jitter=0.5, dropout=0.5)
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    assert torch.equal(pool.eval()(x)[1], pool(x)[1])
    assert torch.equal(pool(x)[1], pool.routed(x))
    assert not torch.equal(pool.train()(x)[1], pool(x)[1])
    still = random_pool(dropout=0.5)
    assert torch.equal(still(x)[1], still(x)[1])
    assert not torch.equal(still(x)[0], still(x)[0])


def test_balance_is_1_at_best_and_n_at_worst():
    rows = torch.eye(4, dtype=torch.float64)
    assert float(balance(rows)) == pytest.approx(1)
    assert float(balance(rows[[2, 2, 2]])) == pytest.approx(4)
    p = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.1, 0.9]], dtype=torch.float64, requires_grad=True)
    value = balance(p)
    assert float(value.detach()) == pytest.approx(2 * (2 / 3 * 1.4 / 3 + 1 / 3 * 1.6 / 3))
    (gradient,) = torch.autograd.grad(value, p)
    torch.testing.assert_close(gradient, torch.tensor([[2 / 3, 1 / 3]] * 3, dtype=torch.float64) * 2 / 3)


def test_generators():
    y = torch.randn(2, 7, 6)
    affine = ScaleAndShift(6, "gelu")
    expected = affine.gamma * nn.functional.gelu(y).mean(1, keepdim=True) + affine.beta
    torch.testing.assert_close(affine(y), expected)
    small = randomize_adapter(SmallMLP(6, None, 3))
    expected = nn.functional.gelu(y.mean(1) @ small.fc1.weight.T + small.fc1.bias) @ small.fc2.weight.T + small.fc2.bias
    torch.testing.assert_close(small(y)[:, 0], expected)


# ------------------------------------------------------------------ counts
def test_published_counts():
    with torch.device("meta"):
        model = dl.create_backbone("timm/vit_base_patch16_224", pretrained=False, num_classes=100)
        for preset in (dl.AdapterXConfig.vit_b(), dl.AdapterXConfig.sequential()):
            dl.attach(model, preset)
            count = dl.count_parameters(model)
            assert count.adapter == 170_816
            assert round(count.percent, 2) == 0.20
            dl.detach(model)
        dl.attach(model, dl.AdapterXConfig())
        assert dl.count_parameters(model).adapter == 170_816 - 2 * 768  # nobody reads the last prompt


def test_the_published_size_on_point_mae():
    """With a head for 15 classes; class token and position are trained anyway, since no file has them."""
    model = dl.create_backbone("points/point-mae", num_classes=15, pretrained=False)
    dl.attach(model, dl.AdapterXConfig.point_mae())
    count = dl.count_parameters(model)
    assert (count.adapter, count.head) == (128_352 + 9_216 + 9_216 + 2 * 384, 267_535)
    assert count.adapter + count.head == 415_087
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 256, 3)).shape == (2, 15)


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"shared": False}, 2 * (3 * (2 * 4 * 12 + 4 + 12) + 5 * 12 + 3 * 5)),
        ({"experts": 1}, -(2 * (2 * 4 * 12 + 4 + 12) + 5 * 12 + 3 * 5)),
        ({"prompts": None}, -2 * 2 * 24),
        ({"prompts": "mlp", "prompt_width": 2}, 2 * (2 * 24 * 2 + 2 + 24) - 2 * 2 * 24),
        ({"norm": False}, -3 * 2 * 24),
        ({"class_token": False}, -24),
        ({"bias": False}, -3 * (4 + 12)),
        ({"learn_temperature": True}, 1),
        ({"pool": "prompts"}, 2 * 24),
        ({"last_prompt": True}, 2 * 24),
        ({"dense": True}, 0),
    ],
    ids=str,
)
def test_what_each_switch_trains(settings, difference):
    model = adapted(**settings)
    assert dl.count_parameters(model).adapter - dl.count_parameters(adapted()).adapter == difference
    task = task_of(model).train()
    result = task((images("vit"), LABELS))
    result["loss"].backward()
    found = gradients(model)  # every trained tensor has one
    unread = {name for name, gradient in found.items() if not gradient.any()}
    assert all("blocks.2" in name and "generator" in name for name in unread)
    assert len(unread) == 2 * ("last_prompt" in settings)


# ------------------------------------------------------------------ the network
def plain_vit(model, x, blocks):
    """tiny_vit with Adapter-X, written out. blocks: the modules of the three blocks."""
    net = model
    x = net.norm_pre(net._pos_embed(net.patch_embed(x)))
    for block, own in zip(net.blocks, blocks, strict=True):
        x = x + block.attn(block.norm1(x))
        u = block.norm2(x)
        if own.config.placement == "parallel":
            y = looped_smoa(own.pool, u)
            x = x + block.mlp(u) + y
        else:
            inner = block.mlp(u)
            y = looped_smoa(own.pool, inner)
            x = x + inner + y
        if own.adds_tokens:
            x = torch.cat([x[:, :1], own.generator(y), x[:, 1:]], 1)
    return net.norm(x)


@pytest.mark.parametrize("placement", ["parallel", "serial"])
def test_the_network_is_the_formula(placement):
    model = adapted(placement=placement, last_prompt=True).double()
    x = images("vit").double()
    expected = model.head(plain_vit(model, x, layers(model))[:, 0])
    torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
    assert model.forward_features(x).shape == (2, 17, 24)  # prompts never leave the tower


def test_a_head_may_read_prompts():
    model = adapted(pool="prompts").double()
    x = images("vit").double()
    prompts = plain_vit(model, x, layers(model))[:, 1:4]
    torch.testing.assert_close(model(x), model.head(prompts.mean(1)), atol=1e-10, rtol=1e-10)


def test_the_class_row_alone_is_exact():
    """The last block computes the class token only; a pass of all tokens gives the same logits and gradients."""
    model = adapted(balance=0.0).double()
    x = images("vit").double()
    output, expected = backward(model, x)
    for layer in layers(model):
        layer.pointwise = False
    found, grads = backward(model, x)
    torch.testing.assert_close(found, output, atol=1e-12, rtol=1e-12)
    assert_same(grads, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("family", ["swin", "convnext"])
def test_one_pool_per_width_and_no_prompts_on_maps(family):
    model = adapted(family, placement="serial")
    widths = {"swin": 2, "convnext": 4}[family]
    assert len(pools(model)) == widths
    assert not any(layer.adds_tokens for layer in layers(model))
    backward(model, images(family))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (tiny_convnext, {}, r"set placement to serial.*mlp\.parallel.*ConvNeXtBlock"),
        (tiny_resnet, {}, r"set placement to serial.*mlp\.parallel.*UnknownBlock"),
        (tiny_vit, {"heads": 5}, "heads=5 does not divide the 24 channels of blocks.0"),
        (tiny_swin, {"pool": "prompts"}, "has no place for"),
    ],
)
def test_refused_where_impossible(make, settings, message):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=message):
        dl.attach(model, config(**settings))
    assert_equal_states(model.state_dict(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 0}, "experts must be at least 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"balance": -1.0}, "not be negative"),
        ({"jitter": 1.0}, r"\[0, 1\)"),
        ({"placement": "both"}, "parallel.*serial"),
        ({"pool": "prompts", "prompts": None}, "makes none"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


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
