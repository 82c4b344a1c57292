"""The oriented region proposal network: oriented boxes that may hold an object."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from deltalens.backbones.dense.midpoint_offsets import MidpointOffsetCoder
from deltalens.backbones.dense.precision import InFullPrecision
from deltalens.models.oriented_boxes import enclosing

NUMBERS = 6  # of an anchor's change


class OrientedProposalHead(InFullPrecision, RPNHead):
    """torchvision's head with six numbers for the box of an anchor instead of four. float32 comes out."""

    def __init__(self, channels: int, anchors: int):
        super().__init__(channels, anchors)
        self.bbox_pred = nn.Conv2d(channels, anchors * NUMBERS, kernel_size=1)
        nn.init.normal_(self.bbox_pred.weight, std=0.01)
        nn.init.zeros_(self.bbox_pred.bias)


class OrientedProposals(RegionProposalNetwork):
    """The oriented RPN (Xie et al., 2021, arXiv 2108.05699, section 3.1): torchvision's RPN with midpoint offsets.

        (batch of images, maps of all levels, targets) -> (oriented proposals (n, 5) of each image,
                                                           {"loss_objectness", "loss_rpn_box_reg"} in training)

    Anchors are upright, and assigned by their IoU with the upright boxes around the objects: an object from 0.7 on, and
    always for the best anchors of each object; background below 0.3. Of each image `sampled` anchors count, half of
    them of objects where there are so many. The losses are the cross-entropy and the smooth L1 loss (beta 1/9) of the
    six numbers, both divided by the count of sampled anchors.

    Proposals: the best `kept` of each level; of those of one level whose upright boxes overlap by more than `nms` the
    better one; of these the best `kept`. They are not cut at the image's edges; those that lie outside of it entirely
    are dropped, as torchvision does by clipping. No gradient goes through them.

    torchvision's rather than mmrotate's: anchors across the edges of the image are assigned, too.
    """

    def __init__(self, anchors: nn.Module, head: nn.Module, kept: dict[str, int], nms: float, sampled: int):
        super().__init__(anchors, head, 0.7, 0.3, sampled, 0.5, kept, kept, nms)
        self.box_coder = MidpointOffsetCoder()

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        maps = list(features.values())
        logits, changes = self.head(maps)
        anchors = self.anchor_generator(images, maps)
        counts = [each.shape[1:].numel() for each in logits]
        objectness = torch.cat([_by_cell(each, 1) for each in logits], 1)  # (B, anchors of all levels, 1)
        deltas = torch.cat([_by_cell(each, NUMBERS) for each in changes], 1)
        proposals = self.proposals_of(deltas.detach(), objectness.detach(), anchors, images.image_sizes, counts)
        if not self.training:
            return proposals, {}
        labels, matched = self.assign_targets_to_anchors(anchors, targets or [])
        wanted = [self.box_coder.encode(boxes, each) for boxes, each in zip(matched, anchors, strict=True)]
        of_objectness, of_boxes = self.compute_loss(objectness, deltas.flatten(0, 1), labels, wanted)
        return proposals, {"loss_objectness": of_objectness, "loss_rpn_box_reg": of_boxes}

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each image (labels, boxes): 1 for objects, 0 for background, -1 for neither, and the oriented box
        (anchors, 5) that each anchor is to find. Anchors without an object have a box that nobody reads."""
        labels, matched = [], []
        for each, target in zip(anchors, targets, strict=True):
            boxes = target["boxes"].to(each.dtype)
            overlaps = box_iou(enclosing(boxes), each)
            touched = overlaps.gt(0).any(1)  # torchvision's matcher would make objects of all anchors for any other box
            if touched.any():
                boxes, found = boxes[touched], self.proposal_matcher(overlaps[touched])
            else:
                boxes = each.new_tensor([[0.0, 0.0, 1.0, 1.0, 0.0]])
                found = torch.full((len(each),), self.proposal_matcher.BELOW_LOW_THRESHOLD, device=each.device)
            label = (found >= 0).to(each.dtype)
            labels.append(label.masked_fill(found == self.proposal_matcher.BETWEEN_THRESHOLDS, -1.0))
            matched.append(boxes[found.clamp(min=0)])
        return labels, matched

    def proposals_of(
        self,
        deltas: Tensor,
        objectness: Tensor,
        anchors: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        counts: list[int],
    ) -> list[Tensor]:
        """Proposals (n, 5) of each image, best first, from changes (B, anchors, 6), logits (B, anchors, 1), anchors
        (anchors, 4) of each image, its size (H, W), and how many anchors each level has."""
        objectness = objectness.flatten(1)
        levels = torch.arange(len(counts), device=deltas.device).repeat_interleave(deltas.new_tensor(counts).long())
        found = []
        for image, best in enumerate(self._get_top_n_idx(objectness, counts)):
            boxes = self.box_coder.decode(deltas[image, best], anchors[image][best])
            inside = overlaps_image(boxes, sizes[image], self.min_size)
            boxes, scores, level = boxes[inside], objectness[image, best][inside], levels[best][inside]
            kept = batched_nms(enclosing(boxes), scores, level, self.nms_thresh)[: self.post_nms_top_n()]
            found.append(boxes[kept])
        return found


def overlaps_image(boxes: Tensor, size: tuple[int, int], least: float) -> Tensor:
    """Which of the boxes (n, 5) have sides of at least `least` pixels, and an upright box around them of which so much
    lies in an image of size (H, W). Booleans (n,)."""
    within = clip_boxes_to_image(enclosing(boxes), size)
    sides = torch.cat((boxes[:, 2:4], within[:, 2:] - within[:, :2]), 1)
    return (sides >= least).all(1)


def _by_cell(level: Tensor, numbers: int) -> Tensor:
    """(B, anchors x numbers, H, W) -> (B, H W anchors, numbers), in the order of the anchors."""
    batch, _, height, width = level.shape
    return level.view(batch, -1, numbers, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, numbers)
