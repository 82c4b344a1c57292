"""Maps of a plain network (ViT and the like), taken behind some of its blocks, all of one stride."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.norms import output_norms
from deltalens.backbones.dense.padding import Size, checked, padded, up_to_multiple


class TokenMaps(nn.Module):
    """Holds the network as `backbone`, without its final norm, its head, and the blocks behind the last one taken.

    blocks: counted from 0, negative ones from the end. multiples: sides of images are rounded up to a multiple of the
    first, then of the next, and at last of the patch. norms: see `output_norms`, one for each block taken.
    """

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
        self.fixed_size, self.multiples, self.name = body.fixed_size, (*multiples, body.strides[0]), body.name

    def padded_size(self, size: Size) -> Size:
        """What images of a size are padded to."""
        if self.fixed_size is not None:
            return self.fixed_size
        return up_to_multiple(size[0], *self.multiples), up_to_multiple(size[1], *self.multiples)

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the normed map of each block taken, of the padded image."""
        size = checked(images, self.fixed_size, self.name)
        found = self.backbone.forward_intermediates(
            padded(images, self.padded_size(size)), indices=self.indices, stop_early=True, intermediates_only=True
        )
        normed = [norm(each) for norm, each in zip(self.norms, found, strict=True)]
        return [normed[place] for place in self.taken]

    def maps_and_prefixes(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The same, and the un-normed prefix tokens (B, p, C) of each block taken."""
        size = checked(images, self.fixed_size, self.name)
        pairs = self.backbone.forward_intermediates(
            padded(images, self.padded_size(size)),
            indices=self.indices,
            return_prefix_tokens=True,
            stop_early=True,
            intermediates_only=True,
        )
        normed = [norm(pair[0]) for norm, pair in zip(self.norms, pairs, strict=True)]
        return [normed[place] for place in self.taken], [pairs[place][1] for place in self.taken]
