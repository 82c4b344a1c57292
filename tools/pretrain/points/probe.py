"""How good frozen features are: a linear classifier on them."""

import torch
from torch import nn

from .voxels import VoxelShapes

C = 0.01  # of the linear SVM: its penalty is 1 / C


@torch.inference_mode()
def features(model: nn.Module, shapes: VoxelShapes, points: int, seed: int = 0) -> torch.Tensor:
    """What the head reads, (N, d), of one cloud of each shape."""
    model.eval()
    found = []
    for indices in torch.arange(len(shapes)).split(64):
        clouds = shapes.clouds(indices, points, seed)
        found.append(model.forward_head(model.forward_features(clouds), pre_logits=True))
    return torch.cat(found)


def linear_svm(model: nn.Module, train: VoxelShapes, others: dict[str, VoxelShapes], points: int) -> dict[str, float]:
    """Accuracy in per cent of a linear SVM on standardised features, fitted on the train shapes, of each other split.
    Nothing is searched."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    classifier = make_pipeline(StandardScaler(), LinearSVC(C=C, random_state=0))
    classifier.fit(features(model, train, points).numpy(), train.labels.numpy())
    return {
        name: round(100 * classifier.score(features(model, shapes, points).numpy(), shapes.labels.numpy()), 2)
        for name, shapes in others.items()
    }


def largest_class(shapes: VoxelShapes) -> float:
    """Accuracy in per cent of always naming the most frequent class: chance."""
    return round(100 * float(shapes.labels.bincount().max()) / len(shapes), 2)
