"""Methods on the features of a frozen CLIP: the published implementations' logits, losses, gradients and steps."""

import pytest
import torch
import torch.nn.functional as F
from clip_models import VECTORS, hf_model, open_clip_model, vectors, zero_shot
from models import randomize_adapter, tiny_vit

import deltalens as dl
from deltalens.backbones.feature_classifier import FeatureClassifier
from deltalens.methods import CLIPAdapterConfig, LinearConfig, LoRAConfig

needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason="needs ../shared/reference_vectors")
MODELS = {"open_clip": open_clip_model, "transformers": hf_model}
TEMPLATES = {
    "ImageNet": "a photo of a {}.",
    "OxfordPets": "a photo of a {}, a type of pet.",
    "EuroSAT": "a centered satellite photo of {}.",
    "DescribableTextures": "{} texture.",
}


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ CLIP-Adapter
@needs_vectors
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dataset", TEMPLATES)
def test_published_clip_adapter(make, dataset):
    given, inputs = vectors("clip_adapter"), vectors("clip_inputs")
    model = zero_shot(clip=MODELS[make](), templates=TEMPLATES[dataset])
    dl.attach(model, CLIPAdapterConfig())
    (module,) = model.live("output")
    module.load_state_dict({key: given[f"param.{key}"] for key in module.state_dict()})
    logits = model.train()(inputs["images"])
    torch.testing.assert_close(logits, given[f"logits.{dataset}"], atol=2e-5, rtol=1e-5)
    if dataset != "ImageNet":
        return
    loss = F.cross_entropy(logits, inputs["labels"])
    torch.testing.assert_close(loss, given["loss.ImageNet"].squeeze(), atol=1e-5, rtol=1e-5)
    loss.backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, given[f"grad.{name}"], atol=1e-6, rtol=1e-3)


def test_clip_adapter_on_texts(images):
    """f' of the classes' raw features, as of the images'."""
    model = dl.attach(zero_shot(), CLIPAdapterConfig(towers="both", ratio=0.6))
    randomize_adapter(model)
    (module,) = model.live("text.output")
    with torch.no_grad():
        raw = model.clip.encode_text(model.prompts().ids)
        wanted = F.normalize(0.6 * module.fc(raw) + 0.4 * raw, dim=-1)
        torch.testing.assert_close(model.text_features(), wanted, atol=1e-6, rtol=1e-5)
    model.train()(images).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert model.live("output")[0] is not module
    with pytest.raises(TypeError, match="needs classes that are texts, and VisionTransformer has none"):
        dl.attach(tiny_vit(), CLIPAdapterConfig(towers="text"))


def test_clip_adapter_counts():
    import open_clip

    with torch.device("meta"):
        clip = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))
        from deltalens.methods.clip_adapter import FeatureAdapter

        assert sum(p.numel() for p in FeatureAdapter(clip.text_projection.shape[1], 4, 0.2).parameters()) == 131_072
    assert dl.count_parameters(dl.attach(zero_shot(), CLIPAdapterConfig())).adapter == 2 * 32 * 8
    assert dl.count_parameters(dl.attach(zero_shot(), CLIPAdapterConfig(towers="both"))).adapter == 4 * 32 * 8


def test_clip_adapter_on_an_ordinary_classifier():
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    dl.attach(model, CLIPAdapterConfig(ratio=0.5))
    (module,) = [m for name, m in model.named_modules() if name.endswith(".clip_adapter")]
    torch.testing.assert_close(model(x), model.head(0.5 * module.fc(features) + 0.5 * features))


# ------------------------------------------------------------------ CLIP-LoRA, linear probe
def test_clip_lora():
    import open_clip

    with torch.device("meta"):
        clip = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))
    assert dl.count_parameters(dl.attach(clip, LoRAConfig.clip())).adapter == 184_320
    model = dl.attach(zero_shot(), LoRAConfig.clip())
    layers = [module for name, module in model.named_modules() if name.endswith(".lora")]
    assert len(layers) == 2 * 4 * 3
    assert all(layer.scaling == pytest.approx(1 / 2**0.5) and layer.dropout.p == 0.25 for layer in layers)


def test_linear_probe_is_the_classifier_without_class_names(images):
    """What create_backbone("open_clip/...") builds: CLIP's projected image features, frozen, and one linear layer."""
    model = FeatureClassifier(open_clip_model().visual, 3, (3, 32, 32))
    features = model.forward_features(images)
    dl.attach(model, LinearConfig())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias"}
    torch.testing.assert_close(model(images), features @ model.head.weight.T + model.head.bias)
