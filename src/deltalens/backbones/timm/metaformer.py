"""timm's MetaFormer: PoolFormer v1 and v2, ConvFormer, CAFormer.

Two pre-norm branches; "attention" is the token mixer, whatever it is (pooling, separable convolution, attention).
Stages with attention run on tokens (B, H*W, C), all others on maps (B, C, H, W). The stream beside a branch passes
`res_scale`. LayerScale belongs to the branch. Prompts become keys and values of blocks with attention; there are no
position embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timm.models.metaformer import Attention, MetaFormerBlock, Stem
from torch import Tensor, nn

from deltalens.backbones.timm.maps import TWO_BRANCHES, attend, find_tower, prompted
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.equation import Branch, residual_block
from deltalens.sites.layout import ChannelsFirst, Tokens
from deltalens.sites.swap import original_class, original_method
from deltalens.sites.weights import linear_rows


class StageTokens(Tokens):
    """(B, H*W, C) of stages that each halve the map of the one before, rounding up.

    The stem records its map; the number of tokens tells how often it has been halved.
    """

    def __init__(self):
        super().__init__(prefix=0)

    def _grid_of(self, x: Tensor) -> tuple[int, int]:
        count = x.shape[1]
        eager = not torch.compiler.is_compiling()
        if eager and torch._C._current_graph_task_id() != -1 and count in self._grid_of_length:
            return self._grid_of_length[count]  # inside backward: a checkpoint runs this block again
        height, width = self.grid or super()._grid_of(x)  # which says what to do about an unknown grid
        while height * width > count:
            height, width = (height + 1) // 2, (width + 1) // 2
        if height * width != count:
            raise RuntimeError(f"{count} tokens are no halving of the stem's map of {self.grid[0]}x{self.grid[1]}")
        if eager and torch.is_grad_enabled():
            self._grid_of_length[count] = (height, width)
        return height, width


# ------------------------------------------------------------------ attention with prompts as extra keys and values
def _heads(attn: Attention, x: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, N, count * heads * d) -> `count` tensors (B, heads, N, d)."""
    return x.unflatten(-1, (count, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def prompt_keys_values(block: MetaFormerBlock, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Un-normed prompts (1 or B, p, C) -> keys and values, each (1 or B, heads, p, d)."""
    attn = block.token_mixer
    width = attn.attention_dim
    return _heads(attn, linear_rows(attn.qkv, block.norm1(prompts), width, 3 * width), 2)


def _attend(attn: Attention, normed: Tensor, keys_values: list) -> Tensor:
    y = attend(attn, *_heads(attn, attn.qkv(normed), 3), keys_values)
    return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))


def _block_forward(self: MetaFormerBlock, x: Tensor) -> Tensor:
    slots = self.delta

    def mix(normed: Tensor) -> Tensor:
        extra = prompted(slots, normed, lambda prompts: prompt_keys_values(self, prompts))
        u = _attend(self.token_mixer, normed, extra) if extra else self.token_mixer(normed)
        return self.layer_scale1(u)

    def mlp(normed: Tensor) -> Tensor:
        return self.layer_scale2(self.mlp(normed))

    branches = (
        Branch("attention", self.norm1, mix, self.drop_path1, self.res_scale1),
        Branch("mlp", self.norm2, mlp, self.drop_path2, self.res_scale2),
    )
    return residual_block(slots, slots.layout, x, branches)


def _width(block: MetaFormerBlock) -> int:
    layer = block.mlp.fc2
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _parts(block: MetaFormerBlock) -> dict[str, Part]:
    """The linear layers; in stages on maps the MLP is made of convolutions, which are none."""
    linear = {name: Part(f"mlp.{name}") for name in ("fc1", "fc2") if isinstance(getattr(block.mlp, name), nn.Linear)}
    attn = block.token_mixer
    if original_class(attn).forward is not Attention.forward:
        return linear
    width = attn.attention_dim
    parts = {name: Part("token_mixer.qkv", (i * width, (i + 1) * width)) for i, name in enumerate("qkv")}
    return parts | {"proj": Part("token_mixer.proj")} | linear


ATTENTION = Family(
    name="deltalens.backbones.timm.metaformer:ATTENTION",
    methods={"forward": _block_forward},
    slots=TWO_BRANCHES | {"attention.prompts"},
    parts=_parts,
    width=_width,
    keys_values=prompt_keys_values,
    readers=lambda block: {"attention.pre": ("token_mixer.qkv",), "mlp.pre": ("mlp.fc1",)},
)
TOKENS = Family(
    name="deltalens.backbones.timm.metaformer:TOKENS",
    methods={"forward": _block_forward},
    slots=TWO_BRANCHES,
    parts=_parts,
    width=_width,
    readers=lambda block: {"mlp.pre": ("mlp.fc1",)},
)
MAPS = Family(
    name="deltalens.backbones.timm.metaformer:MAPS",
    methods={"forward": _block_forward},
    slots=TWO_BRANCHES,
    width=_width,
    layout=ChannelsFirst(),
)


def _stem_forward(self: Stem, x: Tensor) -> Tensor:
    y = original_method(self, "forward")(x)
    self.__dict__["delta_layout"].record(*y.shape[2:4])
    return y


STEM = Family(name="deltalens.backbones.timm.metaformer:STEM", methods={"forward": _stem_forward})


def _family(block: MetaFormerBlock) -> Family:
    if isinstance(block.mlp.fc1, nn.Conv2d):
        return MAPS
    return ATTENTION if original_class(block.token_mixer).forward is Attention.forward else TOKENS


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """One tower of all MetaFormer blocks in the tree."""
    for tower in find_tower(model, {MetaFormerBlock: _family}, _width):
        stem = next(((path, module) for path, module in model.named_modules() if isinstance(module, Stem)), None)
        if stem is not None and any(block.family is not MAPS for block in tower.blocks):
            tower.layout = StageTokens()
            tower.embed = Site(*stem, STEM, tower.blocks[0].width, tower=tower)
        yield "", tower
