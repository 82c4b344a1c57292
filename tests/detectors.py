"""Small detectors on a two-level pyramid, and pictures of coloured rectangles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from models import tiny_swin
from torch import Tensor, nn
from torch.utils.data import Dataset

from deltalens.backbones.dense import cascade_rcnn, fcos, mask_rcnn, retinanet

SMALL = {
    "retinanet": {"channels": 16, "anchor_scale": 2.0},
    "fcos": {"channels": 32, "convolutions": 1},
    "mask_rcnn": {
        "channels": 16,
        "anchor_scale": 4.0,
        "proposals": 20,
        "proposals_train": 40,
        "sampled_regions": 16,
        "box_width": 16,
        "mask_convolutions": 1,
        "mask_width": 8,
    },
}
SMALL["cascade"] = SMALL["mask_rcnn"]
BUILDERS = {
    "retinanet": retinanet.on_pyramid,
    "fcos": fcos.on_pyramid,
    "mask_rcnn": mask_rcnn.on_pyramid,
    "cascade": cascade_rcnn.on_pyramid,
}
WITH_MASKS = ("mask_rcnn", "cascade")
COLOURS = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0))
NAMES = ["red", "green", "blue"]


class TwoLevels(nn.Module):
    """The two stages of a tiny Swin as maps (strides 4 and 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_swin(strict_img_size=False, num_classes=0)
        self.channels, self.strides = [12, 24], [4, 8]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.backbone.forward_intermediates(images, intermediates_only=True, norm=False)


def small_detector(head: str, num_classes: int = 3, **options) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[head](TwoLevels(), num_classes, {**SMALL[head], **options})


def target_of(boxes: list, labels: list, size: tuple[int, int] = (64, 64), **more) -> dict:
    """A target with filled rectangles as masks."""
    boxes_tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes_tensor.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    none = torch.zeros(len(boxes), dtype=torch.int64)
    return {
        "boxes": boxes_tensor,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": masks,
        "image_id": 0,
        "area": (boxes_tensor[:, 2] - boxes_tensor[:, 0]) * (boxes_tensor[:, 3] - boxes_tensor[:, 1]),
        "iscrowd": none,
        "difficult": none.clone(),
        **more,
    }


class Rectangles(Dataset):
    """Grey noise with 0 to 2 rectangles of three colours, of the sizes given in turn."""

    def __init__(
        self, count: int, seed: int = 0, sizes: tuple[tuple[int, int], ...] = ((64, 64),), empty: bool = False
    ):
        self.count, self.seed, self.sizes, self.empty = count, seed, sizes, empty
        self.transform: Callable | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        random = torch.Generator().manual_seed(1000 * self.seed + index)
        height, width = self.sizes[index % len(self.sizes)]
        image = 0.2 * torch.randn(3, height, width, generator=random)
        boxes, labels = [], []
        for _ in range(0 if self.empty or index % 4 == 3 else 1 + index % 2):
            side = torch.randint(14, 28, (2,), generator=random)
            left = int(torch.randint(0, width - int(side[0]), (), generator=random))
            top = int(torch.randint(0, height - int(side[1]), (), generator=random))
            label = int(torch.randint(0, 3, (), generator=random))
            image[:, top : top + side[1], left : left + side[0]] = torch.tensor(COLOURS[label])[:, None, None]
            boxes.append([left, top, left + int(side[0]), top + int(side[1])])
            labels.append(label)
        target = target_of(boxes, labels, (height, width), image_id=index)
        return (self.transform(image) if self.transform else image), target

    @staticmethod
    def collate(items: list) -> tuple[list[Tensor], list[dict]]:
        return [image for image, _ in items], [target for _, target in items]

    def batch(self, count: int | None = None) -> tuple[list[Tensor], list[dict]]:
        return self.collate([self[index] for index in range(count or self.count)])
