"""deltalens: adapt frozen, pretrained vision models by training a few per cent of their parameters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "deltalens.backbones": ["describe"],
    "deltalens.backbones.names": ["create_backbone", "list_models"],
    "deltalens.lifecycle.attach": ["attach", "detach"],
    "deltalens.lifecycle.count": ["count_parameters", "parameter_table", "print_trainable_parameters"],
    "deltalens.lifecycle.files": ["from_pretrained", "load_adapter", "save_pretrained"],
    "deltalens.lifecycle.info": ["adapter_info", "class_names", "preprocessing"],
    "deltalens.lifecycle.merge": ["merge_and_unload"],
    "deltalens.lifecycle.official": ["import_official"],
    "deltalens.lifecycle.switch": ["active_adapters", "delete_adapter", "disable_adapter", "set_adapter"],
    "deltalens.methods": [
        "BitFitConfig",
        "FullConfig",
        "LinearConfig",
        "LoRAConfig",
        "Method",
        "MonaConfig",
        "MonaLayer",
        "VPTConfig",
        "list_methods",
        "make_config",
    ],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'deltalens' has no attribute {name!r}")


def __dir__():
    return __all__


if TYPE_CHECKING:
    from deltalens.backbones import describe
    from deltalens.backbones.names import create_backbone, list_models
    from deltalens.lifecycle.attach import attach, detach
    from deltalens.lifecycle.count import count_parameters, parameter_table, print_trainable_parameters
    from deltalens.lifecycle.files import from_pretrained, load_adapter, save_pretrained
    from deltalens.lifecycle.info import adapter_info, class_names, preprocessing
    from deltalens.lifecycle.merge import merge_and_unload
    from deltalens.lifecycle.official import import_official
    from deltalens.lifecycle.switch import active_adapters, delete_adapter, disable_adapter, set_adapter
    from deltalens.methods import (
        BitFitConfig,
        FullConfig,
        LinearConfig,
        LoRAConfig,
        Method,
        MonaConfig,
        MonaLayer,
        VPTConfig,
        list_methods,
        make_config,
    )
