"""The feature pyramid network between a backbone's maps and a detector's head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from deltalens.backbones.dense.precision import full_precision

EXTRA_LEVELS = ("pool", "input", "output")


class DetectionNeck(nn.Module):
    """Pyramid -> FPN (Lin et al., 2017, arXiv 1612.03144): images (B, 3, H, W) -> {"0": (B, channels, H_0, W_0), ...}.

        M_i = lateral_i(C_i) + nearest(M_{i+1}),      P_i = conv3x3(M_i)

    extra: further, coarser levels. "pool": one, every second cell of the last (Mask R-CNN). "input": P6 = conv3x3 with
    stride 2 of C5, the backbone's last map, P7 = conv3x3 with stride 2 of relu(P6) (RetinaNet). "output": the same with
    P6 from P5 (FCOS).
    levels: which maps of the pyramid are read; None for all with a stride of at least `finest`. top_down: False leaves
    the FPN out, P_i = C_i, for pyramids whose maps have `channels` channels.

    Attributes: out_channels; strides, of all levels in pixels. Maps are float32 under autocast, too. Raises ValueError
    for levels that the pyramid does not have, and for maps of other widths without the FPN.
    """

    def __init__(
        self,
        pyramid: nn.Module,
        levels: Sequence[int] | None,
        finest: int,
        channels: int = 256,
        extra: str = "pool",
        top_down: bool = True,
    ):
        super().__init__()
        if extra not in EXTRA_LEVELS:
            raise ValueError(f"extra levels are {', '.join(EXTRA_LEVELS)}, got {extra!r}")
        self.levels = _levels(list(pyramid.strides), levels, finest)
        widths = [pyramid.channels[level] for level in self.levels]
        self.strides = [int(pyramid.strides[level]) for level in self.levels]
        self.out_channels = channels
        self.pyramid = pyramid
        if extra == "pool":
            more: nn.Module = LastLevelMaxPool()
            self.strides += [2 * self.strides[-1]]
        else:
            more = LastLevelP6P7(widths[-1] if extra == "input" else channels, channels)
            more.use_P5 = extra == "output"  # torchvision asks whether the two widths are equal
            self.strides += [2 * self.strides[-1], 4 * self.strides[-1]]
        if not top_down and set(widths) != {channels}:
            raise ValueError(
                f"without top_down every map must have {channels} channels, and the pyramid's have {widths}"
            )
        self.fpn = FeaturePyramidNetwork(widths, channels, more) if top_down else _ExtraLevels(more)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.pyramid(images)
        read = OrderedDict((str(number), maps[level]) for number, level in enumerate(self.levels))
        return full_precision(self.fpn(read))


class _ExtraLevels(nn.Module):
    """Maps as they are, and the further levels."""

    def __init__(self, extra_blocks: nn.Module):
        super().__init__()
        self.extra_blocks = extra_blocks

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        found, names = self.extra_blocks(list(maps.values()), list(maps.values()), list(maps))
        return OrderedDict(zip(names, found, strict=True))


def _levels(strides: list[int], levels: Sequence[int] | None, finest: int) -> list[int]:
    if levels is None:
        found = [level for level, stride in enumerate(strides) if stride >= finest]
        if not found:
            raise ValueError(f"the pyramid's strides are {strides}, and the detector reads those of at least {finest}")
        return found
    missing = [level for level in levels if not 0 <= level < len(strides)]
    if missing:
        raise ValueError(f"the pyramid has no level {missing[0]}: it has {len(strides)}, with strides {strides}")
    return sorted(levels)
