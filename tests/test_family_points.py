"""The family of point transformers: a ViT's slots on patches that lie in no grid."""

import copy
import pickle

import pytest
import torch
from family_checks import adapted, assert_same_run, assert_untouched_by_zero, compiled_equals_eager
from matrix import ROWS, export, refusal, walk
from torch import nn
from vit_zoo import Constant  # noqa: F401

import deltalens as dl
from deltalens.models.point_mae import PointMAE
from deltalens.models.point_transformer import PointTransformer
from deltalens.sites.layout import Patches

OPTIONS = {
    "point-mae": {},
    "point-bert": {"encoder_dim": 16, "head": "mlp"},
    "recon": {"class_tokens": ("cls", "img", "text"), "two_streams": True},
    "mini": {"head": "linear"},
    "once": {"pos_every_block": False},
}
SMALL = {"dim": 24, "depth": 3, "heads": 2, "num_groups": 6, "group_size": 4, "encoder_dim": 24}


def make(kind: str = "mini", classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    model = PointTransformer(classes, **{**SMALL, **OPTIONS[kind]})
    for name, parameter in model.named_parameters():
        if name.endswith(("_token", "_pos", "weight")):
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def clouds(batch: int = 6) -> torch.Tensor:
    return torch.randn(batch, 40, 3, generator=torch.Generator().manual_seed(0))
