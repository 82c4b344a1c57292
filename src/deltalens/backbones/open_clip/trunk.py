"""open_clip's `TimmModel`: a trunk of timm as image tower.

timm's families find the blocks of the trunks they know. A trunk that none of them knows is described by the fallback
here, so that a whole CLIP is not taken for its text tower alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from open_clip.timm_model import TimmModel
from torch import nn

from deltalens.backbones import unknown
from deltalens.backbones.describe import known_towers
from deltalens.sites.anatomy import Tower


def find_towers(model: nn.Module) -> Iterator[tuple[str, Tower]]:
    """(path of the trunk, tower) for every trunk of no known family."""
    for path, module in model.named_modules():
        if isinstance(module, TimmModel) and not known_towers(module.trunk):
            for _, tower in unknown.find_towers(module.trunk):
                yield f"{path}.trunk".lstrip("."), tower
