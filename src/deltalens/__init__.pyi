from .backbones import describe
from .backbones.names import create_backbone, list_models
from .lifecycle.attach import attach, detach
from .lifecycle.count import count_parameters, parameter_table, print_trainable_parameters
from .lifecycle.files import from_pretrained, load_adapter, save_pretrained
from .lifecycle.info import adapter_info, class_names, preprocessing
from .lifecycle.merge import merge_and_unload
from .lifecycle.official import import_official
from .lifecycle.prepare import prepare
from .lifecycle.switch import active_adapters, delete_adapter, disable_adapter, set_adapter
from .methods import (
    BitFitConfig,
    ConvpassConfig,
    FacTConfig,
    FullConfig,
    LinearConfig,
    LoRAConfig,
    Method,
    MonaConfig,
    MonaLayer,
    RepAdapterConfig,
    SCTConfig,
    SSFConfig,
    VPTConfig,
    from_peft,
    list_methods,
    make_config,
)

__version__: str
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
    "__version__",
    "active_adapters",
    "adapter_info",
    "attach",
    "class_names",
    "count_parameters",
    "create_backbone",
    "delete_adapter",
    "describe",
    "detach",
    "disable_adapter",
    "from_peft",
    "from_pretrained",
    "import_official",
    "list_methods",
    "list_models",
    "load_adapter",
    "make_config",
    "merge_and_unload",
    "parameter_table",
    "prepare",
    "preprocessing",
    "print_trainable_parameters",
    "save_pretrained",
    "set_adapter",
]
