"""The point transformer: class tokens, then patches that lie in no grid. ReCon's blocks have two streams.

=================  ==================================================================================
block              what differs
=================  ==================================================================================
timm's `Block`     nothing: the reading is that of a ViT (`backbones/timm/vit.py`)
`TwoStreamBlock`   class tokens and patches have norms, attentions and MLPs of their own, and the skip
                   passes the norm. Parts of the class tokens' layers end with `_contrast`. Prompts are
                   keys and values for both; no `attention.mask`
=================  ==================================================================================

Tokens that adapters add have no position where positions are added before every block.

The owner of the tokens offers the slot `patches`: f(tokens (B, G, dim)) -> tokens, before class tokens and positions
join them. A module there that says `positions_once` has positions added before the first block alone. One that says
`reads_plain` is called f(tokens, plain, layout): plain() gives the normed patches (B, G, dim) as they are without any
adapter's modules and without class tokens, without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from deltalens.backbones.timm import token_attention as token
from deltalens.backbones.timm import token_owner
from deltalens.backbones.timm.vit import BLOCK
from deltalens.backbones.unknown import UNKNOWN_BLOCK
from deltalens.models.point_blocks import TwoStreamBlock
from deltalens.models.point_transformer import PointTransformer
from deltalens.sites.anatomy import Family, Part, Site, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import Patches
from deltalens.sites.output import live, pooled
from deltalens.sites.slots import without_adapters
from deltalens.sites.swap import original_class, original_method

OWN_METHODS = ("forward", "forward_features", "forward_head", "embed", "encode", "pool")


# ------------------------------------------------------------------ ReCon's block
def _two_stream_forward(self: TwoStreamBlock, x: Tensor) -> Tensor:
    slots = self.delta

    def first_norm(x: Tensor) -> Tensor:
        return self.norm_streams(x, self.norm1_contrast, self.norm1)

    def second_norm(x: Tensor) -> Tensor:
        return self.norm_streams(x, self.norm2_contrast, self.norm2)

    def attend(normed: Tensor) -> Tensor:
        prompts = [module(normed) for module in slots.live("attention.prompts")]
        pairs = [p if isinstance(p, tuple) else _keys_values(self, p) for p in prompts]
        return _attend(self, normed, pairs)

    def mlps(normed: Tensor) -> Tensor:
        return self.norm_streams(normed, self.mlp_contrast, self.mlp)

    branches = (
        Branch("attention", first_norm, attend, self.drop_path, skip=first_norm),
        Branch("mlp", second_norm, mlps, self.drop_path, skip=second_norm),
    )
    return token_owner.leave(slots, residual_block(slots, slots.layout, x, branches), None)


def _attend(block: TwoStreamBlock, normed: Tensor, pairs: list[token.KeysValues]) -> Tensor:
    """Both attentions. pairs: further keys and values, (1 or B, 2 heads, p, head_dim): those of the patches' attention,
    then those of the class tokens'."""
    if not pairs:
        return block.attend(normed)
    halves = [tuple(each.chunk(2, 1) for each in pair) for pair in pairs]
    of_patches, of_class = ([(k[i], v[i]) for k, v in halves] for i in (0, 1))
    class_tokens, patches = normed[:, : block.prefix], normed[:, block.prefix :]
    cross = block.attn_contrast
    keys, values = token.with_prompts(*cross.keys_values(patches), of_class)
    return torch.cat([cross.read(class_tokens, keys, values), token.attend(block.attn, patches, of_patches)], 1)


def _keys_values(block: TwoStreamBlock, prompts: Tensor) -> token.KeysValues:
    """Un-normed prompts (1 or B, p, C), as patches -> their keys and values, each (1 or B, 2 heads, p, head_dim)."""
    normed = block.norm1(prompts)
    pairs = (token.prompt_keys_values(block.attn, normed), block.attn_contrast.keys_values(normed))
    keys, values = (torch.cat(each, 1) for each in zip(*pairs, strict=True))
    return keys, values


def _two_stream_parts(block: TwoStreamBlock) -> dict[str, Part]:
    width, cross = block.norm1.normalized_shape[0], "attn_contrast"
    of_class = {
        "q_contrast": Part(f"{cross}.q"),
        "k_contrast": Part(f"{cross}.kv", (0, width)),
        "v_contrast": Part(f"{cross}.kv", (width, 2 * width)),
        "proj_contrast": Part(f"{cross}.proj"),
    }
    mlp = {f"{name}_contrast": part for name, part in token.mlp_parts(block.mlp_contrast, "mlp_contrast").items()}
    return token.attention_parts(block.attn) | token.mlp_parts(block.mlp) | of_class | mlp


TWO_STREAMS = Family(
    name="deltalens.backbones.points.transformer:TWO_STREAMS",
    methods={"forward": _two_stream_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.prompts"},
    parts=_two_stream_parts,
    width=lambda block: block.norm1.normalized_shape[0],
    keys_values=_keys_values,
    readers=lambda block: {
        "attention.pre": (*token.attention_readers(), "attn_contrast.q", "attn_contrast.kv"),
        "mlp.pre": (*token.mlp_readers(), *token.mlp_readers("mlp_contrast")),
    },
)


# ------------------------------------------------------------------ the owner of the tokens
def _forward(self: PointTransformer, clouds: Tensor) -> Tensor:
    return token_owner.whole_forward(self, clouds)


def _embed(self: PointTransformer, groups: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    self.__dict__["delta_layout"].found["centres"] = centres.detach()
    return original_method(self, "embed")(groups, centres)


def _encode(self: PointTransformer, tokens: Tensor, pos: Tensor, every_block: bool | None = None) -> Tensor:
    layout, given = self.__dict__["delta_layout"], tokens
    layout.record(tokens.shape[1])

    def plain() -> Tensor:
        with torch.no_grad(), without_adapters(self):
            return self.norm(self.blocks(given, pos, self.pos_every_block, 0))

    try:
        for module in live(self, "patches"):
            tokens = module(tokens, plain, layout) if getattr(module, "reads_plain", False) else module(tokens)
            every_block = False if getattr(module, "positions_once", False) else every_block
        return original_method(self, "encode")(tokens, pos, every_block)
    finally:
        layout.found.clear()


def _pool(self: PointTransformer, tokens: Tensor) -> Tensor:
    features = pooled(self, tokens, self.__dict__["delta_layout"])
    return original_method(self, "pool")(tokens) if features is None else features


def _owner(name: str, slots: frozenset[str], **methods: Callable) -> Family:
    return Family(
        name=f"deltalens.backbones.points.transformer:{name}",
        methods={"embed": _embed, "encode": _encode, **methods},
        slots=slots,
        widths=lambda owner: {"pool": owner.num_features, "output": owner.num_features},
    )


OWNER = _owner("OWNER", frozenset({"patches", "pool", "output"}), forward=_forward, pool=_pool)
OTHER_HEAD = _owner("OTHER_HEAD", frozenset({"patches"}))


# ------------------------------------------------------------------ towers
def _family(block: nn.Module) -> Family:
    forward = original_class(block).forward
    if forward is Block.forward and token.is_softmax(block.attn):
        return BLOCK
    return TWO_STREAMS if forward is TwoStreamBlock.forward else UNKNOWN_BLOCK


def _tower(owner: PointTransformer) -> Tower:
    prefix = len(owner.class_tokens)
    tower = Tower("points", Patches(prefix, owner.num_groups), class_token=bool(prefix))
    for number, block in enumerate(owner.blocks.blocks):
        tower.add(f"blocks.blocks.{number}", block, _family(block), owner.dim)
    tower.untrained = list(owner.untrained)
    tower.class_tensors = tuple(f"{name}_{kind}" for name in owner.class_tokens for kind in ("token", "pos"))
    cls = original_class(owner)
    if cls.encode is PointTransformer.encode and cls.embed is PointTransformer.embed:
        whole = all(getattr(cls, name) is getattr(PointTransformer, name) for name in OWN_METHODS)
        family = OWNER if whole else OTHER_HEAD
        tower.owner = Site("", owner, family, owner.dim, tower=tower)
        if whole and owner.num_classes:
            tower.classifier = tower.owner
    return tower


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the owner, tower) for every PointTransformer in the tree."""
    for path, owner in model.named_modules():
        if isinstance(owner, PointTransformer) and len(owner.blocks.blocks):
            yield path, _tower(owner)
