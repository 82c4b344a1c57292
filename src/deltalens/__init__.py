"""deltalens: adapt frozen, pretrained vision models by training a few per cent of their parameters.

The public names and where they live are listed in `__init__.pyi`; each is imported when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*__all__, "__version__"]
