"""Maps of a plain network (ViT and the like), taken behind some of its blocks, all of one stride."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.norms import output_norms
from deltalens.backbones.dense.padding import Size, checked, frame_of, padded


class TokenMaps(nn.Module):
    """Holds the network as `backbone`, without its final norm, its head, and the blocks behind the last one taken.

    blocks: counted from 0, negative ones from the end. multiples: sides of images are rounded up to a multiple of the
    first, then of the next, and at last of the patch. norms: see `output_norms`, one for each block taken.
    """

    backbone: Any

    def __init__(self, body: Body, blocks: Sequence[int], norms: str | None = "auto", multiples: Sequence[int] = ()):
        super().__init__()
        depth = len(body.strides)
        wrong = [block for block in blocks if not isinstance(block, int) or not -depth <= block < depth]
        if wrong or not blocks:
            raise ValueError(
                f"blocks must lie between {-depth} and {depth - 1} in this {body.name}, got {list(blocks)}"
            )
        places = [block % depth for block in blocks]
        self.indices = sorted(set(places))
        self.taken = [self.indices.index(place) for place in places]
        self.backbone = body.module
        if hasattr(self.backbone, "prune_intermediate_layers"):
            self.backbone.prune_intermediate_layers(self.indices, prune_norm=True)
        self.stride, self.width = body.strides[0], body.channels[0]
        self.norms = output_norms(norms, [self.width] * len(self.indices), body.module)
        self.prefix_tokens = body.prefix_tokens
        self.fixed_size, self.multiples, self.name = body.fixed_size, (*multiples, body.strides[0]), body.name

    def input_size(self, size: Size) -> Size:
        """What the network gets of images of a size."""
        return frame_of(size, self.fixed_size, *self.multiples)

    def padded_size(self, size: Size) -> Size:
        """The size of the images whose maps `padded_maps` gives."""
        return self.input_size(size)

    def padded_maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the normed map of each block taken, of the padded image."""
        found = self.backbone.forward_intermediates(
            self._padded(images), indices=self.indices, stop_early=True, intermediates_only=True
        )
        normed = [norm(each) for norm, each in zip(self.norms, found, strict=True)]
        return [normed[place] for place in self.taken]

    def maps_and_prefixes(self, images: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """The same, and the prefix tokens (B, p, C) of each block taken, through the same norms."""
        pairs = self.backbone.forward_intermediates(
            self._padded(images),
            indices=self.indices,
            return_prefix_tokens=True,
            stop_early=True,
            intermediates_only=True,
        )
        maps = [norm(each) for norm, (each, _) in zip(self.norms, pairs, strict=True)]
        prefixes = [_normed_tokens(norm, tokens) for norm, (_, tokens) in zip(self.norms, pairs, strict=True)]
        return [maps[place] for place in self.taken], [prefixes[place] for place in self.taken]

    def _padded(self, images: Tensor) -> Tensor:
        return padded(images, self.input_size(checked(images, self.fixed_size, self.name)))


def _normed_tokens(norm: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens (B, p, C) through a norm of maps."""
    return norm(tokens.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)


def require_plain(body: Body, head: str, others: str) -> None:
    """TypeError where a head for ViTs is put on a hierarchical network."""
    if not body.plain:
        raise TypeError(
            f"head={head!r} reads the tokens of several blocks of a ViT, all of one stride, and {body.name} has maps "
            f"of strides {list(body.strides)}: use head={others}"
        )
