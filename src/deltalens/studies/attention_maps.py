"""Where a block looks: attention over the map and over prompts, as arrays and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_reverse
from torch import Tensor, nn

from deltalens.backbones import describe
from deltalens.backbones.timm import swin, vit
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


@dataclass(frozen=True)
class WindowsAttention:
    """The attention of one Swin block, window by window.

    weights (B * windows, heads, c + area queries, p + c + area keys), rows sum to 1; values (B * windows, heads,
    p + c + area, head_dim). p prompts are keys and values only, c prompts live on beside the map (`inserted`), each
    window with its own copy; area positions of the map follow. size: the map (H, W); window: (h, w); shift: how far
    the map was rolled up and left before it was cut. There is no class token: what is shown is the mean row of all
    positions.
    """

    weights: Tensor
    values: Tensor
    prompts: int
    inserted: int
    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]
    batch: int
    prefix: int = 0

    def of_query(self) -> Tensor:
        """(B * windows, heads, p + c + area): the mean row of each window's positions."""
        return self.weights[:, :, self.inserted :].mean(2)

    def over_map(self) -> Tensor:
        """(B, heads, H, W): how much goes to each position, as a share of what all windows give."""
        rows = self.of_query()[..., -self.window[0] * self.window[1] :]
        cut = rows.transpose(1, 2).unflatten(1, self.window)  # (B * windows, h, w, heads)
        padded = [-(-side // step) * step for side, step in zip(self.size, self.window, strict=True)]
        whole = window_reverse(cut, self.window, *padded)[:, : self.size[0], : self.size[1]]
        whole = torch.roll(whole, self.shift, (1, 2)).permute(0, 3, 1, 2)
        return whole * self.batch / len(self.weights)

    def over_prompts(self) -> Tensor:
        """(B, heads, p + c): the mean over windows of what goes to each prompt, those of this block first."""
        rows = self.of_query()[..., : self.prompts + self.inserted]
        return rows.unflatten(0, (self.batch, -1)).mean(1)

    def over_prefix(self) -> Tensor:
        """(B, heads, 0): Swin has no prefix tokens."""
        return self.over_prompts()[..., :0]

    def output(self) -> Tensor:
        """(B * windows, c + area, heads * head_dim): weights @ values, what the block's projection reads."""
        return (self.weights @ self.values).transpose(1, 2).flatten(2)


@torch.no_grad()
def block_attention(model: nn.Module, images: Tensor, block: int = -1) -> BlockAttention | WindowsAttention:
    """The attention of a ViT or Swin block, adapted or not, for some images; the model is put in eval mode.

    The block's own layers are used: what enters it, its qkv layer and its prompt modules is caught in a forward pass,
    and queries, keys and values are computed from it once more. block: its number, negative from the end.

    Raises TypeError for blocks of other families, IndexError for a number beyond the blocks.
    """
    site = _site(model, block)
    caught = _Caught(site.module)
    try:
        model.eval().forward_features(images)  # not forward, where a last block may compute its class row only
    finally:
        caught.remove()
    return (_of_vit if site.family is vit.BLOCK else _of_swin)(site, caught, images)


class _Caught:
    """What one forward pass shows of a block: stream, the tokens that its qkv layer reads, its prompts."""

    def __init__(self, block: nn.Module):
        self.stream: Tensor | tuple[Tensor, Tensor] | None = None
        self.tokens: Tensor | None = None
        self.prompts: list[Tensor | tuple[Tensor, Tensor]] = []
        modules = block.delta.live("attention.prompts") if "delta" in block._modules else []
        self.handles = [
            block.register_forward_pre_hook(lambda _, inputs: setattr(self, "stream", inputs[0])),
            block.attn.qkv.register_forward_pre_hook(lambda _, inputs: setattr(self, "tokens", inputs[0])),
            *(each.register_forward_hook(lambda _, inputs, output: self.prompts.append(output)) for each in modules),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def keys_values(self, site: Site) -> list[tuple[Tensor, Tensor]]:
        """Of every prompt module, each (1 or B, heads, p, head_dim)."""
        return [p if isinstance(p, tuple) else site.family.keys_values(site.module, p) for p in self.prompts]


def _of_vit(site: Site, caught: _Caught, images: Tensor) -> BlockAttention:
    attn, normed = site.module.attn, caught.tokens
    q, k, v = _heads(attn, normed)
    q, k = attn.q_norm(q), attn.k_norm(k)
    length, mask = normed.shape[1], None
    if "delta" in site.module._modules:
        mask = site.module.delta.mask(None, normed, site.module.delta.layout)
    for extra in caught.keys_values(site):
        k, v = (torch.cat([e.to(t).expand(len(t), -1, -1, -1), t], 2) for e, t in zip(extra, (k, v), strict=True))
    scores, count = q @ k.transpose(-2, -1) * attn.head_dim**-0.5, k.shape[2] - length
    if mask is not None:
        visible = True if mask.dtype == torch.bool else 0.0
        mask = F.pad(mask, (count, 0), value=visible)
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    grid, prefix = _grid(site, images), site.tower.layout.prefix
    return BlockAttention(scores.softmax(-1), v, count, prefix, length - prefix - grid[0] * grid[1], grid)


def _of_swin(site: Site, caught: _Caught, images: Tensor) -> WindowsAttention:
    block, attn, tokens = site.module, site.module.attn, caught.tokens
    size = tuple((caught.stream[0] if isinstance(caught.stream, tuple) else caught.stream).shape[1:3])
    windows, inserted = len(tokens), tokens.shape[1] - block.window_area
    q, k, v = _heads(attn, tokens)
    for extra in caught.keys_values(site):
        each = [e.to(k).repeat_interleave(windows // len(e), 0) for e in extra]
        k, v = torch.cat([each[0], k], 2), torch.cat([each[1], v], 2)
    count = k.shape[2] - tokens.shape[1]
    bias, mask = attn._get_rel_pos_bias(), block.attn_mask
    if getattr(block, "dynamic_mask", False):
        padded = [-(-side // step) * step for side, step in zip(size, block.window_size, strict=True)]
        mask = block.get_attn_mask(tokens.new_zeros(1, *padded, 1))
    if mask is not None:
        bias = (bias + mask.unsqueeze(1)).repeat(windows // len(mask), 1, 1, 1)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + F.pad(bias, (count + inserted, 0, inserted, 0))
    window, shift = tuple(block.window_size), tuple(block.shift_size)
    return WindowsAttention(scores.softmax(-1), v, count, inserted, size, window, shift, len(images))


def _heads(attn: nn.Module, tokens: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, each (B, heads, N, head_dim)."""
    return attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _site(model: nn.Module, block: int) -> Site:
    state = state_of(model) if KEY in model.__dict__ else None
    anatomy = describe(model, *((state.backbone, state.blocks, state.tower) if state else ()))
    blocks = anatomy.towers[0].blocks
    if not -len(blocks) <= block < len(blocks):
        raise IndexError(f"{type(model).__name__} has {len(blocks)} blocks, numbered from 0; there is no block {block}")
    site = blocks[block]
    if site.family not in (vit.BLOCK, swin.BLOCK) or not hasattr(model, "forward_features"):
        raise TypeError(
            f"attention maps are drawn for timm's ViT and Swin blocks; {site.path} of {type(model).__name__} is a "
            f"{type(site.module).__name__}"
        )
    return site


def _grid(site: Site, images: Tensor) -> tuple[int, int]:
    embed = site.tower.embed.module
    recorded = getattr(embed.__dict__.get("delta_layout"), "grid", None)
    return tuple(recorded or embed.dynamic_feat_size(tuple(images.shape[-2:])))


# ------------------------------------------------------------------ the picture
def plot_attention(
    image: np.ndarray,
    attention: BlockAttention | WindowsAttention,
    path: str | os.PathLike,
    title: str = "",
    most_heads: int = 12,
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


def _shares(axis, attention: BlockAttention | WindowsAttention) -> None:
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
