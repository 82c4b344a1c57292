"""One file per method; importing this package registers them all."""

from deltalens.methods.base import Method, list_methods, make_config, method_class, register, setting
from deltalens.methods.bitfit import BitFitConfig
from deltalens.methods.full import FullConfig
from deltalens.methods.linear import LinearConfig
from deltalens.methods.lora import LoRAConfig
from deltalens.methods.mona import MonaConfig, MonaLayer
from deltalens.methods.peft_methods import from_peft
from deltalens.methods.vpt import VPTConfig

__all__ = [
    "BitFitConfig",
    "FullConfig",
    "LinearConfig",
    "LoRAConfig",
    "Method",
    "MonaConfig",
    "MonaLayer",
    "VPTConfig",
    "from_peft",
    "list_methods",
    "make_config",
    "method_class",
    "register",
    "setting",
]
