"""Every method on the backbones of dense networks: attached, trained and taken off again, or refused in words."""

import pytest
import torch
from dense_models import loss_of, network, pictures
from models import randomize_adapter

import deltalens as dl

METHODS = {
    "mona": dl.MonaConfig(bottleneck=4),
    "lora": dl.LoRAConfig(r=2),
    "vpt-deep": dl.VPTConfig(num_tokens=2),
    "vpt-shallow": dl.VPTConfig(num_tokens=2, deep=False),
    "adaptformer": dl.AdaptFormerConfig(bottleneck=4),
    "adapter": dl.AdapterConfig(bottleneck=4),
    "lorand": dl.LoRandConfig(branches=2, rank=2),
    "bitfit": dl.BitFitConfig(),
    "normtuning": dl.NormTuningConfig(),
    "linear": dl.LinearConfig(),
    "full": dl.FullConfig(),
    "adapter-x": dl.AdapterXConfig(),
}
REFUSED = {
    ("vpt-deep", "convnext"): "attention.prompts",
    ("vpt-shallow", "convnext"): "tokens.in",
    ("adaptformer", "convnext"): "mlp.parallel",
    ("adapter-x", "convnext"): "Adapter-X",
    ("lora", "convnext"): r"LoRA \(or set target_modules to layer names\) needs the slot 'weights:q'",
}


@pytest.mark.parametrize("kind", ["swin", "vit", "convnext"])
@pytest.mark.parametrize("method", METHODS)
def test_attached_trained_and_taken_off(method, kind):
    model, x = network(kind, "fcn"), pictures(45, 67)
    with torch.no_grad():
        before = model(x)["out"]
    if (method, kind) in REFUSED:
        with pytest.raises(TypeError, match=REFUSED[method, kind]):
            dl.attach(model, METHODS[method])
        assert torch.equal(model(x)["out"], before)
        return
    dl.attach(model, METHODS[method])
    randomize_adapter(model)
    loss_of(model.train()(x)).backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not [name for name in trained if model.get_parameter(name).grad is None]
    inside = [name for name in trained if name.startswith("maps.backbone.")]
    assert bool(inside) == (method != "linear")
    with torch.no_grad():
        assert (model.eval()(x)["out"] - before).abs().max() > 1e-3
        dl.detach(model)
        assert torch.equal(model.eval()(x)["out"], before)


@pytest.mark.parametrize("method", [dl.VPTConfig(num_tokens=2, pool="cls"), dl.AdapterXConfig(pool="patches")])
def test_what_needs_a_classifiers_end_is_refused(method):
    with pytest.raises(TypeError, match="changes what a head reads: Segmenter has none"):
        dl.attach(network("vit", "fcn"), method)


def test_a_classifiers_head_has_no_place_here():
    model = network("vit", "fcn")
    with pytest.raises(TypeError, match="MLPConfig replaces a classifier layer, and Segmenter has none"):
        dl.attach(model, dl.MLPConfig())
    dl.attach(model, dl.LinearConfig())


# ------------------------------------------------------------------ no graph below
FIRST = {"swin": "layers_0.blocks.0.attn", "vit": "blocks.0.attn", "convnext": "stages_0.blocks.0.mlp"}
LAST = {"swin": "layers_3.blocks.0", "vit": "blocks.3", "convnext": "stages_3.blocks.0"}


def in_graph(model, path):
    """(whether what goes into a module of the backbone needs a gradient, whether what comes out does)."""
    seen = []
    module = model.get_submodule(f"{model.adapted}.{path}")
    handle = module.register_forward_hook(lambda m, args, y: seen.append((args[0].requires_grad, y.requires_grad)))
    model.train()(pictures())
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", FIRST)
def test_nothing_below_the_first_adapted_block_is_in_the_graph(kind):
    """The frozen layers in front of the first Mona keep nothing for backward, nor do blocks below a last one."""
    model = dl.attach(network(kind, "fcn"), dl.MonaConfig(bottleneck=4))
    assert in_graph(model, FIRST[kind]) == (False, False)
    assert in_graph(model, LAST[kind]) == (True, True)
    model = dl.attach(network(kind, "fcn"), dl.PartialConfig(blocks=1))
    assert in_graph(model, LAST[kind]) == (False, True)


@pytest.mark.parametrize("kind", FIRST)
def test_a_frozen_backbone_keeps_nothing_for_backward(kind):
    """Under a head alone, no tensor that the backbone computes is saved."""
    model, saved, taken = dl.attach(network(kind, "fcn"), dl.LinearConfig()), [], []
    model.maps.norms[0].register_forward_pre_hook(lambda m, args: taken.append(len(saved)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.train()(pictures())
    assert taken == [0]
    assert saved
