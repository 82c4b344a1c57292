"""transformers' ViT-like towers under the library's own options: recorded states, sizes, masks, checkpointing."""

import copy
import pickle

import pytest
import torch
from hf_models import tiny
from models import randomize_adapter
from test_family_hf_vits import images, tokens_of

import deltalens as dl
from deltalens.sites.output import logits_of

transformers = pytest.importorskip("transformers", "5.0")


# ------------------------------------------------------------------ what the library's options do
def shapes(output):
    return {
        key: [tuple(x.shape) for x in value] if isinstance(value, (tuple, list)) else tuple(value.shape)
        for key, value in output.items()
        if value is not None
    }


RECORDING = [
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "Dinov2Backbone",
    "DINOv3ViTBackbone",
    "BeitBackbone",
    "CLIPVisionModel",
    "SiglipVisionModel",
]


@pytest.mark.parametrize("name", RECORDING)
@pytest.mark.parametrize("deep", [True, False])
def test_recorded_states_hold_the_backbones_own_tokens(name, deep):
    model = tiny(name)
    model.set_attn_implementation("eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    expected = shapes(model(images(), **options))
    dl.attach(model, dl.VPTConfig(num_tokens=3, deep=deep))
    output = model(images(), **options)
    assert len(output.hidden_states) == 4
    assert len(output.attentions) == 3
    assert shapes(output) == expected
    flat = model(images(), return_dict=False, **options)
    assert isinstance(flat, tuple)
    values = [value for value in output.values() if value is not None]
    for one, other in zip(flat, values, strict=True):
        for a, b in zip(*((one, other) if isinstance(one, tuple) else ((one,), (other,))), strict=True):
            assert torch.equal(a, b)
    dl.detach(model)
    assert shapes(model(images(), **options)) == expected


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPVisionModel"])
def test_other_image_sizes_move_the_grid(name):
    model = tiny(name)
    dl.attach(model, dl.MonaConfig(bottleneck=4))
    x = torch.randn(2, 3, 48, 24)
    output = model(x, interpolate_pos_encoding=True, output_hidden_states=True)
    assert output.hidden_states[-1].shape == (2, 1 + 6 * 3, 24)
    assert dl.describe(model).towers[0].embed.module.__dict__["delta_layout"].grid == (6, 3)
    with pytest.raises(ValueError, match="doesn't match"):
        model(x)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "BeitModel"])
def test_masked_patches_pass(name):
    model = tiny(name, use_mask_token=True) if name != "ViTModel" else None
    if model is None:
        model = transformers.ViTForMaskedImageModeling(tiny(name).config).eval()
        model.config.encoder_stride = model.config.patch_size
    dl.attach(model, dl.VPTConfig(num_tokens=3, deep=False))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :4] = True
    if name == "ViTModel":
        assert model.vit(images(), bool_masked_pos=mask).last_hidden_state.shape == (2, 17, 24)
    else:
        found = model(images(), bool_masked_pos=mask).last_hidden_state
        assert found.shape == (2, 17, 24)
        assert not torch.allclose(found, model(images()).last_hidden_state)


@pytest.mark.parametrize("config", [dl.VPTConfig(num_tokens=3), dl.MonaConfig(bottleneck=4), dl.LoRAConfig(r=2)])
def test_checkpointing_saves_memory_and_changes_nothing(config):
    found, saved = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny("ViTForImageClassification")
        randomize_adapter(dl.attach(model, config))
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            logits = model(images()).logits
        saved.append(sum(kept))
        logits.sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert saved[1] < 0.7 * saved[0]
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)


def test_dropout_and_drop_path_of_the_library():
    """In train mode the frozen backbone's dropout is off; with methods that keep it, it is as the library draws it."""
    model = tiny("BeitForImageClassification", drop_path_rate=0.5, hidden_dropout_prob=0.2)
    dl.attach(model, dl.AdapterConfig.houlsby(bottleneck=4)).train()
    assert torch.equal(model(images()).logits, model(images()).logits)
    plain = tiny("BeitForImageClassification", drop_path_rate=0.5, hidden_dropout_prob=0.2).train()
    torch.manual_seed(3)
    with torch.no_grad():
        expected = plain(images()).logits
    adapted = tiny("BeitForImageClassification", drop_path_rate=0.5, hidden_dropout_prob=0.2)
    dl.attach(adapted, dl.VPTConfig(num_tokens=3))
    with dl.disable_adapter(adapted), torch.no_grad():
        for module in adapted.modules():
            module.training = True
        torch.manual_seed(3)
        assert torch.equal(adapted(images()).logits, expected)


def test_copies_pickles_and_precision():
    model = tiny("ViTForImageClassification")
    randomize_adapter(dl.attach(model, [dl.VPTConfig(num_tokens=3), dl.MonaConfig(bottleneck=4)])).eval()
    expected = model(images()).logits
    assert torch.equal(copy.deepcopy(model)(images()).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()).logits, expected)
    assert isinstance(model, transformers.ViTForImageClassification)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images()).logits.float(), expected, atol=0.2, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ViTForImageClassification", dl.VPTConfig(num_tokens=3)),
        ("Dinov2ForImageClassification", dl.VPTConfig(num_tokens=3, deep=False)),
        ("CLIPForImageClassification", dl.MonaConfig(bottleneck=4)),
        ("DINOv3ViTModel", dl.VPTConfig(num_tokens=3, deep=False)),
    ],
)
def test_compiles_as_one_graph(name, config):
    model = tiny(name)
    randomize_adapter(dl.attach(model, config)).eval()
    with torch.no_grad():
        expected = tokens_of(model(images()))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(tokens_of(compiled(images())), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


# ------------------------------------------------------------------ two towers, and patches of many shapes
def test_vision_tower_of_a_two_tower_model():
    model = tiny("CLIPModel")
    text = {"input_ids": torch.tensor([[1, 5, 6, 29]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    dl.attach(model, dl.MonaConfig(bottleneck=4), backbone="vision_model")
    anatomy = dl.describe(model, "vision_model")
    assert [block.path for block in anatomy.blocks()] == [f"vision_model.encoder.layers.{i}" for i in range(3)]
    assert any(p.requires_grad for p in model.text_model.parameters())  # what lies around the backbone is trained
    randomize_adapter(model)
    output = model(pixel_values=images(), **text)
    output.logits_per_image.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "delta" in n)
    whole = tiny("CLIPModel")
    with pytest.raises(TypeError, match="plain sequence"):
        dl.attach(whole, dl.MonaConfig(bottleneck=4))
    dl.attach(whole, dl.MonaConfig(bottleneck=4), tower="vision")
    assert all("vision_model" in n for n, p in whole.named_parameters() if p.requires_grad)


def test_siglip2_is_a_sequence():
    model = tiny("Siglip2VisionModel").double()
    x = torch.randn(2, 16, 3 * 64, dtype=torch.float64)
    inputs = {"pixel_values": x, "spatial_shapes": torch.tensor([[4, 4], [2, 4]])}
    inputs["pixel_attention_mask"] = torch.tensor([[1] * 16, [1] * 8 + [0] * 8])
    plain = copy.deepcopy(model)
    dl.attach(model, dl.VPTConfig(num_tokens=3))
    randomize_adapter(model)
    hidden = x.clone()
    hidden[1, 8:] += 1
    expected = model(**inputs).last_hidden_state[1, :8]
    torch.testing.assert_close(model(**{**inputs, "pixel_values": hidden}).last_hidden_state[1, :8], expected)
    assert not torch.allclose(plain(**inputs).last_hidden_state[1, :8], expected)
    for config, why in (
        (dl.VPTConfig(num_tokens=3, deep=False), "tokens.in"),
        (dl.MonaConfig(bottleneck=4), "plain sequence"),
    ):
        with pytest.raises(TypeError, match=why):
            dl.attach(tiny("Siglip2VisionModel"), config)


# ------------------------------------------------------------------ published sizes
@pytest.mark.parametrize(
    ("cls", "config", "blocks", "width", "prefix"),
    [
        ("ViTForImageClassification", "ViTConfig", 12, 768, 1),
        ("DeiTForImageClassification", "DeiTConfig", 12, 768, 2),
        ("Dinov2Model", "Dinov2Config", 12, 768, 1),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", 12, 768, 5),
        ("DINOv3ViTModel", "DINOv3ViTConfig", 12, 384, 1),
        ("BeitModel", "BeitConfig", 12, 768, 1),
        ("CLIPVisionModel", "CLIPVisionConfig", 12, 768, 1),
        ("SiglipVisionModel", "SiglipVisionConfig", 12, 768, 0),
    ],
)
def test_published_architectures(cls, config, blocks, width, prefix):
    with torch.device("meta"):
        model = getattr(transformers, cls)(getattr(transformers, config)())
    (tower,) = dl.describe(model).towers
    assert len(tower.blocks) == blocks
    assert {block.width for block in tower.blocks} == {width}
    assert tower.layout.prefix == prefix
    assert {"q", "fc2"} <= tower.blocks[0].parts.keys()
    assert "attention.prompts" in tower.blocks[0].slots
    assert tower.image_size == (224, 224)


def test_overridden_forwards_are_unknown():
    class Own(transformers.models.vit.modeling_vit.ViTLayer):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs) * 2

    model = tiny("ViTForImageClassification")
    model.vit.layers[1].__class__ = Own
    slots = [block.slots for block in dl.describe(model).blocks()]
    assert "attention.prompts" in slots[0]
    assert slots[1] == {"block.stream"}


def test_save_pretrained_after_detach(tmp_path):
    model = tiny("ViTForImageClassification")
    expected = logits_of(model(images()))
    dl.detach(dl.attach(model, dl.VPTConfig(num_tokens=3), num_classes=3))
    model.save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(images()).logits, expected)
    assert again.config.num_labels == 5
