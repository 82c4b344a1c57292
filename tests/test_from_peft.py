"""peft's own tuners in our lifecycle: the same numbers as peft used directly, and everything an adapter must do."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import types
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, MODELS, images, randomize, randomize_adapter, tiny_convnext, tiny_swin_v2, tiny_vit
from safetensors.torch import load_file, save_file
from torch import nn

import deltalens as dl
from deltalens.lifecycle.count import parameter_table
from deltalens.lifecycle.tensors import adapter_tensors
from deltalens.methods import method_class
from deltalens.training.optim import parameter_groups

# settings that fit layers of 12 to 72 channels
SMALL = {
    "adamss": {"r": 8},
    "c3a": {"block_size": 12},
    "fourierft": {"n_frequency": 20},
    "gralora": {"r": 4},
    "hira": {"r": 4},
    "lily": {"r": 4},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 4},
    "peanut": {"r": 4},
    "psoft": {"r": 4},
    "pvera": {"r": 8},
    "randlora": {"r": 4},
    "road": {"group_size": 12},
    "shira": {"r": 1},
    "vblora": {"vector_length": 12, "num_vectors": 16},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 20},
}
TUNERS = [name.partition("/")[2] for name in dl.list_methods("peft/*")]
CANNOT_MERGE = {"lily"}
# FRoD decomposes all layers of one kind together, and Swin's have several widths
PAIRS = [(f, t) for f in ("vit", "swin") for t in TUNERS if (f, t) != ("swin", "frod")]
each_pair = pytest.mark.parametrize(("family", "tuner"), PAIRS)
LOHA = {"r": 2, "target_modules": ["qkv"]}
X = {family: images(family) for family in MODELS}


def method_of(tuner, **settings):
    return dl.make_config(f"peft/{tuner}", **{**SMALL.get(tuner, {}), **settings})


def build(family):
    """A tiny model. The ViT pools all tokens: with a class token our last block computes one row, which rounds
    differently."""
    return tiny_vit(global_pool="avg", class_token=False) if family == "vit" else MODELS[family]()


def loha(*endings, **settings):
    return dl.from_peft(
        peft.LoHaConfig(**{**LOHA, **settings, **({"target_modules": list(endings)} if endings else {})})
    )


def directly(family, tuner, seed):
    """The same tuner on the same layers through peft's own function."""
    config = method_of(tuner).peft_config()
    config.target_modules = {"qkv", "fc2"} if tuner == "ia3" else {"qkv"}
    if tuner == "ia3":
        config.feedforward_modules = {"fc2"}
    model = build(family)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config).eval()


def everything_about(model):
    """What detach must give back: module and parameter objects, flags, values, modes."""
    return (
        {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        set(model.__dict__),
    )


def assert_unchanged(model, before):
    modules, parameters, attributes = everything_about(model)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (identity, flag, value) in parameters.items():
        assert (identity, flag) == before[1][name][:2], name
        assert torch.equal(value, before[1][name][2]), name
    assert attributes == before[2]


# ------------------------------------------------------------------ every tuner, everything
@each_pair
def test_equal_to_peft_used_directly(family, tuner):
    theirs, ours, x = directly(family, tuner, seed=3), build(family), X[family]
    torch.manual_seed(3)
    dl.attach(ours, method_of(tuner))
    assert torch.equal(ours(x), theirs(x))
    names = {name.removeprefix("base_model.model.") for name, _ in theirs.named_parameters()}
    assert names & {n for n, _ in ours.named_parameters()} == {n for n, _ in ours.named_parameters()}
    assert dl.count_parameters(ours).adapter == theirs.get_nb_trainable_parameters()[0]

    for model in (ours, theirs):  # the same step of the same optimiser
        model.train()
        loss = F.cross_entropy(model(x), torch.tensor([0, 1]))
        loss.backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not name.startswith("head"):
                    assert parameter.grad is not None, name
                    parameter -= 0.1 * parameter.grad.sign()
        model.eval()
    for head in ours.head.parameters() if isinstance(ours.head, nn.Linear) else ours.head.fc.parameters():
        head.requires_grad_(False)
    if tuner != "pvera":  # samples in training, and both draw from one generator
        assert torch.equal(ours(x), theirs(x))


@each_pair
def test_lifecycle(family, tuner, tmp_path):
    model, x = build(family), X[family]
    before, plain = everything_about(model), model(x)
    dl.attach(model, method_of(tuner), num_classes=7)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model.train()
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(x), torch.tensor([0, 6]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    adapted = model.eval()(x)

    with dl.disable_adapter(model):
        assert torch.equal(model(x), plain)
        assert not any(p.requires_grad for p in model.parameters())
        assert {name for name, _ in model.named_parameters()} == before[1].keys(), "the wrappers are gone"
    assert torch.equal(model(x), adapted)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert torch.equal(copy.deepcopy(model)(x), adapted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), adapted)

    dl.save_pretrained(model, tmp_path)
    torch.manual_seed(11)
    restored = dl.from_pretrained(tmp_path, build(family))
    assert torch.equal(restored(x), adapted)
    assert {name for name, p in restored.named_parameters() if p.requires_grad} == trained

    if tuner in CANNOT_MERGE:
        with pytest.raises(NotImplementedError, match=f"peft cannot merge peft/{tuner}"):
            dl.merge_and_unload(restored)
        assert torch.equal(restored(x), adapted)
    else:
        merged = dl.merge_and_unload(restored)
        torch.testing.assert_close(merged(x), adapted, atol=2e-5, rtol=1e-4)
        assert {name for name, _ in merged.named_modules()} == {name for name, _ in build(family).named_modules()}

    dl.detach(model)
    assert_unchanged(model, before)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("tuner", TUNERS)
def test_settings_survive_json_and_peft(tuner):
    method = method_of(tuner)
    entry = json.loads(json.dumps(method.to_dict()))
    again = dl.make_config(entry.pop("method"), **entry)
    assert again == method
    assert again.peft_config() == method.peft_config()
    assert dl.from_peft(method.peft_config()) == method
    assert pickle.loads(pickle.dumps(method)) == copy.deepcopy(method) == method
    assert 1e-5 < method.learning_rate < 1e-1


def test_a_fresh_process_loads_them_all(tmp_path):
    x = X["swin"]
    for tuner in ("loha", "dora", "vera", "ia3", "vblora", "randlora", "psoft", "adamss"):
        model = randomize_adapter(dl.attach(build("swin"), method_of(tuner)))
        dl.save_pretrained(model, tmp_path / tuner)
        torch.save(model(x).detach(), tmp_path / tuner / "expected.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads(1)
from pathlib import Path
import deltalens as dl
from models import images, tiny_swin
for folder in sorted(Path({str(tmp_path)!r}).iterdir()):
    model = dl.from_pretrained(folder, tiny_swin())
    print(folder.name, torch.equal(model(images("swin")), torch.load(folder / "expected.pt")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split("\n")[:-1]
    assert len(lines) == 8
    assert all(line.endswith("True") for line in lines), lines


# ------------------------------------------------------------------ names and settings
def test_the_names_are_peft_s_and_no_name_is_forgotten():
    known = {kind.value.lower() for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    from deltalens.methods.peft_methods import LEARNING_RATES, UNFIT

    assert set(TUNERS) - {"dora"} == LEARNING_RATES.keys() - {"dora"} <= known
    assert known - LEARNING_RATES.keys() == UNFIT.keys() & known
    assert not LEARNING_RATES.keys() & UNFIT.keys()


def test_from_peft_reads_the_configuration_and_leaves_it_alone():
    config = peft.LoHaConfig(r=3, alpha=6, target_modules=["qkv", "fc1"], rank_pattern={"fc1": 2}, task_type=None)
    before = copy.deepcopy(config)
    method = dl.from_peft(config)
    assert (method.name, method.r, method.alpha, method.target_modules) == ("peft/loha", 3, 6, ("fc1", "qkv"))
    assert repr(method) == "PeftLoHaConfig(rank_pattern={'fc1': 2}, r=3, alpha=6, target_modules=('fc1', 'qkv'))"
    model = dl.attach(build("vit"), method)
    assert config == before
    assert model.blocks[0].mlp.fc1.hada_w1_b.default.shape == (2, 24)
    assert model.blocks[0].attn.qkv.hada_w1_b.default.shape == (3, 24)
    assert dl.from_peft(peft.LoraConfig(use_dora=True)).name == "peft/dora"
    assert dl.from_peft(peft.LoraConfig()).name == "peft/lora"
    assert dl.make_config("peft/dora") == dl.from_peft(peft.LoraConfig(use_dora=True))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (lambda: peft.LoraConfig(bias="all"), ValueError, r"bias='all' is not taken over: add BitFitConfig"),
        (lambda: peft.LoHaConfig(modules_to_save=["head"]), ValueError, "modules_to_save.*the head is trained"),
        (lambda: peft.LoraConfig(target_parameters=["a.weight"]), ValueError, "name linear layers"),
        (lambda: peft.PromptTuningConfig(), ValueError, "prompt_tuning is not available.*VPTConfig"),
        (lambda: peft.LNTuningConfig(), ValueError, "trains norm layers"),
        (lambda: peft.PolyConfig(), ValueError, "task number"),
        (lambda: dl.MonaConfig(), TypeError, "from_peft takes a configuration such as"),
        (lambda: "loha", TypeError, "from_peft takes a configuration such as"),
    ],
)
def test_configurations_that_are_refused(config, error, message):
    with pytest.raises(error, match=message):
        dl.from_peft(config())


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="peft/loha has no setting 'rank'"):
        dl.make_config("peft/loha", rank=3)
    with pytest.raises(ValueError, match=r"did you mean.*peft/loha"):
        dl.make_config("peft/lohaa")
    with pytest.raises(ValueError, match="peft/ia3: `feedforward_modules` should be a subset"):
        dl.make_config("peft/ia3", target_modules=("qkv",), feedforward_modules=("fc2",))
    model = build("swin")
    before = everything_about(model)
    with pytest.raises(ValueError, match=r"peft cannot apply peft/road to these layers: The out_features.*group_size"):
        dl.attach(model, dl.make_config("peft/road"))
    assert_unchanged(model, before)


def test_without_peft_the_message_says_what_to_install(monkeypatch):
    from deltalens.methods import peft_methods

    peft_methods._build.cache_clear()
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "peft/loha" in dl.list_methods()
    for call in (lambda: dl.make_config("peft/loha"), lambda: dl.from_peft(object())):
        with pytest.raises(ImportError, match=r"pip install 'deltalens\[peft\]'"):
            call()


def test_command_line(capsys):
    from deltalens.cli.main import main
    from deltalens.cli.method_options import method_entries, read_methods, translate

    words = ["--method", "peft/loha", "--method.r", "4", "--method.target_modules", "[qkv, fc1]", "--method", "bitfit"]
    (one, two) = read_methods(json.loads(translate(words)[1]))
    assert one == dl.from_peft(peft.LoHaConfig(r=4, target_modules=["qkv", "fc1"]))
    assert two == dl.BitFitConfig()
    assert read_methods(method_entries([one, two])) == [one, two]

    main(["list", "methods"])
    assert "peft/loha" in capsys.readouterr().out
    main(["list", "methods", "peft/lo*"])
    shown = capsys.readouterr().out
    assert "--method.decompose_factor -1" in shown
    assert "--method.lora_alpha 8" in shown
    main(["inspect", "--method", "peft/loha", "--method.r", "4"])
    shown = capsys.readouterr().out
    assert "around attn.qkv        peft/loha: Linear, 6,144 parameters" in shown
    assert "trained without head         36,864" in shown


# ------------------------------------------------------------------ which layers
def wrapped_layers(model):
    return [name for name, module in model.named_modules() if hasattr(module, "base_layer")]


def test_default_targets():
    vit = dl.attach(build("vit"), dl.make_config("peft/loha", r=2))
    assert wrapped_layers(vit) == [f"blocks.{i}.attn.qkv" for i in range(3)]
    swin = dl.attach(build("swin"), dl.make_config("peft/ia3"))
    assert wrapped_layers(swin) == [
        f"layers.{i}.blocks.{j}.{layer}" for i in (0, 1) for j in (0, 1) for layer in ("attn.qkv", "mlp.fc2")
    ]
    assert swin.layers[0].blocks[0].mlp.fc2.is_feedforward
    assert not swin.layers[0].blocks[0].attn.qkv.is_feedforward
    convnext = dl.attach(tiny_convnext(), dl.make_config("peft/loha", r=2))
    assert len(wrapped_layers(convnext)) == 10
    assert {name.rpartition(".")[2] for name in wrapped_layers(convnext)} == {"fc1", "fc2"}
    with pytest.raises(ValueError, match="blocks of ResNet name no linear parts: give target_modules"):
        dl.attach(MODELS["resnet"](), dl.make_config("peft/loha"))


def test_targets_by_ending_expression_and_wildcard():
    def targets(**settings):
        return wrapped_layers(dl.attach(build("vit"), loha(**settings)))

    assert targets(target_modules=["attn.proj"]) == [f"blocks.{i}.attn.proj" for i in range(3)]
    assert targets(target_modules=r"blocks\.[02]\.mlp\.fc\d") == [
        f"blocks.{i}.mlp.fc{j}" for i in (0, 2) for j in (1, 2)
    ]
    assert targets(target_modules=["fc1"], layers_to_transform=[1], layers_pattern="blocks") == ["blocks.1.mlp.fc1"]
    assert targets(target_modules=["qkv", "fc1"], exclude_modules=["fc1"]) == [f"blocks.{i}.attn.qkv" for i in range(3)]
    assert targets(target_modules="all-linear") == [
        f"blocks.{i}.{layer}" for i in range(3) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]


class WithMultiheadAttention(nn.Module):
    pretrained_cfg = {"input_size": (3, 8, 8)}

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, 2)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (lambda: build("vit"), ["proj"], "patch_embed.proj is the patch embedding"),
        (lambda: build("vit"), ["qkv", "head"], "head belongs to the head"),
        (lambda: build("vit"), ["attn"], "blocks.0.attn is a Attention; peft/loha changes nn.Linear layers only"),
        (lambda: build("vit"), ["norm1"], "blocks.0.norm1 is a LayerNorm"),
        (lambda: build("vit"), ["query"], "matches no layer of VisionTransformer"),
        (WithMultiheadAttention, ["out_proj"], "never called: its parent MultiheadAttention reads the weight itself"),
        (tiny_swin_v2, ["qkv"], "never called: its parent WindowAttention reads the weight itself"),
    ],
)
def test_unfit_targets_are_refused(model, targets, message):
    network = model()
    before = everything_about(network)
    with pytest.raises((ValueError, TypeError), match=message):
        dl.attach(network, loha(*targets), blocks=r"blocks\.\d+" if model is WithMultiheadAttention else None)
    assert_unchanged(network, before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_change_the_backbone_are_refused(init):
    model = build("vit")
    before, plain = everything_about(model), model(X["vit"])
    with pytest.raises(ValueError, match="changes the frozen weights when it starts"):
        dl.attach(model, dl.from_peft(peft.LoraConfig(r=4, init_lora_weights=init)))
    assert_unchanged(model, before)
    assert torch.equal(model(X["vit"]), plain)


def test_layers_with_a_weight_method_are_refused_both_ways():
    lora = dl.LoRAConfig(r=2, parts=("q", "v"))
    model = dl.attach(build("vit"), lora, "a")
    with pytest.raises(ValueError, match=r"peft/loha cannot change blocks.0.attn.qkv, which lora of the adapter 'a'"):
        dl.attach(model, loha(), "b")
    assert list(dl.active_adapters(model)) == ["a"]
    dl.attach(model, loha("fc1"), "b")  # other layers are fine
    dl.delete_adapter(model, "a")
    dl.attach(model, loha("qkv"), "c")  # and so are these once LoRA is gone
    with pytest.raises(ValueError, match=r"lora cannot change blocks.0.attn.qkv, which peft/loha of the adapter 'c'"):
        dl.attach(model, lora, "d")
    assert dl.active_adapters(model) == ("c",)
    dl.delete_adapter(model, "c")
    dl.attach(model, lora, "d")
    for methods in ([lora, loha()], [loha(), lora]):
        with pytest.raises(ValueError, match=r"peft/loha cannot change blocks.0.attn.qkv, which lora changes already"):
            dl.attach(build("vit"), methods)
    with pytest.raises(ValueError, match=r"peft/lokr cannot change .*qkv, which peft/loha changes already"):
        dl.attach(build("vit"), [loha(), dl.make_config("peft/lokr")])


# ------------------------------------------------------------------ several adapters
@pytest.mark.parametrize(
    "other", [dl.MonaConfig(bottleneck=6, dropout=0.0), dl.VPTConfig(num_tokens=3), dl.BitFitConfig()]
)
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_with_another_method_side_by_side(family, other, tmp_path):
    model, x = build(family), X[family]
    plain, outputs = model(x), {}
    for name, method in (("peft", loha("qkv", "fc1")), ("other", other), ("more", dl.make_config("peft/lokr", r=2))):
        randomize_adapter(dl.attach(model, method, name, num_classes=4), seed=len(name))
        outputs[name] = model(x)
    for name in ("peft", "other", "more", "peft", "other"):
        dl.set_adapter(model, name)
        assert torch.equal(model(x), outputs[name])
    dl.set_adapter(model, ("peft", "other"))
    together = model(x)
    assert min((together - outputs[name]).abs().max() for name in outputs) > 1e-3
    alone = dl.from_pretrained(save(model, "peft", tmp_path / "peft"), build(family))
    dl.load_adapter(alone, save(model, "other", tmp_path / "other"), "other")
    dl.set_adapter(alone, ("default", "other"))
    assert torch.equal(alone(x), together)
    dl.set_adapter(alone, "default")
    assert torch.equal(alone(x), outputs["peft"])
    dl.delete_adapter(model, "peft")
    dl.set_adapter(model, "more")
    assert torch.equal(model(x), outputs["more"])
    assert torch.equal(dl.detach(model)(x), plain)


def save(model, name, folder):
    dl.save_pretrained(model, folder, name)
    return folder


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_methods_in_one_adapter(family, tmp_path):
    model, x = build(family), X[family]
    before, plain = everything_about(model), model(x)
    methods = [
        dl.MonaConfig(bottleneck=6, dropout=0.0),
        loha("qkv"),
        dl.BitFitConfig(),
        method_of("vera", target_modules=["fc1"]),
    ]
    dl.attach(model, methods)
    randomize_adapter(model)
    kinds = {row.kind for row in parameter_table(model)}
    assert kinds == {"inserted", "unfrozen", "head"}
    adapted = model(x)
    dl.save_pretrained(model, tmp_path)
    again = dl.from_pretrained(tmp_path, build(family))
    assert torch.equal(again(x), adapted)
    assert [m.name for m in again.__dict__["_deltalens"].adapters["default"].configs] == [m.name for m in methods]
    torch.testing.assert_close(dl.merge_and_unload(again)(x), adapted, atol=1e-4, rtol=1e-4)
    dl.detach(model)
    assert_unchanged(model, before)
    assert torch.equal(model(x), plain)


def test_two_adapters_that_wrap_one_layer_do_not_act_together():
    model, x = build("vit"), X["vit"]
    randomize_adapter(dl.attach(model, loha(), "a"))
    randomize_adapter(dl.attach(model, dl.make_config("peft/ia3"), "b"), seed=2)
    output = model(x)
    with pytest.raises(ValueError, match=r"'a' and 'b' both wrap blocks.0.attn.qkv: they cannot act together"):
        dl.set_adapter(model, ("a", "b"))
    assert dl.active_adapters(model) == ("b",)
    assert torch.equal(model(x), output)


def test_a_failed_attach_leaves_the_active_wrappers():
    model, x = build("vit"), X["vit"]
    output = randomize_adapter(dl.attach(model, loha()))(x)
    with pytest.raises(ValueError, match="matches no layer"):
        dl.attach(model, loha("query"), "b")
    assert torch.equal(model(x), output)
    assert wrapped_layers(model) == [f"blocks.{i}.attn.qkv" for i in range(3)]


# ------------------------------------------------------------------ counts, modes, groups, devices
def test_counts_and_table():
    model = dl.attach(build("swin"), dl.make_config("peft/vera", r=8))
    plain = dl.count_parameters(dl.attach(build("swin"), dl.LinearConfig()))
    count = dl.count_parameters(model)
    assert count.backbone == plain.backbone
    assert count.head == plain.head
    assert count.adapter == sum(8 + 3 * width for width in (12, 12, 24, 24))
    rows = parameter_table(model)
    assert sum(row.numel for row in rows if row.kind == "inserted") == count.adapter
    assert {row.name for row in rows if row.kind != "head"} >= {"layers.0.blocks.0.attn.qkv.vera_lambda_b.default"}


def test_a_vector_bank_shared_by_all_layers_counts_and_is_saved_once(tmp_path):
    model = dl.attach(build("vit"), method_of("vblora"))
    bank = 16 * 12
    logits = 3 * (4 * 24 // 12 + 4 * 72 // 12) * 16
    assert dl.count_parameters(model).adapter == bank + logits
    dl.save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for key, t in tensors.items() if not key.startswith("head")) == bank + logits
    assert "vblora_vector_bank" in tensors


def test_shared_projections_are_saved_once(tmp_path):
    dl.save_pretrained(dl.attach(build("vit"), method_of("randlora")), tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert sum("randlora_A" in key for key in keys) == 1
    assert sum("randlora_lambda" in key for key in keys) == 3


def test_frozen_layers_are_in_eval_mode_and_wrappers_train():
    model = dl.attach(tiny_vit(drop_path_rate=0.5, proj_drop_rate=0.5), dl.make_config("peft/lora", lora_dropout=0.5))
    model.train()
    wrapper = model.blocks[0].attn.qkv
    assert wrapper.training
    assert wrapper.lora_dropout.default.training
    assert not wrapper.base_layer.training
    assert not model.blocks[0].attn.proj_drop.training
    randomize_adapter(model)
    assert not torch.equal(model(X["vit"]), model(X["vit"])), "peft's dropout is active"
    assert not any(module.training for module in model.eval().modules())


def test_parameter_groups():
    model = dl.attach(build("vit"), [dl.make_config("peft/lora", r=2, target_modules=("qkv",)), loha("fc1")])
    groups = {group["weight_decay"]: group["names"] for group in parameter_groups(model, 1e-3, 0.05)}
    assert "blocks.0.attn.qkv.lora_A.default.weight" in groups[0.05]
    assert "blocks.0.mlp.fc1.hada_w1_a.default" in groups[0.0]
    assert not any("base_layer" in name for names in groups.values() for name in names)


def test_inactive_wrappers_follow_the_model():
    model, x = build("vit"), X["vit"]
    randomize_adapter(dl.attach(model, loha("fc1"), "a"))
    expected = model(x)
    dl.attach(model, dl.MonaConfig(bottleneck=6), "b")
    model.double()
    dl.set_adapter(model, "a")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(x.double()).float(), expected, atol=1e-5, rtol=1e-5)


def test_wrappers_of_a_bfloat16_model_stay_as_peft_makes_them():
    model, x = build("swin").bfloat16(), X["swin"].bfloat16()
    dl.attach(model, dl.make_config("peft/lora", r=2))
    adapted = randomize_adapter(model)(x)
    assert adapted.dtype == torch.bfloat16
    assert model.layers[0].blocks[0].attn.qkv.lora_A.default.weight.dtype == torch.float32
    with dl.disable_adapter(model):
        assert not torch.equal(model(x), adapted)
    assert torch.equal(model(x), adapted)
    assert model.layers[0].blocks[0].attn.qkv.lora_A.default.weight.dtype == torch.float32


def test_a_plain_checkpoint_meets_an_adapted_model():
    model = dl.attach(build("vit"), loha())
    with pytest.raises(RuntimeError, match="checkpoint of the plain backbone, and the model has adapters"):
        model.load_state_dict(build("vit").state_dict())


def test_adalora_s_regulariser_is_peft_s():
    class WithLoss(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return types.SimpleNamespace(loss=self.network(x).sum() * 0)

    method = dl.make_config("peft/adalora", init_r=4, total_step=10)
    config = method.peft_config()
    config.target_modules = {"qkv"}
    torch.manual_seed(0)
    theirs = peft.get_peft_model(WithLoss(build("vit")), config)
    torch.manual_seed(0)
    ours = dl.attach(build("vit"), method)
    (loss,) = method.losses(ours, None, None).values()
    torch.testing.assert_close(loss, theirs.base_model(X["vit"]).loss)
    assert loss > 0
    loss.backward()
    assert loha().losses(ours, None, None) == {}


# ------------------------------------------------------------------ files
def test_the_folder(tmp_path):
    model = dl.attach(build("vit"), loha("qkv", "fc1"), "flowers")
    dl.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PEFT/LOHA"
    (entry,) = config["methods"]
    assert (entry["method"], entry["r"], entry["target_modules"]) == ("peft/loha", 2, ["fc1", "qkv"])
    assert all("base_layer" not in name and "hada" not in name for name in config["base_model"]["fingerprint"])
    assert config["trained_parameters"]["adapter"] == dl.count_parameters(model).adapter > 0
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {"blocks.0.attn.qkv.hada_w1_a", "blocks.2.mlp.fc1.hada_w2_b", "head.weight"} <= keys
    assert not any("flowers" in key or "default" in key for key in keys)
    assert keys == adapter_tensors(model).keys()


def test_tensors_are_peft_s_own(tmp_path):
    """The same tensors as in a folder that peft writes."""
    theirs, ours = directly("vit", "lokr", seed=5), build("vit")
    torch.manual_seed(5)
    dl.attach(ours, method_of("lokr"))
    theirs.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    found = {f"base_model.model.{k}": t for k, t in adapter_tensors(ours).items() if not k.startswith("head")}
    assert found.keys() == written.keys()
    assert all(torch.equal(found[key], written[key]) for key in written)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_damaged_tensors_are_named_and_nothing_changes(damage, tmp_path):
    dl.save_pretrained(dl.attach(build("vit"), loha()), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "blocks.1.attn.qkv.hada_w1_a"
    if damage == "missing":
        del tensors[key]
    elif damage == "extra":
        tensors["blocks.1.attn.qkv.hada_w3"] = torch.zeros(2)
    else:
        tensors[key] = torch.zeros(5, 5)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = build("vit")
    before = everything_about(model)
    with pytest.raises(ValueError, match=r"(missing|not expected|of another shape): blocks\.1\.attn\.qkv\.hada_w"):
        dl.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_another_backbone_is_refused(tmp_path):
    dl.save_pretrained(dl.attach(build("vit"), loha()), tmp_path)
    with pytest.raises(ValueError, match="backbone with other weights"):
        dl.load_adapter(randomize(build("vit"), seed=9), tmp_path)


def test_adapters_travel_to_a_feature_extractor(tmp_path):
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 16, "depths": (1, 1, 2), "num_heads": (2, 2, 4), "window_size": 4}
    classifier = timm.create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, **sizes)
    features = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **sizes)
    features.load_state_dict(
        {key.replace("layers.", "layers_"): t for key, t in classifier.state_dict().items()}, strict=False
    )
    randomize_adapter(dl.attach(classifier, loha("qkv", "fc2")))
    dl.save_pretrained(classifier, tmp_path)
    x = torch.randn(1, 3, 32, 32)
    dl.load_adapter(features, tmp_path)
    expected = classifier.eval().forward_intermediates(x, intermediates_only=True)
    found = [feature_map.permute(0, 3, 1, 2) for feature_map in features.eval()(x)]
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert adapter_tensors(features).keys() <= load_file(tmp_path / "adapter_model.safetensors").keys()


def test_a_named_backbone(tmp_path):
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = build("vit"), nn.Sequential(nn.Linear(CLASSES, 4), nn.GELU(), nn.Linear(4, 2))

        def forward(self, x):
            return self.decoder(self.encoder(x))

    def make():
        torch.manual_seed(0)
        return Segmenter().eval()

    model, x = make(), X["vit"]
    plain = model(x)
    randomize_adapter(dl.attach(model, loha("qkv"), backbone="encoder"))
    adapted = model(x)
    assert wrapped_layers(model) == [f"encoder.blocks.{i}.attn.qkv" for i in range(3)]
    dl.save_pretrained(model, tmp_path)
    assert "blocks.0.attn.qkv.hada_w1_a" in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(dl.from_pretrained(tmp_path, make())(x), adapted)
    assert torch.equal(dl.detach(model)(x), plain)


def test_classes_are_made_once():
    assert method_class("peft/loha") is type(loha())
    assert dataclasses.is_dataclass(method_class("peft/loha"))
    assert method_class("peft/loha").__doc__.startswith("LoHa of the peft library")
