"""NormTuning: train the normalisation layers. A baseline of Mona's comparison."""

from __future__ import annotations

from typing import ClassVar

from deltalens.methods.base import Method, register
from deltalens.sites.norms import is_norm


@register("normtuning")
class NormTuningConfig(Method):
    """Train weight and bias of every normalisation layer of the backbone, and the head.

        norm(x) = (x - mean) / std * w + b     ->     (x - mean) / std * w' + b'

    Layers are found by their class: LayerNorm, BatchNorm, GroupNorm, InstanceNorm, RMSNorm and their kin. BatchNorm
    layers are in training mode while they train, and their running statistics are the adapter's own, saved with it.
    The official code of Mona takes every parameter with "norm" in its name. On timm's ViT and Swin both find the same
    tensors; the name test misses norms that are called otherwise (`bn1` of ResNet) and takes what is no norm but has
    the word in its path.

    Parameters: the sum of all norms' widths, twice. ViT-B/16 38,400, Swin-T 24,768 (26,112 with the output norms of a
    detector, Mona's number).
    """

    learning_rate: ClassVar = 5e-3

    def unfreeze(self, anatomy):
        return [path for path, _ in anatomy.backbone_parameters() if is_norm(_owner(anatomy.model, path))]


def _owner(model, path):
    return model.get_submodule(path.rpartition(".")[0])
