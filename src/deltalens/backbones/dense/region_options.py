"""What detectors that look at proposed regions are told: anchors, proposals, how many regions are trained on."""

from __future__ import annotations

from dataclasses import dataclass

from deltalens.backbones.dense.detector_options import DetectorOptions


@dataclass(frozen=True)
class RegionOptions(DetectorOptions):
    """Beside `DetectorOptions`. anchor_scale: anchors of a level are anchor_scale x stride (8 as published, 4 or less
    for objects that are small in the input). anchor_sizes: or name the sizes (pixels) of every level, which are the
    levels read and one more. anchor_ratios: height / width. proposals, proposals_train: regions that are looked at in
    evaluation and in training. proposal_nms: the IoU above which the worse of two proposals is dropped.
    sampled_anchors, sampled_regions: so many of each image go into the losses. canonical_scale: boxes of this size
    (pixels) are pooled from the level of stride 16. box_width: of the layers behind a box's features.
    """

    anchor_scale: float = 8.0
    anchor_sizes: tuple[tuple[float, ...], ...] | None = None
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    proposals: int = 1000
    proposals_train: int = 2000
    proposal_nms: float = 0.7
    sampled_anchors: int = 256
    sampled_regions: int = 512
    canonical_scale: int = 224
    box_width: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.anchor_scale > 0 or not self.anchor_ratios or min(self.anchor_ratios) <= 0:
            raise ValueError("anchor_scale and anchor_ratios must be positive")
        for name in (
            "proposals",
            "proposals_train",
            "sampled_anchors",
            "sampled_regions",
            "canonical_scale",
            "box_width",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.proposal_nms <= 1:
            raise ValueError(f"proposal_nms must lie above 0 and not above 1, got {self.proposal_nms}")
