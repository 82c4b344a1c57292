"""Checkpoints of mmdetection's Cascade (Mask) R-CNN in the names of our networks.

Its Swin comes in two forms: that of the Swin authors' fork (`layers`) and mmdetection's own (`stages`), whose patch
merging reads the four neighbours of a position in another order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltalens.backbones.checkpoint import read_weights
from deltalens.backbones.dense.cascade_rcnn import CascadeDetector

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
WHOLE = (
    "roi_head.bbox_head."  # of one head of stages "roi_head.bbox_head.0.", of Mask R-CNN "roi_head.bbox_head.fc_cls"
)


def _background_first(tensor: Tensor) -> Tensor:
    """Its last class is the background; ours is class 0."""
    return torch.cat([tensor[-1:], tensor[:-1]])


def _with_background(tensor: Tensor) -> Tensor:
    """Masks of the classes; ours have one of the background, which is never read."""
    return torch.cat([torch.zeros_like(tensor[:1]), tensor])


def _changes(tensor: Tensor) -> Tensor:
    """Box changes of all classes together, or of each class: ours have those of the background, too."""
    return tensor if len(tensor) == 4 else torch.cat([torch.zeros_like(tensor[:4]), tensor])


def _merged(tensor: Tensor) -> Tensor:
    """Channels (..., 4 C) of patch merging. Its own: channel by channel, of each the neighbours (0, 0), (0, 1), (1, 0),
    (1, 1), (row, column). Ours: neighbour by neighbour (0, 0), (1, 0), (0, 1), (1, 1), of each all channels."""
    channels = tensor.shape[-1] // 4
    cells = tensor.reshape(*tensor.shape[:-1], channels, 2, 2)
    return cells.movedim(-3, -1).transpose(-3, -2).flatten(-3)


_BODY = "backbone.pyramid.backbone."
_BLOCK = r"backbone\.(?:layers|stages)\.(\d+)\.blocks\.(\d+)\."
_STAGE, _OURS = r"roi_head\.bbox_head\.(\d+)\.", "roi_heads.stages.{0}."
_MASKS = r"roi_head\.mask_head\.(\d+)\."

RULES: tuple[tuple[str, str, Callable[[Tensor], Tensor] | None], ...] = (
    # Swin, and ResNet, whose names are torchvision's
    (r"backbone\.patch_embed\.proj(?:ection)?\.(\w+)", _BODY + "patch_embed.proj.{0}", None),
    (r"backbone\.patch_embed\.norm\.(\w+)", _BODY + "patch_embed.norm.{0}", None),
    (_BLOCK + r"(norm[12]\.\w+)", _BODY + "layers_{0}.blocks.{1}.{2}", None),
    (_BLOCK + r"attn\.(?:w_msa\.)?(\w+_bias_table|qkv\.\w+|proj\.\w+)", _BODY + "layers_{0}.blocks.{1}.attn.{2}", None),
    (_BLOCK + r"(?:mlp\.fc1|ffn\.layers\.0\.0)\.(\w+)", _BODY + "layers_{0}.blocks.{1}.mlp.fc1.{2}", None),
    (_BLOCK + r"(?:mlp\.fc2|ffn\.layers\.1)\.(\w+)", _BODY + "layers_{0}.blocks.{1}.mlp.fc2.{2}", None),
    (r"backbone\.layers\.(\d+)\.downsample\.(.+)", _BODY + "layers_{next}.downsample.{1}", None),
    (r"backbone\.stages\.(\d+)\.downsample\.(.+)", _BODY + "layers_{next}.downsample.{1}", _merged),
    (r"backbone\.norm(\d)\.(\w+)", "backbone.pyramid.norms.{0}.{1}", None),
    (r"backbone\.((?:conv1|bn1|layer\d)\..+)", _BODY + "{0}", None),
    # the neck and the proposals
    (r"neck\.lateral_convs\.(\d)\.conv\.(\w+)", "backbone.fpn.inner_blocks.{0}.0.{1}", None),
    (r"neck\.fpn_convs\.(\d)\.conv\.(\w+)", "backbone.fpn.layer_blocks.{0}.0.{1}", None),
    (r"rpn_head\.rpn_conv\.(\w+)", "rpn.head.conv.0.0.{0}", None),
    (r"rpn_head\.rpn_cls\.(\w+)", "rpn.head.cls_logits.{0}", None),
    (r"rpn_head\.rpn_reg\.(\w+)", "rpn.head.bbox_pred.{0}", None),
    # the stages
    (_STAGE + r"shared_convs\.(\d)\.conv\.(\w+)", _OURS + "box_head.{1}.0.{2}", None),
    (_STAGE + r"shared_convs\.(\d)\.(?:bn|gn)\.(\w+)", _OURS + "box_head.{1}.1.{2}", None),
    (_STAGE + r"shared_fcs\.(\d)\.(\w+)", _OURS + "box_head.{fc}.{2}", None),
    (_STAGE + r"fc_cls\.(\w+)", _OURS + "box_predictor.cls_score.{1}", _background_first),
    (_STAGE + r"fc_reg\.(\w+)", _OURS + "box_predictor.bbox_pred.{1}", _changes),
    (_MASKS + r"convs\.(\d)\.conv\.(\w+)", _OURS + "mask_head.{1}.0.{2}", None),
    (_MASKS + r"upsample\.(\w+)", _OURS + "mask_predictor.conv5_mask.{1}", None),
    (_MASKS + r"conv_logits\.(\w+)", _OURS + "mask_predictor.mask_fcn_logits.{1}", _with_background),
)
"""(a pattern of its names, our name with the pattern's groups, what is done to the tensor). {next}: the stage behind
the first group, since timm's Swin merges patches at the beginning of a stage. {fc}: by the box head's kind."""
LEFT_OUT = r".+\.relative_position_index|data_preprocessor\..+"  # computed anew
_OF_CLASSES = re.compile(r"roi_heads\.stages\.\d+\..+\.(?:cls_score|mask_fcn_logits|bbox_pred)\.\w+")
_OF_MASKS = re.compile(r"roi_heads\.stages\.\d+\.mask_.+")
_FC = {"2fc": {"0": "fc6", "1": "fc7"}, "4conv1fc": {"0": "5"}}  # 4 convolutions, flattening, then the linear layer


def whole_network(path: str) -> dict[str, Tensor] | None:
    """The tensors of a file that holds a detector of mmdetection, None for any other. Read with weights_only=True."""
    if Path(path).suffix not in SUFFIXES:
        return None
    weights = read_weights(path)
    return weights if any(name.startswith(WHOLE) for name in weights) else None


def translated(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmdetection's Cascade (Mask) R-CNN -> the names and the order of ours. ValueError for a name that it does not
    have."""
    kind = box_head_of(weights)
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if re.fullmatch(LEFT_OUT, name):
            continue
        for pattern, target, change in RULES:
            match = re.fullmatch(pattern, name)
            if match:
                fields = _fields(kind, match)
                found[target.format(*match.groups(), **fields)] = tensor if change is None else change(tensor)
                break
        else:
            raise ValueError(
                f"the checkpoint's {name} is no part of mmdetection's Cascade (Mask) R-CNN with a Swin or a ResNet, "
                "which is what is understood"
            )
    return found


def _fields(kind: str, match: re.Match[str]) -> dict[str, Any]:
    groups = match.groups()
    number = groups[0] if groups[0].isdigit() else "0"
    return {"next": int(number) + 1, "fc": _FC[kind].get(groups[1], groups[1]) if len(groups) > 1 else ""}


def box_head_of(weights: Mapping[str, Tensor]) -> str:
    """The kind of its box heads, for the option `box_head`."""
    return "4conv1fc" if any(".shared_convs." in name for name in weights) else "2fc"


def load(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Fill a whole network, backbone and head, from the tensors of mmdetection's.

    Layers that depend on the classes stay as they are where the checkpoint has another number of classes; mask heads
    are left out where the network has none. ValueError where anything else is missing or does not fit.
    """
    if not isinstance(network, CascadeDetector):
        raise ValueError(
            f"{source} is a whole detector of mmdetection, and {type(network).__name__} is no Cascade R-CNN, which is "
            "what is understood: pass head='cascade' or head='cascade_rcnn'"
        )
    if WHOLE + "0.fc_cls.weight" not in weights:
        raise ValueError(f"{source} is a detector of mmdetection without stages; Cascade R-CNN is what is understood")
    own = network.state_dict()
    with_masks = any(_OF_MASKS.fullmatch(name) for name in own)
    found = {name: t for name, t in translated(weights).items() if with_masks or not _OF_MASKS.fullmatch(name)}
    classes = len(weights[WHOLE + "0.fc_cls.weight"]) - 1
    fresh = {name for name, t in found.items() if classes != network.num_classes and _differs(name, t, own)}
    found = {name: t for name, t in found.items() if name not in fresh}
    missing = [name for name in own if name not in found and name not in fresh and "num_batches" not in name]
    misfits = [name for name in found if name not in own or own[name].shape != found[name].shape]
    if missing or misfits:
        name = (misfits or missing)[0]
        shapes = [str(tuple(state[name].shape)) if name in state else "absent" for state in (found, own)]
        raise ValueError(
            f"{source} is of another network: {name} is {shapes[0]} there and {shapes[1]} here. Its box heads are "
            f"box_head={box_head_of(weights)!r}; the backbone (with an img_size that leaves its windows whole), the "
            "number of stages and the masks must be the same, too"
        )
    network.load_state_dict(found, strict=False)


def _differs(name: str, tensor: Tensor, own: Mapping[str, Tensor]) -> bool:
    """Whether a layer of the classes has another number of them. One box for all classes has no number of them."""
    if not _OF_CLASSES.fullmatch(name) or name not in own or own[name].shape == tensor.shape:
        return False
    return ".bbox_pred." not in name or min(len(tensor), len(own[name])) > 4
