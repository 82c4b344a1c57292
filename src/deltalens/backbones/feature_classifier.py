"""A classifier around a tower that has none: features, then one linear layer. With timm's interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FeatureClassifier(nn.Module):
    """logits = head(backbone(images)), head a linear layer (d, num_classes), or nothing where num_classes is 0.

    backbone: a tower that returns its embedding (B, d); a tuple with it in front; or an output object of transformers,
    whose `pooler_output` is read, or the mean of its `last_hidden_state` where there is no pooler. input_size: (C, H,
    W) of the images.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, input_size: tuple[int, int, int]):
        super().__init__()
        self.backbone = backbone
        self.num_features = feature_width(backbone, input_size)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head for so many classes; 0 for none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if num_classes:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the tower's embedding (B, d)."""
        return embedding_of(self.backbone(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Embedding -> logits, or the embedding itself with pre_logits."""
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def embedding_of(output: Any) -> Tensor:
    """The pooled embedding (B, d) in what a tower returns."""
    pooled = getattr(output, "pooler_output", None)
    hidden = getattr(output, "last_hidden_state", None)
    if pooled is not None:
        return pooled.flatten(1)
    if hidden is not None:
        return hidden.mean(1) if hidden.dim() == 3 else hidden.mean((2, 3))
    return output[0] if isinstance(output, (tuple, list)) else output


@torch.no_grad()
def feature_width(backbone: nn.Module, input_size: tuple[int, int, int]) -> int:
    """d of the embedding, from one forward. Not of fake tensors: transformers keeps some of what a forward computes."""
    training, like = backbone.training, next(backbone.parameters())
    try:
        features = embedding_of(backbone.eval()(torch.zeros(1, *input_size, device=like.device, dtype=like.dtype)))
    finally:
        backbone.train(training)
    if features.dim() != 2:
        raise TypeError(
            f"{type(backbone).__name__} gives features of shape {tuple(features.shape)} where one embedding for each "
            "image is expected"
        )
    return features.shape[1]
