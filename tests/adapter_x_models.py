"""Small models with Adapter-X, for its tests."""

import torch
from models import (
    CLASSES,
    MODELS,
    randomize_adapter,
)

import deltalens as dl
from deltalens.methods.adapter_x import BlockExperts
from deltalens.methods.smoa import SMoA
from deltalens.tasks import ClassificationTask

SMALL = {"experts": 3, "bottleneck": 4, "router_width": 5}
LABELS = torch.tensor([0, 3])


def config(**settings):
    return dl.AdapterXConfig(**{**SMALL, "dropout": 0.0, **settings})


def adapted(family="vit", make=None, **settings):
    model = dl.attach((make or MODELS[family])(), config(**settings))
    return randomize_adapter(model)


def task_of(model):
    return ClassificationTask(model, [str(i) for i in range(CLASSES)])


def pools(model):
    return list({id(m): m for m in model.modules() if isinstance(m, SMoA)}.values())


def layers(model):
    return [m for m in model.modules() if isinstance(m, BlockExperts)]
