"""Top-1 and top-5 accuracy of a model on uint8 images."""

import torch
from torch import nn

from .augment import for_evaluation


@torch.inference_mode()
def accuracy(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, size: int, device: str = "cpu"
) -> dict[str, float]:
    """Percentages, with whole images resized to `size`."""
    model.eval()
    hits = torch.zeros(2)
    for batch, target in zip(images.split(250), labels.split(250), strict=True):
        top5 = model(for_evaluation(batch.to(device), size)).topk(5).indices.cpu()
        right = top5 == target[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    top1, top5 = (hits / len(images) * 100).tolist()
    return {"top1": round(top1, 2), "top5": round(top5, 2)}
