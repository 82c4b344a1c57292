"""peft's own tuners in our lifecycle: the same numbers as peft used directly, and names and settings."""

import copy
import json
import pickle
import sys

import peft
import pytest
import torch
import torch.nn.functional as F
from peft_tuners import (
    CANNOT_MERGE,
    TUNERS,
    X,
    assert_unchanged,
    build,
    directly,
    each_pair,
    everything_about,
    method_of,
)
from torch import nn

import deltalens as dl


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
