"""segmentation_models_pytorch, imported where a head needs it."""

from __future__ import annotations

import importlib
from types import SimpleNamespace


def decoders(head: str) -> SimpleNamespace:
    """Its decoder classes and their initialisation. ImportError that says what to install."""
    try:
        package = "segmentation_models_pytorch"
        upernet = importlib.import_module(f"{package}.decoders.upernet.decoder")
        dpt = importlib.import_module(f"{package}.decoders.dpt.decoder")
        start = importlib.import_module(f"{package}.base.initialization")
    except ImportError as error:
        raise ImportError(f"head={head!r} needs segmentation_models_pytorch: pip install 'deltalens[dense]'") from error
    return SimpleNamespace(
        UPerNetDecoder=upernet.UPerNetDecoder,
        DPTDecoder=dpt.DPTDecoder,
        initialize_decoder=start.initialize_decoder,
    )
