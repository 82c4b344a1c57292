"""What tests of methods of two towers share: published vectors held against a model."""

import pytest
import torch
import torch.nn.functional as F
from clip_models import NAMES, VECTORS, hf_model, open_clip_model

from deltalens.backbones.zero_shot import ZeroShotClassifier

MODELS = {"open_clip": open_clip_model, "transformers": hf_model}


def needs(name):
    there = (VECTORS / f"{name}.safetensors").exists()
    return pytest.mark.skipif(not there, reason=f"needs ../shared/reference_vectors/{name}.safetensors")


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def fill(parameters, values):
    assert len(parameters) == len(values)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def assert_published(model, parameters, given, inputs, labels):
    """logits, loss, and gradients (name -> parameter) of the vectors."""
    logits = model.train()(inputs)
    torch.testing.assert_close(logits, given["logits"], atol=2e-5, rtol=1e-5)
    loss = F.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, given["loss"].squeeze(), atol=1e-5, rtol=1e-5)
    loss.backward()
    assert_gradients(parameters, given)


def assert_gradients(parameters, given):
    for name, parameter in parameters.items():
        wanted = given[f"grad.{name}"]
        worst = float((parameter.grad - wanted).abs().max() / wanted.abs().max())
        assert worst < 1e-3, (name, worst)


def vit_b16():
    """ViT-B/16 of open_clip as a classifier, on the meta device."""
    import open_clip

    with torch.device("meta"):
        clip = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))
    return ZeroShotClassifier(clip, open_clip.SimpleTokenizer(), NAMES)
