"""MLP-k: a head of several layers. A baseline of VPT's comparison."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from deltalens.methods.base import Method, register, setting


class MLPHead(nn.Module):
    """(Linear d -> d, ReLU, BatchNorm, dropout) x (k - 1), then Linear d -> C;  features (..., d) -> logits (..., C).

    Weights are Kaiming-normal by their outputs (fan_out), the last bias is zero.
    """

    def __init__(self, in_features: int, out_features: int, layers: int, dropout: float):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        steps: list[nn.Module] = []
        for _ in range(layers - 1):
            steps += [nn.Linear(in_features, in_features), nn.ReLU(), nn.BatchNorm1d(in_features), nn.Dropout(dropout)]
        self.projection = nn.Sequential(*steps)
        self.last_layer = nn.Linear(in_features, out_features)
        for layer in (*self.projection[::4], self.last_layer):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        nn.init.zeros_(self.last_layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.projection(features.flatten(0, -2))
        return self.last_layer(hidden).unflatten(0, features.shape[:-1])


@register("mlp")
class MLPConfig(Method):
    """A head of k layers in place of the linear one; the backbone stays frozen.

        (Linear d -> d, ReLU, BatchNorm, dropout) x (k - 1),  Linear d -> C

    The paper compares k = 2, 3, 5, 9. Parameters, all in the head: (k - 1) (d^2 + 3 d) + (d + 1) C; ViT-B/16 with k=3
    and 100 classes: 1,261,156. Combines with methods that adapt the backbone: `attach(model, [VPTConfig(),
    MLPConfig()])`. The head starts afresh, also where the model had a trained linear one.

    The official last bias starts at -ln 99, the same for all classes; the softmax does not see it, and here it is 0.
    """

    head_only: ClassVar = True
    learning_rate: ClassVar = 3e-3

    layers: int = setting(default=3, help="number of linear layers of the head, k")
    dropout: float = setting(default=0.1, help="dropout after each hidden layer")

    def __post_init__(self):
        if self.layers < 2:
            raise ValueError(f"layers must be at least 2, got {self.layers}; LinearConfig has a head of one layer")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def head(self, layer: nn.Module) -> nn.Module:
        like = next(layer.parameters())
        head = MLPHead(layer.in_features, layer.out_features, self.layers, self.dropout)
        return head.to(like.device, like.dtype)
