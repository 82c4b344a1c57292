"""Build a backbone for a command, for a wished input size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def create_sized_backbone(
    name: str, num_classes: int | None, img_size: int | None, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """(backbone, its preprocessing) for square images of img_size, None for the model's own size.

    Models with position embeddings or windows are built for the size; for others only the preprocessing changes. A
    trial forward of one image shows that the size fits. Raises ValueError where it does not, and as
    `deltalens.create_backbone`.
    """
    import deltalens as dl

    if img_size is None:
        model = dl.create_backbone(name, num_classes=num_classes, **options)
        return model, dl.preprocessing(model)
    if img_size < 1:
        raise ValueError(f"--img-size must be positive, got {img_size}")
    try:
        model = dl.create_backbone(name, num_classes=num_classes, img_size=img_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = dl.create_backbone(name, num_classes=num_classes, **options)  # a network that takes images of any size
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be built for --img-size {img_size}: {error}") from error
    preprocessing = dl.preprocessing(model)
    preprocessing["input_size"] = [preprocessing["input_size"][0], img_size, img_size]
    _try(model, name, preprocessing["input_size"])
    return model, preprocessing


def _try(model: nn.Module, name: str, input_size: list[int]) -> None:
    import torch

    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} does not take images of --img-size {input_size[-1]}: {error}") from error
    finally:
        model.train(was_training)
