"""Classifiers with timm's interface, whatever their blocks: features, pooling, classifier layer."""

from __future__ import annotations

from torch import Tensor, nn

from deltalens.sites.anatomy import Family
from deltalens.sites.output import live, through_output
from deltalens.sites.swap import original_method


def reads_as(model: nn.Module) -> bool:
    """Whether the model is forward_head(forward_features(x)) with a classifier layer, as timm's models are."""
    interface = ("forward_features", "forward_head", "get_classifier")
    return all(hasattr(model, name) for name in interface) and isinstance(model.get_classifier(), nn.Module)


def width_of_features(model: nn.Module) -> int:
    """Channels of the features that the classifier layer reads; wider than the last block where layers lie between
    (EfficientNet)."""
    return getattr(model.get_classifier(), "in_features", None) or model.num_features


def _forward(self: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    if not live(self, "output"):
        return original_method(self, "forward")(x, *args, **kwargs)
    features = self.forward_head(self.forward_features(x, *args, **kwargs), pre_logits=True)
    return through_output(self, features, x)


CLASSIFIER = Family(
    name="deltalens.backbones.classifier:CLASSIFIER", methods={"forward": _forward}, slots=frozenset({"output"})
)
