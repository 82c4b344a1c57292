"""transformers' ConvNeXts: the block written out, rows of the matrix, recorded states."""

import pytest
import torch
from hf_models import tiny
from matrix import LABELS, ROWS, export, refusal, walk
from models import randomize_adapter
from torch import nn

import deltalens as dl

transformers = pytest.importorskip("transformers", "5.0")

CLASSIFIERS = ("ConvNextForImageClassification", "ConvNextV2ForImageClassification")
FITTING = {
    *("Full", "Linear", "MLP-3 head", "Partial-1", "NormTuning", "BitFit", "Sidetune", "LoRand", "SSF", "Mona"),
    *("Adapter, Houlsby", "Adapter, Pfeiffer", "Adapter-X, sequential", "LoRA on fc1, fc2", "RepAdapter"),
    *("Mona, design v3", "VPT, image channels", "VPT, frame of pixels", "DoRA of peft", "LoHa of peft"),
}


def images(batch=2, dtype=torch.float32, size=64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_refused_rows():
    for row in ROWS:
        if row not in FITTING:
            message = refusal(lambda: tiny(CLASSIFIERS[0]), row)
            assert message, row
            assert "slot" in message, message


@pytest.mark.parametrize("row", ["Mona", "LoRA on fc1, fc2", "Adapter, Pfeiffer", "SSF"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_walk(name, row, tmp_path):
    walk(lambda: tiny(name), images(len(LABELS)), row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("row", ROWS)
def test_full_walk(name, row, tmp_path):
    message = refusal(lambda: tiny(name), row)
    assert (message is None) == (row in FITTING), message
    if message is None:
        export(walk(lambda: tiny(name), images(len(LABELS)), row, tmp_path), images())


LAYERS = {  # convolution, norm, fc1, activation, what follows it, fc2, scale
    "ConvNextModel": lambda b: (
        (b.dwconv, b.layernorm, b.pwconv1, b.act, nn.Identity(), b.pwconv2, b.layer_scale_parameter)
    ),
    "ConvNextV2Model": lambda b: (b.dwconv, b.layernorm, b.pwconv1, b.act, b.grn, b.pwconv2, 1),
    "DINOv3ConvNextModel": lambda b: (
        (b.depthwise_conv, b.layer_norm, b.pointwise_conv1, b.activation_fn, nn.Identity(), b.pointwise_conv2, b.gamma)
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_block_written_out(name):
    model = tiny(name).double()
    plain = model(images(dtype=torch.float64)).last_hidden_state
    dl.attach(model, [dl.RepAdapterConfig(bottleneck=4), dl.AdapterConfig.pfeiffer(bottleneck=4)])
    dl.attach(model, dl.MonaConfig(bottleneck=4), name="mona")
    dl.set_adapter(model, ["default", "mona"])
    with torch.no_grad():
        randomize_adapter(model).eval()
    (tower,) = dl.describe(model).towers
    assert [site.width for site in tower.blocks] == [8, 12, 16, 16, 20]
    block = tower.blocks[1].module
    conv, norm, fc1, act, after, fc2, scale = LAYERS[name](block)
    x = torch.randn(2, 12, 6, 5, dtype=torch.float64)
    u = norm(conv(x).permute(0, 2, 3, 1))
    for module in block.delta.live("mlp.pre"):
        u = module(u)
    u = fc2(after(act(fc1(u)))) * scale
    for module in block.delta.live("mlp.inner"):
        u = module(u)
    y = (x + u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    for module in block.delta.live("block.stream"):
        y = module(y)
    torch.testing.assert_close(block(x), y.permute(0, 3, 1, 2), atol=1e-10, rtol=0)
    assert len(block.delta.all_live()) == 3
    assert not torch.allclose(model(images(dtype=torch.float64)).last_hidden_state, plain)
    dl.detach(model)
    assert torch.equal(model(images(dtype=torch.float64)).last_hidden_state, plain)


@pytest.mark.parametrize("name", LAYERS)
def test_merged_is_the_same(name):
    for config in (dl.RepAdapterConfig(bottleneck=4), dl.SSFConfig(), dl.LoRAConfig(r=2, parts=("fc1", "fc2"))):
        model = tiny(name).double()
        randomize_adapter(dl.attach(model, config)).eval()
        expected = model(images(dtype=torch.float64)).last_hidden_state
        found = dl.merge_and_unload(model)(images(dtype=torch.float64)).last_hidden_state
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_layer_norms_of_both_formats_are_scaled():
    """SSF on a norm whose channels come first, as in the stem, and on one whose channels come last."""
    model = tiny("ConvNextModel")
    dl.attach(model, dl.SSFConfig())
    assert model.embeddings.layernorm.delta.axis == 1
    assert model.encoder.stages[0].layers[0].layernorm.delta.axis == -1


@pytest.mark.parametrize("name", ["ConvNextBackbone", "ConvNextV2Model", "DINOv3ConvNextBackbone"])
def test_recorded_states(name):
    model = tiny(name)
    before = model(images(), output_hidden_states=True)
    randomize_adapter(dl.attach(model, dl.MonaConfig(bottleneck=4)))
    after = model(images(), output_hidden_states=True)
    assert [x.shape for x in after.hidden_states] == [x.shape for x in before.hidden_states]
    assert not torch.allclose(after.hidden_states[-1], before.hidden_states[-1])


@pytest.mark.parametrize(
    ("cls", "config", "blocks"),
    [
        ("ConvNextModel", "ConvNextConfig", 18),
        ("ConvNextV2Model", "ConvNextV2Config", 18),
        ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", 18),
    ],
)
def test_published_architectures(cls, config, blocks):
    with torch.device("meta"):
        model = getattr(transformers, cls)(getattr(transformers, config)())
    (tower,) = dl.describe(model).towers
    assert len(tower.blocks) == blocks
    assert [tower.blocks[0].width, tower.blocks[-1].width] == [96, 768]
    assert tower.stem.module.kernel_size == (4, 4)
    assert tower.blocks[0].parts.keys() == {"fc1", "fc2"}
