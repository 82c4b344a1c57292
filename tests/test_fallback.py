"""Networks of no known family: which modules are blocks, when a stream is a map, and what tracing leaves alone."""

import copy
import pickle

import pytest
import timm
import torch
from models import CLASSES, randomize, randomize_adapter
from torch import nn

import deltalens as dl
from deltalens.backbones import unknown
from deltalens.methods import AdapterConfig, Method, MonaConfig
from deltalens.sites.layout import ChannelsFirst, ChannelsLast, PlainFirst, Sequence, Tokens

WIDTH = 6


class Residual(nn.Module):
    """A block on any stream with channels last: x + mlp(x)."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, *others):
        return x + self.fc2(self.fc1(x).relu())


class ConvBlock(nn.Module):
    def __init__(self, width=WIDTH, out=None, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out or width, 3, stride, 1)
        self.conv2 = nn.Conv2d(out or width, out or width, 3, 1, 1)

    def forward(self, x):
        y = self.conv2(self.conv1(x).relu())
        return x + y if x.shape == y.shape else y


class Layer(nn.Module):
    """A convolution with norm and activation, as stems are made of."""

    def __init__(self, inside, out, stride=1):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inside, out, 3, stride, 1), nn.BatchNorm2d(out)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class Network(nn.Module):
    """Patches, then `arrange`, then blocks, then the mean as features."""

    pretrained_cfg = {"input_size": (3, 32, 48)}

    def __init__(self, arrange, blocks=3):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.extra = nn.Parameter(torch.randn(1, 24, WIDTH))
        self.blocks = nn.Sequential(*[Residual() for _ in range(blocks)])
        self.head, self.arrange = nn.Linear(WIDTH, CLASSES), arrange

    def forward(self, x):
        x = self.blocks(self.arrange(self, self.patches(x)))
        return self.head(x.flatten(1, -2).mean(1))


def towers(model, blocks=None):
    return dl.describe(model, blocks=blocks).towers


def paths(model):
    return [block.path for block in dl.describe(model).blocks()]


# ------------------------------------------------------------------ what is a map
def rows(x):
    return x.flatten(2).transpose(1, 2)


def class_first(self, x):
    return torch.cat([self.extra[:, :1].expand(len(x), -1, -1), rows(x)], 1) + 0.1


def queries(self, x):
    """24 learned tokens that look at the 24 of the image."""
    return self.extra + (self.extra @ rows(x).transpose(1, 2)).softmax(-1) @ rows(x)


def windows(self, x):
    """Tokens window by window (2 x 2), as Hiera and Swin order them."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, c)


MAPS = {
    "tokens in row order": (lambda self, x: rows(x), Tokens, 0),
    "a class token before them": (class_first, Tokens, 1),
    "with positions and a norm": (lambda self, x: nn.functional.layer_norm(rows(x) + self.extra, (WIDTH,)), Tokens, 0),
    "there and back again": (lambda self, x: rows(x).flip(1).roll(5, 1).roll(-5, 1).flip(1), Tokens, 0),
    "channels last": (lambda self, x: x.permute(0, 2, 3, 1), ChannelsLast, 0),
    "reshaped by hand": (lambda self, x: x.permute(0, 2, 3, 1).reshape(len(x), -1, WIDTH).contiguous(), Tokens, 0),
}
NO_MAPS = {
    "window by window": windows,
    "column by column": lambda self, x: x.transpose(2, 3).flatten(2).transpose(1, 2),
    "backwards": lambda self, x: rows(x).flip(1),
    "as many learned tokens": queries,
    "the class token behind": lambda self, x: class_first(self, x).roll(-1, 1),
    "indexed": lambda self, x: rows(x)[:, torch.randperm(24)],
    "height and width swapped": lambda self, x: x.permute(0, 3, 2, 1),
    "channels read as positions": lambda self, x: x.reshape(len(x), 24, WIDTH),
    "windows of tokens": lambda self, x: windows(self, x).unflatten(1, (6, 4)),
    "one half changed in place": lambda self, x: swapped_halves(rows(x)),
}


def swapped_halves(x):
    x = x.clone()
    x[:, :12], x[:, 12:] = x[:, 12:].clone(), x[:, :12].clone()
    return x


class Taker(nn.Module):
    """A spatial module that keeps the map it gets."""

    spatial = True

    def forward(self, x):
        self.seen = x
        return x


class TakeMaps(Method):
    name = "takemaps"

    def __init__(self):
        self.__dict__["takers"] = []

    def place(self, anatomy):
        for block in anatomy.blocks():
            self.takers.append(Taker())
            yield block, "block.stream", self.takers[-1]


@pytest.mark.parametrize("case", MAPS)
@pytest.mark.parametrize("size", [(32, 48), (40, 16)])
def test_every_position_of_a_map_is_that_of_the_image(case, size):
    """One patch of the image is changed; just that position of every block's map changes."""
    arrange, layout, prefix = MAPS[case]
    if "positions" in case and size != (32, 48):
        pytest.skip("its position embedding is of one size")
    model = Network(arrange)
    assert type(towers(model)[0].layout) is layout
    assert towers(model)[0].layout.prefix == prefix
    method = TakeMaps()
    dl.attach(model, method)
    x = torch.randn(1, 3, *size)
    model(x)
    before = [taker.seen for taker in method.takers]
    for row, column in ((0, 0), (size[0] // 8 - 1, 1), (1, size[1] // 8 - 1)):
        changed = x.clone()
        changed[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
        model(changed)
        for taker, old in zip(method.takers, before, strict=True):
            assert taker.seen.shape == (1, size[0] // 8, size[1] // 8, WIDTH)
            moved = (taker.seen - old).abs().sum(-1)[0] > 1e-6
            assert moved.nonzero().tolist() == [[row, column]]


@pytest.mark.parametrize("case", NO_MAPS)
def test_what_is_not_proven_is_no_map(case):
    model = Network(NO_MAPS[case])
    assert not towers(model)[0].layout.has_map
    with pytest.raises(TypeError, match=r"Mona works on maps.*cannot be proven to be a map in row order; blocks="):
        dl.attach(model, MonaConfig(bottleneck=4))
    expected = model(torch.ones(2, 3, 32, 48))
    if case != "indexed":
        dl.attach(model, AdapterConfig.pfeiffer(bottleneck=2))
        randomize_adapter(model)
        assert not torch.allclose(model(torch.ones(2, 3, 32, 48)), expected)


def test_a_volume_and_a_stream_with_the_batch_second():
    class Volume(nn.Module):
        pretrained_cfg = {"input_size": (3, 16, 16)}

        def __init__(self):
            super().__init__()
            self.stem = nn.Conv3d(1, WIDTH, 3, 1, 1)
            self.blocks = nn.ModuleList([VolumeBlock(), VolumeBlock()])

        def forward(self, x):
            x = self.stem(x[:, None])
            for block in self.blocks:
                x = block(x)
            return x.mean((2, 3, 4))

    class VolumeBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv3d(WIDTH, WIDTH, 3, 1, 1), nn.Conv3d(WIDTH, WIDTH, 1)

        def forward(self, x):
            return x + self.conv2(self.conv1(x).relu())

    model, x = Volume(), torch.randn(2, 3, 16, 16)
    (tower,) = towers(model)
    assert isinstance(tower.layout, PlainFirst)
    assert [block.width for block in tower.blocks] == [WIDTH, WIDTH]
    expected = model(x)
    dl.attach(model, AdapterConfig.pfeiffer(bottleneck=2))
    assert not torch.equal(randomize_adapter(model)(x), expected)

    swapped = Network(lambda self, x: rows(x).transpose(0, 1))
    swapped.forward = lambda x: swapped.head(swapped.blocks(rows(swapped.patches(x)).transpose(0, 1)).mean(0))
    assert isinstance(towers(Network(lambda self, x: rows(x).transpose(0, 1)))[0].layout, Sequence)


class Merging(nn.Module):
    """Two stages on channels-last maps; between them every 2 x 2 positions become one, as in Swin."""

    def __init__(self, patches):
        super().__init__()
        self.stem, self.patches = nn.Conv2d(3, WIDTH, 4, 4), patches
        self.first = nn.Sequential(Residual(), Residual())
        self.reduction = nn.Linear(4 * WIDTH, 8)
        self.second = nn.Sequential(Residual(8), Residual(8))

    def forward(self, x):
        x = self.first(self.stem(x).permute(0, 2, 3, 1))
        return self.second(self.reduction(self.patches(x)))


def in_order(x):
    b, h, w, c = x.shape
    return x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)


PATCHES = {
    "in row order": (in_order, True),
    "four slices": (lambda x: torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1), True),
    "column by column": (lambda x: in_order(x).transpose(1, 2), False),
    "halves instead of neighbours": (
        lambda x: torch.cat([half for rows in x.chunk(2, 1) for half in rows.chunk(2, 2)], -1),
        False,
    ),
}


@pytest.mark.parametrize("case", PATCHES)
def test_patches_merged_by_a_linear_layer_are_a_map_if_they_lie_in_order(case):
    patches, is_map = PATCHES[case]
    layouts = {site.path: site.layout for site in dl.describe(Merging(patches)).blocks()}
    assert isinstance(layouts["first.0"], ChannelsLast)
    assert isinstance(layouts["second.1"], ChannelsLast) == is_map
    assert layouts["second.1"].has_map == is_map


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
