"""What a head reads, as a picture (t-SNE) and as numbers (nearest neighbours, silhouette)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deltalens.backbones import describe
from deltalens.lifecycle.state import KEY
from deltalens.lifecycle.tensors import anatomy_of
from deltalens.studies.figure import new_figure, page_colours, save_figure

PANEL = 3.6  # inches
DISTINCT = 8  # classes that the page has colours for


@dataclass(frozen=True)
class Embedding:
    """The embeddings of one model. features (N, D); labels (N,); points: their places in the plane, (N, 2).

    knn_accuracy: share of images whose class most of their 5 nearest others have. silhouette: -1 to 1, how much closer
    the images of a class are to each other than to the nearest other class.
    """

    name: str
    features: np.ndarray
    labels: np.ndarray
    points: np.ndarray
    knn_accuracy: float
    silhouette: float


@torch.inference_mode()
def head_inputs(model: nn.Module, batches: Iterable[Sequence[Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """(features (N, D), labels (N,)) of (images, labels) batches: what enters the classifier layer, which for a ViT is
    the class token after the final norm, or what pools in its place. The model is put in eval mode.
    """
    head, device = classifier_layer(model), next(model.parameters()).device
    features: list[Tensor] = []
    labels: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].float().cpu()))
    try:
        for images, truth in batches:
            model.eval()(images.to(device))
            labels.append(torch.as_tensor(truth))
    finally:
        handle.remove()
    if not features:
        raise ValueError("there are no images to embed")
    return torch.cat(features).flatten(1).numpy(), torch.cat(labels).numpy()


def classifier_layer(model: nn.Module) -> nn.Module:
    """The layer that a network classifies with. TypeError for a network with several, ValueError without any."""
    if hasattr(model, "get_classifier"):
        layer = model.get_classifier()
        if not isinstance(layer, nn.Module):
            raise TypeError(f"{type(model).__name__} has no single classifier layer whose input could be taken")
        return layer
    path = (anatomy_of(model) if KEY in model.__dict__ else describe(model)).head
    if path is None:
        raise ValueError(f"{type(model).__name__} has no classifier layer whose input could be taken")
    return model.get_submodule(path)


def embed(name: str, model: nn.Module, batches: Iterable[Sequence[Tensor]], seed: int = 0) -> Embedding:
    """The embedding of some images by a model, with its t-SNE and its two numbers."""
    features, labels = head_inputs(model, batches)
    return Embedding(
        name,
        features,
        labels,
        plane(features, seed),
        knn_accuracy(features, labels),
        silhouette(features, labels),
    )


def plane(features: np.ndarray, seed: int = 0, perplexity: float = 30.0) -> np.ndarray:
    """t-SNE (van der Maaten and Hinton 2008) from the first two principal components, (N, 2). The perplexity is lowered
    to a third of the images where they are few."""
    from sklearn.manifold import TSNE

    if len(features) < 4:
        raise ValueError(f"t-SNE needs at least 4 images, got {len(features)}")
    fitting = min(perplexity, (len(features) - 1) / 3)
    return TSNE(2, perplexity=fitting, init="pca", random_state=seed).fit_transform(features)


def knn_accuracy(features: np.ndarray, labels: np.ndarray, neighbours: int = 5) -> float:
    """Leave one out: the share of images whose class is the most frequent among the `neighbours` nearest others, by
    Euclidean distance; of equally frequent classes the one with the nearest image counts."""
    points, truth = torch.as_tensor(features).double(), torch.as_tensor(labels)
    distances = torch.cdist(points, points).fill_diagonal_(math.inf)
    nearest = truth[distances.topk(min(neighbours, len(points) - 1), largest=False).indices]
    same = nearest[:, :, None] == nearest[:, None, :]
    votes = same.sum(2)  # of the class of each neighbour
    said = nearest.gather(1, votes.argmax(1, keepdim=True))[:, 0]  # the first of the largest: the nearest
    return (said == truth).double().mean().item()


def silhouette(features: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette coefficient; nan where there is a single class, or as many classes as images."""
    from sklearn.metrics import silhouette_score

    if not 2 <= len(np.unique(labels)) < len(labels):
        return math.nan
    return float(silhouette_score(features, labels))


def plot_embeddings(embeddings: Sequence[Embedding], class_names: Sequence[str], path: str | os.PathLike) -> None:
    """One panel for each embedding, a colour for each class; a legend where there are at most 10 classes."""
    from matplotlib import colormaps

    columns = min(3, len(embeddings))
    figure, axes = new_figure(math.ceil(len(embeddings) / columns), columns, (PANEL, PANEL))
    classes, page = sorted({int(label) for each in embeddings for label in each.labels}), page_colours()
    if len(classes) <= DISTINCT:
        colours = {label: page[f"c{i}"] for i, label in enumerate(classes)}
    else:
        colours = {label: colormaps["turbo"](i / (len(classes) - 1)) for i, label in enumerate(classes)}
    for axis in axes:
        axis.set_axis_off()
    for axis, each in zip(axes, embeddings, strict=False):
        for label in classes:
            chosen = each.points[each.labels == label]
            axis.scatter(*chosen.T, s=9, color=[colours[label]], linewidths=0, label=class_names[label])
        axis.set_title(f"{each.name}\n5-NN {100 * each.knn_accuracy:.1f} %, silhouette {each.silhouette:.2f}")
    if len(classes) <= 10:
        handles, names = axes[0].get_legend_handles_labels()
        entry = 0.45 + 0.065 * max(map(len, names))  # inches, at 8 points
        fitting = max(1, min(5, int(PANEL * columns / entry)))
        figure.legend(
            handles, names, loc="outside lower center", ncols=fitting, fontsize=8, frameon=False, markerscale=2
        )
    save_figure(figure, path)
