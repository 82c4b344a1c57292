"""Official checkpoints of methods beside a CLIP, made of the vectors' tensors."""

import math

import pytest
import torch
from clip_models import NAMES, VECTORS, hf_model, open_clip_model, vectors, zero_shot

import deltalens as dl
from deltalens.methods import (
    CLIPAdapterConfig,
    CoCoOpConfig,
    CoOpConfig,
    KgCoOpConfig,
    LASPConfig,
    MaPLeConfig,
    MMAConfig,
    ProGradConfig,
    RPOConfig,
    TipAdapterConfig,
)

pytestmark = pytest.mark.skipif(not VECTORS.exists(), reason="needs ../shared/reference_vectors")
MODELS = {"open_clip": open_clip_model, "transformers": hf_model}


def under(given, prefix, place=""):
    return {place + key.removeprefix(prefix): tensor for key, tensor in given.items() if key.startswith(prefix)}


def logits(model):
    with torch.no_grad():
        return model.eval()(vectors("clip_inputs")["images"])


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("case", ["a05", "e3", "k0"])
def test_mma(case, make):
    given = vectors(f"clip_mma_{case}")
    numbers = {"start": int(given["start"]), "end": int(given["end"]), "bottleneck": int(given["dim"])}
    model = dl.attach(zero_shot(clip=MODELS[make]()), MMAConfig(**numbers, alpha=float(given["scale"])))
    official = under(given, "adapter.")
    buffers = {"token_embedding": torch.zeros(5, 77, 64), "tokenized_prompts": torch.zeros(5, 77)}
    assert dl.import_official(model, official | buffers, "mma") == (len(official), 2)
    torch.testing.assert_close(logits(model), given["logits"], atol=5e-5, rtol=1e-5)


def test_mma_of_another_depth_is_refused():
    official = under(vectors("clip_mma_a05"), "adapter.")
    model = dl.attach(zero_shot(), MMAConfig(start=4, bottleneck=8))
    with pytest.raises(ValueError, match=r"has no place for: attach MMAConfig with the start"):
        dl.import_official(model, official, "mma")
    model = dl.attach(zero_shot(), MMAConfig(start=2, bottleneck=8))
    with pytest.raises(ValueError, match=r"missing: .*blocks\.1"):
        dl.import_official(model, official, "mma")


def test_mma_in_towers_of_different_depth():
    """Official numbers count the shallower tower's blocks, paired from the top, as MMAConfig does."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=4, width=32, head_width=16, patch_size=16, image_size=32)
    clip = CLIP(16, vision, CLIPTextCfg(vocab_size=30, width=16, heads=1, layers=2))
    model = dl.attach(clip, MMAConfig(start=2, bottleneck=4))
    official = {
        f"shared_adapter.2.0.{leaf}": torch.randn(4, *shape) for leaf, shape in (("weight", (4,)), ("bias", ()))
    }
    for tower, width in (("visual", 32), ("text", 16)):
        official |= {
            f"{tower}_adapter.2.down.0.weight": torch.randn(4, width),
            f"{tower}_adapter.2.down.0.bias": torch.randn(4),
            f"{tower}_adapter.2.up.weight": torch.randn(width, 4),
            f"{tower}_adapter.2.up.bias": torch.randn(width),
        }
    assert dl.import_official(model, official, "mma") == (10, 0)
    (down,) = [
        p for n, p in model.named_parameters() if n.startswith("visual.transformer.resblocks.3") and "down.weight" in n
    ]
    assert torch.equal(down, official["visual_adapter.2.down.0.weight"])


@pytest.mark.parametrize("prefix", ["", "prompt_learner."])
@pytest.mark.parametrize("case", ["csc0.end", "csc1.middle"])
def test_coop(case, prefix):
    given = vectors("clip_coop")
    config = CoOpConfig(num_words=4, position=case.partition(".")[2], per_class=case.startswith("csc1"))
    model = dl.attach(zero_shot(), config)
    texts = {f"{prefix}token_prefix": torch.zeros(5, 1, 64), f"{prefix}token_suffix": torch.zeros(5, 72, 64)}
    assert dl.import_official(model, {f"{prefix}ctx": given[f"{case}.ctx"], **texts}, "coop") == (1, 2)
    torch.testing.assert_close(logits(model), given[f"{case}.logits"], atol=2e-5, rtol=1e-5)


def test_cocoop():
    given = vectors("clip_cocoop")
    model = dl.attach(zero_shot(), CoCoOpConfig(init=None))
    official = under(given, "param.", "prompt_learner.") | {"prompt_learner.token_prefix": torch.zeros(5, 1, 64)}
    assert dl.import_official(model, official, "cocoop") == (5, 1)
    torch.testing.assert_close(logits(model), given["logits"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "adapter."])
def test_clip_adapter(prefix):
    given = vectors("clip_adapter")
    model = dl.attach(zero_shot(), CLIPAdapterConfig())
    assert dl.import_official(model, under(given, "param.", prefix), "clip_adapter") == (2, 0)
    torch.testing.assert_close(logits(model), given["logits.ImageNet"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("train_keys", [False, True])
def test_tip_adapter(train_keys, tmp_path):
    given = vectors("clip_tip_adapter")
    model = zero_shot()
    with torch.no_grad():
        model.clip.logit_scale.fill_(math.log(100))
    dl.attach(model, TipAdapterConfig(train_keys=train_keys))
    official = {"cache_keys": given["cache_keys"], "cache_values": given["cache_values"]}
    if train_keys:
        official |= {"weight": given["F.weight_after3"]}
    assert dl.import_official(model, official, "tip_adapter") == (3, 0)
    (cache,) = model.live("logits")
    if train_keys:
        assert torch.equal(cache.keys, given["F.weight_after3"])
    else:
        torch.testing.assert_close(logits(model), given["logits.init"], atol=1e-4, rtol=1e-5)
    model.set_classes(NAMES[:2])
    with pytest.raises(ValueError, match=r"one-hot rows \(20, 2\)"):
        dl.import_official(model, official, "tip_adapter")


# ------------------------------------------------------------------ MaPLe, RPO, LASP, KgCoOp, ProGrad
def rest_of_a_checkpoint(words=4):
    """What official trainers save beside what they learn: embeddings of the class names, and the frozen model."""
    names = {"token_prefix": torch.zeros(5, 1, 64), "token_suffix": torch.zeros(5, 76 - words, 64)}
    frozen = {"image_encoder.conv1.weight": torch.zeros(128, 3, 16, 16), "logit_scale": torch.zeros(())}
    return {f"prompt_learner.{key}": tensor for key, tensor in names.items()} | frozen


@pytest.mark.parametrize("make", MODELS)
def test_maple(make):
    given = vectors("clip_maple_depth1")
    model = dl.attach(zero_shot(clip=MODELS[make]()), MaPLeConfig(depth=1))
    official = under(given, "param.", "prompt_learner.")
    assert dl.import_official(model, official | rest_of_a_checkpoint(), "maple") == (3, 4)
    torch.testing.assert_close(logits(model), given["logits"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_deep_maple(make):
    """Each deep tensor in its block: two adapters that differ in the order of theirs do not agree."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"ctx": (2, 64), "proj.weight": (128, 64), "proj.bias": (128,)}
    for i in range(2):
        shapes |= {f"compound_prompts_text.{i}": (2, 64), f"compound_prompt_projections.{i}.weight": (128, 64)}
        shapes |= {f"compound_prompt_projections.{i}.bias": (128,)}
    official = {f"prompt_learner.{key}": 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    model = dl.attach(zero_shot(clip=MODELS[make]()), MaPLeConfig(depth=3))
    assert dl.import_official(model, {key: tensor.half() for key, tensor in official.items()}, "maple") == (9, 0)
    vision = next(tower for tower in dl.describe(model).towers if tower.name == "vision")
    for i, block in enumerate(vision.blocks[1:3]):
        (module,) = block.module.delta.live("tokens.in")
        wanted = official[f"prompt_learner.compound_prompts_text.{i}"].half().float()
        assert torch.equal(module.words.ctx, wanted)
        wanted = official[f"prompt_learner.compound_prompt_projections.{i}.weight"].half().float()
        assert torch.equal(module.proj.weight, wanted)
    shallow = dl.attach(zero_shot(), MaPLeConfig(depth=2))
    with pytest.raises(ValueError, match=r"words in 3 blocks, and the adapter in 2: attach MaPLeConfig\(depth=3\)"):
        dl.import_official(shallow, official, "maple")
    del official["prompt_learner.proj.bias"]
    with pytest.raises(ValueError, match=r"no whole MaPLe checkpoint: it lacks proj\.bias"):
        dl.import_official(model, official, "maple")


@pytest.mark.parametrize("make", MODELS)
def test_rpo(make):
    given = vectors("clip_rpo")
    model = dl.attach(zero_shot(clip=MODELS[make]()), RPOConfig(num_prompts=3))
    official = under(given, "param.")
    assert dl.import_official(model, official, "rpo") == (2, 0)
    torch.testing.assert_close(logits(model), given["logits"], atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="missing: text_embed"):
        dl.import_official(model, {"img_prompt": official["img_prompt"]}, "rpo")


def whole_lasp(given, change=0.0):
    """A LASP checkpoint as its trainer saves it, the whole model, whose norms are the model's own, or changed."""
    norms = {
        f"image_encoder.{name.removeprefix('visual.')}": tensor + change
        for name, tensor in open_clip_model().state_dict().items()
        if name.startswith("visual.transformer") and ".ln_" in name
    }
    return under(given, "param.", "prompt_learner.") | norms | rest_of_a_checkpoint()


@pytest.mark.parametrize("make", MODELS)
def test_lasp(make):
    given, inputs = vectors("clip_lasp"), vectors("clip_inputs")
    model = dl.attach(zero_shot(clip=MODELS[make](), names=NAMES[:3]), LASPConfig())
    assert dl.import_official(model, whole_lasp(given), "lasp") == (18, 4)
    with torch.no_grad():
        found = model.eval()(inputs["images"][given["image_index"]])
    torch.testing.assert_close(found, given["logits"], atol=2e-5, rtol=1e-5)
    dl.import_official(model, whole_lasp(given, change=0.5), "lasp")
    mine, plain = dict(model.named_parameters()), dict(MODELS[make]().named_parameters())
    norms = [key for key, p in mine.items() if p.requires_grad and key.startswith("clip.")]
    assert len(norms) == 16
    for key in norms:
        torch.testing.assert_close(mine[key], plain[key.removeprefix("clip.")] + 0.5)


def test_lasp_without_its_parts():
    given = vectors("clip_lasp")
    bare = dl.attach(zero_shot(), LASPConfig(norms=False))
    assert dl.import_official(bare, whole_lasp(given), "lasp") == (2, 20)
    with pytest.raises(ValueError, match=r"was trained in the checkpoint, .*norms=True"):
        dl.import_official(bare, whole_lasp(given, change=0.5), "lasp")
    with pytest.raises(ValueError, match="correction=True"):
        dl.import_official(dl.attach(zero_shot(), LASPConfig(correction=False)), whole_lasp(given), "lasp")


@pytest.mark.parametrize("config", [KgCoOpConfig(init=None), ProGradConfig(num_words=4)])
def test_coop_with_further_terms(config):
    given = vectors("clip_coop")
    model = dl.attach(zero_shot(), config)
    unused = {"prompt_learner.meta_net.linear1.weight": torch.zeros(2, 32)}
    official = {"prompt_learner.ctx": given["csc0.end.ctx"]} | rest_of_a_checkpoint() | unused
    assert dl.import_official(model, official, config.name) == (1, 5)
    torch.testing.assert_close(logits(model), given["csc0.end.logits"], atol=2e-5, rtol=1e-5)
