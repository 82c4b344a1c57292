"""The published forms of VPT, Mona and Adapter-X, operation by operation: what the fast forms are compared with."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deltalens.methods.bottleneck import ACTIVATIONS
from deltalens.methods.mona_layer import MonaLayer
from deltalens.methods.smoa import SMoA
from deltalens.methods.vpt import Prompts


class PlainDeepVPT(nn.Module):
    """VPT-deep on a timm VisionTransformer with a class token, as published.

    Block i runs on (class token, p prompts of block i, patch tokens): the prompts join the sequence before block 0,
    and what a block made of its prompts is overwritten by the next block's. The head reads the class token.

    backbone: frozen here, but for its head. prompts: initial values of every block's prompts, each (p, C); trained.
    """

    def __init__(self, backbone: VisionTransformer, prompts: Sequence[Tensor]):
        super().__init__()
        if (
            not isinstance(backbone, VisionTransformer)
            or backbone.num_prefix_tokens != 1
            or backbone.global_pool != "token"
        ):
            raise ValueError(
                "the plain form of VPT-deep is for a VisionTransformer with one class token that the head reads, not "
                f"for this {type(backbone).__name__}; choose such a model, for example timm/vit_base_patch16_224"
            )
        if len(prompts) != self.prompted(backbone):
            raise ValueError(f"{self.prompted(backbone)} blocks need as many prompts, got {len(prompts)}")
        self.backbone = backbone.requires_grad_(False)
        self.backbone.head.requires_grad_(True)
        self.prompts = nn.Parameter(torch.stack([block.detach() for block in prompts]))

    @staticmethod
    def prompted(backbone: VisionTransformer) -> int:
        """How many blocks have prompts of their own."""
        return len(backbone.blocks)

    def forward(self, images: Tensor) -> Tensor:
        net, (depth, count, _) = self.backbone, self.prompts.shape
        x = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images))))
        for i in range(depth):
            first_patch = 1 if i == 0 else 1 + count
            prompts = self.prompts[i].expand(x.shape[0], -1, -1)
            x = net.blocks[i](torch.cat([x[:, :1], prompts, x[:, first_patch:]], 1))
        return net.forward_head(net.norm(x))


class PlainShallowVPT(PlainDeepVPT):
    """VPT-shallow: p prompts join the sequence before block 0 and go through all blocks as every token does."""

    @staticmethod
    def prompted(backbone: VisionTransformer) -> int:
        return 1

    def forward(self, images: Tensor) -> Tensor:
        net = self.backbone
        x = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images))))
        x = torch.cat([x[:, :1], self.prompts.expand(x.shape[0], -1, -1), x[:, 1:]], 1)
        return net.forward_head(net.norm(net.blocks(x)))


def plain_vpt(backbone: VisionTransformer, adapted: nn.Module, deep: bool = True) -> PlainDeepVPT:
    """The plain form with the prompts of a model that `attach` gave VPT. `backbone` is its own copy, unadapted."""
    prompts = [module.embedding for module in adapted.modules() if isinstance(module, Prompts)]
    return (PlainDeepVPT if deep else PlainShallowVPT)(backbone, prompts)


def plain_mona(adapted: nn.Module) -> nn.Module:
    """A copy of a model with Mona whose layers run `MonaLayer.plain`, the order of the official code."""
    model = copy.deepcopy(adapted)
    for module in model.modules():
        if isinstance(module, MonaLayer):
            module.forward = module.plain
    return model


def looped_smoa(pool: SMoA, x: Tensor) -> Tensor:
    """SMoA sub-token by sub-token, from its formula and the parameters of a pool, without dropout and jitter."""
    activation = {"relu": torch.relu, "gelu": nn.functional.gelu}[pool.activation]

    def expert(k: int, s: Tensor) -> Tensor:
        hidden = pool.down[k] @ s if pool.down_bias is None else pool.down[k] @ s + pool.down_bias[k]
        out = pool.up[k].T @ activation(hidden)
        return out if pool.up_bias is None else out + pool.up_bias[k]

    def routed(s: Tensor) -> Tensor:
        if pool.experts == 1:
            return expert(0, s)
        p = pool.router.probabilities(pool.router.weight @ s)
        if pool.dense:
            return torch.stack([p[k] * expert(k, s) for k in range(pool.experts)]).sum(0)
        k = int(p.argmax())
        return p[k] * expert(k, s)

    chunks = [routed(s) for token in x.reshape(-1, x.shape[-1]) for s in token.chunk(pool.heads)]
    return pool.scale * torch.stack(chunks).view(x.shape)


class SortedSMoA(SMoA):
    """SMoA as mixtures of large experts are dispatched: sub-tokens sorted by expert, a loop over the experts, and the
    results put back in place. What the wide form is compared with."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sub = self.split(x)
        probabilities = self.router.probabilities(nn.functional.linear(sub, self.router.weight))
        gates, chosen = probabilities.max(-1)
        order = chosen.argsort()
        counts = torch.bincount(chosen, minlength=self.experts).tolist()
        results = []
        for k, part in enumerate(sub[order].split(counts)):
            hidden = nn.functional.linear(part, self.down[k], None if self.down_bias is None else self.down_bias[k])
            hidden = self.dropout(ACTIVATIONS[self.activation](hidden))
            result = hidden @ self.up[k]
            results.append(result if self.up_bias is None else result + self.up_bias[k])
        y = torch.cat(results) * (gates * self.scale).to(sub.dtype)[order].unsqueeze(-1)
        return torch.empty_like(sub).index_copy(0, order, y).view(x.shape), probabilities


def sorted_adapter_x(adapted: nn.Module) -> nn.Module:
    """A copy of a model with Adapter-X whose pools sort and loop."""
    model = copy.deepcopy(adapted)
    for module in model.modules():
        if isinstance(module, SMoA):
            module.__class__ = SortedSMoA
    return model
