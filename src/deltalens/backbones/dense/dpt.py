"""DPT (Ranftl et al., arXiv 2103.13413) for ViTs: segmentation_models_pytorch's decoder on tokens of four blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.library import decoders
from deltalens.backbones.dense.segmentation import Segmenter, class_layer, conv_norm_relu
from deltalens.backbones.dense.token_maps import TokenMaps, require_plain

READOUTS = ("cat", "add", "ignore")


class TokensOfBlocks(TokenMaps):
    """The maps of some blocks together with their prefix tokens, of images padded to an even number of patches."""

    def padded_maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        if not self.prefix_tokens:
            maps = super().padded_maps(images)
            return maps, [None] * len(maps)
        return self.maps_and_prefixes(images)


class DPTHead(nn.Module):
    """(maps, prefix tokens) -> logits at an eighth of a patch: tokens reassembled at 4, 2, 1 and 1/2 times the grid,
    then fused from the coarsest, each time with twice the size."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        prefix: bool,
        readout: str,
        channels: int,
        intermediate: Sequence[int],
        dropout: float,
    ):
        super().__init__()
        smp = decoders("dpt")
        self.decoder = smp.DPTDecoder(
            encoder_out_channels=[width] * 4,
            encoder_output_strides=[16] * 4,  # in sixteenths of a patch, whatever the patch
            encoder_has_prefix_tokens=prefix,
            readout=readout,
            intermediate_channels=list(intermediate),
            fusion_channels=channels,
        )
        smp.initialize_decoder(self.decoder)
        self.classify = nn.Sequential(conv_norm_relu(channels, channels), class_layer(channels, num_classes, dropout))

    def forward(self, tokens: tuple[list[Tensor], list[Tensor | None]]) -> Tensor:
        maps, prefixes = tokens
        return self.classify(self.decoder([each.contiguous() for each in maps], prefixes))


def build(
    body: Body,
    num_classes: int,
    *,
    blocks: Sequence[int] | None = None,
    readout: str | None = None,
    channels: int = 256,
    intermediate_channels: Sequence[int] = (256, 512, 1024, 1024),
    dropout: float = 0.1,
    norms: str | None = "auto",
) -> Segmenter:
    """A ViT under DPT. blocks: four of them, evenly spread by default (2, 5, 8, 11 of twelve). readout: what becomes of
    the class token: "cat" puts it beside each token and projects both, "add" adds the mean prefix token, "ignore"; by
    default "cat" where there is one, "ignore" where not. norms: the paper has none on tokens.
    """
    require_plain(body, "dpt", "upernet or fcn")
    readout = readout or ("cat" if body.prefix_tokens else "ignore")
    if readout not in READOUTS:
        raise ValueError(f"readout must be one of {', '.join(READOUTS)}, got {readout!r}")
    if readout != "ignore" and not body.prefix_tokens:
        raise ValueError(f"readout={readout!r} reads a class token, and {body.name} has none: use readout='ignore'")
    depth = len(body.strides)
    blocks = [max((depth * part + 3) // 4 - 1, 0) for part in (1, 2, 3, 4)] if blocks is None else list(blocks)
    if len(blocks) != 4 or len(intermediate_channels) != 4:
        raise ValueError(f"dpt reads four blocks and has four intermediate widths, got {blocks}")
    maps = TokensOfBlocks(body, blocks, norms, multiples=(2 * body.strides[0],))
    if body.fixed_size is not None and any(side % (2 * maps.stride) for side in body.fixed_size):
        raise ValueError(
            f"dpt needs an even number of patches in both directions, and {body.name} takes images of "
            f"{body.fixed_size} with patches of {maps.stride} px: choose img_size= among the multiples of "
            f"{2 * maps.stride}"
        )
    prefix = bool(body.prefix_tokens) and readout != "ignore"
    head = DPTHead(maps.width, num_classes, prefix, readout, channels, intermediate_channels, dropout)
    return Segmenter(maps, head, num_classes)
