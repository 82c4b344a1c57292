"""Where a block looks: attention over the map and over prompts, as arrays and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.backbones import describe, vit
from deltalens.lifecycle.state import KEY, state_of
from deltalens.sites.anatomy import Site
from deltalens.studies.figure import new_figure, page_colours, save_figure


@dataclass(frozen=True)
class BlockAttention:
    """The attention of one block of a ViT, in full.

    weights (B, heads, N queries, p + N keys), rows sum to 1; values (B, heads, p + N, head_dim). The N tokens of the
    stream are `prefix` tokens of the backbone (class token, registers), `inserted` ones of an adapter (VPT-shallow),
    and the map, row by row. The p keys before them come from prompts that are keys and values only (VPT-deep): they
    have columns here and no rows.
    """

    weights: Tensor
    values: Tensor
    prompts: int
    prefix: int
    inserted: int
    grid: tuple[int, int]

    def of_query(self) -> Tensor:
        """(B, heads, p + N): the row of the class token; without one, the mean row of the map's tokens."""
        if self.prefix:
            return self.weights[:, :, 0]
        return self.weights[:, :, self.inserted :].mean(2)

    def over_map(self) -> Tensor:
        """(B, heads, H, W): how much of `of_query` goes to each patch."""
        return self.of_query()[..., -self.grid[0] * self.grid[1] :].unflatten(-1, self.grid)

    def over_prompts(self) -> Tensor:
        """(B, heads, p + inserted): how much of it goes to each prompt, those of this block first."""
        row, start = self.of_query(), self.prompts + self.prefix
        return torch.cat([row[..., : self.prompts], row[..., start : start + self.inserted]], -1)

    def over_prefix(self) -> Tensor:
        """(B, heads, prefix): how much of it goes to each prefix token of the backbone."""
        return self.of_query()[..., self.prompts : self.prompts + self.prefix]

    def output(self) -> Tensor:
        """(B, N, heads * head_dim): weights @ values, what the block's projection reads."""
        return (self.weights @ self.values).transpose(1, 2).flatten(2)


@torch.no_grad()
def block_attention(model: nn.Module, images: Tensor, block: int = -1) -> BlockAttention:
    """The attention of a block, adapted or not, for some images; the model is put in eval mode.

    The block's own layers are used: what enters its qkv layer is caught in a forward pass, and queries, keys and values
    are computed from it once more, with those of its prompts. block: its number, negative from the end.

    Raises TypeError for a block that is not timm's ViT block, IndexError for a number beyond the blocks.
    """
    site = _site(model, block)
    module, attn = site.module, site.module.attn
    caught: list[Tensor] = []
    handle = attn.qkv.register_forward_pre_hook(lambda layer, inputs: caught.append(inputs[0]))
    try:
        model.eval().forward_features(images)  # not forward, where a last block computes its class row only
    finally:
        handle.remove()
    normed = caught[-1]  # calls before it may have been for prompts
    q, k, v = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    length, mask = normed.shape[1], None
    if "delta" in module._modules:
        slots = module.delta
        mask = slots.mask(None, normed, slots.layout)
        for prompts in [each(normed) for each in slots.live("attention.prompts")]:
            extra = prompts if isinstance(prompts, tuple) else site.family.keys_values(module, prompts)
            k, v = (torch.cat([e.to(t).expand(len(t), -1, -1, -1), t], 2) for e, t in zip(extra, (k, v), strict=True))
    scores = q @ k.transpose(-2, -1) * attn.head_dim**-0.5
    count = k.shape[2] - length
    if mask is not None:
        unmasked = True if mask.dtype == torch.bool else 0.0
        mask = F.pad(mask, (count, 0), value=unmasked)
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    grid, prefix = _grid(site, images), site.tower.layout.prefix
    inserted = length - prefix - grid[0] * grid[1]
    return BlockAttention(scores.softmax(-1), v, count, prefix, inserted, grid)


def _site(model: nn.Module, block: int) -> Site:
    state = state_of(model) if KEY in model.__dict__ else None
    anatomy = describe(model, *((state.backbone, state.blocks) if state else ()))
    blocks = anatomy.towers[0].blocks
    if not -len(blocks) <= block < len(blocks):
        raise IndexError(f"{type(model).__name__} has {len(blocks)} blocks, numbered from 0; there is no block {block}")
    site = blocks[block]
    if site.family is not vit.BLOCK or not hasattr(model, "forward_features"):
        raise TypeError(
            f"attention maps are drawn for timm's ViT blocks; {site.path} of {type(model).__name__} is a "
            f"{type(site.module).__name__}"
        )
    return site


def _grid(site: Site, images: Tensor) -> tuple[int, int]:
    embed = site.tower.embed.module
    recorded = getattr(embed.__dict__.get("delta_layout"), "grid", None)
    return tuple(recorded or embed.dynamic_feat_size(tuple(images.shape[-2:])))


# ------------------------------------------------------------------ the picture
def plot_attention(
    image: np.ndarray, attention: BlockAttention, path: str | os.PathLike, title: str = "", most_heads: int = 12
) -> None:
    """Draw the first image's attention: the picture, the mean over heads laid over it, each head, and the shares of
    prefix tokens, prompts and patches, prompt by prompt.

    image: uint8 (H, W, 3), as the model saw it.
    """
    maps = attention.over_map()[0].float().cpu()
    panels = [("mean of heads", maps.mean(0)), *((f"head {i}", each) for i, each in enumerate(maps[:most_heads]))]
    columns = min(5, len(panels) + 2)
    figure, axes = new_figure(-(-(len(panels) + 2) // columns), columns, (2.1, 2.3))
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(image)
    axes[0].set_title(title or "image")
    for axis, (name, values) in zip(axes[1:], panels, strict=False):
        axis.imshow(image)
        axis.imshow(overlay(values, image.shape[:2]), cmap="magma", alpha=0.6)
        axis.set_title(name)
    _shares(axes[len(panels) + 1], attention)
    save_figure(figure, path)


def overlay(values: Tensor, size: Sequence[int]) -> np.ndarray:
    """A map (h, w) enlarged to (H, W), bilinear."""
    return F.interpolate(values[None, None], tuple(size), mode="bilinear", align_corners=False)[0, 0].numpy()


def _shares(axis, attention: BlockAttention) -> None:
    """Bars: how much of the mean row goes to prefix, to all patches, and to each prompt."""
    colours = page_colours()
    prompts = attention.over_prompts()[0].mean(0).tolist()
    prefix, patches = (float(each[0].mean(0).sum()) for each in (attention.over_prefix(), attention.over_map()))
    heights = [prefix, patches, sum(prompts), *prompts]
    names = ["prefix", "patches", "prompts", *(str(i) for i in range(len(prompts)))]
    axis.set_axis_on()
    axis.bar(range(len(heights)), heights, color=[colours["c0"]] * 2 + [colours["c1"]] + [colours["c2"]] * len(prompts))
    shown = range(len(names)) if len(names) <= 13 else range(3)
    axis.set_xticks(list(shown), [names[i] for i in shown], rotation=90, fontsize=7)
    axis.set_title("share of attention")
