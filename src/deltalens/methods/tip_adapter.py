"""Tip-Adapter (Zhang et al., Tip-Adapter: training-free adaption of CLIP for few-shot classification, ECCV 2022, arXiv
2207.09519)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.methods.base import Method, register, setting
from deltalens.methods.cache_search import searched
from deltalens.methods.sized_by_data import SizedByData
from deltalens.sites.anatomy import Anatomy, require

STEPS = (20, 200)  # of the search, for alpha and beta


class FeatureCache(SizedByData):
    """`logits`: logits + alpha * votes,  votes_c(f) = sum over the images i of class c of exp(-beta (1 - f . k_i)).

    keys (N, D): normalised features of the training images, a parameter where they are trained. labels (N,): their
    classes. classes: the names of the classes, so that others are noticed.
    """

    open_length = ("keys", "labels", "classes")

    def __init__(self, width: int, alpha: float, beta: float, trained: bool, passes: int):
        super().__init__()
        self.alpha, self.beta, self.passes = alpha, beta, passes
        keys = torch.empty(0, width)
        if trained:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)
        self.register_buffer("labels", torch.empty(0, dtype=torch.long))
        self.register_buffer("classes", torch.empty(0, dtype=torch.uint8))
        self.compared: tuple[str, ...] | None = None  # names that were found to be those of the images

    @property
    def training_free(self) -> bool:
        return not isinstance(self.keys, nn.Parameter)

    @property
    def filled(self) -> bool:
        return len(self.keys) > 0

    @torch.no_grad()
    def fill(self, keys: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
        """keys (N, D), labels (N,)."""
        for leaf, tensor in (("keys", keys), ("labels", labels), ("classes", names_as_bytes(class_names))):
            self.make_room(leaf, len(tensor))
            getattr(self, leaf).copy_(tensor)
        self.compared = None

    def make_room(self, leaf: str, length: int) -> None:
        super().make_room(leaf, length)
        self.compared = None

    def check_classes(self, names: tuple[str, ...]) -> None:
        """ValueError where the model has other classes than the images are of."""
        if names is self.compared or not self.filled:
            return
        own = tuple(bytes(self.classes.tolist()).decode().split("\0"))
        if own != names:
            raise ValueError(
                f"Tip-Adapter's images are of {len(own)} classes ({_shown(own)}), and the model now has {len(names)} "
                f"({_shown(names)}): attach a new one and prepare it with images of these"
            )
        self.compared = names

    def votes(self, affinity: Tensor, classes: int, beta: float | None = None) -> Tensor:
        """Cosines with the images (B, N) -> (B, classes)."""
        weights = torch.exp(-(self.beta if beta is None else beta) * (1 - affinity))
        return weights.new_zeros(len(weights), classes).index_add(1, self.labels, weights)

    def affinity(self, features: Tensor) -> Tensor:
        """Normalised features (B, D) -> cosines with the images (B, N), in float32 or better."""
        if not self.filled:
            raise RuntimeError(
                "Tip-Adapter has no images yet: call deltalens.prepare(model, loader) with the training data once "
                "(deltalens.training.fit does it by itself)"
            )
        if features.dim() != 2:
            raise TypeError("Tip-Adapter needs one feature of each image; another adapter reads several tokens")
        precise = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return features.to(precise) @ self.keys.to(precise).T

    def forward(self, logits: Tensor, features: Tensor) -> Tensor:
        votes = self.votes(self.affinity(features), logits.shape[-1])
        return logits + (self.alpha * votes).to(logits.dtype)


def names_as_bytes(names: Sequence[str]) -> Tensor:
    return torch.tensor(list("\0".join(names).encode()), dtype=torch.uint8)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


@register("tip_adapter")
class TipAdapterConfig(Method):
    """CLIP's logits plus votes of the training images by how near they are; trained or not.

        logits + alpha exp(-beta (1 - f K^T)) V          f (B, D) normalised, K (N, D) keys, V (N, C) one-hot labels

    Keys are the mean over `passes` of the images' features under augmentation, then normalised. `deltalens.prepare`
    computes them from a loader that gives the images in the same order in every pass; adapter files hold them. That is
    all of Tip-Adapter. train_keys is Tip-Adapter-F: the keys are then trained, from there on not normalised.
    `deltalens.training.fit` prepares both by itself; the former then runs no epochs.
    Keys belong to their classes: with others the model refuses to run.

    alpha and beta are chosen on the validation images behind the training, where there are some (`search`): the best
    of the grid 0.1 + i (highest - 0.1) / n with 20 values of alpha and 200 of beta. Accuracy on these images is then
    that of the choice.

    Published: alpha 1.17, beta 1 on ImageNet, then both searched on that grid; the official code searches ImageNet's
    on its test images, and takes Tip-Adapter-F's best epoch on test images, so that its numbers are too good by an
    unknown amount. The grids end at alpha 3, beta 7 on ImageNet and pets, 13 and 13 on DTD, 10 and 12 on EuroSAT. 10
    passes with random crops of at
    least half the image; Tip-Adapter-F AdamW 0.001 with eps 1e-4, 20 epochs (100 on EuroSAT), batch 256. The official
    code multiplies CLIP's cosines by 100, which is exp(logit_scale) of OpenAI's weights.

    Parameters: none; N D with train_keys, 8,192,000 for 1,000 classes of 16 images and D = 512.
    """

    learning_rate: ClassVar = 1e-3

    alpha: float = setting(default=1.17, help="factor on the images' votes")
    beta: float = setting(default=1.0, help="how fast votes fall with the distance")
    train_keys: bool = setting(default=False, help="train the keys (Tip-Adapter-F)")
    passes: int = setting(default=10, help="passes over the images that keys are averaged of; 1 without augmentation")
    search: bool = setting(default=True, help="choose alpha and beta on the validation images, after training")
    highest_alpha: float = setting(default=3.0, help="where the search ends")
    highest_beta: float = setting(default=7.0, help="where the search ends")

    def __post_init__(self):
        if self.alpha < 0 or self.beta < 0:
            raise ValueError(f"alpha and beta must be at least 0, got {self.alpha} and {self.beta}")
        if not (self.highest_alpha > 0.1 and self.highest_beta > 0.1):
            raise ValueError(
                "the search begins at 0.1, so that highest_alpha and highest_beta must be above that, got "
                f"{self.highest_alpha} and {self.highest_beta}"
            )
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, got {self.passes}")

    def place(self, anatomy: Anatomy):
        sites = [tower.classifier for tower in anatomy.towers if tower.classifier is not None]
        if not sites or not isinstance(anatomy.model, ZeroShotClassifier):
            raise TypeError(
                "Tip-Adapter adds to the logits of a classifier made of class names, which "
                f"{type(anatomy.model).__name__} is not: build it with create_backbone('open_clip/...', "
                "class_names=[...])"
            )
        require(sites[0], "logits", "Tip-Adapter", anatomy.model)
        width = sites[0].width_of("logits")
        yield sites[0], "logits", FeatureCache(width, self.alpha, self.beta, self.train_keys, self.passes)

    def prepare(self, model: nn.Module, loader: Iterable[Any]) -> None:
        """Fill the active caches that are empty. loader: batches (images (B, 3, H, W), labels (B,)), in the same order
        in every pass."""
        for cache in model.live("logits"):
            if isinstance(cache, FeatureCache) and not cache.filled:
                keys, labels = mean_features(model, loader, cache.passes)
                cache.fill(F.normalize(keys, dim=-1), labels, model.class_names)

    def finish(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, Any]:
        """Search alpha and beta. loader: batches (images, labels) of validation images."""
        if not self.search:
            return {}
        caches = [module for module in model.live("logits") if isinstance(module, FeatureCache)]
        if len(caches) != 1:
            raise ValueError(
                f"{len(caches)} Tip-Adapters are active, whose alpha and beta cannot be searched together: search each "
                "by its name with search_cache, with search=False here"
            )
        found = searched(model, caches[0], loader, (self.highest_alpha, self.highest_beta), STEPS)
        return {"alpha": found.alpha, "beta": found.beta}


@torch.no_grad()
def mean_features(model: ZeroShotClassifier, loader: Iterable[Any], passes: int = 1) -> tuple[Tensor, Tensor]:
    """(features (N, D), labels (N,)): of the loader's images, not normalised, the mean over several passes.

    ValueError for labels that are not one class each, and for a loader that changes its order.
    """
    own, total, first = next(model.parameters()), None, None
    for _ in range(passes):
        features, labels = [], []
        for batch in loader:
            features.append(model.raw_image_features(batch[0].to(own.device, own.dtype)))
            labels.append(torch.as_tensor(batch[1]))
        found = torch.cat(labels).to(own.device) if labels else torch.empty(0)
        if not labels or found.dim() != 1 or found.is_floating_point() or int(found.max()) >= model.num_classes:
            raise ValueError(f"Tip-Adapter needs images with one label each, below {model.num_classes}")
        if first is not None and not torch.equal(first, found):
            raise ValueError("the loader gives its images in another order in each pass: pass one with shuffle=False")
        first, summand = found, torch.cat(features)
        total = summand if total is None else total + summand
    return total / passes, first
