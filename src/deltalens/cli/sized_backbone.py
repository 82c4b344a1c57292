"""Build a backbone for a command, for a wished size of its input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def create_sized_backbone(
    name: str,
    num_classes: int | None,
    img_size: int | None,
    num_points: int | None = None,
    normalize: str | None = None,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """(backbone, its preprocessing) for square images of img_size, or clouds of num_points; None for the model's own.

    normalize: "unit_sphere", or "none" for clouds as they are read; None for what the model's preprocessing says.

    Models with position embeddings or windows are built for the size; for others only the preprocessing changes. A
    trial forward of one image shows that the size fits. Raises ValueError where it does not, and as
    `deltalens.create_backbone`.
    """
    import deltalens as dl
    from deltalens.data.inputs import POINTS, kind_of

    if img_size is None:
        model = dl.create_backbone(name, num_classes=num_classes, **options)
        return model, _of_points(dl.preprocessing(model), name, num_points, normalize)
    if num_points is not None or normalize is not None:
        raise ValueError("--img-size is for images, --num-points and --normalize for clouds: leave one of them out")
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
    if kind_of(preprocessing) == POINTS:
        raise ValueError(
            f"{name} reads clouds of points, and --img-size is the edge of images: leave it out, or see --num-points"
        )
    _check_patches(model, name, img_size)
    preprocessing["input_size"] = [preprocessing["input_size"][0], img_size, img_size]
    _try(model, name, preprocessing["input_size"])
    return model, preprocessing


def _of_points(
    preprocessing: dict[str, Any], name: str, num_points: int | None, normalize: str | None
) -> dict[str, Any]:
    """Preprocessing with another number of points, or another normalisation. ValueError for a model of images."""
    from deltalens.data.inputs import POINTS, kind_of

    if num_points is None and normalize is None:
        return preprocessing
    if kind_of(preprocessing) != POINTS:
        raise ValueError(f"{name} takes images, which have no --num-points and no --normalize: see --img-size")
    if num_points is not None and num_points < 1:
        raise ValueError(f"--num-points must be positive, got {num_points}")
    if normalize not in (None, "unit_sphere", "none"):
        raise ValueError(f"--normalize is unit_sphere or none, got {normalize!r}")
    said = {} if num_points is None else {"num_points": num_points}
    return (
        preprocessing | said | ({} if normalize is None else {"normalize": None if normalize == "none" else normalize})
    )


def _check_patches(model: nn.Module, name: str, img_size: int) -> None:
    """A patch embedding would leave out the pixels that fill no patch, without a word."""
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None) or _patches_of(getattr(model, "backbone", model))
    if patch and not getattr(embed, "dynamic_img_pad", False) and any(img_size % side for side in patch):
        lower, side = img_size - img_size % patch[0], patch[0]
        raise ValueError(
            f"{name} cuts images into patches of {side} pixels, which do not divide --img-size {img_size}: use "
            f"{lower or side} or {lower + side}"
        )


def _patches_of(model: nn.Module) -> tuple[int, ...] | None:
    """Patch size of a tower of transformers, torchvision or open_clip."""
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "patch_size", getattr(model, "patch_size", None))
    size = (size,) if isinstance(size, int) else size
    return tuple(size) if isinstance(size, (tuple, list)) and all(isinstance(side, int) for side in size) else None


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
