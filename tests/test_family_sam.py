"""SAM's image encoder: prompts in windows and over the whole map against attention written out for each window."""

import pytest
import torch
import torch.nn.functional as F
from matrix import LABELS, ROWS, refusal, walk
from models import images, randomize_adapter
from torch import nn
from vit_zoo import SAMS

import deltalens as dl
from deltalens.methods import Method

EXACT = {"atol": 1e-10, "rtol": 1e-10}
FEW = ("Mona", "VPT-deep")
NO_TOKENS = {"VPT-shallow", "VPT, 2 of the blocks", "VPT, added", "VPT, added to all", "VPT, patches of pixels"}


def pair(name, **settings):
    return SAMS[name](**settings).double(), SAMS[name](**settings).double(), images("vit").double()


def rotated(x, embedding):
    sin, cos = embedding.chunk(2, -1)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


def window_attention(block, tokens, prompts):
    """Attention of one window (h, w, C), normed, with prompts (p, C) as further keys and values."""
    attn, (height, width) = block.attn, tokens.shape[:2]
    q, k, v = attn.qkv(tokens.flatten(0, 1)).unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
    _, prompt_k, prompt_v = attn.qkv(block.norm1(prompts)).unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
    q, k, prompt_k = attn.q_norm(q), attn.k_norm(k), attn.k_norm(prompt_k)
    bias = 0
    if attn.use_rel_pos:
        rows, columns = (torch.arange(side)[:, None] - torch.arange(side) + side - 1 for side in (height, width))
        of_map = q.unflatten(1, (height, width))
        by_row = torch.einsum("nhwc,hkc->nhwk", of_map, attn.rel_pos_h[rows])
        by_column = torch.einsum("nhwc,wkc->nhwk", of_map, attn.rel_pos_w[columns])
        bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(3).flatten(1, 2)
    elif attn.rope is not None:
        q, k = (rotated(each, attn.rope.get_embed().to(each)) for each in (q, k))
    scale = attn.head_dim**-0.5
    scores = torch.cat([q @ prompt_k.mT * scale, q @ k.mT * scale + bias], -1)
    y = (scores.softmax(-1) @ torch.cat([prompt_v, v], 1)).transpose(0, 1).flatten(1)
    return attn.proj(y).unflatten(0, (height, width))


def attention_update(block, normed, prompts):
    """What attention adds to maps (B, H, W, C), window by window; the last windows are padded with zeros."""
    height, width = normed.shape[1:3]
    size = block.window_size or height
    normed = F.pad(normed, (0, 0, 0, -width % size, 0, -height % size))
    update = torch.zeros_like(normed)
    for i, image in enumerate(normed):
        for top in range(0, len(image), size):
            for left in range(0, image.shape[1], size):
                rows, columns = slice(top, top + size), slice(left, left + size)
                update[i, rows, columns] = window_attention(block, image[rows, columns], prompts)
    return block.ls1(update[:, :height, :width])


def block_with_prompts(block, prompts, x):
    x = x + attention_update(block, block.norm1(x), prompts)
    return x + block.ls2(block.mlp(block.norm2(x)))


@pytest.mark.parametrize("name", SAMS)
def test_prompts_are_keys_and_values_in_every_window(name):
    model, plain, x = pair(name)
    dl.attach(model, dl.VPTConfig(num_tokens=2))
    randomize_adapter(model)
    prompts = [block.delta.live("attention.prompts")[0].embedding for block in model.blocks]
    for block, own in zip(plain.blocks, prompts, strict=True):
        block.forward = lambda x, block=block, own=own: block_with_prompts(block, own, x)
    plain.head = model.head
    found, expected = model(x), plain(x)
    torch.testing.assert_close(found, expected, **EXACT)
    weights = torch.randn(found.shape, dtype=found.dtype)
    found, expected = (torch.autograd.grad((y * weights).sum(), prompts) for y in (found, expected))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    dl.merge_and_unload(model)
    torch.testing.assert_close(model(x), plain(x), **EXACT)


class Affine(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, normed=None):
        return self.first(x) if normed is None else self.first(x) + self.second(normed)


class EverySlot(Method):
    name = "every_slot"

    def place(self, anatomy):
        for block in anatomy.blocks():
            for slot in sorted(block.family.slots - {"attention.prompts"}):
                yield block, slot, Affine(block.width)


@pytest.mark.parametrize("name", SAMS)
def test_every_slot_at_once(name):
    model, plain, x = pair(name)
    dl.attach(model, EverySlot())

    def written_out(block, live, x):
        start = x
        first = normed = block.norm1(x)
        update = attention_update(block, live("attention.pre")(normed), x.new_zeros(0, x.shape[-1]))
        x = live("attention.stream")(x + live("attention.inner")(update) + live("attention.parallel")(x, normed))
        normed = block.norm2(x)
        update = live("mlp.inner")(block.ls2(block.mlp(live("mlp.pre")(normed))))
        x = live("mlp.stream")(x + update + live("mlp.parallel")(x, normed))
        return live("block.stream")(x + live("block.parallel")(start, first))

    slots = dl.describe(model).blocks()[0].family.slots - {"attention.prompts"}
    for block, adapted in zip(plain.blocks, model.blocks, strict=True):
        live = {slot: adapted.delta.live(slot)[0] for slot in slots}
        block.forward = lambda x, block=block, live=live: written_out(block, live.__getitem__, x)
    plain.head = model.head
    torch.testing.assert_close(model(x), plain(x), **EXACT)


@pytest.mark.parametrize("name", SAMS)
@torch.no_grad()
def test_nothing_changes_bit_for_bit(name):
    model, x = SAMS[name](), images("vit")
    output, features = model(x), model.forward_features(x)
    dl.attach(model, [dl.ConvpassConfig(bottleneck=3), dl.LoRAConfig(r=2)])
    assert torch.equal(model.forward_features(x), features)
    dl.detach(model)
    assert torch.equal(model(x), output)


def test_drop_path_falls_on_windows():
    """As in timm, with the same random numbers."""
    model, plain = (SAMS["sam"](drop_path_rate=0.5).double() for _ in range(2))
    x = images("vit").double()
    dl.attach(model, dl.MonaConfig(bottleneck=4, init="identity", dropout=0.0))
    outputs = []
    for network in (model, plain):
        torch.manual_seed(2)
        outputs.append(network.train().forward_features(x))
    torch.testing.assert_close(*outputs, **EXACT)


def test_rows_that_are_refused():
    messages = {row: refusal(SAMS["sam"], row) for row in sorted(NO_TOKENS)}
    assert all("'tokens.in'" in message for message in messages.values())
    with pytest.raises(ValueError, match="create it with another img_size"):  # its embeddings are made for one size
        dl.attach(SAMS["sam, rope"](), ROWS["VPT, frame of pixels"]())


@pytest.mark.parametrize("row", FEW)
def test_few_rows(row, tmp_path):
    walk(SAMS["sam"], images("vit", batch=len(LABELS)), row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(set(ROWS) - NO_TOKENS - set(FEW)))
def test_all_rows(row, tmp_path):
    walk(SAMS["sam"], images("vit", batch=len(LABELS)), row, tmp_path)
