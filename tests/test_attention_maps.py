"""Attention maps are the block's own attention, prompts included."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from models import images, randomize_adapter, tiny_convnext, tiny_swin, tiny_vit
from torch import nn

import deltalens as dl
from deltalens.methods import Method, base, register
from deltalens.studies.attention_maps import block_attention, overlay, plot_attention

# configuration -> (prompts, inserted tokens) in blocks 0 and 2
CASES = {
    "plain": (None, (0, 0), (0, 0)),
    "vpt-deep": (dl.VPTConfig(num_tokens=3), (3, 0), (3, 0)),
    "vpt-shallow": (dl.VPTConfig(num_tokens=3, deep=False), (0, 3), (0, 3)),
    "prefix": (dl.VPTConfig(num_tokens=4, location="prefix"), (4, 0), (4, 0)),
    "two sets": ([dl.VPTConfig(num_tokens=3), dl.VPTConfig(num_tokens=2)], (5, 0), (5, 0)),
    "lora": (dl.LoRAConfig(r=2, parts=("q", "k", "v")), (0, 0), (0, 0)),
    "lora and prompts": ([dl.LoRAConfig(r=2, parts=("k",)), dl.VPTConfig(num_tokens=2)], (2, 0), (2, 0)),
    "mona": (dl.MonaConfig(bottleneck=4), (0, 0), (0, 0)),
}


def adapted(config, **kwargs) -> nn.Module:
    model = tiny_vit(**kwargs)
    if config is not None:
        randomize_adapter(dl.attach(model, config))
    return model.double().eval()


def what_the_projection_reads(model, x, block):
    seen = []
    handle = model.blocks[block].attn.proj.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    model.forward_features(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_weights_and_values_give_the_output_of_the_block(case, fused):
    config, *expected = CASES[case]
    model, x = adapted(config), images("vit", batch=3).double()
    for block in model.blocks:
        block.attn.fused_attn = fused
    for block, (prompts, inserted) in zip((0, 2), expected, strict=True):
        attention = block_attention(model, x, block)
        tokens = 1 + inserted + 16
        assert attention.weights.shape == (3, 3, tokens, prompts + tokens)
        assert (attention.prompts, attention.inserted, attention.prefix, attention.grid) == (
            prompts,
            inserted,
            1,
            (4, 4),
        )
        torch.testing.assert_close(attention.weights.sum(-1), torch.ones(3, 3, tokens).double())
        with torch.no_grad():
            expected_output = what_the_projection_reads(model, x, block)
        torch.testing.assert_close(attention.output(), expected_output, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_parts_of_the_row_are_the_whole_row(case):
    config, _, (prompts, inserted) = CASES[case]
    attention = block_attention(adapted(config), images("vit").double())
    assert attention.over_map().shape == (2, 3, 4, 4)
    assert attention.over_prompts().shape == (2, 3, prompts + inserted)
    whole = attention.over_map().sum((-2, -1)) + attention.over_prompts().sum(-1) + attention.over_prefix().sum(-1)
    torch.testing.assert_close(whole, torch.ones(2, 3).double())
    start = attention.prompts + 1 + inserted
    assert torch.equal(attention.over_map()[1, 2, 1, 3], attention.weights[1, 2, 0, start + 1 * 4 + 3])
    if prompts:
        assert torch.equal(attention.over_prompts()[0, 1, prompts - 1], attention.weights[0, 1, 0, prompts - 1])
    if inserted:
        assert torch.equal(attention.over_prompts()[0, 1, 0], attention.weights[0, 1, 0, 1])


def test_without_a_class_token_the_mean_of_the_patches_is_shown():
    model = adapted(dl.VPTConfig(num_tokens=3, deep=False), class_token=False, global_pool="avg")
    attention = block_attention(model, images("vit").double(), 1)
    assert (attention.prefix, attention.inserted) == (0, 3)
    torch.testing.assert_close(attention.of_query(), attention.weights[:, :, 3:].mean(2))


def test_other_image_sizes_keep_their_grid():
    for config in (None, dl.VPTConfig(num_tokens=2)):
        model = adapted(config, dynamic_img_size=True)
        attention = block_attention(model, images("vit", size=(32, 48)).double())
        assert attention.grid == (4, 6)
        assert attention.over_map().shape == (2, 3, 4, 6)


def test_masks_are_applied(monkeypatch):
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))

    class HideLast(nn.Module):
        def forward(self, mask, x, layout):
            visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
            visible[:, -1] = False
            return visible

    @register("hide_last")
    class HideLastConfig(Method):
        head_only = True

        def place(self, anatomy):
            for block in anatomy.blocks():
                yield block, "attention.mask", HideLast()

    model = adapted([HideLastConfig(), dl.VPTConfig(num_tokens=2)])
    x = images("vit").double()
    attention = block_attention(model, x, 1)
    assert attention.weights[..., -1].abs().max() == 0
    assert attention.weights[..., :2].min() > 0
    with torch.no_grad():
        torch.testing.assert_close(attention.output(), what_the_projection_reads(model, x, 1), rtol=1e-10, atol=1e-10)


def test_the_model_is_left_as_it_was():
    model, x = adapted(dl.VPTConfig(num_tokens=3)), images("vit").double()
    before = model(x)
    block_attention(model, x)
    assert torch.equal(model(x), before)
    assert not model.blocks[-1].attn.qkv._forward_pre_hooks


SWIN = {  # configuration -> (prompts, inserted) in each of the four blocks
    "plain": (None, [(0, 0)] * 4),
    "vpt-deep": (dl.VPTConfig(num_tokens=3), [(3, 0)] * 3 + [(0, 3)]),
    "vpt-shallow": (dl.VPTConfig(num_tokens=3, deep=False), [(0, 3)] * 4),
    "prefix": (dl.VPTConfig(num_tokens=3, location="prefix"), [(3, 0)] * 4),
    "lora and mona": ([dl.LoRAConfig(r=2), dl.MonaConfig(bottleneck=4)], [(0, 0)] * 4),
}


@pytest.mark.parametrize("case", SWIN)
def test_swin_windows_give_the_output_of_the_block(case):
    """Blocks 0 and 1 have 8 x 8 positions in windows of 4, the second one shifted; 2 and 3 a single window."""
    config, expected = SWIN[case]
    model, x = tiny_swin(), images("swin", batch=3).double()
    if config is not None:
        randomize_adapter(dl.attach(model, config))
    model.double().eval()
    blocks = [block for stage in model.layers for block in stage.blocks]
    for number, (block, (prompts, inserted)) in enumerate(zip(blocks, expected, strict=True)):
        seen = []
        handle = block.attn.proj.register_forward_pre_hook(lambda layer, inputs, seen=seen: seen.append(inputs[0]))
        attention = block_attention(model, x, number)
        handle.remove()
        assert (attention.prompts, attention.inserted) == (prompts, inserted)
        torch.testing.assert_close(attention.weights.sum(-1), torch.ones(attention.weights.shape[:3]).double())
        torch.testing.assert_close(attention.output(), seen[0].detach(), rtol=1e-10, atol=1e-10)
        side = 8 if number < 2 else 4
        assert attention.over_map().shape == (3, blocks[number].attn.num_heads, side, side)
        whole = attention.over_map().sum((-2, -1)) + attention.over_prompts().sum(-1)
        torch.testing.assert_close(whole, torch.ones_like(whole))


def test_swin_positions_are_where_they_are_in_the_picture():
    """The same weights, position by position, also where the map was rolled before it was cut."""
    model, x = tiny_swin().double().eval(), images("swin", batch=2).double()
    block = model.layers[0].blocks[1]
    attention = block_attention(model, x, 1)
    assert attention.shift == (2, 2)
    rows, found = attention.of_query(), attention.over_map()
    for image, window, place, (row, column) in ((0, 0, 0, (2, 2)), (1, 1, 5, (3, 7)), (1, 3, 15, (1, 1))):
        expected = rows[image * 4 + window, :, place] / 4
        torch.testing.assert_close(found[image, :, row, column], expected)
    assert block.window_size == (4, 4)


def test_other_blocks_are_refused():
    with pytest.raises(TypeError, match="ConvNeXtBlock"):
        block_attention(tiny_convnext(), images("convnext"))
    with pytest.raises(IndexError, match="has 3 blocks"):
        block_attention(tiny_vit(), images("vit"), 3)


def test_the_overlay_is_the_map_enlarged():
    values = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    large = overlay(values, (8, 8))
    assert large.shape == (8, 8)
    assert (large[0, 0], large[0, -1], large[-1, 0], large[-1, -1]) == (0, 1, 2, 3)
    assert large.mean() == pytest.approx(1.5)


def test_the_figure(tmp_path):
    attention = block_attention(adapted(dl.VPTConfig(num_tokens=3)), images("vit").double())
    picture = np.full((32, 32, 3), 128, np.uint8)
    for name in ("attention.svg", "attention.png"):
        plot_attention(picture, attention, tmp_path / name, "grey")
    root = ElementTree.parse(tmp_path / "attention.svg").getroot()
    pictures = list(root.iter("{http://www.w3.org/2000/svg}image"))
    assert len(pictures) == 1 + 1 + 3  # the picture, the mean over it, three heads over it
    with pytest.raises(ValueError, match=r"\.svg, \.png, \.pdf"):
        plot_attention(picture, attention, tmp_path / "attention.txt")
