"""BitFit (Ben Zaken et al., ACL 2022, arXiv 2106.10199): train the biases. "Bias" in VPT's tables."""

from __future__ import annotations

from typing import ClassVar

from deltalens.methods.base import Method, register, setting


@register("bitfit")
class BitFitConfig(Method):
    """Train every backbone parameter named `bias`, and the head.

    The official VPT and Mona codes test for the substring "bias" in the name, which on Swin also trains every
    `relative_position_bias_table`; that is `relative_position=True`, the default here too, because the published
    counts (76,218 for Swin-T with the output norms of a detector) include the tables.
    """

    learning_rate: ClassVar = 5e-3

    relative_position: bool = setting(
        default=True, help="also train Swin's relative position bias tables, as the official codes do"
    )

    def unfreeze(self, anatomy):
        found = []
        for path, _ in anatomy.backbone_parameters():
            leaf = path.rpartition(".")[2]
            if leaf.endswith("bias") or (self.relative_position and "relative_position_bias" in leaf):
                found.append(path)
        return found
