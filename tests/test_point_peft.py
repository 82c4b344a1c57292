"""Point-PEFT against a form with loops, its memory, and its published count of parameters."""

import math

import pytest
import torch
import torch.nn.functional as F
from family_checks import adapted, assert_same_run
from matrix import point_model
from models import MODELS
from test_family_points import clouds, make
from torch import nn

import deltalens as dl
from deltalens.methods.point_memory import PointMemory
from deltalens.models.point_ops import farthest_points
from deltalens.models.point_transformer import PointTransformer

SETTINGS = {"bottleneck": 4, "num_prompts": 4, "prompt_bottleneck": 3, "inner": 6, "heads": 2}


def bottleneck(module, x):
    hidden = x @ module.down.weight.T + module.down.bias
    return hidden * torch.sigmoid(1.702 * hidden) @ module.up.weight.T + module.up.bias


def memory_of(model) -> PointMemory:
    return model.delta.live("patches")[0]


def plain_features(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The maximum over the patches, which see no class token."""
    tokens, pos = model.embed(*model.group(x))
    for block in model.blocks.blocks:
        tokens = block(tokens + pos)
    return model.norm(tokens).amax(1).detach()


def written_out(model, plain):
    """Point-PEFT by hand: the modules' tensors, read from the adapted model; all else from a plain one."""

    def shifted(y, layer):
        return y + layer.delta.live("all")[0].shift

    def spread(layer, tokens, where, places):
        local, rows = layer.local, []
        for each, points, targets in zip(tokens, where, places, strict=True):
            chosen = farthest_points(points[None], layer.centres)[0]
            found = []
            for centre in chosen:
                near = (points - points[centre]).square().sum(-1).argsort()[: layer.neighbours]
                group = each[near]
                n = F.layer_norm(group, group.shape[-1:], local.norm.weight, local.norm.bias)
                q, k, v = (n @ local.qkv.weight.T).chunk(3, -1)
                width, parts = local.proj.in_features, []
                for cut in torch.arange(width).chunk(local.heads):
                    scores = (q[:, cut] @ k[:, cut].T / math.sqrt(width)).softmax(-1)
                    parts.append(scores @ v[:, cut])
                pooled = (group + local.proj(torch.cat(parts, -1))).amax(0)
                found.append(F.gelu(layer.norm(pooled[None]))[0] + 0.3 * each[centre])
            weights = 1 / ((targets[:, None] - points[chosen][None]).square().sum(-1) + 1e-8)
            rows.append(weights / weights.sum(1, keepdim=True) @ torch.stack(found))
        return torch.stack(rows)

    def run(x):
        own, memory = plain_features(plain, x), memory_of(model).features
        likeness = F.cosine_similarity(own[:, None], memory[None], dim=-1)
        order = likeness.argsort(1, descending=True)[:, :2]
        weights = likeness.gather(1, order).softmax(1)
        prior = torch.stack([own, (weights[..., None] * memory[order]).sum(1), *memory[order].unbind(1)], 1)

        groups, places = plain.group(x)
        tokens, pos = plain.embed(groups, places)
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), tokens], 1)
        pos = torch.cat([model.cls_pos.expand(len(x), -1, -1), pos], 1)
        for number, (block, bare) in enumerate(zip(model.blocks.blocks, plain.blocks.blocks, strict=True)):
            x, count = x + pos, 0
            if number == 0:
                (prompts,) = block.delta.live("tokens.in")
                inserted = prompts.embedding + prior + bottleneck(prompts.bottleneck, prior)
                x, count = torch.cat([x[:, :1], inserted, x[:, 1:]], 1), 4
            n = shifted(bare.norm1(x), block.norm1)
            q, k, v = bare.attn.qkv(n).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
            x = x + shifted(bare.attn.proj(mixed.transpose(1, 2).flatten(2)), block.attn.proj)
            n = shifted(bare.norm2(x), block.norm2)
            u = shifted(bare.mlp.fc2(F.gelu(shifted(bare.mlp.fc1(n), block.mlp.fc1))), block.mlp.fc2)
            x = x + u + 0.7 * bottleneck(block.delta.live("mlp.inner")[0], u)
            (layer,) = block.delta.live("tokens.out")
            where = torch.cat([layer.local.coordinates.expand(len(x), -1, -1), places], 1) if count else places
            x = torch.cat([x[:, : 1 + count], x[:, 1 + count :] + 0.3 * spread(layer, x[:, 1:], where, places)], 1)
            x = x + bottleneck(layer.bottleneck, x)
            x = torch.cat([x[:, :1], x[:, 1 + count :]], 1)
        (last,) = model.norm.delta.live("all")
        x = plain.norm(x) * last.scale + last.shift
        return model.cls_head_finetune(torch.cat([x[:, 0], x[:, 1:].amax(1)], 1))

    return run


@pytest.fixture
def prepared() -> nn.Module:
    model = dl.attach(make("point-mae").double(), dl.PointPEFTConfig(**SETTINGS, share=0.3))
    dl.prepare(model, [(clouds()[:4].double() * 1.5, None), clouds()[4:].double() * 0.7])
    features = memory_of(model).features.clone()
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    assert torch.equal(memory_of(model).features, features)
    return model


def test_the_network_is_the_formula(prepared):
    assert_same_run(prepared, written_out(prepared, make("point-mae").double()), clouds().double())


def test_the_memory_is_the_training_clouds_features(prepared):
    plain, x = make("point-mae").double(), clouds().double()
    expected = torch.cat([plain_features(plain, x[:4] * 1.5), plain_features(plain, x[4:] * 0.7)])
    torch.testing.assert_close(memory_of(prepared).features, expected)
    before = memory_of(prepared).features.clone()
    dl.prepare(prepared, [x])
    assert torch.equal(memory_of(prepared).features, before)  # what is there stays


def test_a_cloud_recalls_those_most_like_it():
    memory = PointMemory(3, 2)
    memory.fill(torch.tensor([[2.0, 0, 0], [0, 1, 0], [-1, 0, 0], [1, 1, 0]]))
    prior = memory.recall(torch.tensor([[5.0, 0, 0]]))[0]
    assert prior[2:].tolist() == [[2, 0, 0], [1, 1, 0]]
    weights = torch.tensor([1, math.sqrt(0.5)]).softmax(0)
    torch.testing.assert_close(prior[1], weights @ prior[2:])
    assert prior[0].tolist() == [5, 0, 0]


def test_files_hold_the_memory(prepared, tmp_path):
    dl.save_pretrained(prepared, tmp_path)
    loaded = dl.from_pretrained(tmp_path, make("point-mae").double())
    assert torch.equal(loaded(clouds().double()), prepared(clouds().double()))


def test_nothing_of_a_pass_stays(prepared):
    layout = prepared.__dict__["delta_layout"]
    prepared(clouds().double())
    assert layout.found == {}
    with pytest.raises(ValueError, match="no 4 neighbours"):
        prepared(clouds()[:, :3].double())
    assert layout.found == {}
    assert all(slots.active == ("default",) for slots in (block.delta for block in prepared.blocks.blocks))


def test_published_count():
    with torch.device("meta"):
        model = dl.attach(PointTransformer(15), dl.PointPEFTConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 710_749


def test_prompt_blocks_and_their_absence():
    model = adapted(make("mini"), dl.PointPEFTConfig(**SETTINGS, prompt_blocks=0))
    assert model(clouds()).shape == (6, 5)  # no memory to fill
    model = dl.attach(make("mini"), dl.PointPEFTConfig(**SETTINGS, prompt_blocks=2))
    dl.prepare(model, [clouds()])
    assert [len(block.delta.live("tokens.in")) for block in model.blocks.blocks] == [1, 1]
    assert model.forward_features(clouds()).shape == (6, 1 + 5, 24)


def test_refused_where_impossible():
    small = {"dim": 24, "depth": 2, "heads": 2, "num_groups": 5, "group_size": 4, "encoder_dim": 24}
    with pytest.raises(TypeError, match="Point-PEFT works on patches of point clouds"):
        dl.attach(MODELS["vit"](), dl.PointPEFTConfig())
    with pytest.raises(TypeError, match="ReCon's have two: use points/point-mae"):
        dl.attach(make("recon"), dl.PointPEFTConfig())
    with pytest.raises(ValueError, match="prompt_blocks=3 is more than the 2 blocks"):
        dl.attach(make(), dl.PointPEFTConfig(prompt_blocks=3))
    with pytest.raises(ValueError, match="5 patches of 1 points"):
        dl.attach(PointTransformer(5, **{**small, "group_size": 1}), dl.PointPEFTConfig())
    model = dl.attach(point_model(), dl.PointPEFTConfig())
    with pytest.raises(RuntimeError, match=r"no training clouds yet: call deltalens\.prepare"):
        model(clouds())
    with pytest.raises(ValueError, match="and there are 6: give more clouds, or set num_prompts to at most 8"):
        dl.prepare(model, [clouds()])
    dl.prepare(model, [clouds(), clouds()])
    tokens, pos = model.embed(*model.group(clouds()))
    model.encode(tokens, pos)
    with pytest.raises(RuntimeError, match="the centres of this pass are not known"):
        model.encode(tokens, pos)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck": 0}, "bottleneck must be at least 1"),
        ({"heads": 4}, "inner=18 is not a multiple of heads=4"),
        ({"num_prompts": 2}, "num_prompts must be at least 3"),
        ({"prompt_blocks": -1}, "prompt_blocks must not be negative"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        dl.PointPEFTConfig(**settings)
