"""BitFit (Ben Zaken et al., ACL 2022, arXiv 2106.10199): train the biases. "Bias" in VPT's tables."""

from __future__ import annotations

from typing import ClassVar

from deltalens.methods.base import Method, register, setting


@register("bitfit")
class BitFitConfig(Method):
    """Train every backbone parameter named `bias` (or `q_bias`, `v_bias`), and the head.

    The official VPT and Mona codes test for the substring "bias" in the name, which on Swin also trains every
    `relative_position_bias_table`; that is `relative_position=True`, the default here too, because the published
    counts (76,218 for Swin-T with the output norms of a detector) include the tables. Other networks' position biases
    (`attention_biases` of LeViT) belong to the switch as well.
    """

    learning_rate: ClassVar = 5e-3

    relative_position: bool = setting(
        default=True, help="also train relative position bias tables (Swin), as the official codes do"
    )

    def unfreeze(self, anatomy):
        found = []
        for path, _ in anatomy.backbone_parameters():
            leaf = path.rpartition(".")[2]
            if leaf.endswith("bias") or (self.relative_position and "bias" in leaf):
                found.append(path)
        return found
