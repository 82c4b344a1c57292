"""The equation of a pre-norm block with every slot filled, against the same written out in full."""

import pytest
import torch
from models import images, randomize_adapter, tiny_swin, tiny_vit
from torch import nn

import deltalens as dl
from deltalens.methods import Method, MonaConfig, VPTConfig


class Affine(nn.Module):
    """f(x) -> x W + b, or with two arguments f(x, n) -> x W + n V: order and arguments show."""

    pointwise = True

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, normed=None):
        return self.first(x) if normed is None else self.first(x) + self.second(normed)


class ConditionalPrompts(nn.Module):
    """attention.prompts: tokens that differ from sample to sample."""

    def __init__(self, width):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(3, width))

    def forward(self, normed):
        return self.tokens + normed.flatten(1, -2).mean(1)[:, None]


class EverySlot(Method):
    name = "every_slot"
    slots = (
        *(f"{branch}.{slot}" for branch in ("attention", "mlp") for slot in ("pre", "inner", "parallel", "stream")),
        "block.parallel",
        "block.stream",
    )

    def place(self, anatomy):
        for block in anatomy.blocks():
            for slot in self.slots:
                yield block, slot, Affine(block.width)
            yield block, "mlp.inner", Affine(block.width)  # a second one in the same slot


class PromptsOfTheSample(Method):
    name = "prompts_of_the_sample"

    def place(self, anatomy):
        for block in anatomy.blocks():
            yield block, "attention.prompts", ConditionalPrompts(block.width)


class Inner(EverySlot):
    name = "inner"
    slots = ("attention.inner", "mlp.parallel")


def written_out(block, filled, x):
    """n = norm(x); u = inner(body(pre(n))); x <- stream(x + u + parallel(x, n)), twice; then the block's own slots."""

    def slot(name, *arguments):
        (module,) = filled[name]
        return module(*arguments)

    start = x
    first_normed = normed = block.norm1(x)
    body = block._attn if hasattr(block, "_attn") else lambda n: block.ls1(block.attn(n))
    u = slot("attention.inner", body(slot("attention.pre", normed)))
    x = slot("attention.stream", x + u + slot("attention.parallel", x, normed))
    normed = block.norm2(x)
    body = block.mlp if not hasattr(block, "ls2") else lambda n: block.ls2(block.mlp(n))
    u = body(slot("mlp.pre", normed))
    for module in filled["mlp.inner"]:
        u = module(u)
    x = slot("mlp.stream", x + u + slot("mlp.parallel", x, normed))
    return slot("block.stream", x + slot("block.parallel", start, first_normed))


def blocks_of(model):
    return [block.module for block in dl.describe(model).blocks()]


@pytest.mark.parametrize(("factory", "options"), [(tiny_vit, {"init_values": 0.3, "qk_norm": True}), (tiny_swin, {})])
def test_every_slot_at_once(factory, options):
    model, plain, x = factory(**options).double(), factory(**options).double(), images("vit").double()
    dl.attach(model, EverySlot())
    for block, adapted in zip(blocks_of(plain), blocks_of(model), strict=True):
        filled = {slot: adapted.delta.live(slot) for slot in EverySlot.slots}
        block.forward = lambda x, block=block, filled=filled: written_out(block, filled, x)
    torch.testing.assert_close(model(x), plain(x), atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(model.forward_features(x), plain.forward_features(x), atol=1e-11, rtol=1e-11)


def test_pointwise_slots_cost_one_row_in_the_last_block():
    model, x = tiny_vit().double(), images("vit").double()
    dl.attach(model, EverySlot())
    seen = []
    model.blocks[-1].mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)), atol=1e-12, rtol=1e-12)
    assert seen == [1, 17]


@pytest.mark.parametrize(("factory", "options"), [(tiny_vit, {}), (tiny_swin, {}), (tiny_swin, {"window_size": 2})])
def test_keys_and_values_that_differ_between_samples_stay_with_their_sample(factory, options):
    model, x = factory(**options).double(), images("vit", batch=3).double()
    dl.attach(model, PromptsOfTheSample())
    together = model(x)
    alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)
    assert (model(x.roll(1, 0)).roll(-1, 0) - together).abs().max() < 1e-12


@pytest.mark.parametrize("factory", [tiny_vit, tiny_swin])
def test_prompts_that_live_on_meet_other_slots(factory):
    """Pointwise modules act on prompts too, spatial ones see the map alone."""
    model, x = factory().double(), images("vit").double()
    dl.attach(model, [VPTConfig(num_tokens=3, deep=False), Inner(), MonaConfig(bottleneck=4, dropout=0.0)])
    randomize_adapter(model)
    shapes = {"inner": [], "mona": []}
    for block in blocks_of(model):
        for kind, slot in (("inner", "attention.inner"), ("mona", "attention.stream")):
            (module,) = block.delta.live(slot)
            module.register_forward_hook(lambda m, args, y, kind=kind: shapes[kind].append(tuple(args[0].shape)))
    together = model(x)
    grids = [(4, 4, 24)] * 3 if factory is tiny_vit else [(8, 8, 12)] * 2 + [(4, 4, 24)] * 2
    assert shapes["mona"] == [(2, *grid) for grid in grids]
    prefix = 1 if factory is tiny_vit else 0
    assert shapes["inner"] == [(2, prefix + 3 + height * width, c) for height, width, c in grids]
    torch.testing.assert_close(together[1:], model(x[1:]), atol=1e-12, rtol=0)
    together.sum().backward()
