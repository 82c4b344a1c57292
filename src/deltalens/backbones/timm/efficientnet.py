"""timm's mobile blocks: EfficientNet v1 and v2, MobileNet v2 to v5, MNASNet, MixNet, FBNet, HardCoRe-NAS, TinyNet.

A block of convolutions is one branch without a norm in front, n is x:  y = stream( x + drop_path(inner(u)) ), with
LayerScale in u. Many blocks change shape or width and then have no skip: y = stream( inner(u) ). `MobileAttention`
(MobileNet v4 hybrid, v5) is a pre-norm branch called "attention"; its prompts are normed, get no position and become
keys and values. Where keys and values are read from a downsampled map, there is no place for prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timm.layers import Attention2d, MultiQueryAttention2d
from timm.models._efficientnet_blocks import (
    CondConvResidual,
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    MobileAttention,
    UniversalInvertedResidual,
)
from torch import Tensor, nn

from deltalens.backbones.timm.maps import (
    OUTPUT_ONLY,
    as_map,
    attend,
    attend_map,
    block_without_skip,
    find_tower,
    identity,
    one_branch,
    prompted,
    split_map,
)
from deltalens.sites.anatomy import Family, Tower
from deltalens.sites.equation import Branch, residual_block
from deltalens.sites.swap import original_class


# ------------------------------------------------------------------ branches of convolutions
def _space_to_depth(block: nn.Module, x: Tensor) -> Tensor:
    return x if block.conv_s2d is None else block.bn_s2d(block.conv_s2d(x))


def _conv_bn_act(block: ConvBnAct, x: Tensor) -> Tensor:
    return block.aa(block.bn1(block.conv(x)))


def _depthwise_separable(block: DepthwiseSeparableConv, x: Tensor) -> Tensor:
    x = block.aa(block.bn1(block.conv_dw(_space_to_depth(block, x))))
    return block.bn2(block.conv_pw(block.se(x)))


def _inverted(block: InvertedResidual, x: Tensor) -> Tensor:
    x = block.bn1(block.conv_pw(_space_to_depth(block, x)))
    x = block.se(block.aa(block.bn2(block.conv_dw(x))))
    return block.bn3(block.conv_pwl(x))


def _conditional(block: CondConvResidual, x: Tensor) -> Tensor:
    routing = torch.sigmoid(block.routing_fn(F.adaptive_avg_pool2d(x, 1).flatten(1)))
    x = block.bn1(block.conv_pw(x, routing))
    x = block.se(block.bn2(block.conv_dw(x, routing)))
    return block.bn3(block.conv_pwl(x, routing))


def _edge(block: EdgeResidual, x: Tensor) -> Tensor:
    x = block.se(block.aa(block.bn1(block.conv_exp(x))))
    return block.bn2(block.conv_pwl(x))


def _universal(block: UniversalInvertedResidual, x: Tensor) -> Tensor:
    x = block.dw_mid(block.pw_exp(block.dw_start(x)))
    return block.layer_scale(block.dw_end(block.pw_proj(block.se(x))))


# class -> (its branch, the layer whose outputs are the stream's channels)
_CONVOLUTIONS: dict[type, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    ConvBnAct: (_conv_bn_act, "conv"),
    DepthwiseSeparableConv: (_depthwise_separable, "conv_pw"),
    CondConvResidual: (_conditional, "conv_pwl"),
    InvertedResidual: (_inverted, "conv_pwl"),
    EdgeResidual: (_edge, "conv_pwl"),
    UniversalInvertedResidual: (_universal, "pw_proj.conv"),
}


def _kind(block: nn.Module) -> type:
    return next(base for base in original_class(block).__mro__ if base in _CONVOLUTIONS)


def _block_forward(self: nn.Module, x: Tensor) -> Tensor:
    slots, branch = self.delta, _CONVOLUTIONS[_kind(self)][0]
    if not self.has_skip:
        return block_without_skip(slots, "mlp", branch(self, x))
    branches = (Branch("mlp", identity, lambda n: branch(self, n), self.drop_path),)
    return residual_block(slots, slots.layout, x, branches)


def _width(block: nn.Module) -> int:
    if isinstance(block, MobileAttention):
        attn = block.attn
        return (attn.output.proj if isinstance(attn, MultiQueryAttention2d) else attn.proj).out_channels
    layer = block.get_submodule(_CONVOLUTIONS[_kind(block)][1])
    convolutions = [layer] if hasattr(layer, "out_channels") else layer.children()  # MixedConv2d holds several
    return sum(each.out_channels for each in convolutions)


BLOCK = Family(
    name="deltalens.backbones.timm.efficientnet:BLOCK",
    methods={"forward": _block_forward},
    slots=one_branch("mlp"),
    width=_width,
)
NO_SKIP = Family(
    name="deltalens.backbones.timm.efficientnet:NO_SKIP",
    methods={"forward": _block_forward},
    slots=OUTPUT_ONLY,
    width=_width,
)


# ------------------------------------------------------------------ the attention block
def prompt_keys_values(block: MobileAttention, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Un-normed prompts (1 or B, p, C) -> keys and values (1 or B, heads, p, d); one head for multi-query attention."""
    attn, normed = block.attn, block.norm(as_map(prompts))
    if isinstance(attn, MultiQueryAttention2d):
        return tuple(layer(normed).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (attn.key, attn.value))
    return split_map(attn, attn.qkv(normed))[1:]


def _multi_query(attn: MultiQueryAttention2d, x: Tensor, keys_values: list) -> Tensor:
    """timm's MultiQueryAttention2d.forward with further keys and values."""
    query = attn.query(x)
    q = query.flatten(2).unflatten(1, (attn.num_heads, attn.key_dim)).transpose(-1, -2)
    k, v = (layer(x).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (attn.key, attn.value))
    y = attend(attn, q, k, v, keys_values)
    return attn.output(y.transpose(-1, -2).flatten(1, 2).unflatten(-1, query.shape[-2:]))


def _attention_forward(self: MobileAttention, x: Tensor) -> Tensor:
    slots = self.delta
    x = x if self.conv_cpe_dw is None else x + self.conv_cpe_dw(x)

    def body(normed: Tensor) -> Tensor:
        extra = prompted(slots, normed, lambda prompts: prompt_keys_values(self, prompts))
        if not extra:
            return self.layer_scale(self.attn(normed))
        several = isinstance(self.attn, MultiQueryAttention2d)
        return self.layer_scale((_multi_query if several else attend_map)(self.attn, normed, extra))

    if not self.has_skip:
        return block_without_skip(slots, "attention", body(self.norm(x)))
    branches = (Branch("attention", self.norm, body, self.drop_path),)
    return residual_block(slots, slots.layout, x, branches)


ATTENTION = Family(
    name="deltalens.backbones.timm.efficientnet:ATTENTION",
    methods={"forward": _attention_forward},
    slots=one_branch("attention") | {"attention.prompts"},
    width=_width,
    keys_values=prompt_keys_values,
)
ATTENTION_WITHOUT_PROMPTS = Family(
    name="deltalens.backbones.timm.efficientnet:ATTENTION_WITHOUT_PROMPTS",
    methods={"forward": _attention_forward},
    slots=one_branch("attention"),
    width=_width,
)
ATTENTION_NO_SKIP = Family(
    name="deltalens.backbones.timm.efficientnet:ATTENTION_NO_SKIP",
    methods={"forward": _attention_forward},
    slots=frozenset({"attention.inner", "block.stream"}),
    width=_width,
)


def _family(block: nn.Module) -> Family:
    return BLOCK if block.has_skip else NO_SKIP


def _attention_family(block: MobileAttention) -> Family:
    attn = block.attn
    if not block.has_skip:
        return ATTENTION_NO_SKIP
    if original_class(attn).forward is MultiQueryAttention2d.forward:
        return ATTENTION if attn.kv_stride == 1 and not attn.einsum else ATTENTION_WITHOUT_PROMPTS
    return ATTENTION if original_class(attn).forward is Attention2d.forward else ATTENTION_WITHOUT_PROMPTS


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all mobile blocks in the tree. Networks that only borrow `ConvBnAct` (GhostNet) have none."""
    kinds = {**dict.fromkeys(_CONVOLUTIONS, _family), MobileAttention: _attention_family}
    for tower in find_tower(model, kinds, _width):
        if any(original_class(block.module) is not ConvBnAct for block in tower.blocks):
            yield "", tower
