"""One file per method; importing this package registers them all."""

from deltalens.methods.adapter import AdapterConfig
from deltalens.methods.adapter_x import AdapterXConfig
from deltalens.methods.adaptformer import AdaptFormerConfig
from deltalens.methods.base import Method, list_methods, make_config, method_class, register, setting
from deltalens.methods.bitfit import BitFitConfig
from deltalens.methods.clip_adapter import CLIPAdapterConfig
from deltalens.methods.cocoop import CoCoOpConfig
from deltalens.methods.convpass import ConvpassConfig
from deltalens.methods.coop import CoOpConfig
from deltalens.methods.dapt import DAPTConfig
from deltalens.methods.fact import FacTConfig
from deltalens.methods.full import FullConfig
from deltalens.methods.idpt import IDPTConfig
from deltalens.methods.kgcoop import KgCoOpConfig
from deltalens.methods.lasp import LASPConfig
from deltalens.methods.linear import LinearConfig
from deltalens.methods.lora import LoRAConfig
from deltalens.methods.lorand import LoRandConfig
from deltalens.methods.maple import MaPLeConfig
from deltalens.methods.mlp import MLPConfig
from deltalens.methods.mma import MMAConfig
from deltalens.methods.mona import MonaConfig, MonaLayer
from deltalens.methods.normtuning import NormTuningConfig
from deltalens.methods.partial import PartialConfig
from deltalens.methods.peft_methods import from_peft
from deltalens.methods.point_peft import PointPEFTConfig
from deltalens.methods.prograd import ProGradConfig
from deltalens.methods.repadapter import RepAdapterConfig
from deltalens.methods.rpo import RPOConfig
from deltalens.methods.sct import SCTConfig
from deltalens.methods.sidetune import SidetuneConfig
from deltalens.methods.ssf import SSFConfig
from deltalens.methods.tip_adapter import TipAdapterConfig
from deltalens.methods.vpt import VPTConfig
from deltalens.methods.vpt_prototypes import class_prototypes
from deltalens.methods.zero_shot import ZeroShotConfig

__all__ = [
    "AdaptFormerConfig",
    "AdapterConfig",
    "AdapterXConfig",
    "BitFitConfig",
    "CLIPAdapterConfig",
    "CoCoOpConfig",
    "CoOpConfig",
    "ConvpassConfig",
    "DAPTConfig",
    "FacTConfig",
    "FullConfig",
    "IDPTConfig",
    "KgCoOpConfig",
    "LASPConfig",
    "LinearConfig",
    "LoRAConfig",
    "LoRandConfig",
    "MLPConfig",
    "MMAConfig",
    "MaPLeConfig",
    "Method",
    "MonaConfig",
    "MonaLayer",
    "NormTuningConfig",
    "PartialConfig",
    "PointPEFTConfig",
    "ProGradConfig",
    "RPOConfig",
    "RepAdapterConfig",
    "SCTConfig",
    "SSFConfig",
    "SidetuneConfig",
    "TipAdapterConfig",
    "VPTConfig",
    "ZeroShotConfig",
    "class_prototypes",
    "from_peft",
    "list_methods",
    "make_config",
    "method_class",
    "register",
    "setting",
]
