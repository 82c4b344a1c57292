"""Seam: an attention mask that a method changes (RPO's read-only prompts).

Prompts attend to the original tokens only; nobody, not even another prompt, attends to a prompt.
"""

import pytest
import torch
from clip_tiny import VECTORS, tiny_clip
from models import images, tiny_vit
from safetensors.torch import load_file
from torch import nn

import deltalens as dl
from deltalens.methods import Method, VPTConfig


class Prompts(nn.Module):
    """tokens.in: tokens after the prefix."""

    def __init__(self, count, width):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(count, width))

    def forward(self, x, layout):
        return layout.insert(x, self.tokens[None])


class ReadOnly(nn.Module):
    """attention.mask: tokens between the prefix and the map can be read by nobody."""

    def forward(self, mask, x, layout):
        _, front = layout.split(x)
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        visible[:, layout.prefix : front.shape[1]] = False
        return visible if mask is None else mask & visible


class ReadPrompts(nn.Module):
    """tokens.out: the class token receives the mean of the prompts, which the head then sees."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x, layout):
        prompts = x[:, layout.prefix : layout.prefix + self.count]
        return torch.cat([prompts.mean(1, keepdim=True), x[:, 1:]], 1)


class ReadOnlyPrompts(Method):
    name = "read_only_prompts"
    read = True

    def place(self, anatomy):
        (tower,) = anatomy.towers
        yield tower.blocks[0], "tokens.in", Prompts(4, tower.blocks[0].width)
        for block in tower.blocks:
            yield block, "attention.mask", ReadOnly()
        if self.read:
            yield tower.blocks[-1], "tokens.out", ReadPrompts(4)


class UnreadPrompts(ReadOnlyPrompts):
    read = False


@pytest.mark.parametrize("registers", [0, 2])
def test_originals_are_unchanged(registers):
    model, x = tiny_vit(reg_tokens=registers).double(), images("vit").double()
    plain_logits, plain_features = model(x), model.forward_features(x)
    dl.attach(model, UnreadPrompts())
    torch.testing.assert_close(model(x), plain_logits, atol=1e-12, rtol=0)
    torch.testing.assert_close(model.forward_features(x), plain_features, atol=1e-12, rtol=0)


def test_prompts_read_what_an_explicit_computation_says():
    model, x = tiny_vit().double(), images("vit").double()
    reference = tiny_vit().double()
    dl.attach(model, ReadOnlyPrompts())
    prompts = model.blocks[0].delta.tokens_in.adapter_default.read_only_prompts.tokens

    tokens = reference._pos_embed(reference.patch_embed(x))
    readers = prompts.detach().clone().requires_grad_()
    p = readers.expand(len(x), -1, -1)
    for block in reference.blocks:
        p, tokens = _read(block, p, tokens), block(tokens)
    expected = reference.head(reference.norm(p.mean(1)))

    logits = model(x)
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)
    (logits**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(prompts.grad, readers.grad, atol=1e-11, rtol=0)


def _read(block, p, tokens):
    """One block for prompts alone: queries from prompts, keys and values from the originals."""
    attn = block.attn
    q = attn.qkv(block.norm1(p))[..., : attn.attn_dim].unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    kv = attn.qkv(block.norm1(tokens))[..., attn.attn_dim :].unflatten(-1, (2, attn.num_heads, -1))
    k, v = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
    weights = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
    p = p + attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return p + block.mlp(block.norm2(p))


def test_nobody_reads_a_prompt_in_any_block():
    """No original token depends on a prompt, and no prompt on another one."""
    model, x = tiny_vit().double(), images("vit", batch=1).double()
    dl.attach(model, UnreadPrompts())
    (module,) = model.blocks[0].delta.live("tokens.in")
    taken = []
    model.blocks[1].register_forward_hook(lambda block, args, output: taken.append(output))
    model(x)
    prefix, prompts = taken[0][:, :1], taken[0][:, 1:5]
    patches = taken[0][:, 5:]
    for originals in (prefix, patches):
        (gradient,) = torch.autograd.grad(originals.sum(), module.tokens, retain_graph=True, allow_unused=True)
        assert gradient is None or not gradient.any()
    (gradient,) = torch.autograd.grad(prompts[0, 2].sum(), module.tokens)
    assert gradient[2].any()
    assert not gradient[[0, 1, 3]].any()


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_mask_meets_prompts_that_are_keys_and_values(additive, causal):
    """The mask covers the tokens of the stream; keys and values of VPT-deep beside it are seen by all."""
    model = tiny_vit().double()
    visible = torch.rand(17, 17) > 0.4
    visible.fill_diagonal_(True)
    mask = torch.zeros(17, 17).double().masked_fill(~visible, float("-inf")) if additive else visible
    dl.attach(model, VPTConfig(num_tokens=3))
    block = model.blocks[1]
    (prompts,) = block.delta.live("attention.prompts")
    stream = torch.randn(2, 17, 24).double()
    found = block(stream, attn_mask=mask, is_causal=causal)

    allowed = visible & torch.ones(17, 17, dtype=torch.bool).tril() if causal else visible
    everything = torch.cat([torch.ones(17, 3, dtype=torch.bool), allowed], 1)
    attn = block.attn
    normed = block.norm1(torch.cat([prompts.embedding.expand(2, -1, -1), stream], 1))
    q, k, v = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q[:, :, 3:] @ k.transpose(-1, -2) * attn.scale).masked_fill(~everything, float("-inf"))
    expected = stream + attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


# ------------------------------------------------------------------ the published method, on two towers
class AppendedPrompts(nn.Module):
    """embed of the image tower: K tokens after all others, before ln_pre."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = nn.Parameter(tokens)

    def forward(self, x, layout):
        return torch.cat([x, self.tokens.expand(len(x), -1, -1)], 1)


class TextPrompts(AppendedPrompts):
    """embed of the text tower: K tokens in place of the padding after each class's end of text."""

    def __init__(self, tokens, ends):
        super().__init__(tokens)
        self.register_buffer("ends", ends)

    def forward(self, x, layout):
        count = len(self.tokens)
        rows = torch.arange(len(x))[:, None]
        places = self.ends[:, None] + 1 + torch.arange(count)
        return x.index_put((rows, places), self.tokens.expand(len(x), -1, -1))


class FixedMask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("fixed", mask)

    def forward(self, mask, x, layout):
        return self.fixed.to(x.dtype)


class LastTokens(nn.Module):
    """pool: the K tokens that start right after `ends` of each sample, or the last K."""

    def __init__(self, count, ends=None):
        super().__init__()
        self.count = count
        self.register_buffer("ends", ends)

    def forward(self, x, layout):
        if self.ends is None:
            return x[:, -self.count :]
        return x[torch.arange(len(x))[:, None], self.ends[:, None] + 1 + torch.arange(self.count)]


def clip_visual_mask(tokens: int, prompts: int) -> torch.Tensor:
    mask = torch.zeros(tokens + prompts, tokens + prompts)
    mask[:, tokens:] = float("-inf")
    return mask


def clip_text_mask(ends: torch.Tensor, prompts: int, length: int) -> torch.Tensor:
    mask = torch.full((length, length), float("-inf")).triu(1).repeat(len(ends), 1, 1)
    for row, end in enumerate(ends.tolist()):
        mask[row, :, end + 1 : end + 1 + prompts] = float("-inf")
        mask[row, end + 1 : end + 1 + prompts, : end + 1] = 0
    return mask


class ReadOnlyPromptOptimization(Method):
    name = "rpo"

    def __init__(self, text, image, ends):
        self.__dict__.update(text=text, image=image, ends=ends)

    def place(self, anatomy):
        towers = {tower.name: tower for tower in anatomy.towers}
        count, owner = len(self.text), towers["image"].owner
        yield owner, "embed", AppendedPrompts(self.image)
        yield owner, "pool", LastTokens(count)
        mask = FixedMask(clip_visual_mask(5, count))
        for block in towers["image"].blocks:
            yield block, "attention.mask", mask
        owner = towers["text"].owner
        yield owner, "embed", TextPrompts(self.text, self.ends)
        yield owner, "pool", LastTokens(count, self.ends)
        mask = FixedMask(clip_text_mask(self.ends, count, 77))
        for block in towers["text"].blocks:
            yield block, "attention.mask", mask


@pytest.mark.skipif(not VECTORS.exists(), reason="needs ../shared/reference_vectors")
def test_published_rpo():
    vectors, inputs = load_file(VECTORS / "clip_rpo.safetensors"), load_file(VECTORS / "clip_inputs.safetensors")
    ids = inputs["token_ids_compact"]
    ends = vectors["len_prompts"].long() - 1
    assert torch.equal(ends, ids.argmax(-1))
    assert torch.equal(clip_visual_mask(5, 3) < 0, vectors["visual_mask"] < 0)

    model = tiny_clip()
    dl.attach(model, ReadOnlyPromptOptimization(vectors["param.text_prompt"], vectors["param.img_prompt"], ends))
    logits = model(inputs["images"], ids)
    torch.testing.assert_close(logits, vectors["logits"], atol=2e-5, rtol=0)
    nn.functional.cross_entropy(logits, inputs["labels"]).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {
        "delta.embed.adapter_default.rpo.tokens",
        "visual.delta.embed.adapter_default.rpo.tokens",
    }
    for path, name in (("delta", "text_prompt"), ("visual.delta", "img_prompt")):
        found = trained[f"{path}.embed.adapter_default.rpo.tokens"]
        torch.testing.assert_close(found, vectors[f"grad.{name}"], atol=1e-6, rtol=1e-4)
