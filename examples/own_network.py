"""The modules of deltalens inside one's own network, and attach on a network that no library knows."""

import torch
from torch import Tensor, nn

import deltalens as dl
from deltalens.methods.lora import LoRALayer
from deltalens.methods.vpt import Prompts


class Block(nn.Module):
    """A transformer block on maps (B, H, W, C), written by you, with three adapters placed by hand."""

    def __init__(self, dim: int, heads: int = 4, num_prompts: int = 5):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.prompts = Prompts(num_prompts, dim, bound=0.1)  # VPT-deep: further keys and values
        self.lora = LoRALayer(dim, 2 * dim, rank=4, alpha=4.0)  # LoRA beside the MLP's first layer
        self.mona = dl.MonaLayer(dim, bottleneck=16)  # Mona on the stream: a map in, a map out

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm1(x.flatten(1, 2))
        prompts = self.norm1(self.prompts(tokens)).expand(len(x), -1, -1)
        keys = torch.cat([prompts, tokens], 1)
        x = x + self.attn(tokens, keys, keys, need_weights=False)[0].view_as(x)
        n = self.norm2(x)
        hidden = self.mlp[0](n) + self.lora(n)
        x = x + self.mlp[2](self.mlp[1](hidden))
        return self.mona(x)


class Network(nn.Module):
    """Patches of 8 x 8 pixels, blocks, mean, classifier."""

    def __init__(self, dim: int = 48, depth: int = 3, classes: int = 10, block: type[nn.Module] = Block):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 8, 8)
        self.blocks = nn.ModuleList(block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def freeze_all_but_adapters(model: Network) -> Network:
    """By hand what attach does for a whole model."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.blocks:
        for adapter in (block.prompts, block.lora, block.mona):
            adapter.requires_grad_(True)
    return model


class PlainBlock(nn.Module):
    """A block without any adapter, as in a network you cannot or do not want to edit."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(dim), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


if __name__ == "__main__":
    images = torch.randn(2, 3, 64, 64)
    by_hand = freeze_all_but_adapters(Network())
    print(by_hand(images).shape, sum(p.numel() for p in by_hand.parameters() if p.requires_grad), "trained")

    unknown = Network(block=PlainBlock)  # deltalens finds its blocks with one trial forward
    dl.attach(unknown, dl.MonaConfig(bottleneck=16))
    dl.print_trainable_parameters(unknown)
    print(unknown(images).shape)
