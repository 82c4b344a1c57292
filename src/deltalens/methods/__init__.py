"""One file per method; importing this package registers them all."""

from deltalens.methods.base import Method, list_methods, make_config, method_class, register, setting
from deltalens.methods.bitfit import BitFitConfig
from deltalens.methods.convpass import ConvpassConfig
from deltalens.methods.fact import FacTConfig
from deltalens.methods.from_peft import from_peft
from deltalens.methods.full import FullConfig
from deltalens.methods.linear import LinearConfig
from deltalens.methods.lora import LoRAConfig
from deltalens.methods.mona import MonaConfig, MonaLayer
from deltalens.methods.repadapter import RepAdapterConfig
from deltalens.methods.sct import SCTConfig
from deltalens.methods.ssf import SSFConfig
from deltalens.methods.vpt import VPTConfig

__all__ = [
    "BitFitConfig",
    "ConvpassConfig",
    "FacTConfig",
    "FullConfig",
    "LinearConfig",
    "LoRAConfig",
    "Method",
    "MonaConfig",
    "MonaLayer",
    "RepAdapterConfig",
    "SCTConfig",
    "SSFConfig",
    "VPTConfig",
    "from_peft",
    "list_methods",
    "make_config",
    "method_class",
    "register",
    "setting",
]
