"""Families of convolutional and hybrid networks: every slot against hooks on the library's own forward, prompts against
tokens that are really there."""

import conv_models
import pytest
import torch
from torch import nn

import deltalens as dl
from deltalens.methods import Method

# block class -> branch -> (first module of its body, last module of it); n is what the first one reads
PLACES = {
    "BasicBlock": {"mlp": ("conv1", "bn2")},
    "Bottleneck": {"mlp": ("conv1", "se")},
    "RegNet": {"mlp": ("conv1", "conv3")},
    "PreBottleneck": {"mlp": ("conv1", "conv3")},
    "PreActBottleneck": {"mlp": ("conv1", "conv3")},
    "PreActBasic": {"mlp": ("conv1", "conv2")},
    "ResNetV2": {"mlp": ("conv1", "norm3")},
    "DepthwiseSeparableConv": {"mlp": ("conv_dw", "bn2")},
    "InvertedResidual": {"mlp": ("conv_pw", "bn3")},
    "EdgeResidual": {"mlp": ("conv_exp", "bn2")},
    "UniversalInvertedResidual": {"mlp": ("dw_start", "layer_scale")},
    "ConvBnAct": {"mlp": ("conv", "aa")},
    "MobileAttention": {"attention": ("attn", "layer_scale")},
    "MetaFormerBlock": {"attention": ("token_mixer", "layer_scale1"), "mlp": ("mlp", "layer_scale2")},
    "MbConvBlock": {"mlp": ("down", "conv3_1x1")},
    "ConvNeXtBlock": {"mlp": ("mlp", "ls")},
    "TransformerBlock2d": {"attention": ("attn", "ls1"), "mlp": ("mlp", "ls2")},
    "PartitionAttentionCl": {"attention": (None, "ls1"), "mlp": ("mlp", "ls2")},
    "PartitionAttention2d": {"attention": (None, "ls1"), "mlp": ("mlp", "ls2")},
    "ParallelPartitionAttention": {"attention": (None, "ls1"), "mlp": ("mlp", "ls2")},
    "RepMixerBlock": {"attention": ("token_mixer.mixer", "token_mixer.layer_scale"), "mlp": ("mlp", "layer_scale")},
    "AttentionBlock": {"attention": ("token_mixer", "layer_scale_1"), "mlp": ("mlp", "layer_scale_2")},
}
SKIPS = ("res_scale1", "downsample", "shortcut")  # what the first branch's skip may be called
FAMILIES = {
    "resnet": conv_models.resnet,
    "resnext": conv_models.resnext,
    "regnet": conv_models.regnet,
    "regnet, pre-activation": lambda: conv_models.regnet(preact=True),
    "resnetv2": conv_models.resnetv2,
    "resnetv2, v1.5": lambda: conv_models.resnetv2(preact=False),
    "resnetv2, basic": lambda: conv_models.resnetv2(basic=True, bottle_ratio=1.0),
    "efficientnet": conv_models.efficientnet,
    "mobile hybrid": conv_models.mobile_hybrid,
    "caformer": conv_models.caformer,
    "poolformer": conv_models.poolformer,
    "maxvit": conv_models.maxvit,
    "maxvit, maps": lambda: conv_models.maxvit(use_nchw_attn=True, head_first=True, init_values=None),
    "maxvit, parallel": lambda: conv_models.maxvit(("M", "PM"), head_first=True, rel_pos_type="mlp"),
    "coatnet": conv_models.coatnet,
    "maxxvit": conv_models.maxxvit,
    "fastvit": conv_models.fastvit,
}


VARIANTS = ("resnext", "regnet, pre-activation", "resnetv2, v1.5", "resnetv2, basic", "poolformer", "maxvit, maps",
            "maxvit, parallel", "maxxvit")  # fmt: skip


def some(names, slow):
    """Parameters of a test, those in `slow` for the full run only."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def images(model: nn.Module, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(seed))


class Affine(nn.Module):
    """f(x), or f(x, n), that differs from channel to channel and place to place."""

    def __init__(self, width, zero=False):
        super().__init__()
        self.zero = zero
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, normed=None):
        if self.zero:
            return x if normed is None else torch.zeros_like(x)
        return 0.5 * x + self.first(x) if normed is None else self.first(x) + self.second(normed)


class SpatialShift(nn.Module):
    """f(map (B, H, W, C)): adds each row to the next."""

    spatial = True

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        assert x.shape[-1] == self.width
        return x + 0.5 * x.roll(1, 1)


class EverySlot(Method):
    """An affine module in every slot that the blocks offer; `zero` ones change nothing."""

    name = "every_slot"

    def __init__(self, zero=False, only=None):
        self.__dict__.update(zero=zero, only=only)

    def place(self, anatomy):
        for block in anatomy.blocks():
            for slot in sorted(block.slots):
                leaf = slot.partition(".")[2]
                if leaf in ("pre", "inner", "parallel", "stream") and (self.only is None or slot == self.only):
                    yield block, slot, Affine(block.width, self.zero)


class InTheStream(Method):
    name = "in_the_stream"

    def place(self, anatomy):
        for block in anatomy.blocks():
            yield block, "block.stream", SpatialShift(block.width)


class PromptsWhereTheyFit(Method):
    """Three un-normed tokens for each block whose attention takes prompts."""

    name = "prompts_where_they_fit"

    def place(self, anatomy):
        for block in anatomy.blocks():
            if "attention.prompts" in block.slots:
                yield block, "attention.prompts", Tokens(block.width)


class Tokens(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 3, width, generator=torch.Generator().manual_seed(width)))

    def forward(self, normed):
        return self.tokens


# ------------------------------------------------------------------ the library's forward with hooks
def on_channels(module, last):
    """A module for channels-last features on a tensor of either layout."""

    def call(*tensors):
        if last:
            return module(*tensors)
        return module(*(x.movedim(1, -1) for x in tensors)).movedim(-1, 1)

    return call


def hook_block(block: nn.Module, delta, kind: str, last: bool) -> None:
    """Put the modules of `delta` (a Slots of a copy) into a plain block by hooks."""

    def of(slot):
        modules = delta.live(slot)
        return on_channels(modules[0], last) if modules else None

    seen = {}
    block.register_forward_pre_hook(lambda _, args: seen.update(block=args[0]))
    places = PLACES[kind]
    for number, (branch, (first, end)) in enumerate(places.items()):
        pre, inner, parallel, stream = (of(f"{branch}.{leaf}") for leaf in ("pre", "inner", "parallel", "stream"))

        def before(_, args, branch=branch, pre=pre):
            seen[branch] = args[0]
            return (pre(args[0]), *args[1:]) if pre else None

        def after_norm(_, args, y, branch=branch, pre=pre):
            seen[branch] = y
            return pre(y) if pre else None

        if first is None:
            block.norm1.register_forward_hook(after_norm)
        else:
            block.get_submodule(first).register_forward_pre_hook(before)
        if kind == "RepMixerBlock" and branch == "attention" and pre:
            block.token_mixer.norm.register_forward_pre_hook(lambda _, args, pre=pre: (pre(args[0]),))
        if number == 1 and hasattr(block, "norm2"):
            block.norm2.register_forward_pre_hook(lambda _, args: seen.update(second=args[0]))

        def after(_, args, u, number=number, branch=branch, inner=inner, parallel=parallel, stream=stream):
            n = seen[branch]
            x = seen["block"] if number == 0 else seen.get("second", n)
            x = n if kind == "PreBottleneck" else x
            u = inner(u) if inner else u
            u = u + parallel(x, n) if parallel else u
            if stream and number == 0 and len(places) == 2:
                skip = next((s for name in SKIPS if (s := getattr(block, name, None)) is not None), lambda x: x)
                u = stream(skip(x) + u) - skip(x)
            return u

        block.get_submodule(end).register_forward_hook(after)

    def at_the_end(_, args, y):
        last_branch = list(places)[-1]
        stream, parallel, whole = of(f"{last_branch}.stream"), of("block.parallel"), of("block.stream")
        y = stream(y) if stream else y
        if parallel:
            n = seen[next(iter(places))]
            y = y + parallel(n if kind == "PreBottleneck" else seen["block"], n)
        return whole(y) if whole else y

    block.register_forward_hook(at_the_end)


def hooked(make, adapted: nn.Module) -> nn.Module:
    """A plain model with the adapter's modules in hooks."""
    plain, modules = make().double(), dict(adapted.named_modules())
    blocks = {site.path: site for site in dl.describe(plain).blocks()}
    for path, site in blocks.items():
        kind = type(site.module).__name__
        kind = type(plain).__name__ if kind == "Bottleneck" and type(plain).__name__ in PLACES else kind
        if hasattr(modules[path], "delta"):
            hook_block(site.module, modules[path].delta, kind, site.width == _last_axis(site))
    return plain


def _last_axis(site) -> int | None:
    """The width, where channels are the last axis of the block's stream."""
    return site.width if type(site.layout).__name__ in ("ChannelsLast", "StageTokens") else None


@pytest.mark.parametrize("family", some(FAMILIES, (*VARIANTS, "regnet", "resnetv2", "coatnet", "efficientnet")))
def test_modules_that_change_nothing_leave_the_output_bit_for_bit(family):
    model = FAMILIES[family]()
    x, before = images(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        dl.attach(model, EverySlot(zero=True))
        assert all(block.module.delta.all_live() for block in dl.describe(model).blocks())
        assert torch.equal(model(x), expected)
        dl.detach(model)
        assert torch.equal(model(x), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", some(FAMILIES, (*VARIANTS, "resnetv2", "coatnet")))
def test_every_slot_equals_hooks_on_the_plain_forward(family):
    model = FAMILIES[family]().double()
    dl.attach(model, EverySlot())
    x = images(model).double()
    plain = hooked(FAMILIES[family], model)
    found, expected = model.forward_features(x), plain.forward_features(x)
    scale = expected.detach().abs().max()
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-10, rtol=1e-10)
    used = [p for block in dl.describe(model).blocks() for p in block.module.delta.parameters()]
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / scale
    grads = torch.autograd.grad((found * weights).sum(), used, allow_unused=True)
    again = torch.autograd.grad((expected * weights).sum(), used, allow_unused=True)
    assert sum(g is not None for g in grads) >= len(used) // 2
    for one, other in zip(grads, again, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).abs().max() <= 1e-9 * max(1, one.abs().max())


@pytest.mark.parametrize("family", ["caformer", "maxvit", "resnet"])
def test_spatial_modules_see_maps(family):
    """Also where the stream is tokens, or changes its layout from block to block."""
    model, plain = FAMILIES[family](), FAMILIES[family]()
    dl.attach(model, InTheStream())
    x = torch.randn(2, 3, 64, 32) if family in ("caformer", "fastvit", "resnet") else images(model)

    def shifted(site):
        def hook(module, args, y):
            if y.dim() == 3:
                height = int((2 * y.shape[1]) ** 0.5)
                y = y.unflatten(1, (height, -1))
                return (y + 0.5 * y.roll(1, 1)).flatten(1, 2)
            return y + 0.5 * y.roll(1, 1 if _last_axis(site) else 2)

        return hook

    for site in dl.describe(plain).blocks():
        site.module.register_forward_hook(shifted(site))
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ prompts
class PromptsAsTokens(nn.Module):
    """The library's attention, run with normed prompts as further tokens in front, which are thrown away again."""

    def __init__(self, attn, normed):
        super().__init__()
        self.attn, self.normed = attn, normed

    def forward(self, x, **kwargs):
        prompts, shape = self.normed(), x.shape
        count = prompts.shape[1]
        if x.dim() == 4 and x.shape[1] == prompts.shape[2] and not self.last:
            tokens = torch.cat([prompts.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
            y = self.attn(tokens.transpose(1, 2).unsqueeze(-1), **kwargs)
            return y[:, :, count:].reshape(shape)
        tokens = torch.cat([prompts.expand(len(x), -1, -1), x.flatten(1, -2)], 1)
        return self.attn(tokens, **kwargs)[:, count:].reshape(shape)


class PaddedBias(nn.Module):
    """A relative-position bias that is zero for the tokens in front."""

    def __init__(self, rel_pos, count):
        super().__init__()
        self.rel_pos, self.count = rel_pos, count

    def get_bias(self):
        return nn.functional.pad(self.rel_pos.get_bias(), (self.count, 0, self.count, 0))

    def forward(self, attn, shared_rel_pos=None):
        return attn + self.get_bias()


def with_prompts_as_tokens(block: nn.Module, tokens: nn.Parameter) -> None:
    name = "token_mixer" if hasattr(block, "token_mixer") else "attn"
    norm = getattr(block, "norm1", None) or block.norm
    attn = getattr(block, name)
    last = isinstance(norm, nn.LayerNorm) and "2d" not in type(norm).__name__

    def normed():
        if last:
            return norm(tokens)
        return norm(tokens.transpose(1, 2).unsqueeze(-1)).flatten(2).transpose(1, 2)

    if getattr(attn, "rel_pos", None) is not None:
        attn.rel_pos = PaddedBias(attn.rel_pos, tokens.shape[1])
    wrapped = PromptsAsTokens(attn, normed)
    wrapped.last = last
    setattr(block, name, wrapped)


PROMPTED = {
    "caformer": (conv_models.caformer, 3),
    "caformer, unfused": (conv_models.caformer, 3),
    "mobile hybrid": (conv_models.mobile_hybrid, 2),
    "maxvit": (conv_models.maxvit, 8),
    "maxvit, heads first": (lambda: conv_models.maxvit(head_first=True, rel_pos_type="bias_tf"), 8),
    "maxvit, maps": (lambda: conv_models.maxvit(use_nchw_attn=True, head_first=True), 8),
    "maxvit, no bias": (lambda: conv_models.maxvit(rel_pos_type=None, no_block_attn=True), 4),
    "coatnet": (conv_models.coatnet, 1),
    "fastvit": (conv_models.fastvit, 2),
}


@pytest.mark.parametrize(
    "case", some(PROMPTED, ("caformer, unfused", "maxvit, maps", "maxvit, heads first", "maxvit, no bias"))
)
def test_prompts_equal_tokens_that_are_thrown_away(case):
    make, count = PROMPTED[case]
    model, plain = make().double(), make().double()
    dl.attach(model, PromptsWhereTheyFit())
    if "unfused" in case:
        for module in [*model.modules(), *plain.modules()]:
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    prompts, modules = [], dict(plain.named_modules())
    for site in dl.describe(model).blocks():
        if "attention.prompts" in site.slots:
            (module,) = site.module.delta.live("attention.prompts")
            prompts.append(module.tokens)
            with_prompts_as_tokens(modules[site.path], module.tokens)
    assert len(prompts) == count
    x = images(model).double()
    found, expected = model.forward_features(x), plain.forward_features(x)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        assert (found - make().double().forward_features(x)).abs().max() > 1e-3
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), prompts),
        torch.autograd.grad((expected * weights).sum(), prompts),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-9)
