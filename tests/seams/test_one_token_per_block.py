"""Seam: a parallel module that also returns a new token, so that the stream grows block by block (Adapter-X, DAPT)."""

import pytest
import torch
from models import images, randomize_adapter, tiny_swin, tiny_vit
from torch import nn

import deltalens as dl
from deltalens.methods import LoRAConfig, Method, MonaConfig


class TokenMaker(nn.Module):
    """mlp.parallel: delta = up(relu(down(n))) for every token, and one new token gamma * mean(n) + beta."""

    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)
        self.gamma, self.beta = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x, normed):
        return self.up(torch.relu(self.down(normed))), self.gamma * normed.mean(1, keepdim=True) + self.beta


class OneTokenPerBlock(Method):
    name = "one_token_per_block"

    def place(self, anatomy):
        for block in anatomy.blocks():
            yield block, "mlp.parallel", TokenMaker(block.width)


def explicit_features(model, plain, x):
    """The stream as [prefix, newest token, ..., oldest token, patches]."""
    prefix = plain.num_prefix_tokens
    x = plain._pos_embed(plain.patch_embed(x))
    for block, adapted in zip(plain.blocks, model.blocks, strict=True):
        (maker,) = adapted.delta.live("mlp.parallel")
        x = x + block.attn(block.norm1(x))
        normed = block.norm2(x)
        delta, token = maker(x, normed)
        x = x + block.mlp(normed) + delta
        x = torch.cat([x[:, :prefix], token, x[:, prefix:]], 1)
    added = len(plain.blocks)
    return plain.norm(torch.cat([x[:, :prefix], x[:, prefix + added :]], 1))


@pytest.mark.parametrize("registers", [0, 2])
def test_equals_an_explicit_computation(registers):
    plain, model = (tiny_vit(reg_tokens=registers).double() for _ in range(2))
    x = images("vit").double()
    dl.attach(model, OneTokenPerBlock())
    expected = explicit_features(model, plain, x)
    torch.testing.assert_close(model.forward_features(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(model(x), plain.head(expected[:, 0]), atol=1e-12, rtol=0)


def test_every_module_learns():
    """The last block's token is read by nobody, as published; all else gets a gradient."""
    model, x = tiny_vit(), images("vit")
    dl.attach(model, OneTokenPerBlock())
    model(x).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == [
        f"blocks.2.delta.mlp_parallel.adapter_default.one_token_per_block.{leaf}" for leaf in ("gamma", "beta")
    ]


def test_added_tokens_never_come_out():
    plain, model = tiny_vit(reg_tokens=2), tiny_vit(reg_tokens=2)
    dl.attach(model, OneTokenPerBlock())
    x = images("vit")
    for options in ({}, {"output_fmt": "NLC"}, {"indices": [0, 2], "norm": True}, {"stop_early": True, "indices": [1]}):
        (final, found), (plain_final, expected) = (m.forward_intermediates(x, **options) for m in (model, plain))
        assert [y.shape for y in found] == [y.shape for y in expected]
        assert final.shape == plain_final.shape
    found = model.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True)
    assert [(tuple(y.shape), tuple(p.shape)) for y, p in found] == [((2, 24, 4, 4), (2, 3, 24))] * 3
    found = model.forward_intermediates(x, return_prefix_tokens=True, output_dict=True)
    expected = plain.forward_intermediates(x, return_prefix_tokens=True, output_dict=True)
    assert found.keys() == expected.keys()
    assert found["image_features"].shape == expected["image_features"].shape


def test_with_other_methods_in_one_adapter():
    """Spatial modules see the map only, wherever the stream's tokens are."""
    model, x = tiny_vit().double(), images("vit").double()
    dl.attach(model, [OneTokenPerBlock(), MonaConfig(bottleneck=4, dropout=0.0), LoRAConfig(r=2)])
    randomize_adapter(model)
    seen = []
    for block in model.blocks:
        (mona,) = block.delta.live("mlp.stream")
        mona.register_forward_hook(lambda m, args, y: seen.append(tuple(args[0].shape)))
    model(x).sum().backward()
    assert seen == [(2, 4, 4, 24)] * 3


def test_a_stream_without_room_for_tokens_says_so():
    model = tiny_swin()
    dl.attach(model, OneTokenPerBlock())
    with pytest.raises(TypeError, match="ChannelsLast streams take no extra tokens"):
        model(images("swin"))
