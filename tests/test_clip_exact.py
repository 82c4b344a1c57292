"""Exact shortcuts of two towers against the published forms in float64, and where they are not taken."""

import pytest
import torch
import torch.nn.functional as F
from clip_models import NAMES, hf_model, open_clip_model, zero_shot
from hf_models import tiny
from models import randomize_adapter
from torch import nn

import deltalens as dl
from deltalens.backbones.two_towers import two_towers_of
from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.methods import (
    CLIPAdapterConfig,
    CoCoOpConfig,
    CoOpConfig,
    LoRAConfig,
    MaPLeConfig,
    Method,
    MMAConfig,
    MonaConfig,
    RPOConfig,
    VPTConfig,
)
from deltalens.studies.plain_clip import plain_coop, plain_mma, trained_pairs

LIBRARIES = {"open_clip": open_clip_model, "transformers": hf_model}
EXACT = {"atol": 1e-10, "rtol": 1e-10}
MMA = MMAConfig(start=2, bottleneck=4, alpha=0.5)
LAYERS = 4


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def adapted(library, method, **options):
    model = zero_shot(clip=LIBRARIES[library](**options)).double()
    dl.attach(model, method)
    return randomize_adapter(model)


# ------------------------------------------------------------------ the published forms
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "method", [MMA, CoOpConfig(num_words=4), CoCoOpConfig(reduction=4)], ids=lambda m: type(m).__name__
)
def test_equal_to_the_published_form(library, method, images):
    """Logits and gradients of the whole towers of open_clip, twice: the second time from what was kept."""
    ours, labels = adapted(library, method), torch.tensor([0, 4, 2])
    make = plain_mma if isinstance(method, MMAConfig) else plain_coop
    plain = make(open_clip_model().double(), ours)
    theirs, mine = zip(*trained_pairs(plain, ours), strict=True)
    assert {id(p) for p in mine} == {id(p) for p in ours.parameters() if p.requires_grad}
    expected = plain.train()(images)
    wanted = torch.autograd.grad(F.cross_entropy(expected, labels), theirs)
    for _ in range(2):
        logits = ours.train()(images)
        torch.testing.assert_close(logits, expected, **EXACT)
        for one, other in zip(torch.autograd.grad(F.cross_entropy(logits, labels), mine), wanted, strict=True):
            torch.testing.assert_close(one, other, **EXACT)
            assert other.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), plain.eval()(images), **EXACT)


def test_plain_forms_are_those_of_open_clip():
    with pytest.raises(ValueError, match="not for this CLIPModel"):
        plain_mma(hf_model(), adapted("transformers", MMA))


# ------------------------------------------------------------------ what is computed
def _rows(model):
    """(tower, block, rows) of every block's MLP, as they are called."""
    seen = []
    for tower in dl.describe(model).towers:
        for site in tower.blocks:
            first = next(m for m in site.module.mlp.modules() if isinstance(m, nn.Linear))
            first.register_forward_pre_hook(
                lambda _, args, at=(tower.name, site.index): seen.append((*at, args[0].shape[1]))
            )
    return seen


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_blocks_compute_the_row_that_is_read(library, checkpointing, images):
    model = adapted(library, MMA)
    expected = model.train()(images)
    if checkpointing and library == "transformers":
        model.clip.gradient_checkpointing_enable()  # holds frozen blocks in training mode, where nothing is kept
    elif checkpointing:
        model.clip.set_grad_checkpointing()
    seen = _rows(model)
    torch.testing.assert_close(model.train()(images), expected, **EXACT)
    longest = int(model.prompts().ends.max()) + 1
    wanted = [("vision", i, 5) for i in range(LAYERS - 1)] + [("vision", LAYERS - 1, 1)]
    wanted += [("text", i, longest) for i in range(LAYERS - 1)] + [("text", LAYERS - 1, 1)]
    assert sorted(seen) == sorted(wanted)
    assert longest < 77
    seen.clear()
    model(images)
    below_was_kept = ("text", 0, longest) not in seen
    assert below_was_kept or (checkpointing and library == "transformers")


@pytest.mark.parametrize("library", LIBRARIES)
def test_backward_begins_above_the_first_adapted_block(library, images):
    """That block needs the gradient of its output only; attention and norms are in the graph from the next one on."""
    first = 2
    model = adapted(library, MMAConfig(start=first, bottleneck=4))
    found = _graph(model.train()(images).sum())
    above = LAYERS - first
    assert sum("Attention" in name for name in found) == 2 * above
    assert sum("LayerNorm" in name for name in found) == 2 * (2 * above + 1)  # two in a block, one behind the tower
    assert not any("Convolution" in name or "Embedding" in name for name in found)


def _graph(value):
    """Names of the nodes that backward visits."""
    found, left = {}, [value.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found[node] = node.name()
            left += [each for each, _ in node.next_functions]
    return list(found.values())


# ------------------------------------------------------------------ every method, in both libraries
class Whole(nn.Module):
    """The library's own pass of the image tower, all rows of the last block."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        vision = self.model.vision_model
        return self.model.visual_projection(vision(images).pooler_output)


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (MMA, 1),
        (LoRAConfig(r=2, parts=("q", "k", "v", "proj", "fc1", "fc2")), 1),
        (VPTConfig(num_tokens=2), 1),
        (VPTConfig(num_tokens=2, deep=False), 1),
        (CLIPAdapterConfig(), 1),
        (MaPLeConfig(depth=3), 1),
        ([MonaConfig(bottleneck=4)], 5),
        (RPOConfig(num_prompts=3), 8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rows_of_transformers_image_tower(method, rows, images):
    """One row where nothing else is read; all where a module looks at the map, or the head reads more tokens."""
    model = zero_shot(clip=hf_model()).double()
    dl.attach(model, method, tower="vision" if isinstance(method, (list, VPTConfig)) else None)
    randomize_adapter(model)
    seen = _rows(model)
    ours = two_towers_of(model.clip).image(model.clip, images)
    assert [count for name, index, count in seen if (name, index) == ("vision", LAYERS - 1)] == [rows]
    if rows > 5:
        return  # K tokens are read, which the library's pass does not return
    whole = Whole(model.clip)(images)
    torch.testing.assert_close(ours, whole, **EXACT)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(whole.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = [
        torch.autograd.grad((value * weights).sum(), trained, allow_unused=True) if value.requires_grad else ()
        for value in (ours, whole)
    ]
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **EXACT)


def test_who_listens_to_the_image_tower_gets_all_tokens(images):
    model = adapted("transformers", MMA)
    seen = []
    model.clip.vision_model.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state.shape[1]))
    expected = model(images)
    assert seen == [5]
    model.clip.vision_model._forward_hooks.clear()
    torch.testing.assert_close(model(images), expected, **EXACT)


# ------------------------------------------------------------------ where texts must not be cut
class Neighbours(nn.Module):
    """Adds to every word what stands before it: not pointwise."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x + self.scale * x.roll(1, 1)


class Mixing(Method):
    name = "mixing"

    def place(self, anatomy):
        text = next(tower for tower in anatomy.towers if tower.name == "text")
        yield text.blocks[-1], "block.stream", Neighbours()


@pytest.mark.parametrize("library", LIBRARIES)
def test_all_words_for_a_module_that_reads_them(library):
    model = adapted(library, Mixing())
    seen = _rows(model)
    ours = model.text_features()
    assert seen[-1] == ("text", LAYERS - 1, int(model.prompts().ends.max()) + 1)
    whole = F.normalize(two_towers_of(model.clip).text(model.clip, model.prompts().ids), dim=-1)
    torch.testing.assert_close(ours, whole, **EXACT)


def test_siglip_reads_every_word():
    """Words see those behind them: nothing is cut, and the last block still computes the row that is read."""

    def words(texts):
        return torch.tensor([([1 + ord(c) % 20 for c in text[-9:]] + [0] * 12)[:12] for text in texts])

    model = ZeroShotClassifier(tiny("SiglipModel"), words, NAMES, "a {}").double().eval()
    dl.attach(model, LoRAConfig(r=2, parts=("q", "k", "v", "proj")), tower="text")
    randomize_adapter(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    seen = _rows(model)
    ours = model.text_features()
    assert {count for _, _, count in seen[:-1]} == {12}
    assert seen[-1][-1] == 1
    whole = F.normalize(two_towers_of(model.clip).text(model.clip, model.prompts().ids), dim=-1)
    torch.testing.assert_close(ours, whole, **EXACT)
    weights = torch.randn(whole.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = [torch.autograd.grad((value * weights).sum(), trained) for value in (ours, whole)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    shorter = two_towers_of(model.clip).text(model.clip, F.pad(model.prompts().ids[:, :10], (0, 2), value=3))
    assert not torch.allclose(F.normalize(shorter, dim=-1), whole, atol=1e-6)  # words behind the text count
