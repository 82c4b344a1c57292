"""Networks of no known family: which modules are blocks, when a stream is a map, and what tracing leaves alone."""

import copy
import pickle

import pytest
import timm
import torch
from models import CLASSES, randomize, randomize_adapter
from torch import nn
from unknown_networks import WIDTH, ConvBlock, Layer, Network, TakeMaps, Taker, paths, rows, towers

import deltalens as dl
from deltalens.backbones import unknown
from deltalens.methods import AdapterConfig, MonaConfig
from deltalens.sites.layout import ChannelsFirst, Tokens


# ------------------------------------------------------------------ what is a block
class Stages(nn.Module):
    pretrained_cfg = {"input_size": (3, 32, 32)}

    def __init__(self, *steps):
        super().__init__()
        self.steps, self.head = nn.Sequential(*steps), nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.steps(x)
        x = x[0] if isinstance(x, (tuple, list)) else x
        return self.head(nn.functional.adaptive_avg_pool1d(x.mean((2, 3)), 12))


class Stage(nn.Module):
    """Blocks as attributes, as RegNet has them."""

    def __init__(self, count, width, out):
        super().__init__()
        for i in range(count):
            self.add_module(f"b{i + 1}", ConvBlock(width if i == 0 else out, out, 2 if i == 0 else 1))

    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x


class Two(ConvBlock):
    """A block of two streams, the first handed on as it is."""

    def forward(self, pair):
        first, second = pair if isinstance(pair, tuple) else (pair[:, :2], pair)
        return first, super().forward(second)


class Split(nn.Module):
    def forward(self, x):
        return x[:, :2], x


class Joined(nn.Module):
    def forward(self, pair):
        return torch.cat([pair[1], pair[0]], 1)


def stem():
    return nn.Sequential(Layer(3, WIDTH, 2), Layer(WIDTH, WIDTH), Layer(WIDTH, WIDTH))


def plain_list():
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1))


# what the network is made of -> paths of its blocks
SHAPES = {
    "stages with attributes": (
        lambda: (Layer(3, WIDTH), Stage(2, WIDTH, 8), Stage(1, 8, 10), Stage(3, 10, 12)),
        ["steps.1.b1", "steps.1.b2", "steps.2.b1", "steps.3.b1", "steps.3.b2", "steps.3.b3"],
    ),
    "a stem of layers": (lambda: (*stem(), ConvBlock(), ConvBlock()), ["steps.3", "steps.4"]),
    "a single block in every stage": (
        lambda: (stem(), Stage(1, WIDTH, 8), Stage(1, 8, 10)),
        ["steps.1", "steps.2"],
    ),
    "growing widths": (
        lambda: (stem(), ConvBlock(WIDTH, 7), ConvBlock(7, 8), ConvBlock(8, 9)),
        ["steps.1", "steps.2", "steps.3"],
    ),
    "plain lists of layers": (
        lambda: (
            Layer(3, WIDTH),
            nn.Sequential(plain_list(), plain_list()),
        ),
        ["steps.1.0", "steps.1.1"],
    ),
    "layers only": (
        lambda: (Layer(3, WIDTH), Layer(WIDTH, WIDTH), Layer(WIDTH, 8, 2)),
        ["steps.0", "steps.1", "steps.2"],
    ),
    "convolutions only": (
        lambda: (nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 9, 3)),
        ["steps.0", "steps.2", "steps.4"],
    ),
    "two streams": (lambda: (stem(), Split(), Two(), Two(), Joined()), ["steps.2", "steps.3"]),
    "two kinds in turn": (
        lambda: (stem(), ConvBlock(), Stage(1, WIDTH, WIDTH), ConvBlock(), Stage(1, WIDTH, WIDTH)),
        ["steps.1", "steps.2", "steps.3", "steps.4"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_blocks_are_found_and_can_be_adapted(case, tmp_path):
    make, expected = SHAPES[case]

    def build():
        torch.manual_seed(0)
        return randomize(Stages(*make())).eval()

    model, x = build(), torch.randn(2, 3, 32, 32)
    assert paths(model) == expected
    assert all(isinstance(tower.layout, ChannelsFirst) for tower in towers(model))
    plain = model(x)
    dl.attach(model, MonaConfig(bottleneck=2))
    randomize_adapter(model)
    output = model.eval()(x)
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    dl.save_pretrained(model, tmp_path)
    assert torch.equal(dl.from_pretrained(tmp_path, build())(x), output)
    copied = pickle.loads(pickle.dumps(model)) if case != "two streams" else copy.deepcopy(model)
    assert torch.equal(copied(x), output)
    assert torch.equal(dl.detach(model)(x), plain)


def test_a_block_that_is_a_list_of_layers_keeps_its_length_and_items():
    model = Stages(*SHAPES["plain lists of layers"][0]())
    block = model.steps[1][0]
    before = [type(layer) for layer in block]
    dl.attach(model, MonaConfig(bottleneck=2))
    assert isinstance(block, nn.Sequential)
    assert "delta" in block._modules
    assert ([type(layer) for layer in block], len(block)) == (before, 3)
    assert type(block[-1]) is nn.Conv2d
    assert len(block[:2]) == 2


def test_a_block_that_is_called_twice():
    """ALBERT's way: one block is every block. It acts each time."""
    model = Network(lambda self, x: rows(x), blocks=2)
    model.blocks[1] = model.blocks[0]
    assert paths(Network(lambda self, x: rows(x), blocks=2)) == ["blocks.0", "blocks.1"]
    (tower,) = towers(model, blocks=r"blocks\.0")
    assert isinstance(tower.layout, Tokens)
    calls = []
    dl.attach(model, TakeMaps(), blocks=r"blocks\.0")
    model.blocks[0].delta.register_forward_hook(lambda *a: None)
    taker = next(m for m in model.modules() if isinstance(m, Taker))
    taker.register_forward_hook(lambda *a: calls.append(1))
    model(torch.randn(1, 3, 32, 48))
    assert len(calls) == 2


def test_a_block_that_is_called_on_streams_of_two_sizes_has_no_map():
    class Pyramid(Network):
        def forward(self, x):
            fine, coarse = self.patches(x), nn.functional.avg_pool2d(self.patches(x), 2)
            return self.head(self.blocks(rows(fine)).mean(1) + self.blocks(rows(coarse)).mean(1))

    model = Pyramid(None)
    (tower,) = towers(model)
    assert "called several times, on streams of different sizes" in tower.layout.reason
    dl.attach(model, AdapterConfig.pfeiffer(bottleneck=2))
    model(torch.randn(1, 3, 32, 48))


# published architecture -> (class of its blocks, their number, has a map) of every tower
PUBLISHED = {
    "regnetx_002": {("Bottleneck", 13, True)},
    "pvt_v2_b0": {("Block", 2, True)},
    "vgg11": {("Conv2d", 9, True)},
}
SLOW = {
    "hrnet_w18_small": {("Bottleneck", 23, True), ("BasicBlock", 23, True)},
    "levit_128s": {("LevitBlock", 2, True), ("LevitBlock", 7, False)},
    "rexnet_100": {("LinearBottleneck", 16, True)},
    "dpn48b": {("DualPathBlock", 16, True)},
    "crossvit_tiny_240": {("Block", 3, True), ("Block", 12, True), ("CrossAttentionBlock", 6, False)},
    "densenet121": {("DenseLayer", 58, True)},
    "tnt_s_legacy_patch16_224": {("Block", 12, False)},
    "hiera_tiny_224": {("HieraBlock", 12, False)},
    "nest_tiny": {("TransformerLayer", 12, False)},
    "coat_tiny": {("SerialBlock", 2, True), ("SerialBlock", 8, True), ("ParallelBlock", 8, True)},
    "cait_xxs24_224": {("LayerScaleBlock", 24, True), ("LayerScaleBlockClassAttn", 2, False)},
    "convmixer_768_32": {("Sequential", 32, True)},
    "convit_tiny": {("Block", 10, True), ("Block", 2, True)},
    "inception_v3": {("InceptionA", 9, True), ("InceptionC", 9, True), ("InceptionE", 9, True)},
}


@pytest.mark.parametrize("name", [*PUBLISHED, *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]])
def test_published_architectures(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    found = [tower for _, tower in unknown.find_towers(model)]
    kinds = {(type(b.module).__name__, len(t.blocks), t.layout.has_map) for t in found for b in t.blocks}
    assert kinds == (PUBLISHED | SLOW)[name]
