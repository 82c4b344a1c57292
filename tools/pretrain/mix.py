"""Mixup and CutMix on a batch, and the soft targets that go with them."""

import torch
import torch.nn.functional as F


def soft_targets(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mix(images: torch.Tensor, targets: torch.Tensor, mixup: float, cutmix: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image with its mirror in the batch, by Mixup or CutMix with equal chance where both alphas are > 0."""
    if not (mixup or cutmix):
        return images, targets
    use_cutmix = bool(cutmix) and (not mixup or torch.rand(()).item() < 0.5)
    alpha = cutmix if use_cutmix else mixup
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    if use_cutmix:
        images, share = _cut(images, share)
    else:
        images = torch.lerp(images.flip(0), images, share)
    return images, torch.lerp(targets.flip(0), targets, share)


def _cut(images: torch.Tensor, share: float) -> tuple[torch.Tensor, float]:
    height, width = images.shape[-2:]
    cut_height, cut_width = (round(extent * (1 - share) ** 0.5) for extent in (height, width))
    top = int(torch.randint(height - cut_height + 1, ()))
    left = int(torch.randint(width - cut_width + 1, ()))
    box = (..., slice(top, top + cut_height), slice(left, left + cut_width))
    mixed = images.clone()
    mixed[box] = images.flip(0)[box]
    return mixed, 1 - cut_height * cut_width / (height * width)
