"""Seam: a post-norm block that no family reads (Swin v2 with a forward of its own) offers its output alone."""

import pytest
import torch
from models import images, randomize_adapter, tiny_unread
from torch import nn

import deltalens as dl
from deltalens.methods import BitFitConfig, LoRAConfig, Method, MonaConfig, VPTConfig


class Bottleneck(nn.Module):
    """f(u) -> u."""

    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, u):
        return u + self.up(torch.relu(self.down(u)))


class HoulsbyLike(Method):
    name = "houlsby_like"
    slot = "attention.inner"

    def place(self, anatomy):
        for block in anatomy.blocks():
            yield block, self.slot, Bottleneck(block.width)


class AtTheOutput(HoulsbyLike):
    slot = "block.stream"


def test_only_the_output_is_offered():
    blocks = dl.describe(tiny_unread()).blocks()
    assert [(block.path, block.width) for block in blocks] == [
        ("layers.0.blocks.0", 12),
        ("layers.0.blocks.1", 12),
        ("layers.1.blocks.0", 24),
        ("layers.1.blocks.1", 24),
    ]
    assert {block.slots for block in blocks} == {frozenset({"block.stream"})}


@pytest.mark.parametrize(
    ("config", "slot"),
    [
        (HoulsbyLike(), "attention.inner"),
        (VPTConfig(), "attention.prompts"),
        (VPTConfig(deep=False), "tokens.in"),
        (LoRAConfig(), "weights:q"),
    ],
)
def test_other_slots_are_a_named_error_and_nothing_changes(config, slot):
    model, x = tiny_unread(), images("swin")
    before, output = {name: type(m) for name, m in model.named_modules()}, model(x)
    with pytest.raises(TypeError) as caught:
        dl.attach(model, config)
    for word in (slot, "layers.0.blocks.0", "UnreadBlock", "SwinTransformerV2", "block.stream"):
        assert word in str(caught.value)
    assert {type(config).__name__, type(config).__name__.removesuffix("Config")} & set(
        str(caught.value).replace("-", " ").split()
    )
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), output)


def test_a_module_at_the_output_reads_the_output():
    model, plain, x = tiny_unread(), tiny_unread(), images("swin")
    dl.attach(model, AtTheOutput())
    modules = [block.delta.live("block.stream")[0] for stage in model.layers for block in stage.blocks]
    blocks = [block for stage in plain.layers for block in stage.blocks]
    for block, module in zip(blocks, modules, strict=True):
        block.register_forward_hook(lambda block, args, y, module=module: module(y))
    torch.testing.assert_close(model(x), plain(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [MonaConfig(bottleneck=4), BitFitConfig(), LoRAConfig(r=2, target_modules=("attn.proj", "mlp.fc1"))],
)
def test_what_fits_works_and_comes_off_again(config):
    model, x = tiny_unread(), images("swin")
    output = model(x)
    dl.attach(model, config)
    randomize_adapter(model)
    adapted = model(x)
    adapted.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert (adapted - output).abs().max() > 1e-3
    dl.detach(model)
    assert torch.equal(model(x), output)


def test_a_layer_that_its_parent_goes_around_is_refused():
    """The attention multiplies with qkv.weight itself; a LoRA on that layer would train nothing and say nothing."""
    model = tiny_unread()
    with pytest.raises(
        ValueError, match=r"layers\.0\.blocks\.0\.attn\.qkv is never called: its parent WindowAttention"
    ):
        dl.attach(model, LoRAConfig(target_modules=("attn.qkv",)))
    assert not any("delta" in name.split(".") for name, _ in model.named_modules())
