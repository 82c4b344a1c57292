"""Partial-k: full fine-tuning of the last blocks. A baseline of VPT's and Mona's comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from deltalens.methods.base import Method, register, setting
from deltalens.sites.anatomy import Anatomy, Tower
from deltalens.sites.norms import is_norm


@register("partial")
class PartialConfig(Method):
    """Train the last k blocks of each tower, everything of the backbone behind the first of them, and the head.

    "Behind" is the order in which modules are registered: patch merging between the trained blocks of a Swin belongs to
    it, the final norm too, unless final_norm is off. VPT trains the final norm (Partial-1, -2, -4), Mona does not
    (Partial-1). Dropout and drop-path stay off, in the trained blocks too, as in VPT's code.

    The official VPT code names the final norm differently for each backbone: with MoCo-v3 its test misses the final
    norm, which stays frozen there. Its Partial-2 on Swin is the last stage, whatever its depth; with the depths of
    Swin-T, -B and -L these are the last two blocks.

    Parameters: Swin-T, k=1: 7,091,928 without the final norm (1,536). ViT-B/16, k=1: 7,089,408 with it.
    """

    learning_rate: ClassVar = 3e-4

    blocks: int = setting(default=1, help="how many blocks from the end are trained, k")
    final_norm: bool = setting(default=True, help="also train norms behind the last block, as VPT does and Mona not")

    def __post_init__(self):
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}; LinearConfig trains the head only")

    def unfreeze(self, anatomy: Anatomy) -> list[str]:
        for tower in anatomy.towers:
            if self.blocks > len(tower.blocks):
                raise ValueError(
                    f"blocks={self.blocks}, but {type(anatomy.model).__name__} has {len(tower.blocks)} blocks; "
                    "FullConfig trains all of the backbone"
                )
        return [path for tower in anatomy.towers for path in self._of(tower, anatomy)]

    def _of(self, tower: Tower, anatomy: Anatomy) -> Iterable[str]:
        root = next((site.path for site in (tower.owner, tower.classifier) if site is not None), "")
        place = {f"{block.path}.": block.index - len(tower.blocks) for block in tower.blocks}  # the last one is at -1
        others = tuple(f"{block.path}." for block in anatomy.blocks() if block.tower is not tower)
        reached = -len(tower.blocks) - 1
        for path, _ in anatomy.backbone_parameters():
            if (root and not path.startswith(f"{root}.")) or path.startswith(others):
                continue
            inside = next((index for start, index in place.items() if path.startswith(start)), None)
            reached = reached if inside is None else inside
            if reached < -self.blocks:
                continue
            behind_all = reached == -1 and inside is None
            norm = behind_all and is_norm(anatomy.model.get_submodule(path.rpartition(".")[0]))
            if self.final_norm or not norm:
                yield path
