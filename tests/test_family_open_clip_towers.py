"""open_clip's towers inside CLIP, trunks of timm, what is left to the fallback, published networks."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from library_models import (
    WithHead,
    texts,
    tiny_clip,
    tiny_oc_visual,
    tiny_timm_trunk,
)
from models import randomize, randomize_adapter
from open_clip.coca_model import CoCa, MultimodalCfg
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, Transformer
from test_family_open_clip import double_images, prompts_of
from torch import nn

import deltalens as dl
from deltalens.sites.layout import Sequence, Tokens
from deltalens.sites.swap import Swapped


# ------------------------------------------------------------------ inside CLIP
@pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_both_towers_of_clip(custom_text):
    model = tiny_clip(custom_text)
    vision, text = dl.describe(model).towers
    assert (vision.name, text.name) == ("vision", "text")
    assert isinstance(vision.layout, Tokens)
    assert isinstance(text.layout, Sequence)
    start = "text.transformer" if custom_text else "transformer"
    assert [block.path for block in text.blocks] == [f"{start}.resblocks.{i}" for i in range(2)]
    assert vision.blocks[0].path == "visual.transformer.resblocks.0"
    assert [block.width for block in (vision.blocks[0], text.blocks[0])] == [24, 16]
    assert vision.blocks[0].slots - text.blocks[0].slots == {"tokens.in", "tokens.out"}
    with pytest.raises(TypeError, match="plain sequence"):
        dl.attach(model, dl.MonaConfig(bottleneck=3))
    with pytest.raises(TypeError, match=r"needs the slot 'tokens\.in'.*transformer\.resblocks\.0"):
        dl.attach(model, dl.VPTConfig(num_tokens=2, deep=False))


@pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_the_image_tower_of_clip(custom_text):
    """backbone="visual" adapts the images and leaves the text tower's blocks alone."""
    model, x, words = tiny_clip(custom_text).double(), double_images(), texts()
    bare = tiny_clip(custom_text).double().visual
    methods = [dl.VPTConfig(num_tokens=2), dl.LoRAConfig(r=2)]
    dl.attach(model, methods, backbone="visual")
    dl.attach(bare, methods)
    randomize_adapter(model)
    bare.load_state_dict(model.visual.state_dict())
    torch.testing.assert_close(model.encode_image(x), bare(x), atol=1e-12, rtol=1e-12)
    assert torch.allclose(model(x, words)[0], F.normalize(bare(x), dim=-1))
    text = model.text.transformer if custom_text else model.transformer
    assert not any(isinstance(module, Swapped) for module in text.modules())


def text_beside_prompts(model, prompts, words):
    """Each word sees the prompts, and words before it; prompts are no queries."""
    x, length = model.token_embedding(words) + model.positional_embedding, words.shape[1]
    for block, prompt in zip(model.transformer.resblocks, prompts, strict=True):
        count = len(prompt)
        mask = F.pad(model.attn_mask, (count, 0, count, 0))
        mask[:count, count:] = float("-inf")  # prompts see prompts only; their rows are thrown away
        x = block(torch.cat([prompt.expand(len(x), -1, -1), x], 1), attn_mask=mask)[:, -length:]
    x = model.ln_final(x)
    return x[torch.arange(len(x)), words.argmax(-1)] @ model.text_projection


def test_prompts_of_the_text_tower():
    model, plain, words = tiny_clip().double(), tiny_clip().double(), texts()
    randomize_adapter(dl.attach(model, dl.VPTConfig(num_tokens=3)))
    names = [name for name in prompts_of(model) if not name.startswith("visual.")]
    prompts = [model.get_parameter(name).detach() for name in names]
    assert len(prompts) == 2
    expected = text_beside_prompts(plain, prompts, words)
    torch.testing.assert_close(model.encode_text(words), expected, atol=1e-10, rtol=1e-10)
    model.transformer.grad_checkpointing = True
    torch.testing.assert_close(model.encode_text(words), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{"embed_cls": True}, {"no_causal_mask": True, "use_pad_mask": True}])
def test_masks_that_differ_from_text_to_text(options):
    """open_clip passes (B * heads, N, N) masks where padding is masked."""
    settings = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2, "output_dim": 4}
    model = randomize(TextTransformer(**settings, **options)).double().eval()
    words = texts()
    words[:, 4:] = 0
    expected = model(words)
    dl.attach(model, [dl.LoRAConfig(r=2), dl.VPTConfig(num_tokens=1)])
    for block in model.transformer.resblocks:  # one prompt that nobody looks at changes nothing
        prompts = block.delta.attention_prompts.adapter_default.vpt
        prompts.forward = lambda n: (torch.full((1, 2, 1, 8), -1e4).double(), torch.ones(1, 2, 1, 8).double())
    found = model(words)
    assert found.shape == expected.shape
    block = model.transformer.resblocks[0]
    far = block.delta.attention_prompts.adapter_default.vpt
    far.forward = lambda n: (torch.zeros(1, 2, 1, 8).double(), torch.full((1, 2, 1, 8), 50.0).double())
    assert (model(words) - found).abs().max() > 1e-2
    for block in model.transformer.resblocks:
        block.delta.attention_prompts.adapter_default.vpt.forward = lambda n: (torch.zeros(1, 2, 0, 8).double(),) * 2
    torch.testing.assert_close(model(words), expected, atol=1e-10, rtol=1e-10)


def test_coca():
    """Two stacks of text blocks beside the image tower; cross-attention blocks get nothing."""
    vision = CLIPVisionCfg(layers=2, width=24, head_width=6, patch_size=8, image_size=32, output_tokens=True,
                           attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=3)  # fmt: skip
    text = CLIPTextCfg(context_length=6, vocab_size=20, width=16, heads=2, layers=2, output_tokens=True, embed_cls=True)
    decoder = MultimodalCfg(context_length=6, vocab_size=20, width=16, heads=2, layers=2)
    model = randomize(CoCa(16, decoder, text, vision)).double().eval()
    assert [tower.name for tower in dl.describe(model).towers] == ["vision", "text", "text1"]
    x, words = double_images(), texts()
    expected = model(x, words)
    dl.attach(model, dl.LoRAConfig(r=2))
    found = model.eval()(x, words)
    for key in ("image_features", "text_features", "logits"):
        torch.testing.assert_close(found[key], expected[key], atol=1e-10, rtol=1e-10)
    assert not any(isinstance(module, Swapped) for module in model.text_decoder.cross_attn.modules())
    randomize_adapter(model)
    changed = model(x, words)
    assert (changed["logits"] - expected["logits"]).abs().max() > 1e-3


def test_trunks_of_timm():
    model = tiny_timm_trunk()
    (tower,) = dl.describe(model).towers
    paths = [block.path for block in tower.blocks]
    assert paths == [f"trunk.blocks.{i}" for i in range(len(model.trunk.blocks))]
    assert {"attention.prompts", "weights:q"} <= tower.blocks[0].slots
    model = dl.attach(WithHead(model), [dl.MonaConfig(bottleneck=3), dl.VPTConfig(num_tokens=2)], backbone="visual")
    model(torch.randn(1, 3, 160, 160)).sum().backward()
    prompts = [model.get_parameter(name) for name in prompts_of(model)]
    assert len(prompts) == len(paths)
    assert all(p.grad.abs().max() > 0 for p in prompts)


class PatchMixer(nn.Module):
    """A network that no family knows, with what TimmModel asks of a trunk."""

    num_features = 8
    pretrained_cfg = {"input_size": (3, 32, 32)}

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return x + self.mix(x)

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 8, 8), nn.Sequential(self.Block(), self.Block())

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))


def test_a_whole_clip_is_not_taken_for_its_text_tower():
    """Where no family knows the trunk, the fallback describes it."""
    model, trunk = tiny_clip(), tiny_timm_trunk()
    trunk.trunk, trunk.head = PatchMixer(), nn.Linear(8, 10)
    model.visual = trunk
    vision, text = sorted(dl.describe(model).towers, key=lambda tower: tower.name, reverse=True)
    assert [block.path for block in vision.blocks] == ["visual.trunk.blocks.0", "visual.trunk.blocks.1"]
    assert vision.name == "vision"
    assert text.name == "text"
    with pytest.raises(TypeError, match=r"'weights:q', which Block \(visual\.trunk\.blocks\.0\)"):
        dl.attach(model, dl.LoRAConfig(r=2))


def test_subclasses_with_a_forward_of_their_own_are_unknown():
    class MyBlock(ResidualAttentionBlock):
        def attention(self, *args, **kwargs):
            return super().attention(*args, **kwargs) * 2

    model = tiny_oc_visual()
    model.transformer.resblocks[1].__class__ = MyBlock
    slots = [block.slots for block in dl.describe(model).blocks()]
    assert slots[1] == {"block.stream"}
    assert slots[0] == slots[2] != slots[1]


def test_scaled_cosine_attention_is_not_read():
    """open_clip 3.3's forward of it fails; a reading would hide that."""
    stack = Transformer(16, 2, 2, scaled_cosine_attn=True)
    assert {block.slots for block in dl.describe(nn.Sequential(stack)).blocks()} == {frozenset({"block.stream"})}


# ------------------------------------------------------------------ published networks
@pytest.mark.parametrize(
    ("name", "blocks", "slot"),
    [
        ("ViT-B-32", (12, 12), "weights:q"),
        ("ViT-L-14-CLIPA", (24, 12), "weights:q"),
        ("RN50", (16, 12), "mlp.inner"),
        ("ViT-B-16-SigLIP", (12, 12), "weights:q"),
    ],
)
def test_published_networks(name, blocks, slot):
    config = copy.deepcopy(open_clip.get_model_config(name))
    of_timm = "timm_model_name" in config["vision_cfg"]
    if of_timm:
        config["vision_cfg"]["timm_model_pretrained"] = False
    known = ("embed_dim", "quick_gelu", "text_cfg", "vision_cfg")
    with torch.device("meta"):
        model = (CustomTextCLIP if of_timm else CLIP)(**{key: config[key] for key in known if key in config})
    towers = {tower.name: tower for tower in dl.describe(model).towers}
    assert (len(towers["vision"].blocks), len(towers["text"].blocks)) == blocks
    assert all(slot in block.slots for block in towers["vision"].blocks)
    assert towers["vision"].image_size == (224, 224)
