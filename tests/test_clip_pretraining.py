"""What `python -m tools.pretrain clip` begins with and learns from."""

import random
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from deltalens.backbones.open_clip import mini
from deltalens.data.drawn_shapes import HELD_OUT, Look

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.pretrain.clip.captions import Captions, drawn_pictures, words
from tools.pretrain.clip.towers import Vocabulary, contrast, create, encode_texts, penultimate

NAMES = [["goldfish", "Carassius auratus"], ["bee"], ["school bus"]]
LOOKS = [Look("striped", "red", "star"), Look("plain", "red", "ring"), Look("striped", "red", "star")]


@pytest.fixture(scope="module")
def captions():
    return Captions(NAMES, LOOKS)


@pytest.fixture(scope="module")
def vocabulary(captions):
    return Vocabulary(captions.vocabulary())


@pytest.fixture(scope="module")
def clip(vocabulary):
    torch.manual_seed(0)
    return create(vocabulary).eval()


@torch.no_grad()
def test_the_image_tower_begins_with_the_features_of_vit_mini(clip):
    vit = timm.create_model("deltalens_vit_mini", pretrained=True, num_classes=0).eval()
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(penultimate(clip.visual, images), vit(images), atol=1e-4, rtol=0)


@torch.no_grad()
def test_renumbered_and_cut_texts_have_the_features_of_the_whole_model(clip, vocabulary):
    whole = mini.untrained().eval()
    weights = dict(clip.state_dict())
    table = whole.token_embedding.weight.clone()
    table[vocabulary.ids] = weights[mini.TABLE]
    whole.load_state_dict(weights | {mini.TABLE: table})
    texts = ["a photo of a school bus.", "bee", "a drawing of a striped red star."]
    wanted = whole.encode_text(mini.tokenizer()(texts), normalize=True)
    torch.testing.assert_close(encode_texts(clip, vocabulary(texts)), wanted, atol=1e-5, rtol=0)


def test_a_caption_describes_every_image_that_has_what_it_says(captions):
    labels = torch.tensor([2, 3, 4, 5, 0])
    seen = set()
    for seed in range(30):
        step = captions.of(labels, random.Random(seed))
        assert step.positives.any(1).all()
        assert step.positives[:, :3].nonzero().tolist() == [[0, 2], [4, 0]]  # photographs, of their classes alone
        assert torch.equal(step.positives[1], step.positives[3])  # two pictures of one look
        for text, column in zip(step.texts[3:], step.positives.T[3:], strict=True):
            said = text.replace("on a plain background", "").replace(".", "").split()
            assert column[1] == (not {"plain", "ring"} & set(said))
            assert column[2] == (not {"striped", "star"} & set(said))
            seen.add(tuple(column.tolist()))
    assert (False, True, True, True, False) in seen  # such as "red shape"
    assert words({"colour": "red"}) == "red shape"


def test_the_loss_is_that_of_clip_where_each_text_describes_one_image(clip):
    images, texts = (
        F.normalize(torch.randn(4, 128, generator=torch.Generator().manual_seed(s)), dim=-1) for s in (0, 1)
    )
    logits = clip.logit_scale.exp() * images @ texts.T
    wanted = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    found = contrast(clip, images, texts, torch.eye(4, dtype=torch.bool))
    torch.testing.assert_close(found, wanted)

    doubled = contrast(clip, images[[0, 0, 1]], texts[:2], torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.bool))
    each = F.cross_entropy((clip.logit_scale.exp() * images[[0, 0, 1]] @ texts[:2].T), torch.tensor([0, 0, 1]))
    back = F.log_softmax(clip.logit_scale.exp() * texts[:2] @ images[[0, 0, 1]].T, dim=1)
    torch.testing.assert_close(doubled, (each - (back[0, :2].mean() + back[1, 2]) / 2) / 2)


def test_drawings_for_training_lack_the_pairs_that_are_held_out():
    for held_out in (False, True):
        pictures, looks = drawn_pictures(30, seed=0, held_out=held_out)
        assert pictures.shape == (30, 3, 48, 48)
        assert {(look.colour, look.shape) in HELD_OUT for look in looks} == {held_out}
