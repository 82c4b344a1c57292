"""Methods of two towers: the published implementations' logits, losses, gradients and steps."""

import pytest
import torch
import torch.nn.functional as F
from clip_checks import MODELS, trained
from clip_models import NAMES, VECTORS, open_clip_model, vectors, zero_shot

import deltalens as dl
from deltalens.backbones.text_pass import CHUNK
from deltalens.methods import CoCoOpConfig, CoOpConfig, MMAConfig

needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason="needs ../shared/reference_vectors")


@torch.no_grad()
def _fill(parameters, values):
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


# ------------------------------------------------------------------ MMA
def _official_mma(name: str) -> str:
    """...blocks.2.delta.block_parallel. ... .mma.down.weight -> visual_adapter.3.down.0.weight; index 0 elsewhere."""
    path, _, leaf = name.rpartition(".mma.")
    block, _, slot = path.partition(".delta.")
    index = int(block.rpartition(".")[2]) + 1 if slot.startswith("block_parallel") else 0
    part, _, kind = leaf.partition(".")
    tower = "shared" if part == "shared" else "visual" if "visual" in path or "vision" in path else "text"
    inner = {"shared": f"0.{kind}", "up": f"up.{kind}", "down": f"down.0.{kind}"}[part]
    return f"{tower}_adapter.{index}.{inner}"


def _mma(case, make=open_clip_model, **settings):
    given = vectors(f"clip_mma_{case}")
    numbers = {"start": int(given["start"]), "end": int(given["end"]), "bottleneck": int(given["dim"])}
    model = zero_shot(clip=make())
    dl.attach(model, MMAConfig(**numbers, alpha=float(given["scale"]), **settings))
    parameters = trained(model)
    _fill(parameters, {name: given[f"adapter.{_official_mma(name)}"] for name in parameters})
    return model.train(), given, parameters


@needs_vectors
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("case", ["a05", "a0001", "e3", "k0"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_published_mma(case, make, decoupled):
    if case == "k0" and make == "transformers":
        pytest.skip("the order of blocks and embeddings is the same code")
    model, given, parameters = _mma(case, MODELS[make], decoupled=decoupled)
    inputs = vectors("clip_inputs")
    logits = model(inputs["images"])
    torch.testing.assert_close(logits, given["logits"], atol=5e-5, rtol=1e-5)
    loss = F.cross_entropy(logits, inputs["labels"])
    torch.testing.assert_close(loss, given["loss"].squeeze(), atol=1e-5, rtol=1e-5)
    loss.backward()
    kind = "grad" if decoupled else "grad_plain"
    for name, parameter in parameters.items():
        wanted = given[f"{kind}.{_official_mma(name)}"]
        worst = float((parameter.grad - wanted).abs().max() / wanted.abs().max())
        assert worst < 2e-4, (name, worst)


@needs_vectors
def test_published_steps_of_mma():
    model, given, parameters = _mma("a05")
    inputs = vectors("clip_inputs")
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0015, momentum=0.9, weight_decay=5e-4)
    for wanted in given["sgd3.losses"]:
        loss = F.cross_entropy(model(inputs["images"]), inputs["labels"])
        torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, given[f"sgd3.adapter.{_official_mma(name)}"], atol=1e-6, rtol=1e-4)


@needs_vectors
@pytest.mark.parametrize(
    ("wanted", "settings"),
    [
        ("no_shared", {"shared": False}),
        ("visual_only", {"towers": "vision"}),
        ("text_only", {"towers": "text"}),
        ("visual_only_no_shared", {"towers": "vision", "shared": False}),
        ("text_only_no_shared", {"towers": "text", "shared": False}),
    ],
)
def test_published_ablations_of_mma(wanted, settings):
    model, given, _ = _mma("a05", **settings)
    with torch.no_grad():
        logits = model(vectors("clip_inputs")["images"])
    torch.testing.assert_close(logits, given[f"ablation.logits.{wanted}"], atol=5e-5, rtol=1e-5)


def test_mma_counts():
    import open_clip

    with torch.device("meta"):
        clip = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))
    for start, count in ((1, 1_011_840), (5, 674_560), (9, 337_280)):
        model = dl.attach(clip, MMAConfig(start=start))
        assert dl.count_parameters(model).adapter == count
        dl.detach(model)


def test_mma_pairs_towers_of_different_depth_from_the_top():
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=6, width=32, head_width=16, patch_size=16, image_size=32)
    clip = CLIP(16, vision, CLIPTextCfg(vocab_size=30, width=16, heads=1, layers=3))
    dl.attach(clip, MMAConfig(start=2, bottleneck=4))
    blocks = sorted({name.partition(".delta")[0] for name in trained(clip)})
    assert blocks == [
        *(f"transformer.resblocks.{i}" for i in (1, 2)),
        *(f"visual.transformer.resblocks.{i}" for i in (4, 5)),
    ]
    down = "block_parallel.adapter_default.mma.shared"
    text, vision = (f"{tower}transformer.resblocks.{i}.delta.{down}" for tower, i in (("", 1), ("visual.", 4)))
    assert clip.get_submodule(text) is clip.get_submodule(vision)


@pytest.mark.parametrize("beyond", [{"start": 5}, {"start": 2, "end": 5}])
def test_mma_beyond_the_last_block(beyond):
    with pytest.raises(ValueError, match="=5 is beyond the 4 blocks of CLIP's towers"):
        dl.attach(open_clip_model(), MMAConfig(**beyond))


@pytest.mark.parametrize("make", MODELS)
def test_mma_under_autocast(make):
    """The streams of both towers are float32 from the first adapter on, and logits stay near those of float32."""
    model = zero_shot(clip=MODELS[make]())
    dl.attach(model, MMAConfig(start=3, bottleneck=4, alpha=1e-3))
    images, seen = torch.randn(2, 3, 32, 32), {}
    with torch.no_grad():
        exact = model.train()(images)
    for tower in dl.describe(model).towers:
        for site in tower.blocks:
            at = (tower.name, site.index + 1)
            site.module.register_forward_hook(lambda _, __, out, at=at: seen.update({at: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.train()(images)
    assert {seen[tower, number] for tower in ("vision", "text") for number in (3, 4)} == {torch.float32}
    if make == "open_clip":  # whose image stream is that of its first convolution
        assert seen["vision", 1] == seen["vision", 2] == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, atol=0.1 * float(exact.abs().max()), rtol=0)
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trained(model).values())


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("towers", ["both", "vision", "text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_refuses_a_model_in_half_precision(make, towers, dtype):
    model = zero_shot(clip=MODELS[make]())
    dl.attach(model, MMAConfig(start=3, bottleneck=4, towers=towers))
    model.to(dtype)
    with pytest.raises(TypeError, match=f"which a model in {dtype} rounds away"):
        model(torch.randn(1, 3, 32, 32, dtype=dtype))


def test_mma_adds_what_bfloat16_would_lose():
    """1e-3 of a branch beside a stream of ones survives autocast."""
    from deltalens.methods.mma import ModalityAdapter

    module = ModalityAdapter(8, 4, None, 1e-3, True, False)
    x = torch.ones(1, 3, 8, dtype=torch.bfloat16) * 2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        delta = module(x, x)
        moved = x + delta
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved - x.float(), delta.float(), rtol=1e-3, atol=1e-6)
    assert torch.equal(x + delta.bfloat16(), x)  # what the cast would leave


# ------------------------------------------------------------------ CoOp, CoCoOp
@needs_vectors
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("per_class", [False, True])
def test_published_coop(position, per_class, make):
    given, inputs, case = vectors("clip_coop"), vectors("clip_inputs"), f"csc{int(per_class)}.{position}"
    model = zero_shot(clip=MODELS[make]())
    dl.attach(model, CoOpConfig(num_words=4, position=position, per_class=per_class))
    ((_, ctx),) = trained(model).items()
    assert ctx.shape == given[f"{case}.ctx"].shape
    with torch.no_grad():
        ctx.copy_(given[f"{case}.ctx"])
    logits = model.train()(inputs["images"])
    torch.testing.assert_close(logits, given[f"{case}.logits"], atol=2e-5, rtol=1e-5)
    F.cross_entropy(logits, inputs["labels"]).backward()
    torch.testing.assert_close(ctx.grad, given[f"{case}.grad.ctx"], atol=1e-6, rtol=1e-3)


@needs_vectors
def test_coop_begins_as_the_words_it_is_given():
    inputs = vectors("clip_inputs")
    model = dl.attach(zero_shot(), CoOpConfig(init="a photo of a"))
    with torch.no_grad():
        torch.testing.assert_close(model(inputs["images"]), zero_shot()(inputs["images"]), atol=1e-5, rtol=1e-5)


def test_coop_on_other_classes():
    model, images = zero_shot(), torch.randn(2, 3, 32, 32)
    dl.attach(model, CoOpConfig(num_words=3))
    model.set_classes(["goldfish", "sports car"])
    assert model(images).shape == (2, 2)
    model = dl.attach(zero_shot(), CoOpConfig(num_words=3, per_class=True))
    model.set_classes(["goldfish", "sports car"])
    with pytest.raises(ValueError, match="words of their own for 5 classes, and there are 2"):
        model(images)
    with pytest.raises(TypeError, match="create_backbone"):
        dl.attach(open_clip_model(), CoOpConfig())


@needs_vectors
@pytest.mark.parametrize("make", MODELS)
def test_published_cocoop(make):
    given, inputs = vectors("clip_cocoop"), vectors("clip_inputs")
    model = zero_shot(clip=MODELS[make]())
    dl.attach(model, CoCoOpConfig(init=None, num_words=4))
    (module,) = model.live("text.context")
    parameters = dict(module.named_parameters())
    _fill(parameters, {name: given[f"param.{name}"] for name in parameters})
    logits = model.train()(inputs["images"])
    torch.testing.assert_close(logits, given["logits"], atol=2e-5, rtol=1e-5)
    F.cross_entropy(logits, inputs["labels"]).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, given[f"grad.{name}"], atol=1e-6, rtol=1e-3)


def test_counts_of_context():
    assert dl.count_parameters(dl.attach(zero_shot(), CoOpConfig(num_words=4))).adapter == 4 * 64
    cocoop = dl.attach(zero_shot(), CoCoOpConfig())
    assert dl.count_parameters(cocoop).adapter == 4 * 64 + (32 * 2 + 2) + (2 * 64 + 64)
    assert len(NAMES) == cocoop.num_classes


@pytest.mark.parametrize("options", [{"position": "middle"}, {"per_class": True}], ids=["middle", "per class"])
def test_learned_words_of_many_classes_without_gradients(options):
    """More texts than are computed at a time, of names with other lengths, as with gradients."""
    names = [f"{'very ' * (i % 3)}thing {i}" for i in range(CHUNK + 9)]
    model = zero_shot()
    model.set_classes(names)
    dl.attach(model, CoOpConfig(num_words=3, **options))
    with_gradients = model.text_features()
    assert with_gradients.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(model.text_features(), with_gradients.detach(), atol=1e-5, rtol=1e-5)
