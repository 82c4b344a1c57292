"""DAPT against the published implementation's numbers, a plain form, and its count of parameters."""

import ast

import pytest
import reference
import torch
import torch.nn.functional as F
from family_checks import adapted, assert_same_run
from models import MODELS
from published_points import published_shape
from test_family_points import clouds, make
from torch import nn

import deltalens as dl
from deltalens.models.point_mae import PointMAE
from deltalens.models.point_transformer import PointTransformer


# ------------------------------------------------------------------ the published numbers
@torch.no_grad()
def test_every_published_output_is_reproduced():
    plain, _ = reference.load("pointmae_tiny")
    tensors, metadata = reference.load("dapt_tiny")
    config = ast.literal_eval(metadata["config"])
    model = published_shape(config)
    model.load_state_dict(reference.sub(plain, "state."))
    official = {**reference.sub(plain, "state."), **reference.sub(tensors, "state.")}
    dl.attach(model.eval(), dl.DAPTConfig(bottleneck=config["rank"], dropout=config["drop_adapter_rate"]))
    loaded, _ = dl.import_official(model, {f"module.{key}": tensor for key, tensor in official.items()}, "dapt")
    assert loaded == 22 * config["depth"] + 4 + 2 + 16  # blocks, TFTS around them, class token, head

    seen = {}
    for number, block in enumerate(model.blocks.blocks):
        (layer,) = block.delta.live("mlp.parallel")
        block.register_forward_hook(lambda _, __, y, n=number: seen.__setitem__(f"block{n}", y))
        layer.register_forward_hook(lambda _, __, y, n=number: seen.__setitem__(f"adapter{n}", y[0]))
    seen["logits"] = model.eval()(tensors["input.points"])
    assert {f"output.{name}" for name in seen} == {name for name in tensors if name.startswith("output.")}
    for name, found in seen.items():
        torch.testing.assert_close(found, tensors[f"output.{name}"], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("preset", "classes", "expected"),
    [("hardest", 15, 1_087_771), ("bg", 15, 1_087_771), ("only", 15, 989_467), ("modelnet40", 40, 1_069_716)],
)
def test_published_counts(preset, classes, expected):
    with torch.device("meta"):
        model = PointTransformer(classes)
        dl.attach(model, getattr(dl.DAPTConfig, preset)())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


# ------------------------------------------------------------------ the network as a formula
def written_out(model, plain, config):
    """DAPT by hand: the modules' tensors, read from the adapted model; all else from a plain one."""

    def tfts(y, layer):
        (module,) = layer.delta.live("all")
        return y * module.scale + module.shift

    def run(x):
        tokens, pos = plain.embed(*plain.group(x))
        (patches,) = model.delta.live("patches")
        tokens = tokens * patches.tfts.scale + patches.tfts.shift
        first, where = ([t.expand(len(x), -1, -1) for t in kind] for kind in ([model.cls_token], [model.cls_pos]))
        x = torch.cat([*first, tokens], 1) + torch.cat([*where, pos], 1)
        for block, bare in zip(model.blocks.blocks, plain.blocks.blocks, strict=True):
            (layer,) = block.delta.live("mlp.parallel")
            n = tfts(bare.norm1(x), block.norm1)
            heads = bare.attn.num_heads
            q, k, v = (
                tfts(bare.attn.qkv(n), block.attn.qkv).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            )
            mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
            x = x + tfts(bare.attn.proj(mixed.transpose(1, 2).flatten(2)), block.attn.proj)
            n = tfts(bare.norm2(x), block.norm2)
            m = F.layer_norm(n, n.shape[-1:], layer.norm.weight, layer.norm.bias, 1e-5)
            change = layer.up(F.gelu(layer.down(m))) * F.relu(layer.scale(m))
            x = x + tfts(bare.mlp.fc2(F.gelu(tfts(bare.mlp.fc1(n), block.mlp.fc1))), block.mlp.fc2) + change
            prompt = F.gelu(change).mean(1, keepdim=True) * layer.prompt.gamma + layer.prompt.beta
            x = torch.cat([x[:, :1], prompt, x[:, 1:]], 1)
        x = tfts(plain.norm(x), model.norm)
        depth = len(plain.blocks.blocks)
        prompts, patches = x[:, 1 : 1 + depth], x[:, 1 + depth :]
        read = [x[:, 0]] if config.read_class else []
        read += [prompts.mean(1) if config.read_prompts == "mean" else prompts.amax(1)] if config.read_prompts else []
        read += [patches.mean(1) if config.read_patches == "mean" else patches.amax(1)] if config.read_patches else []
        return model.cls_head_finetune(torch.cat(read, 1))

    return run


@pytest.mark.parametrize(
    "settings", [{}, {"read_patches": None}, {"read_class": False, "read_prompts": "max", "read_patches": "mean"}]
)
def test_the_network_is_the_formula(settings):
    config = dl.DAPTConfig(bottleneck=4, **settings)
    model = adapted(make("point-mae").double(), config)
    assert_same_run(model, written_out(model, make("point-mae").double(), config), clouds().double())


def test_starts_as_the_backbone_but_for_prompts_scales_and_positions():
    model = make("once")
    before = model.forward_features(clouds())
    dl.attach(model, dl.DAPTConfig(bottleneck=4, tfts=False, prompts=False, read_prompts=None))
    torch.testing.assert_close(model.forward_features(clouds()), before)


@pytest.mark.parametrize("positions_once", [True, False])
def test_positions_are_added_once_or_as_the_backbone_does(positions_once):
    settings = {"tfts": False, "prompts": False, "read_prompts": None}
    model = dl.attach(make("point-mae"), dl.DAPTConfig(bottleneck=4, positions_once=positions_once, **settings))
    same = make("once" if positions_once else "point-mae").forward_features(clouds())
    torch.testing.assert_close(model.forward_features(clouds()), same)
    with dl.disable_adapter(model):
        torch.testing.assert_close(model.forward_features(clouds()), make("point-mae").forward_features(clouds()))


def test_the_change_is_dropped_with_the_mlp_and_the_prompt_is_not():
    torch.manual_seed(0)
    model = PointTransformer(5, dim=24, depth=2, heads=2, num_groups=5, group_size=4, encoder_dim=24, drop_path=0.99)
    adapted(model, dl.DAPTConfig(bottleneck=4, dropout=0.0)).train()
    before, after = [], []
    last = model.blocks.blocks[1]
    last.register_forward_pre_hook(lambda _, x: before.append(x[0]))
    last.register_forward_hook(lambda _, __, y: after.append(y))
    model(clouds())
    kept = torch.cat([after[0][:, :1], after[0][:, 2:]], 1)
    dropped = (kept == before[0]).flatten(1).all(1)
    assert dropped.any()  # attention, MLP and adapter of a sample, all of them
    assert (after[0][:, 1].abs().sum(1) > 0).all()
    assert len(after[0][:, 1].unique(dim=0)) == len(clouds())


def test_dropout_acts_in_training_only():
    layer = adapted(make(), dl.DAPTConfig(bottleneck=4, dropout=0.5)).blocks.blocks[0].delta.live("mlp.parallel")[0]
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.eval().change(x), layer.change(x))
    assert not torch.equal(layer.train().change(x), layer.change(x))


ADAPTER, PROMPT, TFTS = 2 * 24 + (24 * 4 + 4) + (4 * 24 + 24) + 25, 2 * 24, 22 * 24  # of a block: C = 24, n = 4
AROUND, OF_CLASS, HEAD = 4 * 24, 2 * 24, 24 * 5  # TFTS of tokens and last norm, class token, one vector of the head


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 2 * (ADAPTER + PROMPT + TFTS) + AROUND + OF_CLASS + 3 * HEAD + 5),
        ({"dynamic": False}, 2 * (ADAPTER - 25 + PROMPT + TFTS) + AROUND + OF_CLASS + 3 * HEAD + 5),
        ({"tfts": False}, 2 * (ADAPTER + PROMPT) + OF_CLASS + 3 * HEAD + 5),
        ({"prompts": False, "read_prompts": None}, 2 * (ADAPTER + TFTS) + AROUND + OF_CLASS + 2 * HEAD + 5),
    ],
)
def test_what_each_switch_trains(settings, expected):
    model = dl.attach(make("mini"), dl.DAPTConfig(bottleneck=4, **settings))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


# ------------------------------------------------------------------ heads, errors
def test_heads_are_the_models_own_kind_and_come_back():
    model = make("point-mae")
    own = model.get_classifier()
    dl.attach(model, dl.DAPTConfig(bottleneck=4), num_classes=7)
    assert model(clouds()).shape == (6, 7)
    assert (model.get_classifier()[0].in_features, len(model.get_classifier())) == (72, 9)
    dl.attach(model, dl.DAPTConfig(bottleneck=4, read_prompts=None), name="two")
    assert torch.equal(model.get_classifier()[0].weight, own[0].weight)  # as many vectors: the trained head goes on
    assert dl.detach(model).get_classifier() is own


def test_recons_class_tokens_are_all_read():
    model = dl.attach(make("recon"), dl.DAPTConfig(bottleneck=4))
    assert model.get_classifier()[0].in_features == (3 + 1 + 1) * 24
    assert model(clouds()).shape == (6, 5)


def refused(model: nn.Module, settings: dict) -> str:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError)) as error:
        dl.attach(model, dl.DAPTConfig(**settings))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(error.value)


def test_refused_where_impossible():
    assert "works on patches of point clouds, which VisionTransformer does not have" in refused(MODELS["vit"](), {})
    small = {"dim": 24, "depth": 2, "heads": 2, "num_groups": 5, "group_size": 4, "encoder_dim": 24}
    assert "build it with class_tokens=('cls',)" in refused(PointTransformer(5, **small, class_tokens=()), {})
    assert "create the model with num_classes" in refused(PointTransformer(0, **small), {})
    assert "has no classifier" not in refused(PointMAE(**small, decoder_depth=1, decoder_heads=2), {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck": 0}, "bottleneck must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"prompts": False}, "set read_prompts to None"),
        ({"read_class": False, "read_prompts": None, "read_patches": None}, "the head must read something"),
        ({"read_patches": "sum"}, "must be one of"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        dl.DAPTConfig(**settings)
