"""UPerNet (Xiao et al., arXiv 1807.10221): segmentation_models_pytorch's decoder on our pyramid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from deltalens.backbones.dense.body import Body
from deltalens.backbones.dense.fcn import auxiliary_head
from deltalens.backbones.dense.library import decoders
from deltalens.backbones.dense.pyramid import STRIDES, make_pyramid
from deltalens.backbones.dense.segmentation import Segmenter, class_layer


class UPerNetHead(nn.Module):
    """Pyramid pooling (1, 2, 3, 6) of the coarsest map, top-down sums, all maps resized to the finest and fused.

    The library's decoder norms its maps (LayerNorm) at the start. Those norms are taken out: the pyramid has them, with
    a switch.
    """

    def __init__(self, widths: Sequence[int], num_classes: int, channels: int, dropout: float):
        super().__init__()
        smp = decoders("upernet")
        if len(widths) < 2:
            raise ValueError(f"upernet needs maps of at least two strides, and this backbone gives {len(widths)}")
        self.decoder = smp.UPerNetDecoder([0, 0, *widths], len(widths) + 1, channels)
        self.decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in widths)
        smp.initialize_decoder(self.decoder)
        self.classify = class_layer(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        if self.training and maps[-1].shape[0] == 1:
            raise ValueError(
                "upernet pools whole maps and norms them over the images of a batch (BatchNorm): it needs at least 2 "
                "images a batch in training, got 1"
            )
        return self.classify(self.decoder([maps[0], maps[0], *maps]))


def build(
    body: Body,
    num_classes: int,
    *,
    channels: int = 512,
    dropout: float = 0.1,
    auxiliary: bool = True,
    auxiliary_channels: int = 256,
    norms: str | None = "auto",
    strides: Sequence[int] = STRIDES,
    blocks: Sequence[int] | None = None,
    pyramid_channels: int | None = None,
) -> Segmenter:
    """A backbone under UPerNet with an auxiliary FCN head on the map of stride 16, as in mmsegmentation's recipes.

    norms, strides, blocks, pyramid_channels: `make_pyramid`.
    """
    pyramid = make_pyramid(body, strides=strides, norms=norms, blocks=blocks, out_channels=pyramid_channels)
    further = [auxiliary_head(pyramid.channels, num_classes, auxiliary_channels)] if auxiliary else []
    return Segmenter(pyramid, UPerNetHead(pyramid.channels, num_classes, channels, dropout), num_classes, further)
