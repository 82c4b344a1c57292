"""Zero-shot accuracy of the CLIP in training: photographs by their class names, drawn pictures by theirs."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from deltalens.backbones.class_prompts import IMAGENET_SELECT
from deltalens.data.drawn_shapes import HELD_OUT, TEXTURES, Look

from ..augment import for_evaluation
from .towers import encode_texts

Tokens = Callable[[Sequence[str]], torch.Tensor]


def photograph_accuracy(
    clip: nn.Module, tokens: Tokens, images: torch.Tensor, labels: torch.Tensor, names: Sequence[str]
) -> dict[str, float]:
    """Percentages among all classes, with the mean text features of the seven published templates."""
    return _accuracy(clip, tokens, images, labels, names, IMAGENET_SELECT)


def drawn_accuracy(clip: nn.Module, tokens: Tokens, pictures: torch.Tensor, looks: Sequence[Look]) -> dict[str, float]:
    """Percentages among all names of the pairs of colour and shape that training has not seen."""
    names = [Look(texture, *pair).name for pair in sorted(HELD_OUT) for texture in TEXTURES]
    labels = torch.tensor([names.index(look.name) for look in looks])
    return _accuracy(clip, tokens, pictures, labels, names, ("a drawing of a {}.",))


@torch.no_grad()
def _accuracy(
    clip: nn.Module,
    tokens: Tokens,
    images: torch.Tensor,
    labels: torch.Tensor,
    names: Sequence[str],
    templates: Sequence[str],
) -> dict[str, float]:
    each = [encode_texts(clip, tokens([template.replace("{}", name) for name in names])) for template in templates]
    texts = F.normalize(torch.stack(each).mean(0), dim=-1)
    hits = torch.zeros(2)
    for batch, target in zip(images.split(250), labels.split(250), strict=True):
        top5 = (clip.visual(for_evaluation(batch, 48)) @ texts.T).topk(5).indices
        right = top5 == target[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    top1, top5 = (hits / len(images) * 100).tolist()
    return {"top1": round(top1, 2), "top5": round(top5, 2)}
