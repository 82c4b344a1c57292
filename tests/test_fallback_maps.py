"""When the stream of a network of no known family is proven to be a map."""

import pytest
import torch
from models import randomize_adapter
from torch import nn
from unknown_networks import WIDTH, Network, Residual, TakeMaps, rows, towers

import deltalens as dl
from deltalens.methods import AdapterConfig, MonaConfig
from deltalens.sites.layout import ChannelsLast, PlainFirst, Sequence, Tokens

# ------------------------------------------------------------------ what is a map


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
