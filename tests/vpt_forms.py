"""The forms of VPT that tests run through, on tiny networks."""

import pytest
from models import MODELS, randomize_adapter

import deltalens as dl
from deltalens.methods import VPTConfig

ANY_SIZE = {"vit": {"dynamic_img_size": True}, "swin": {"strict_img_size": False}, "convnext": {}, "resnet": {}}
FORMS = {
    "prefix": {"location": "prefix"},
    "add": {"location": "add"},
    "add-1": {"location": "add-1", "deep": False},
    "pixel": {"location": "prepend-pixel", "deep": False},
    "pixel, imagenet": {"location": "prepend-pixel", "deep": False, "init": "imagenet"},
    "channels": {"location": "concat-channel", "deep": False, "num_tokens": 1},
    "padding": {"location": "padding", "deep": False, "num_tokens": 4},
    "intra": {"shared": "intra"},
    "all, project": {"shared": "all", "project": 7},
    "project": {"project": 7},
    "prefix, all": {"location": "prefix", "shared": "all"},
    "depth 2": {"depth": 2, "pool": "patches+prompts"},
    "reverse 2": {"depth": 2, "reverse": True},
    "fixed": {"train_prompts": False},
    "prompts": {"pool": "prompts"},
}
SWIN_FORMS = [name for name in FORMS if name != "prefix, all"]


def config_of(name, **changes) -> VPTConfig:
    return VPTConfig(**{"num_tokens": 3, **FORMS[name], **changes})


def adapted(family, name, **options):
    model = MODELS[family](**{**ANY_SIZE[family], **options})
    return randomize_adapter(dl.attach(model, config_of(name)))


PAIRS = [("vit", name) for name in FORMS] + [("swin", name) for name in SWIN_FORMS]
each_form = pytest.mark.parametrize(("family", "name"), PAIRS)
