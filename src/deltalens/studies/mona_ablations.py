"""The ablations of the Mona paper as data: label -> configuration, for a study to run on one dataset."""

from __future__ import annotations

from deltalens.methods.mona import MonaConfig

# the paper's comparison of model sizes runs full fine-tuning and Mona on these; its own Swin-T checkpoint is not named
MODEL_SIZES = {
    "Swin-T": "timm/swin_tiny_patch4_window7_224.ms_in22k",
    "Swin-B": "timm/swin_base_patch4_window7_224.ms_in22k",
    "Swin-L": "timm/swin_large_patch4_window7_224.ms_in22k",
}

_ABLATIONS: dict[str, dict[str, MonaConfig]] = {
    "design": {
        "v1": MonaConfig(design="v1"),
        "v2": MonaConfig(design="v2"),
        "v3": MonaConfig(design="v3"),
        "final": MonaConfig(),
    },
    "norm": {
        "none": MonaConfig(norm=None),
        "batch": MonaConfig(norm="batch"),
        "layer, after the down-projection": MonaConfig(norm_position="bottleneck"),
        "layer, at the input": MonaConfig(),
    },
    "kernels": {
        "3": MonaConfig(kernels=(3,)),
        "5": MonaConfig(kernels=(5,)),
        "7": MonaConfig(kernels=(7,)),
        "3, 3, 3": MonaConfig(kernels=(3, 3, 3)),
        "3, 5, 7": MonaConfig(),
    },
    "bottleneck": {
        "32": MonaConfig(bottleneck=32),
        "64": MonaConfig(),
        "128": MonaConfig(bottleneck=128),
    },
}


def mona_ablations(*names: str) -> dict[str, MonaConfig]:
    """Label "<ablation>: <variant>" -> configuration, in the order of a table; each has the published layer.

    names: design (the iterations v1, v2, v3, final), norm (none, BatchNorm, the scaled LayerNorm inside the bottleneck
    or at the input), kernels, bottleneck; none means all four. Everything that is not varied is at Mona's default.
    The fifth comparison of the paper, model sizes, is Mona on `MODEL_SIZES`. Raises ValueError for an unknown name.
    """
    unknown = [name for name in names if name not in _ABLATIONS]
    if unknown:
        raise ValueError(f"unknown ablation {unknown[0]!r}; there are {', '.join(_ABLATIONS)}")
    return {
        f"{name}: {variant}": config for name in names or _ABLATIONS for variant, config in _ABLATIONS[name].items()
    }
