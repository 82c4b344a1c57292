"""peft's tuners with settings that fit tiny networks."""

import peft
import pytest
import torch
from models import MODELS, images, tiny_vit

import deltalens as dl

# settings that fit layers of 12 to 72 channels
SMALL = {
    "adamss": {"r": 8},
    "c3a": {"block_size": 12},
    "fourierft": {"n_frequency": 20},
    "gralora": {"r": 4},
    "hira": {"r": 4},
    "lily": {"r": 4},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 4},
    "peanut": {"r": 4},
    "psoft": {"r": 4},
    "pvera": {"r": 8},
    "randlora": {"r": 4},
    "road": {"group_size": 12},
    "shira": {"r": 1},
    "vblora": {"vector_length": 12, "num_vectors": 16},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 20},
}
TUNERS = [name.partition("/")[2] for name in dl.list_methods("peft/*")]
CANNOT_MERGE = {"lily"}
# FRoD decomposes all layers of one kind together, and Swin's have several widths
PAIRS = [(f, t) for f in ("vit", "swin") for t in TUNERS if (f, t) != ("swin", "frod")]
each_pair = pytest.mark.parametrize(("family", "tuner"), PAIRS)
LOHA = {"r": 2, "target_modules": ["qkv"]}
X = {family: images(family) for family in MODELS}


def method_of(tuner, **settings):
    return dl.make_config(f"peft/{tuner}", **{**SMALL.get(tuner, {}), **settings})


def build(family):
    """A tiny model. The ViT pools all tokens: with a class token our last block computes one row, which rounds
    differently."""
    return tiny_vit(global_pool="avg", class_token=False) if family == "vit" else MODELS[family]()


def loha(*endings, **settings):
    return dl.from_peft(
        peft.LoHaConfig(**{**LOHA, **settings, **({"target_modules": list(endings)} if endings else {})})
    )


def directly(family, tuner, seed):
    """The same tuner on the same layers through peft's own function."""
    config = method_of(tuner).peft_config()
    config.target_modules = {"qkv", "fc2"} if tuner == "ia3" else {"qkv"}
    if tuner == "ia3":
        config.feedforward_modules = {"fc2"}
    model = build(family)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config).eval()


def everything_about(model):
    """What detach must give back: module and parameter objects, flags, values, modes."""
    return (
        {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        set(model.__dict__),
    )


def assert_unchanged(model, before):
    modules, parameters, attributes = everything_about(model)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (identity, flag, value) in parameters.items():
        assert (identity, flag) == before[1][name][:2], name
        assert torch.equal(value, before[1][name][2]), name
    assert attributes == before[2]


def wrapped_layers(model):
    return [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
