"""VPT written out on unmodified timm networks: insert, run every block on all tokens, overwrite.

`twin` gives a plain network the parameters of an adapted one, so that both forms can be differentiated with respect to
the same tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from torch import Tensor, nn

from deltalens.methods import VPTConfig


def twin(plain: nn.Module, adapted: nn.Module) -> nn.Module:
    """`plain` with the very parameters of `adapted` under its own names."""
    plain.double().eval()
    for name, _ in list(plain.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        plain.get_submodule(owner)._parameters[leaf] = adapted.get_parameter(name)
    return plain


def learned(adapted: nn.Module) -> list[dict[str, Tensor]]:
    """The learned tensors of each place, in order of the blocks, a shared module once per place."""
    found = []
    for path, slots in adapted.named_modules():
        if type(slots).__name__ != "Slots":
            continue
        for place, module in slots.of("default"):
            if place.endswith("vpt") and not place.startswith(("pool", "tokens_kept")):
                found.append({"path": path, **dict(module.named_parameters()), **dict(module.named_buffers())})
    return found


def prompts_of(config: VPTConfig, tensors: dict[str, Tensor], width: int) -> Tensor:
    """(p, C)"""
    tokens = tensors["embedding"]
    if config.project:
        tokens = F.linear(tokens, tensors[f"project.{width}.weight"], tensors[f"project.{width}.bias"])
    return tokens.repeat(config.num_tokens, 1) if config.shared in ("intra", "all") else tokens


def keys_values_of(config: VPTConfig, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(heads, p, head_dim) each"""
    times = config.num_tokens if config.shared in ("intra", "all") else 1
    return tensors["keys"].repeat(1, times, 1), tensors["values"].repeat(1, times, 1)


def prompted_blocks(config: VPTConfig, count: int) -> list[int]:
    wanted = 1 if not config.deep else config.depth or count
    return list(range(count))[-wanted:] if config.reverse else list(range(wanted))


def changed_tokens(config, tensors, i, blocks, x, prefix, patches, width):
    """What VPT does to the tokens (B, prefix + prompts + patches, C) that enter block i."""
    own, old, rest = x[:, :prefix], x[:, prefix : x.shape[1] - patches], x[:, x.shape[1] - patches :]
    if i in blocks:
        mine = tensors[blocks.index(i)]
        if config.location in ("add", "add-1"):
            return x + prompts_of(config, mine, width)
        if config.location == "prepend":
            old = prompts_of(config, mine, width).expand(len(x), -1, -1)
    elif i == blocks[-1] + 1 and not config.keep_prompts:
        old = old[:, :0]
    return torch.cat([own, old, rest], 1)


def pooled(config, x: Tensor, prefix: int, patches: int, otherwise: str) -> Tensor:
    """(B, C) of the final tokens."""
    own, old, rest = x[:, :prefix], x[:, prefix : x.shape[1] - patches], x[:, x.shape[1] - patches :]
    return {
        "cls": lambda: x[:, 0],
        "patches": lambda: rest.mean(1),
        "prompts": lambda: old.mean(1),
        "patches+prompts": lambda: torch.cat([old, rest], 1).mean(1),
        "all": lambda: torch.cat([own, old, rest], 1).mean(1),
    }[config.pool or otherwise]()


# ------------------------------------------------------------------ ViT
def vit(net, config: VPTConfig, tensors: list[dict[str, Tensor]], image: Tensor) -> Tensor:
    image = before_the_blocks(net.patch_embed.proj, config, tensors, image)
    if config.location in ("padding", "concat-channel"):
        return net(image)
    x = net.patch_embed(image)
    x = net.norm_pre(net._pos_embed(x))
    prefix = net.num_prefix_tokens
    patches = x.shape[1] - prefix
    if config.location == "prepend-pixel":
        pictures = net.patch_embed.proj(tensors[0]["pixels"]).flatten(2).transpose(1, 2)
        x = torch.cat([x[:, :prefix], pictures.expand(len(x), -1, -1), x[:, prefix:]], 1)
    blocks = prompted_blocks(config, len(net.blocks))
    for i, block in enumerate(net.blocks):
        if config.location in ("prepend", "add", "add-1"):
            x = changed_tokens(config, tensors, i, blocks, x, prefix, patches, x.shape[-1])
        if config.location == "prefix" and i in blocks:
            x = x + block.ls1(
                vit_attention(block.attn, block.norm1(x), *keys_values_of(config, tensors[blocks.index(i)]))
            )
            x = x + block.ls2(block.mlp(block.norm2(x)))
        else:
            x = block(x)
    otherwise = "cls" if net.global_pool == "token" else "patches"
    return net.head(net.fc_norm(pooled(config, net.norm(x), prefix, patches, otherwise)))


def vit_attention(attn, n: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    q, k, v = attn.qkv(n).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    k = torch.cat([k, keys.expand(len(n), -1, -1, -1)], 2)
    v = torch.cat([v, values.expand(len(n), -1, -1, -1)], 2)
    return attn.proj(((q @ k.transpose(-1, -2) * attn.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


# ------------------------------------------------------------------ Swin
def swin(net: SwinTransformer, config: VPTConfig, tensors: list[dict[str, Tensor]], image: Tensor) -> Tensor:
    image = before_the_blocks(net.patch_embed.proj, config, tensors, image)
    if config.location in ("padding", "concat-channel"):
        return net(image)
    x = net.patch_embed(image)
    prompts = x.new_zeros(len(x), 0, x.shape[-1])
    if config.location == "prepend-pixel":
        pictures = net.patch_embed.proj(tensors[0]["pixels"]).flatten(2).transpose(1, 2)
        prompts = net.patch_embed.norm(pictures).expand(len(x), -1, -1)
    blocks, i = prompted_blocks(config, sum(len(stage.blocks) for stage in net.layers)), 0
    for stage in net.layers:
        if not isinstance(stage.downsample, nn.Identity):
            x = stage.downsample(x)
            prompts = stage.downsample.reduction(stage.downsample.norm(prompts.repeat(1, 1, 4)))
        for block in stage.blocks:
            patches, extra = x.shape[1] * x.shape[2], None
            if config.location in ("prepend", "add", "add-1"):
                tokens = torch.cat([prompts, x.flatten(1, 2)], 1)
                tokens = changed_tokens(config, tensors, i, blocks, tokens, 0, patches, x.shape[-1])
                start = tokens.shape[1] - patches
                prompts, x = tokens[:, :start], tokens[:, start:].unflatten(1, x.shape[1:3])
            elif config.location == "prefix" and i in blocks:
                extra = keys_values_of(config, tensors[blocks.index(i)])
            x, prompts = swin_block(block, x, prompts, extra)
            i += 1
    x = net.norm(torch.cat([prompts, x.flatten(1, 2)], 1))
    return net.head.fc(pooled(config, x, 0, patches, "all"))


def swin_block(block, x: Tensor, prompts: Tensor, extra: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Prompts (B, p, C) copied into each window, zero bias for them, outputs averaged over the windows."""
    attn, size, count = block.attn, block.window_size, prompts.shape[1]
    height, width, channels = x.shape[1:]
    normed = torch.roll(block.norm1(x), (-block.shift_size[0], -block.shift_size[1]), (1, 2))
    windows = window_partition(normed, size).view(len(x), -1, block.window_area, channels)
    copies = block.norm1(prompts)[:, None].expand(-1, windows.shape[1], -1, -1)
    tokens = torch.cat([copies, windows], 2)
    q, k, v = attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    bias = attn._get_rel_pos_bias().unsqueeze(1)  # (1, 1, heads, N, N)
    if block.attn_mask is not None:
        bias = bias + block.attn_mask[None, :, None]
    bias = F.pad(bias, (count, 0, count, 0))
    if extra is not None:
        keys, values = (tensor.expand(*k.shape[:2], -1, -1, -1) for tensor in extra)
        k, v, bias = torch.cat([k, keys], 3), torch.cat([v, values], 3), F.pad(bias, (0, keys.shape[3]))
    y = ((q @ k.transpose(-1, -2) * attn.scale + bias).softmax(-1) @ v).transpose(2, 3).flatten(3)
    y = attn.proj(y)
    prompts = prompts + y[:, :, :count].mean(1)
    y = window_reverse(y[:, :, count:].reshape(-1, *size, channels), size, height, width)
    x = x + torch.roll(y, block.shift_size, (1, 2))
    return x + block.mlp(block.norm2(x)), prompts + block.mlp(block.norm2(prompts))


# ------------------------------------------------------------------ pixels
def before_the_blocks(conv: nn.Conv2d, config: VPTConfig, tensors: list[dict[str, Tensor]], image: Tensor) -> Tensor:
    """The image with its frame; for further channels the convolution is made to read them."""
    if config.location == "padding":
        return framed(image, tensors[0]["tb"], tensors[0]["lr"], config.num_tokens)
    if config.location == "concat-channel":
        channels, weight = tensors[0]["image"], torch.cat([conv.weight, tensors[0]["weight"]], 1)

        def forward(x: Tensor) -> Tensor:
            wide = torch.cat([x, channels.expand(len(x), -1, -1, -1)], 1)
            return F.conv2d(wide, weight, conv.bias, conv.stride, conv.padding)

        conv.forward = forward
    return image


def framed(image: Tensor, tb: Tensor, lr: Tensor, p: int) -> Tensor:
    """Pixels in (0, 1), normalised as ImageNet's, written around the image."""
    mean, std = (torch.tensor(v).view(3, 1, 1).to(image) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    batch, channels, height, width = image.shape
    canvas = image.new_zeros(batch, channels, height + 2 * p, width + 2 * p)
    canvas[..., p:-p, p:-p] = image
    canvas[..., :p, :] = ((tb - mean) / std)[..., :p, :]
    canvas[..., -p:, :] = ((tb - mean) / std)[..., p:, :]
    canvas[..., p:-p, :p] = ((lr - mean) / std)[..., :p]
    canvas[..., p:-p, -p:] = ((lr - mean) / std)[..., p:]
    return canvas
