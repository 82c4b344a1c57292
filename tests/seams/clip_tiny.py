"""A two-tower network as OpenAI's CLIP names it, and the family that describes it.

This is what a new file in `backbones/` looks like, kept in the tests: CLIP itself is another piece of work. It shows
that a text tower, a tower owner with slots of its own and a mask that differs from sample to sample need nothing in
the core. The family is made known by one entry in `describe.FAMILIES`.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from deltalens.backbones.describe import FAMILIES
from deltalens.backbones.unknown import CHANNELS_FIRST_EMBED
from deltalens.sites.anatomy import Family, Site, Tower
from deltalens.sites.equation import RESIDUAL_BLOCK_SLOTS, Branch, residual_block
from deltalens.sites.layout import Sequence, Tokens

VECTORS = Path(__file__).parents[2] / "../shared/reference_vectors"
END_OF_TEXT = 29  # in the cut vocabulary of the reference vectors


# ------------------------------------------------------------------ the network
class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class AttentionBlock(nn.Module):
    """Pre-norm block; attn_mask (N, N) or (B, N, N), additive."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def attend(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.repeat_interleave(self.attn.num_heads, 0)
        return self.attn(x, x, x, need_weights=False, attn_mask=attn_mask)[0]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attend(self.ln_1(x), attn_mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(AttentionBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, attn_mask)
        return x


class ImageTower(nn.Module):
    def __init__(
        self, width: int = 128, layers: int = 4, heads: int = 2, patch: int = 16, grid: int = 2, out: int = 32
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, out))

    def embed(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([cls, patches], 1) + self.positional_embedding

    def forward(self, images: Tensor) -> Tensor:
        return self.ln_post(self.transformer(self.ln_pre(self.embed(images)))[:, 0]) @ self.proj


class Clip(nn.Module):
    def __init__(self, width: int = 64, layers: int = 4, heads: int = 1, context: int = 77, vocabulary: int = 30):
        super().__init__()
        self.visual = ImageTower()
        self.transformer = Transformer(width, layers, heads)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, 32))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def causal_mask(self, length: int) -> Tensor:
        return torch.full((length, length), float("-inf"), device=self.logit_scale.device).triu(1)

    def encode_text(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        x = self.ln_final(self.transformer(x, self.causal_mask(x.shape[1])))
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Cosine logits, (images, classes)."""
        image_features = F.normalize(self.visual(images), dim=-1)
        return self.logit_scale.exp() * image_features @ F.normalize(self.encode_text(ids), dim=-1).T


def tiny_clip() -> Clip:
    """The network of the reference vectors, with their weights; random weights where those are absent."""
    torch.manual_seed(0)
    model = Clip().eval()
    if VECTORS.exists():
        model.load_state_dict(load_file(VECTORS / "clip_tiny_openai.safetensors"))
    return model


# ------------------------------------------------------------------ the family
def _block_forward(self: AttentionBlock, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    slots = self.delta
    mask = slots.mask(attn_mask, x, slots.layout)
    attention = Branch("attention", self.ln_1, lambda n: self.attend(n, mask), nn.Identity())
    return residual_block(slots, slots.layout, x, (attention, Branch("mlp", self.ln_2, self.mlp, nn.Identity())))


def _image_forward(self: ImageTower, images: Tensor) -> Tensor:
    slots = self.delta
    x = slots.tokens("embed", self.embed(images), slots.layout)
    x = self.transformer(self.ln_pre(x))
    x = slots.tokens("pool", x, slots.layout) if slots.live("pool") else x[:, 0]
    return self.ln_post(x) @ self.proj


def _clip_forward(self: Clip, images: Tensor, ids: Tensor) -> Tensor:
    """Cosine logits. Features are (images, D) and (classes, D); or (images, classes, D) for the text where a context
    depends on the image; or (images, K, D) and (classes, K, D), paired, where `pool` modules read K tokens."""
    slots = self.delta
    image_features = F.normalize(self.visual(images), dim=-1)
    embeddings = self.token_embedding(ids)
    for module in slots.live("text.context"):
        embeddings = module(embeddings, image_features)
    x = embeddings.flatten(0, -3) + self.positional_embedding
    x = slots.tokens("embed", x, slots.layout)
    x = self.ln_final(self.transformer(x, self.causal_mask(x.shape[1])))
    if slots.live("pool"):
        text_features = F.normalize(slots.tokens("pool", x, slots.layout) @ self.text_projection, dim=-1)
        return self.logit_scale.exp() * torch.einsum("bkd,ckd->bck", image_features, text_features).mean(-1)
    ends = ids.argmax(-1).repeat(len(x) // len(ids))
    text_features = F.normalize(x[torch.arange(len(x)), ends] @ self.text_projection, dim=-1)
    if embeddings.dim() == 4:
        return self.logit_scale.exp() * torch.einsum(
            "bd,bcd->bc", image_features, text_features.unflatten(0, (-1, len(ids)))
        )
    return self.logit_scale.exp() * image_features @ text_features.T


BLOCK = Family(
    name="clip_tiny:BLOCK",
    methods={"forward": _block_forward},
    slots=RESIDUAL_BLOCK_SLOTS | {"attention.mask"},
)
IMAGE_OWNER = Family(
    name="clip_tiny:IMAGE_OWNER", methods={"forward": _image_forward}, slots=frozenset({"embed", "pool"})
)
TEXT_OWNER = Family(
    name="clip_tiny:TEXT_OWNER",
    methods={"forward": _clip_forward},
    slots=frozenset({"text.context", "embed", "pool"}),
)


def _tower(name: str, layout, owner_path: str, owner: nn.Module, family: Family, transformer: Transformer) -> Tower:
    tower = Tower(name, layout)
    width = transformer.resblocks[0].ln_1.weight.shape[0]
    for i, block in enumerate(transformer.resblocks):
        tower.add(f"transformer.resblocks.{i}", block, BLOCK, width)
    tower.owner = Site(owner_path, owner, family, width, tower=tower)
    return tower


def find_towers(model: nn.Module):
    """An image tower and a text tower, wherever they sit in the tree."""
    for path, module in model.named_modules():
        if isinstance(module, ImageTower):
            tower = _tower("image", Tokens(prefix=1), "", module, IMAGE_OWNER, module.transformer)
            tower.embed = Site("conv1", module.conv1, CHANNELS_FIRST_EMBED, tower.blocks[0].width, tower=tower)
            yield path, tower
        elif isinstance(module, Clip):
            yield path, _tower("text", Sequence(), "", module, TEXT_OWNER, module.transformer)


FAMILIES["clip_tiny"] = ("clip_tiny",)
