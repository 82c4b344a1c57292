"""The published forms of CLIP's few-shot methods, operation by operation: what the shipped forms are compared with.

Every step runs the whole text tower on all positions of the context (77), classes in their order, and all tokens of the
last blocks, as the official code of CoOp, CoCoOp and MMA does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltalens as dl
from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.methods.cocoop import ConditionalContext
from deltalens.methods.mma import ModalityAdapter

Branches = Mapping[int, ModalityAdapter]  # number of a block, from 0 -> the adapter beside it


class PlainCLIP(nn.Module):
    """Zero-shot classification with open_clip's CLIP, both towers run whole.

    clip: an unadapted open_clip CLIP with nn.MultiheadAttention blocks and a class token. ids: (C, 77) tokens, one text
    for each class. In eval mode text features are computed once, as the official code does.
    """

    def __init__(self, clip: nn.Module, ids: Tensor):
        super().__init__()
        from open_clip.model import CLIP

        if type(clip) is not CLIP or clip.text_pool_type != "argmax" or not hasattr(clip.visual, "class_embedding"):
            raise ValueError(
                "the published forms are written for open_clip's CLIP with a class token, not for this "
                f"{type(clip).__name__}; choose such a model, for example open_clip/ViT-B-16"
            )
        self.clip = clip
        self.register_buffer("ids", ids)
        self.image_branches: Branches = {}
        self.text_branches: Branches = {}
        self.constant: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        return self.clip.logit_scale.exp() * self.image_features(images) @ self._texts().T

    def _texts(self) -> Tensor:
        if self.training:
            return self.text_features(self.embedded())
        if self.constant is None:
            self.constant = self.text_features(self.embedded())
        return self.constant

    def train(self, mode: bool = True) -> PlainCLIP:
        self.constant = None
        return super().train(mode)

    def embedded(self) -> Tensor:
        """(C, 77, d), without positions."""
        return self.clip.token_embedding(self.ids)

    def image_features(self, images: Tensor) -> Tensor:
        """Normalised, (B, D)."""
        visual = self.clip.visual
        x = _blocks(visual.transformer.resblocks, visual._embeds(images), None, self.image_branches)
        return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)

    def text_features(self, embedded: Tensor) -> Tensor:
        """Embedded words (C, 77, d) -> normalised features (C, D), read at the end token."""
        clip = self.clip
        x = embedded + clip.positional_embedding
        x = clip.ln_final(_blocks(clip.transformer.resblocks, x, clip.attn_mask, self.text_branches))
        ends = self.ids.argmax(-1)
        return F.normalize(x[torch.arange(len(x), device=x.device), ends] @ clip.text_projection, dim=-1)


class PlainMMA(PlainCLIP):
    """MMA with the adapters given, one for each adapted block and tower; CLIP is frozen."""

    def __init__(self, clip: nn.Module, ids: Tensor, image_branches: Branches, text_branches: Branches):
        super().__init__(clip.requires_grad_(False), ids)
        self.image_branches, self.text_branches = image_branches, text_branches
        self.adapters = nn.ModuleList([*image_branches.values(), *text_branches.values()])


class PlainCoOp(PlainCLIP):
    """CoOp with words in the place of the first ones of every text. words: the first values, (m, d)."""

    def __init__(self, clip: nn.Module, ids: Tensor, words: Tensor):
        super().__init__(clip.requires_grad_(False), ids)
        self.ctx = nn.Parameter(words.detach().clone())

    def embedded(self) -> Tensor:
        return self._with(self.ctx)

    def _with(self, words: Tensor) -> Tensor:
        x = self.clip.token_embedding(self.ids)
        return torch.cat([x[:, :1], words.expand(len(x), -1, -1), x[:, 1 + len(words) :]], 1)


class PlainCoCoOp(PlainCoOp):
    """CoCoOp: words of each image's own, the text tower run image by image."""

    def __init__(self, clip: nn.Module, ids: Tensor, context: ConditionalContext):
        super().__init__(clip, ids, context.ctx)
        self.meta_net = copy.deepcopy(context.meta_net)

    def forward(self, images: Tensor) -> Tensor:
        features = self.image_features(images)
        logits = [
            feature @ self.text_features(self._with(self.ctx + shift)).T
            for feature, shift in zip(features, self.meta_net(features), strict=True)
        ]
        return self.clip.logit_scale.exp() * torch.stack(logits)


# ------------------------------------------------------------------ pieces
def _blocks(blocks: nn.ModuleList, x: Tensor, mask: Tensor | None, branches: Branches) -> Tensor:
    for number, block in enumerate(blocks):
        normed = block.ln_1(x)
        y = x + block.ls_1(block.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0])
        y = y + block.ls_2(block.mlp(block.ln_2(y)))
        x = y + _branch(branches[number], normed) if number in branches else y
    return x


def _branch(adapter: ModalityAdapter, normed: Tensor) -> Tensor:
    """alpha up( relu( shared( relu( down(n) ) ) ) ), gradients scaled inside as in the official code."""
    hidden = torch.relu(adapter.down(_rescaled(normed, adapter.alpha)))
    hidden = torch.relu(adapter.shared(hidden))
    return _rescaled(adapter.alpha * adapter.up(hidden), 1 / adapter.alpha)


def _rescaled(x: Tensor, factor: float) -> Tensor:
    """x itself; its gradient is multiplied by a factor."""
    y = x.view_as(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * factor)
    return y


# ------------------------------------------------------------------ from an adapted model
def plain_mma(clip: nn.Module, adapted: ZeroShotClassifier) -> PlainMMA:
    """The plain form with copies of the adapters of a model with MMA. clip: an unadapted one of its own."""
    found = copy.deepcopy(_mma_adapters(adapted))  # at once: a pair's matrix stays one
    return PlainMMA(clip, adapted.prompts().ids, found["vision"], found["text"])


def plain_coop(clip: nn.Module, adapted: ZeroShotClassifier) -> PlainCoOp:
    """The plain form of CoOp (words of all classes in common, at the end) or of CoCoOp, with a model's words."""
    (context,) = adapted.live("text.context")
    if isinstance(context, ConditionalContext):
        return PlainCoCoOp(clip, adapted.prompts().ids, context)
    return PlainCoOp(clip, adapted.prompts().ids, context.ctx)


def trained_pairs(plain: PlainCLIP, adapted: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Trained tensors of a plain form with those of the model that it was made of."""
    found = _mma_adapters(adapted)
    modules = [*found["vision"].values(), *found["text"].values(), *adapted.live("text.context")]
    ours = [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]
    return list(zip([p for p in plain.parameters() if p.requires_grad], ours, strict=True))


def _mma_adapters(adapted: nn.Module) -> dict[str, dict[int, ModalityAdapter]]:
    return {
        tower.name: {
            site.index: module
            for site in tower.blocks
            if "delta" in site.module._modules
            for module in site.module.delta.live("block.parallel")
        }
        for tower in dl.describe(adapted).towers
    }
