"""Convolutional and hybrid networks: which methods fit, from attach to detach; what is found in published ones."""

import copy
import pickle
import pkgutil

import conv_models
import pytest
import timm
import torch
from matrix import LABELS, ROWS, export, refusal, walk
from models import randomize_adapter, tiny_convnext
from timm.models._efficientnet_blocks import ConvBnAct
from timm.models.maxxvit import PartitionAttentionCl
from timm.models.resnet import BasicBlock
from timm.utils.model import reparameterize_model
from torch import nn

import deltalens as dl
from deltalens.backbones.timm import efficientnet

MODELS = {
    "resnet": conv_models.resnet,
    "regnet": conv_models.regnet,
    "efficientnet": conv_models.efficientnet,
    "mobile hybrid": conv_models.mobile_hybrid,
    "caformer": conv_models.caformer,
    "poolformer": conv_models.poolformer,
    "maxvit": conv_models.maxvit,
    "coatnet": conv_models.coatnet,
    "fastvit": conv_models.fastvit,
}
TOKENS = {"VPT-shallow", "VPT, 2 of the blocks", "VPT, added", "VPT, added to all", "VPT, patches of pixels"}
PROMPTS = {"VPT-deep", "VPT, shared", "VPT, class prototypes", "VPT, prefix", "VPT and BitFit"}
BESIDE = {"Adapter, parallel", "AdaptFormer", "Adapter-X", "RepAdapter", "Convpass"}
LINEAR = {"LoRA on q, v", "LoRA on fc1, fc2", "FacT", "DoRA of peft", "LoHa of peft"}
REFUSED = {
    "resnet": TOKENS | PROMPTS | BESIDE | LINEAR | {"SCT"},
    "regnet": TOKENS | PROMPTS | BESIDE | LINEAR | {"SCT"},
    "efficientnet": TOKENS | PROMPTS | BESIDE | LINEAR | {"SCT"},
    "mobile hybrid": (TOKENS | BESIDE | LINEAR | {"SCT"}) - {"VPT, 2 of the blocks"},  # it has two that take prompts
    "caformer": TOKENS,
    "poolformer": TOKENS | PROMPTS | LINEAR,
    "maxvit": TOKENS | BESIDE | {"SCT", "VPT, frame of pixels"},
    "coatnet": (TOKENS | BESIDE | LINEAR | {"SCT", "VPT, frame of pixels"}) - {"VPT-shallow"},  # and one here
    "fastvit": (TOKENS | {"LoRA on fc1, fc2", "FacT", "VPT, image channels"}) - {"VPT, 2 of the blocks"},
}
QUICK = [
    ("resnet", "Mona"),
    ("regnet", "Adapter, Houlsby"),
    ("caformer", "LoRA on q, v"),
    ("caformer", "VPT-deep"),
    ("maxvit", "VPT-deep"),
    ("fastvit", "Mona"),
]


def images(model, batch=2, size=None):
    shape = model.pretrained_cfg["input_size"] if size is None else (3, *size)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("family", "row"), QUICK)
def test_a_method_from_attach_to_detach(family, row, tmp_path):
    make = MODELS[family]
    walk(make, images(make(), len(LABELS)), row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", MODELS)
def test_every_method_fits_or_is_refused(family, row, tmp_path):
    message, make = refusal(MODELS[family], row), MODELS[family]
    assert (message is not None) == (row in REFUSED[family]), message
    if message is None:
        export(walk(make, images(make(), len(LABELS)), row, tmp_path), images(make()))
    else:
        assert any(word in message for word in (type(make()).__name__, "slot", "layer", "size", "channel"))


# ------------------------------------------------------------------ what is found
PUBLISHED = {
    # name: (blocks, widths of the first and the last, blocks by family)
    "resnet18": (8, (64, 512), {"BLOCK": 5, "DOWNSAMPLING": 3}),
    "resnet50": (16, (256, 2048), {"BLOCK": 12, "DOWNSAMPLING": 4}),
    "regnety_002": (13, (24, 368), {"BLOCK": 9, "DOWNSAMPLING": 4}),
    "resnetv2_50": (16, (256, 2048), {"PRE_ACTIVATION": 12, "PRE_ACTIVATION_DOWNSAMPLING": 4}),
    "efficientnet_b0": (16, (16, 320), {"BLOCK": 9, "NO_SKIP": 7}),
    "mixnet_s": (16, (16, 200), {"BLOCK": 11, "NO_SKIP": 5}),
    "mobilenetv4_hybrid_medium": (
        32,
        (48, 960),
        {"BLOCK": 19, "NO_SKIP": 5, "ATTENTION": 4, "ATTENTION_WITHOUT_PROMPTS": 4},
    ),
    "caformer_s18": (18, (64, 512), {"MAPS": 6, "ATTENTION": 12}),
    "maxvit_nano_rw_256": (21, (64, 512), {"MBCONV": 3, "MBCONV_DOWNSAMPLING": 4, "PARTITION": 14}),
    "coatnet_0_rw_224": (
        14,
        (96, 768),
        {"MBCONV": 3, "MBCONV_DOWNSAMPLING": 2, "TRANSFORMER": 7, "TRANSFORMER_DOWNSAMPLING": 2},
    ),
    "fastvit_sa12": (12, (64, 512), {"MIXER": 10, "ATTENTION": 2}),
    "convnext_atto": (12, (40, 320), {"BLOCK": 12}),
}


QUICKLY_BUILT = ("resnet18", "efficientnet_b0", "caformer_s18", "coatnet_0_rw_224", "convnext_atto")


@pytest.mark.parametrize(
    "name", [name if name in QUICKLY_BUILT else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_blocks_of_published_networks(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    (tower,) = dl.describe(model).towers
    families = [block.family.name.partition(":")[2] for block in tower.blocks]
    found = len(families), (tower.blocks[0].width, tower.blocks[-1].width), {f: families.count(f) for f in families}
    assert found == PUBLISHED[name]
    assert tower.image is not None


def test_parts_are_linear_layers():
    block = dl.describe(conv_models.caformer()).blocks()[-1]
    assert sorted(block.parts) == ["fc1", "fc2", "k", "proj", "q", "v"]
    assert block.parts["v"].rows == (48, 72)
    blocks = {type(b.module).__name__: b for b in dl.describe(conv_models.maxvit(head_first=True)).blocks()}
    assert sorted(blocks["PartitionAttentionCl"].parts) == ["fc1", "fc2", "proj", "qkv"]  # q, k, v are no ranges there
    assert not dl.describe(conv_models.caformer()).blocks()[0].parts


class Overriding(BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_subclass_with_a_forward_of_its_own_is_unknown():
    model = conv_models.resnet()
    model.layer2[0].__class__ = Overriding
    blocks = dl.describe(model).blocks()
    assert [b.path for b in blocks if b.slots == {"block.stream"}] == ["layer2.0"]
    x = images(model)
    expected = model(x)
    dl.attach(model, dl.MonaConfig(bottleneck=4, init="identity"))
    torch.testing.assert_close(model.eval()(x), expected)


class OverridingPartition(PartitionAttentionCl):
    def forward(self, x):
        return super().forward(x)


def test_an_unknown_block_keeps_the_layout_of_its_kind():
    """Channels last, in a tower of channels-first maps."""
    model = conv_models.maxvit()
    model.stages[1].blocks[0].attn_grid.__class__ = OverridingPartition
    (block,) = [b for b in dl.describe(model).blocks() if b.slots == {"block.stream"}]
    assert block.path == "stages.1.blocks.0.attn_grid"
    assert block.layout.features(torch.zeros(1, 2, 3, 4)).shape == (1, 2, 3, 4)
    dl.attach(model, dl.MonaConfig(bottleneck=4))
    assert model(images(model)).shape == (2, 5)


@pytest.mark.parametrize("family", ["mobile hybrid", "caformer", "maxvit"])
def test_copies_and_pickles_compute_the_same(family):
    model = MODELS[family]()
    assert all(pkgutil.resolve_name(b.family.name) is b.family for b in dl.describe(model).blocks())
    dl.attach(model, dl.MonaConfig(bottleneck=4))
    randomize_adapter(model).eval()
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        other = images(model, size=(96, 64)) if family == "caformer" else x
        assert model(other).shape == expected.shape


def test_networks_that_only_borrow_a_block_have_no_tower_of_this_family():
    with torch.device("meta"):
        model = timm.create_model("ghostnet_050")
    assert any(isinstance(module, ConvBnAct) for module in model.modules())
    assert list(efficientnet.find_towers(model)) == []


# ------------------------------------------------------------------ frozen statistics, merging, other sizes
@pytest.mark.parametrize("family", ["resnet", "fastvit"])
def test_frozen_batch_norm_keeps_its_statistics_while_training(family):
    model = MODELS[family]()
    dl.attach(model, dl.MonaConfig(bottleneck=4)).train()  # Mona leaves frozen modules in training mode otherwise
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 5
    assert not any(norm.training for norm in norms)
    model(images(model)).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("family", ["maxvit"])
def test_merged_equals_unmerged(family):
    model = MODELS[family]().double()
    dl.attach(model, [dl.LoRAConfig(r=2, parts=("q", "v", "fc1")), dl.VPTConfig(num_tokens=3)])
    randomize_adapter(model).eval()
    x = images(model).double()
    with torch.no_grad():
        expected = model(x)
        merged = dl.merge_and_unload(model)
        torch.testing.assert_close(merged(x), expected, atol=1e-10, rtol=1e-10)


def test_affine_modules_fold_into_the_layers_behind_them():
    model = conv_models.caformer().double()
    dl.attach(model, dl.RepAdapterConfig(bottleneck=4))
    randomize_adapter(model).eval()
    x = images(model).double()
    with torch.no_grad():
        expected = model(x)
        merged = dl.merge_and_unload(model)
        torch.testing.assert_close(merged(x), expected, atol=1e-10, rtol=1e-10)
    left = [m for m in merged.modules() if type(m).__name__ == "RepAdapterLayer"]
    assert len(left) == 4  # in front of convolutions, in the two blocks on maps


def test_token_stages_of_two_sizes_under_checkpointing():
    """Blocks run again in backward, when the stem has recorded another size."""

    def gradients(checkpointing):
        torch.manual_seed(0)
        model = conv_models.caformer().double()
        dl.attach(model, dl.MonaConfig(bottleneck=4, dropout=0.0))
        randomize_adapter(model)
        model.set_grad_checkpointing(checkpointing)
        outputs = [model(images(model, size=size).double()) for size in ((64, 32), (96, 96))]
        sum(output.sum() for output in outputs).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


def test_tokens_of_no_known_map_are_an_error():
    model = conv_models.caformer()
    dl.attach(model, dl.MonaConfig(bottleneck=4))
    model(images(model))
    with pytest.raises(RuntimeError, match="17 tokens are no halving of the stem's map of 16x16"):
        model.stages[2].blocks(torch.randn(1, 17, 16))


# ------------------------------------------------------------------ FastViT's folded form
def test_fastvit_is_reparameterised_under_an_adapter():
    model = conv_models.fastvit()
    dl.attach(model, [dl.AdapterConfig.houlsby(bottleneck=4), dl.RepAdapterConfig(bottleneck=4)])
    randomize_adapter(model).eval()
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        folded = reparameterize_model(model)
        assert folded.stages[0].blocks[0].token_mixer.reparam_conv is not None
        torch.testing.assert_close(folded(x), expected, atol=1e-3, rtol=1e-3)


def test_a_reparameterised_fastvit_is_adapted():
    model = reparameterize_model(conv_models.fastvit())
    x = images(conv_models.fastvit())
    with torch.no_grad():
        expected = model(x)
        dl.attach(model, dl.MonaConfig(bottleneck=4, init="identity"))
        assert (model.eval()(x) - expected).abs().max() < 1e-6
        dl.detach(model)
        assert torch.equal(model(x), expected)


# ------------------------------------------------------------------ ConvNeXt's forms
@pytest.mark.parametrize(
    "options",
    [
        {"conv_mlp": True},
        {"conv_mlp": True, "use_grn": True, "ls_init_value": None},
        {"norm_layer": "simplenorm"},
        {"output_stride": 8},
        {"kernel_sizes": 3, "patch_size": 2, "stem_type": "overlap"},
    ],
)
def test_convnext_in_its_forms(options):
    model = tiny_convnext(**options)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        dl.attach(model, [dl.MonaConfig(bottleneck=4, init="identity"), dl.SSFConfig(std=0)])
        torch.testing.assert_close(model.eval()(x), expected)
        randomize_adapter(model)
        assert (model(x) - expected).abs().max() > 1e-3
        dl.detach(model)
        assert torch.equal(model(x), expected)
    if options.get("conv_mlp"):
        with pytest.raises(TypeError, match=r"weights:fc1.*ConvNeXtBlock"):
            dl.attach(model, dl.LoRAConfig(parts=("fc1", "fc2")))


# ------------------------------------------------------------------ compiled
@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_compiles_as_one_graph(family):
    model = MODELS[family]()
    dl.attach(model, dl.MonaConfig(bottleneck=4))
    randomize_adapter(model).eval()
    x = images(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


def test_condconv_blocks_read_as_the_library_does():
    model = conv_models.efficientnet([["ds_r1_k3_s2_e1_c8"], ["ir_r2_k3_s2_e2_c12_se0.25_cc2"]])
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        dl.attach(model, dl.AdapterConfig.houlsby(bottleneck=2))
        blocks = [type(block.module).__name__ for block in dl.describe(model).blocks()]
        assert blocks == ["DepthwiseSeparableConv", "CondConvResidual", "CondConvResidual"]
        assert torch.equal(model(x), expected)
