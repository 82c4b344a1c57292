"""Learned words in towers that read in both directions and pool at the last position, as SigLIP's do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from clip_models import NAMES

import deltalens as dl
from deltalens.backbones.class_prompts import word_counts
from deltalens.backbones.zero_shot import ZeroShotClassifier
from deltalens.methods import CoCoOpConfig, CoOpConfig, KgCoOpConfig, LASPConfig, MaPLeConfig, ProGradConfig, RPOConfig
from deltalens.tasks import ClassificationTask, backward

LENGTH, END, VOCABULARY = 16, 1, 40


def siglip_tokenizer(texts):
    """No start, an end that padding repeats, small letters without points; long words are two tokens."""
    rows = []
    for text in texts:
        words = text.lower().replace(".", "").split()
        ids = [2 + (sum(map(ord, part)) % (VOCABULARY - 2)) for w in words for part in (w[:8], w[8:]) if part]
        rows.append([*ids[: LENGTH - 1], *[END] * (LENGTH - len(ids[: LENGTH - 1]))])
    return torch.tensor(rows)


def hf_siglip():
    from transformers import SiglipConfig, SiglipModel

    shared = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    text = shared | {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config=shared | {"image_size": 32, "patch_size": 16})
    torch.manual_seed(0)
    return SiglipModel._from_config(config).eval()


def open_clip_siglip(pool_type="last"):
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=16, image_size=32)
    text = CLIPTextCfg(context_length=LENGTH, vocab_size=VOCABULARY, width=32, heads=2, layers=3, proj_bias=True,
                       no_causal_mask=True, pool_type=pool_type)  # fmt: skip
    return CustomTextCLIP(32, vision, text, init_logit_bias=-10.0).eval()


MODELS = {"transformers": hf_siglip, "open_clip": open_clip_siglip}
METHODS = {
    "coop": CoOpConfig(num_words=3),
    "coop of a text": CoOpConfig(init="a photo of a"),
    "coop, front": CoOpConfig(num_words=3, position="front"),
    "coop, middle": CoOpConfig(num_words=4, position="middle"),
    "coop per class": CoOpConfig(num_words=2, per_class=True),
    "kgcoop": KgCoOpConfig(num_words=3, init=None),
    "prograd": ProGradConfig(num_words=3),
    "cocoop": CoCoOpConfig(num_words=2, init=None),
    "lasp": LASPConfig(num_words=3, init=None, norms=False, noise=0.0),
}


def classifier(make, **options):
    clip = MODELS[make]().double() if isinstance(make, str) else make
    return ZeroShotClassifier(clip, siglip_tokenizer, NAMES, **options).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


def plain_logits(clip, images, texts):
    """The library's own passes. texts: function (row of ids' embeddings (L, d), class) -> the row with words in it."""
    text = clip.text_model.embeddings if hasattr(clip, "text_model") else clip.text
    ids = siglip_tokenizer([f"X {name.replace('_', ' ')}." for name in NAMES])
    handle = text.token_embedding.register_forward_hook(
        lambda module, args, out: torch.stack([texts(row, i) for i, row in enumerate(out)])
    )
    try:
        encode = clip.get_text_features if hasattr(clip, "text_model") else clip.encode_text
        features = encode(ids)
    finally:
        handle.remove()
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    image = clip.get_image_features(images) if hasattr(clip, "text_model") else clip.encode_image(images)
    image = image if isinstance(image, torch.Tensor) else image.pooler_output
    cosines = F.normalize(image, dim=-1) @ F.normalize(features, dim=-1).T
    return clip.logit_scale.exp() * cosines + clip.logit_bias


def with_words(config, ctx):
    """Rows "X name end end ..." -> the words of the method at their place, padding kept to the trained length."""
    lengths = word_counts([name.replace("_", " ") for name in NAMES], siglip_tokenizer)[1].tolist()
    front = {"end": None, "front": 0, "middle": config.num_words // 2}[config.position]

    def row(embedded, index):
        name, rest = embedded[1 : 1 + lengths[index]], embedded[1 + lengths[index] :]
        words = ctx[index] if ctx.dim() == 3 else ctx
        cut = len(words) if front is None else front
        return torch.cat([words[:cut], name, words[cut:], rest])[:LENGTH]

    return row


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("coop")])
def test_words_stand_where_the_library_would_read_them(make, name, images):
    """Logits and gradients in float64 against the library's own pass over the same embeddings."""
    config = METHODS[name]
    plain = MODELS[make]().double()
    model = dl.attach(classifier(copy.deepcopy(plain)), config).train()
    (ctx,) = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        ctx += 0.5 * torch.randn_like(ctx)
    own = ctx.detach().clone().requires_grad_()
    wanted, found = plain_logits(plain, images, with_words(config, own)), model(images)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(ctx.grad, own.grad, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_untrained_words_of_a_text_are_that_text(make, images):
    for config in (CoOpConfig(init="a photo of a"), KgCoOpConfig(), LASPConfig()):
        model = dl.attach(classifier(make), config)
        zero_shot = classifier(make, templates="a photo of a {}.")
        torch.testing.assert_close(model(images), zero_shot(images), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_methods_train_are_saved_and_see_other_classes(make, name, images, tmp_path):
    model = dl.attach(classifier(make), METHODS[name])
    task, labels = ClassificationTask(model, NAMES).train(), torch.tensor([0, 3])
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    losses = []
    for _ in range(3):
        result = task((images, labels))
        optimizer.zero_grad()
        backward(task, result)
        optimizer.step()
        losses.append(float((result["losses"]["cross_entropy"] if name == "prograd" else result["loss"]).detach()))
    assert losses[-1] < losses[0]
    dl.save_pretrained(model.eval(), tmp_path)
    with torch.no_grad():
        again = dl.from_pretrained(tmp_path, classifier(make))
        assert torch.equal(again(images), model(images))
        if name != "coop per class":
            few = model(images)[:, :2]
            model.set_classes(NAMES[:2])
            torch.testing.assert_close(model(images), few, atol=1e-10, rtol=1e-10)


def test_what_is_still_refused():
    for config in (MaPLeConfig(depth=2), RPOConfig(num_prompts=2)):
        with pytest.raises(TypeError, match="reads from front to end and pools there"):
            dl.attach(classifier("transformers"), config)
    with pytest.raises(TypeError, match="reads from front to end and pools there"):  # the first place is a word's
        dl.attach(classifier(open_clip_siglip("first")), CoOpConfig())
    model = dl.attach(classifier("transformers"), CoOpConfig(num_words=12))
    with pytest.raises(ValueError, match="is longer than the 16 tokens that the text tower reads"):
        model(torch.zeros(1, 3, 32, 32).double())


def test_a_tokenizer_without_a_word_for_the_places():
    clip = hf_siglip()
    model = ZeroShotClassifier(clip, lambda texts: siglip_tokenizer([t.replace("X", "x x") for t in texts]), NAMES)
    with pytest.raises(ValueError, match="makes 4 tokens of 'X X', which was to hold the places of 2: give init"):
        dl.attach(model, CoOpConfig(num_words=2))


def test_word_counts():
    assert word_counts(["", "dog", "tabby cat", "Annual Crop Land"], siglip_tokenizer)[0] == 0
    assert word_counts(["", "dog", "tabby cat", "goldfishes"], siglip_tokenizer)[1].tolist() == [0, 1, 2, 2]
