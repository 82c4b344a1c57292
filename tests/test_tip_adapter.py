"""Tip-Adapter and Tip-Adapter-F: the published numbers, and a state whose size comes from data."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from clip_models import NAMES, VECTORS, hf_model, open_clip_model, vectors, zero_shot

import deltalens as dl
from deltalens.data.splits import Splits
from deltalens.lifecycle.cache_search import search_cache
from deltalens.methods import TipAdapterConfig
from deltalens.methods.cache_search import best_alpha_beta
from deltalens.methods.tip_adapter import FeatureCache
from deltalens.tasks import ClassificationTask
from deltalens.training import TrainingSettings, fit
from deltalens.training.loaders import preparation_loader
from deltalens.training.optim import parameter_groups

needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason="needs ../shared/reference_vectors")
MODELS = {"open_clip": open_clip_model, "transformers": hf_model}


class TwoPasses:
    """Other views of the same images in every pass, in batches of 8."""

    def __init__(self, first, second, labels):
        self.views, self.labels, self.passes = (first, second), labels, 0

    def __iter__(self):
        self.passes += 1
        return iter(zip(self.views[(self.passes - 1) % 2].split(8), self.labels.split(8), strict=True))


def published(make=open_clip_model, **settings):
    """The small CLIP with the official code's literal factor of 100, prepared with the published images."""
    given = vectors("clip_tip_adapter")
    model = zero_shot(clip=make())
    with torch.no_grad():
        model.clip.logit_scale.fill_(math.log(100))
    dl.attach(model, TipAdapterConfig(passes=2, **settings))
    dl.prepare(model, TwoPasses(given["support_images"], given["support_images_aug2"], given["support_labels"]))
    return model, given, model.live("logits")[0]


@needs_vectors
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("case", ["init", "sharp"])
def test_published_tip_adapter(make, case):
    alpha, beta = vectors("clip_tip_adapter")[f"alpha_beta.{case}"].tolist()
    model, given, cache = published(MODELS[make], alpha=alpha, beta=beta)
    torch.testing.assert_close(cache.keys, given["cache_keys"].T, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(F.one_hot(cache.labels, 5).float(), given["cache_values"])
    with torch.no_grad():
        queries = given["query_features"]
        votes = cache.votes(cache.affinity(queries), 5)
        torch.testing.assert_close(votes, given[f"cache_logits.{case}"], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(
            cache(model.similarities(queries), queries), given[f"logits.{case}"], atol=5e-5, rtol=1e-5
        )
        images = vectors("clip_inputs")["images"]
        torch.testing.assert_close(model(images), given[f"logits.{case}"], atol=1e-4, rtol=1e-5)
    assert dl.count_parameters(model).adapter == 0


@needs_vectors
def test_published_steps_of_tip_adapter_f():
    model, given, cache = published(train_keys=True)
    inputs = vectors("clip_inputs")
    assert dl.count_parameters(model).adapter == cache.keys.numel() == 20 * 32
    optimizer = torch.optim.AdamW([cache.keys], lr=1e-3, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    model.train()
    for step, wanted in enumerate(given["F.losses3"]):
        loss = F.cross_entropy(model(inputs["images"]), inputs["labels"])
        torch.testing.assert_close(loss, wanted, atol=2e-5, rtol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            torch.testing.assert_close(cache.keys.grad, given["F.grad.weight"], atol=1e-6, rtol=1e-3)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(cache.keys, given["F.weight_after3"], atol=1e-6, rtol=1e-4)


@needs_vectors
def test_published_search():
    model, given, cache = published()
    features = given["val_features"]
    with torch.no_grad():
        logits, affinity = model.similarities(features), cache.affinity(features)
    found = best_alpha_beta(cache, logits, affinity, given["val_labels"], (3, 7), (10, 20))
    assert (found.beta, found.alpha) == pytest.approx(given["search.best_beta_alpha"].tolist())
    right = ((logits + found.alpha * cache.votes(affinity, 5, found.beta)).argmax(1) == given["val_labels"]).sum()
    assert found.accuracy == pytest.approx(int(right) / 30)


# ------------------------------------------------------------------ a state made of data
def support(count=7, classes=5, seed=3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    patterns = torch.randn(classes, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    return patterns[labels] + 0.5 * torch.randn(count, 3, 32, 32, generator=generator), labels


def prepared(model=None, **settings):
    model = dl.attach(zero_shot() if model is None else model, TipAdapterConfig(passes=1, **settings))
    return dl.prepare(model, [support()]).eval()


@pytest.fixture
def images():
    return support(4, seed=5)[0]


@torch.no_grad()
def test_the_formula(images):
    model = prepared(alpha=2.0, beta=3.0)
    f, k = (F.normalize(model.clip.encode_image(x), dim=-1) for x in (images, support()[0]))
    wanted = zero_shot()(images) + 2.0 * torch.exp(-3.0 * (1 - f @ k.T)) @ F.one_hot(support()[1], 5).float()
    torch.testing.assert_close(model(images), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train_keys", [False, True])
@torch.no_grad()
def test_files_copies_and_detach(train_keys, images, tmp_path):
    model = prepared(train_keys=train_keys)
    logits = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), logits)
    dl.save_pretrained(model, tmp_path)
    again = dl.from_pretrained(tmp_path, zero_shot())
    assert torch.equal(again(images), logits)
    dl.load_adapter(again, tmp_path, name="second")
    assert torch.equal(again(images), logits)
    fresh = dl.attach(zero_shot(), TipAdapterConfig(train_keys=train_keys)).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images), logits)
    dl.detach(model)
    assert torch.equal(model(images), zero_shot()(images))


@pytest.mark.slow
def test_files_in_a_fresh_process(images, tmp_path):
    model = prepared()
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "logits.pt")
    dl.save_pretrained(model, tmp_path / "adapter")
    code = (
        "import sys, torch; import deltalens as dl; from clip_models import zero_shot\n"
        f"images, logits = torch.load({str(tmp_path / 'logits.pt')!r})\n"
        f"model = dl.from_pretrained({str(tmp_path / 'adapter')!r}, zero_shot())\n"
        "sys.exit(0 if torch.allclose(model(images), logits, atol=1e-5) else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_classes_are_refused(images, tmp_path):
    model = prepared()
    dl.save_pretrained(model, tmp_path)
    model.set_classes(NAMES[::-1])
    with pytest.raises(ValueError, match=r"of 5 classes \(goldfish, tabby_cat, .*now has 5 \(people playing violin"):
        model(images)
    with dl.disable_adapter(model):
        model(images)
    model.set_classes(NAMES)
    assert model(images).shape == (4, 5)
    other = dl.from_pretrained(tmp_path, zero_shot(names=["goldfish", "sports car"]))
    with pytest.raises(ValueError, match=r"now has 2 \(goldfish, sports car\)"):
        other(images)


def test_errors(images, tmp_path):
    model = dl.attach(zero_shot(), TipAdapterConfig(passes=2))
    with pytest.raises(RuntimeError, match=r"no images yet: call deltalens\.prepare"):
        model(images)
    pictures, labels = support()
    with pytest.raises(ValueError, match="another order in each pass"):
        dl.prepare(model, TwoLabels(pictures, labels))
    with pytest.raises(ValueError, match="one label each, below 5"):
        dl.prepare(model, [(pictures, labels + 1)])
    with pytest.raises(ValueError, match="no Tip-Adapter that was prepared"):
        search_cache(model, [(pictures, labels)])
    with pytest.raises(TypeError, match="made of class names, which CLIP is not"):
        dl.attach(open_clip_model(), TipAdapterConfig())


class TwoLabels:
    """The same images, in another order in the second pass."""

    def __init__(self, images, labels):
        self.images, self.labels, self.passes = images, labels, 0

    def __iter__(self):
        self.passes += 1
        order = range(len(self.labels)) if self.passes % 2 else range(len(self.labels))[::-1]
        return iter([(self.images[list(order)], self.labels[list(order)])])


def test_what_is_there_stays(images):
    model = prepared()
    keys = model.live("logits")[0].keys.clone()
    dl.prepare(model, [support(5, seed=8)])
    assert torch.equal(model.live("logits")[0].keys, keys)


def test_search_is_written_into_files(tmp_path, images):
    model = prepared(alpha=0.0)
    validation = support(40, seed=6)
    found = search_cache(model, [(x, y) for x, y in zip(*(v.split(16) for v in validation), strict=True)])
    (cache,) = model.live("logits")
    assert found.accuracy > found.before
    assert (cache.alpha, cache.beta) == (found.alpha, found.beta)
    with torch.no_grad():
        right = (model(validation[0]).argmax(1) == validation[1]).float().mean()
        assert float(right) == pytest.approx(found.accuracy)
        dl.save_pretrained(model, tmp_path)
        again = dl.from_pretrained(tmp_path, zero_shot())
        assert torch.equal(again(images), model(images))


def test_precision(images):
    """Under autocast in bfloat16 the votes are those of float32."""
    (cache,) = prepared(beta=20.0).live("logits")
    features = F.normalize(torch.randn(3, 32), dim=-1)
    with torch.no_grad():
        plain = cache.votes(cache.affinity(features), 5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(cache.votes(cache.affinity(features), 5), plain)


# ------------------------------------------------------------------ training
class Noisy(torch.utils.data.Dataset):
    """Images with noise that is drawn anew whenever they are read."""

    def __init__(self, count):
        self.images, self.labels = support(count)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index] + torch.randn(3, 32, 32), int(self.labels[index])


def test_every_pass_augments_anew():
    loader = preparation_loader(Noisy(10), 4, seed=1)
    first, second = [torch.cat([images for images, _ in loader]) for _ in range(2)]
    assert not torch.equal(first, second)
    again = torch.cat([images for images, _ in preparation_loader(Noisy(10), 4, seed=1)])
    assert torch.equal(first, again)


def test_nothing_to_train_is_said():
    model = dl.attach(zero_shot(), TipAdapterConfig())
    with pytest.raises(ValueError, match=r"made by deltalens\.prepare\(model, loader\) alone"):
        parameter_groups(model, 1e-3, 0.0)


def test_fit_prepares_and_trains_keys(tmp_path):
    model = dl.attach(zero_shot(), TipAdapterConfig(train_keys=True, passes=2))
    data = Splits(Noisy(20), Noisy(10), list(NAMES), Noisy(10))
    quiet = {"accelerator": "cpu", "workers": 0, "progress": False}
    settings = TrainingSettings(epochs=2, batch_size=10, lr=1e-3, weight_decay=0.0, **quiet)
    fit(ClassificationTask(model, NAMES), data, settings, output=str(tmp_path / "run"))
    (cache,) = model.live("logits")
    start = dl.attach(zero_shot(), TipAdapterConfig(passes=2))
    dl.prepare(start, preparation_loader(data.train, 10, settings.seed))
    begun = start.live("logits")[0].keys
    assert cache.keys.shape == begun.shape == (20, 32)
    assert 1e-5 < float((cache.keys - begun).detach().abs().max()) < 1e-2
    assert isinstance(cache, FeatureCache)
    again = dl.from_pretrained(tmp_path / "run", zero_shot())
    assert torch.equal(again.live("logits")[0].keys, cache.keys)
