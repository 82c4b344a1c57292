"""timm's FastViT and MobileCLIP image towers: RepMixer and attention blocks on channels-first maps.

Two branches. "attention" is the token mixer: RepMixer has no norm in front, so that n is x there, and the MLP has none
in either block. `reparameterize()` folds a RepMixer and its skip into one convolution r. Its branch is then read as
r(n) - x, the same function, and left whole where nothing sits before or on it.
"""

from __future__ import annotations

from collections.abc import Iterator

from timm.models.fastvit import Attention, AttentionBlock, MobileOneBlock, RepMixerBlock
from torch import Tensor, nn

from deltalens.backbones.pixels import IMAGE
from deltalens.backbones.timm.maps import TWO_BRANCHES, as_map, attend, find_tower, identity, prompted
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.equation import Branch, residual_block
from deltalens.sites.slots import Slots
from deltalens.sites.swap import original_class
from deltalens.sites.weights import linear_rows


# ------------------------------------------------------------------ RepMixer
def _mixer_branch(mixer: nn.Module, slots: Slots) -> Branch:
    folded = mixer.reparam_conv
    if folded is None:
        return Branch("attention", identity, lambda n: mixer.layer_scale(mixer.mixer(n) - mixer.norm(n)), identity)
    if slots.live("attention.pre") or slots.live("attention.inner"):
        return Branch("attention", identity, lambda n: folded(n) - n, identity)
    return Branch("attention", identity, lambda n: 0.0, identity, skip=folded)


def _mixer_forward(self: RepMixerBlock, x: Tensor) -> Tensor:
    def mlp(x: Tensor) -> Tensor:
        return self.layer_scale(self.mlp(x))

    branches = (_mixer_branch(self.token_mixer, self.delta), Branch("mlp", identity, mlp, self.drop_path))
    return residual_block(self.delta, self.delta.layout, x, branches)


# ------------------------------------------------------------------ attention
def _heads(attn: Attention, x: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, N, count * heads * d) -> `count` tensors (B, heads, N, d)."""
    return x.unflatten(-1, (count, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def prompt_keys_values(block: AttentionBlock, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Un-normed prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, d)."""
    attn = block.token_mixer
    width = attn.num_heads * attn.head_dim
    normed = block.norm(as_map(prompts)).flatten(2).transpose(1, 2)
    return _heads(attn, linear_rows(attn.qkv, normed, width, 3 * width), 2)


def _attend(attn: Attention, x: Tensor, keys_values: list) -> Tensor:
    """timm's Attention.forward with further keys and values. x: (B, C, H, W), normed."""
    y = attend(attn, *_heads(attn, attn.qkv(x.flatten(2).transpose(1, 2)), 3), keys_values)
    y = attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))
    return y.transpose(1, 2).unflatten(-1, x.shape[-2:])


def _attention_forward(self: AttentionBlock, x: Tensor) -> Tensor:
    slots = self.delta

    def mix(normed: Tensor) -> Tensor:
        extra = prompted(slots, normed, lambda prompts: prompt_keys_values(self, prompts))
        return self.layer_scale_1(_attend(self.token_mixer, normed, extra) if extra else self.token_mixer(normed))

    def mlp(x: Tensor) -> Tensor:
        return self.layer_scale_2(self.mlp(x))

    branches = (
        Branch("attention", self.norm, mix, self.drop_path1),
        Branch("mlp", identity, mlp, self.drop_path2),
    )
    return residual_block(slots, slots.layout, x, branches)


def _width(block: RepMixerBlock | AttentionBlock) -> int:
    return block.mlp.fc2.out_channels


def _parts(block: AttentionBlock) -> dict[str, Part]:
    width = block.token_mixer.num_heads * block.token_mixer.head_dim
    parts = {name: Part("token_mixer.qkv", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
    return parts | {"proj": Part("token_mixer.proj")}


MIXER = Family(
    name="deltalens.backbones.timm.fastvit:MIXER",
    methods={"forward": _mixer_forward},
    slots=TWO_BRANCHES,
    width=_width,
)
ATTENTION = Family(
    name="deltalens.backbones.timm.fastvit:ATTENTION",
    methods={"forward": _attention_forward},
    slots=TWO_BRANCHES | {"attention.prompts"},
    parts=_parts,
    width=_width,
    keys_values=prompt_keys_values,
    readers=lambda block: {"attention.pre": ("token_mixer.qkv",)},
)


def _attention_family(block: AttentionBlock) -> Family:
    return ATTENTION if original_class(block.token_mixer).forward is Attention.forward else UNKNOWN_BLOCK


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all FastViT blocks in the tree. The image is received by the stem's first block, several
    convolutions of which read it side by side; none of them is the first, so there is no `stem.parallel`."""
    kinds = {RepMixerBlock: lambda block: MIXER, AttentionBlock: _attention_family}
    for tower in find_tower(model, kinds, _width):
        tower.image = tower.stem = None
        for path, module in model.named_modules():
            if isinstance(module, MobileOneBlock):
                tower.image = Site(path, module, IMAGE, module.out_chs, tower=tower)
                break
        yield "", tower
