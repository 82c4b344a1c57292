"""One file per family of backbones; `describe` finds out which a model is made of."""

from deltalens.backbones.describe import describe

__all__ = ["describe"]
