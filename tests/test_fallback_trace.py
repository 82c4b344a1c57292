"""What tracing an unknown network leaves alone and remembers, and errors that say what to do."""

import copy
import functools

import pytest
import torch
from models import tiny_resnet
from torch import nn
from unknown_networks import WIDTH, ConvBlock, Network, paths, rows, towers

import deltalens as dl
from deltalens.backbones import unknown
from deltalens.methods import LinearConfig, MonaConfig


# ------------------------------------------------------------------ what tracing leaves alone
class Remembering(Network):
    """Caches what it computes in eval mode, counts its calls and draws a random number."""

    def __init__(self):
        super().__init__(lambda self, x: rows(x))
        self.cache, self.calls = {}, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.cache.setdefault("table", self.extra * 2)
        return super().forward(x + torch.rand(()) * self.cache["table"].sum())


def test_the_model_itself_is_not_run():
    model, called = Remembering().train(), []
    model.blocks[1].eval()
    model.blocks[0].register_forward_hook(lambda *arguments: called.append(1))
    state = torch.get_rng_state()
    assert len(paths(model)) == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.calls, model.cache, called, float(model.count)) == (0, {}, [], 0)
    assert (model.training, model.blocks[1].training) == (True, False)
    assert len(model.blocks[0]._forward_hooks) == 1


def test_a_trace_is_remembered_until_the_structure_changes(monkeypatch, tmp_path):
    traced = []
    monkeypatch.setattr(unknown, "trace", lambda *args: traced.append(1) or real(*args))
    from deltalens.backbones.trace import trace as real

    model = tiny_resnet()
    dl.attach(model, MonaConfig(bottleneck=2))
    dl.attach(model, LinearConfig(), name="other", num_classes=3)
    dl.save_pretrained(model, tmp_path)
    dl.detach(model)
    dl.describe(model, blocks=r"layer\d\.\d")
    assert len(traced) == 1
    assert dl.describe(model, blocks=r"layer[12]\.\d").blocks()[-1].path == "layer2.0"
    assert len(traced) == 1
    model.layer1[1] = nn.Identity()
    assert "layer1.1" not in paths(model)
    assert len(traced) == 2
    paths(copy.deepcopy(model))
    assert len(traced) == 3


def test_an_adapted_model_is_seen_as_the_plain_one():
    """Prompts, recorders and modules of adapters do not change what is found."""
    model = tiny_resnet()
    expected = [(block.path, block.width) for block in dl.describe(model).blocks()]
    dl.attach(model, [MonaConfig(bottleneck=2), LinearConfig()])
    unknown._KNOWN.pop(model, None)
    assert [(block.path, block.width) for block in dl.describe(model).blocks()] == expected


# ------------------------------------------------------------------ errors that say what to do
def test_a_model_of_two_inputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = Network(lambda self, x: rows(x))

        def forward(self, images, text):
            return self.visual(images)

    with pytest.raises(TypeError, match=r"Pair is of no known family, and a trial forward .* failed.*backbone="):
        dl.attach(Pair(), MonaConfig())
    dl.attach(Pair(), MonaConfig(), backbone="visual")


def test_a_network_without_blocks():
    class Nothing(nn.Module):
        pretrained_cfg = {"input_size": (3, 32, 32)}

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x.mean((2, 3)))

    with pytest.raises(TypeError, match=r"no repeated blocks found in Nothing; name them with blocks="):
        dl.attach(Nothing(), MonaConfig())


def test_images_of_another_size_are_tried_where_the_declared_one_does_not_fit():
    model = Network(lambda self, x: rows(x) + self.extra)
    model.pretrained_cfg = {"input_size": (3, 224, 224)}
    with pytest.raises(TypeError, match="trial forward"):
        paths(model)
    model.extra = nn.Parameter(torch.randn(1, 144, WIDTH))
    (tower,) = towers(model)
    assert tower.image_size == (96, 96)


@functools.lru_cache
def remembered_positions(size: int) -> torch.Tensor:
    return torch.arange(size).float()


class Remembers(nn.Module):
    """A network with a function that keeps its results, as transformers' rotary embeddings have."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(*[ConvBlock(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return x + remembered_positions(x.shape[-1])


def test_results_that_functions_keep_are_not_left_fake():
    model, x = Remembers().eval(), torch.randn(1, 3, 224, 224)
    dl.describe(model)
    with torch.no_grad():
        found = model(x)
    assert type(found) is torch.Tensor
    assert type(remembered_positions(56)) is torch.Tensor
    torch.testing.assert_close(found, model.blocks(model.stem(x)) + torch.arange(56).float())
