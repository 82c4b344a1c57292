"""CLIP-Adapter (Gao et al., CLIP-Adapter: better vision-language models with feature adapters, IJCV 2023, arXiv
2110.04544)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from deltalens.methods.base import Method, check_choices, register, setting
from deltalens.sites.anatomy import Anatomy, Site, require
from deltalens.sites.output import features_site


class FeatureAdapter(nn.Module):
    """f' = ratio relu(W_up relu(W_down f)) + (1 - ratio) f,  f (..., D), W_down (D / reduction, D), without biases."""

    def __init__(self, width: int, reduction: int, ratio: float):
        super().__init__()
        hidden = max(width // reduction, 1)
        self.fc = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False), nn.ReLU()
        )
        self.ratio = ratio

    def forward(self, features: Tensor, images: Tensor | None = None) -> Tensor:
        return self.ratio * self.fc(features) + (1 - self.ratio) * features


@register("clip_adapter")
class CLIPAdapterConfig(Method):
    """A small network on the image features of a frozen CLIP, mixed with them before they are normalised.

        f' = ratio relu(W_up relu(W_down f)) + (1 - ratio) f          W_down (D / reduction, D), W_up (D, D / reduction)

    towers="text" puts one on the features of the classes instead, towers="both" on each; the paper has all three and
    prefers "vision", which is all that the official code has. With "both" the paper has a ratio for each side; here
    they are one. An ordinary classifier's features, which its head reads, are adapted alike; its head is trained, too.

    Parameters: 2 D^2 / reduction for each side, 131,072 for D = 512. Published: ratio 0.2, reduction 4, the dataset's
    own template. No official training recipe was released. Nothing of the towers is in the graph.
    """

    learning_rate: ClassVar = 1e-3

    ratio: float = setting(default=0.2, help="share of the adapted features, from 0 to 1")
    reduction: int = setting(default=4, help="the network's inner width is the features' divided by this")
    towers: str = setting(default="vision", help="whose features are adapted", choices=("vision", "text", "both"))

    def __post_init__(self):
        check_choices(self)
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be from 0 to 1, got {self.ratio}")
        if self.reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {self.reduction}")

    def place(self, anatomy: Anatomy):
        if self.towers != "text":
            site = features_site(anatomy, "CLIP-Adapter")
            yield site, "output", self._adapter(site.width_of("output"))
        if self.towers != "vision":
            site = _classes_site(anatomy)
            yield site, "text.output", self._adapter(site.width_of("text.output"))

    def _adapter(self, width: int) -> FeatureAdapter:
        return FeatureAdapter(width, self.reduction, self.ratio)


def _classes_site(anatomy: Anatomy) -> Site:
    """The model whose classes are texts."""
    owners = [tower.owner for tower in anatomy.towers if tower.name == "text" and tower.owner is not None]
    if not owners:
        raise TypeError(
            "CLIP-Adapter with towers='text' or 'both' needs classes that are texts, and "
            f"{type(anatomy.model).__name__} has none: build it with create_backbone(name, class_names=[...])"
        )
    require(owners[0], "text.output", "CLIP-Adapter", anatomy.model)
    return owners[0]
