"""Point-MAE and Point-BERT as the library torch-pointcloud has them on the Hugging Face hub: its names, and ours.

=============================================  =====================================================
there                                          here
=============================================  =====================================================
`encoder.local_mlp.lins.{0,1}` (128, 3)        `encoder.first_conv.{0,3}` (128, 3, 1)
`encoder.local_mlp.norms.0.module`             `encoder.first_conv.1`; `global_mlp` is `second_conv`
`pos_embed.lins.{0,1}`                         `pos_embed.{0,2}`
`blocks.blocks.<i>.mlp.lins.{0,1}`             `blocks.blocks.<i>.mlp.fc{1,2}`
`blocks.<i>.` (Point-BERT)                     `blocks.blocks.<i>.`
`norm_f`                                       `norm`
`head.lins.<i>`, `head.norms.<i>.module`       `cls_head_finetune.{0,4,8}`, `.{1,5}`; without norms `.{0,3}`
=============================================  =====================================================
"""

from __future__ import annotations

import re

from torch import Tensor

FIRST = "encoder.local_mlp.lins.0.weight"
REPOSITORY = {"point-mae": "torch-pointcloud/point-mae-base.{tag}.yatian-pang"}
FILE, TAG = "model.safetensors", "pretrain"
_CONVOLUTIONS = {"local_mlp": "first_conv", "global_mlp": "second_conv"}


def encoder_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The encoder under the official names, None where a file is not of this kind."""
    prefixes = [name.removesuffix(FIRST) for name in tensors if name.endswith(FIRST)]
    if not prefixes:
        return None
    prefix = min(prefixes, key=len)
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    step = 4 if any(name.startswith("head.norms.") for name in inside) else 3
    return dict(_official(name, tensor, step) for name, tensor in inside.items())


def _official(name: str, tensor: Tensor, step: int) -> tuple[str, Tensor]:
    """step: layers from one linear layer of the head to the next."""
    name = name.replace(".module.", ".")
    if match := re.fullmatch(r"encoder\.(local_mlp|global_mlp)\.(lins|norms)\.(\d)\.(\w+)", name):
        stage, kind, number, leaf = match.groups()
        place = 3 * int(number) if kind == "lins" else 1
        tensor = tensor.unsqueeze(-1) if (kind, leaf) == ("lins", "weight") else tensor
        return f"encoder.{_CONVOLUTIONS[stage]}.{place}.{leaf}", tensor
    if match := re.fullmatch(r"head\.(lins|norms)\.(\d)\.(\w+)", name):
        kind, number, leaf = match.groups()
        return f"cls_head_finetune.{step * int(number) + (kind == 'norms')}.{leaf}", tensor
    name = re.sub(r"^pos_embed\.lins\.(\d)", lambda found: f"pos_embed.{2 * int(found[1])}", name)
    name = re.sub(r"\.mlp\.lins\.(\d)", lambda found: f".mlp.fc{int(found[1]) + 1}", name)
    name = re.sub(r"^blocks\.(\d)", r"blocks.blocks.\1", name)
    return re.sub(r"^norm_f\.", "norm.", name), tensor
