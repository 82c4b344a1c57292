"""Models of every library by name: the published weights from the libraries' caches, heads, sizes, adapter files."""

import pytest
import torch
from hub_cache import (
    OPEN_CLIP_IMAGES,
    PROCESSOR,
    add_repository,
    register_tiny_torchvision,
    write_open_clip,
    write_timm,
    write_torchvision,
    write_transformers,
)
from models import randomize_adapter
from torchvision.models import _api

import deltalens as dl
from deltalens.backbones.names import source_of
from deltalens.methods import BitFitConfig
from deltalens.sites.output import logits_of

TIMM, TORCHVISION = "test_vit.r160_in1k", "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of the caches, the models whose weights they hold by deltalens' names)."""
    root = tmp_path_factory.mktemp("caches")
    originals = {}
    for kind in ("vit", "dinov2", "dinov3", "clip", "convnext"):
        originals[f"hf/tests/{kind}"] = write_transformers(root / kind, kind)
        add_repository(root / "hf/hub", f"tests/{kind}", root / kind)
    originals["open_clip/hf-hub:tests/tiny"] = write_open_clip(root / "tiny")
    add_repository(root / "hf/hub", "tests/tiny", root / "tiny")
    originals[f"timm/{TIMM}"] = write_timm(root / "timm", TIMM)
    add_repository(root / "hf/hub", f"timm/{TIMM}", root / "timm")
    register_tiny_torchvision()
    for name in (TORCHVISION, "vit_tiny"):
        originals[f"torchvision/{name}.IMAGENET1K_V1"] = write_torchvision(root / "torch", name)
    yield root, originals
    del _api.BUILTIN_MODELS["vit_tiny"]


@pytest.fixture(autouse=True)
def _offline(world, monkeypatch):
    """The caches of the test, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(world[0] / "hf/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(world[0] / "torch"))
    monkeypatch.chdir(world[0])


def pictures(model, count: int = 2) -> torch.Tensor:
    return torch.randn(count, *dl.preprocessing(model)["input_size"])


def body_of(original, name: str):
    """What the original computes before its classifier, as a function of images."""
    if name == "hf/tests/clip":
        return lambda x: original.vision_model(x).last_hidden_state[:, 1:].mean(1)
    if name.startswith("open_clip"):
        return original.encode_image
    if name == "hf/tests/dinov3":
        return lambda x: original(x).pooler_output
    if name == "hf/tests/dinov2":
        return lambda x: torch.cat([(y := original(x).last_hidden_state)[:, 0], y[:, 1:].mean(1)], 1)
    return None


NAMES = [
    "hf/tests/vit",
    "hf/tests/dinov2",
    "hf/tests/dinov3",
    "hf/tests/clip",
    "hf/tests/convnext",
    "open_clip/hf-hub:tests/tiny",
    f"timm/{TIMM}",
    "torchvision/vit_tiny.IMAGENET1K_V1",
    f"torchvision/{TORCHVISION}.IMAGENET1K_V1",
]
QUICK = {"hf/tests/vit", "torchvision/vit_tiny.IMAGENET1K_V1"}
SOME = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_the_published_ones_and_the_head_is_fresh(name, world):
    model = dl.create_backbone(name, num_classes=5).eval()
    x, original = pictures(model), world[1][name]
    head = model.get_submodule(dl.describe(model).head) if name != "hf/tests/convnext" else model.classifier
    seen = []
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        assert logits_of(model(x)).shape == (2, 5)
    handle.remove()
    features = body_of(original, name)
    if features is not None:
        assert torch.allclose(seen[0], features(x), atol=1e-6)
    else:  # a classifier of its own: the same features, and without num_classes its own logits
        whole = dl.create_backbone(name).eval()
        with torch.no_grad():
            assert torch.equal(logits_of(whole(x)), logits_of(original(x)))
    assert source_of(model).name == name


@pytest.mark.parametrize("name", SOME)
def test_adapters_name_their_backbone_and_are_rebuilt(name, tmp_path):
    model = dl.create_backbone(name, num_classes=5)
    dl.attach(model, BitFitConfig())
    randomize_adapter(model)
    x = pictures(model)
    with torch.no_grad():
        output = logits_of(model.eval()(x))
        dl.save_pretrained(model, tmp_path)
        again = dl.from_pretrained(tmp_path)
        assert torch.equal(logits_of(again(x)), output)
    assert dl.preprocessing(again) == dl.preprocessing(model)
    config, _ = dl.lifecycle.files.read_files(tmp_path)
    assert config["base_model"]["library"] == name.partition("/")[0]
    assert config["base_model_name_or_path"] == name
    card = (tmp_path / "README.md").read_text()
    assert ("base_model: tests/vit\n" in card) == (name == "hf/tests/vit")


def test_models_built_by_hand_with_transformers_are_named(tmp_path):
    from transformers import AutoImageProcessor, AutoModel, ViTForImageClassification

    model = ViTForImageClassification.from_pretrained("tests/vit")
    assert source_of(model).name == "hf/tests/vit"
    preprocessing = dl.preprocessing(model)
    assert preprocessing["mean"] == list(AutoImageProcessor.from_pretrained("tests/vit").image_mean)
    assert preprocessing["input_size"] == [3, 32, 32]
    dl.attach(model, BitFitConfig(), num_classes=4)
    dl.save_pretrained(model, tmp_path)
    x = pictures(model)
    with torch.no_grad():
        assert torch.equal(dl.from_pretrained(tmp_path)(x).logits, model.eval()(x).logits)
    assert source_of(AutoModel.from_pretrained("tests/vit")) is None  # create_backbone would build another class
    assert source_of(torch.nn.Linear(2, 2)) is None


def test_image_towers_built_by_hand_with_open_clip_say_how_they_read_images():
    import open_clip

    tower = open_clip.create_model("hf-hub:tests/tiny").visual
    found = dl.preprocessing(tower)
    assert {key: found[key] for key in OPEN_CLIP_IMAGES} == OPEN_CLIP_IMAGES
    assert source_of(tower) is None


def test_timms_repositories_are_timms_under_any_name():
    model = dl.create_backbone(f"hf/timm/{TIMM}", num_classes=3)
    assert source_of(model).name == f"hf-hub:timm/{TIMM}"
    assert type(model).__module__ == "timm.models.vision_transformer"
    assert model.num_classes == 3


def test_the_processor_may_be_missing_in_the_cache(world, tmp_path):
    """Its model type's settings are taken, and said to be."""
    write_transformers(tmp_path / "bare", processor=None)
    add_repository(world[0] / "hf/hub", "tests/bare", tmp_path / "bare")
    with pytest.warns(UserWarning, match="no image processor of tests/bare was found"):
        model = dl.create_backbone("hf/tests/bare", num_classes=2, dtype=torch.bfloat16)
    assert dl.preprocessing(model)["mean"] == [0.5] * 3
    assert source_of(model).kwargs == {"dtype": "bfloat16"}


def test_preprocessing_comes_from_the_library():
    expected = {"mean": PROCESSOR["image_mean"], "std": PROCESSOR["image_std"], "interpolation": "bicubic"}
    found = dl.preprocessing(dl.create_backbone("hf/tests/vit", num_classes=2))
    assert {key: found[key] for key in expected} == expected
    found = dl.preprocessing(dl.create_backbone("open_clip/hf-hub:tests/tiny", num_classes=2))
    assert {key: found[key] for key in OPEN_CLIP_IMAGES} == OPEN_CLIP_IMAGES
    assert (found["crop_mode"], found["input_size"]) == ("squash", [3, 32, 32])


@pytest.mark.parametrize("name", [name for name in NAMES if "dinov2" not in name and "timm" not in name])
def test_heads_of_zero_classes_give_features(name):
    model = dl.create_backbone(name, num_classes=0).eval()
    with torch.no_grad():
        assert logits_of(model(pictures(model))).shape[1] not in (5, 7, 1000)


# ------------------------------------------------------------------ other sizes
def test_position_embeddings_are_resampled_for_another_size(world):
    from timm.layers import resample_abs_pos_embed

    original = world[1]["hf/tests/vit"]
    model = dl.create_backbone("hf/tests/vit", num_classes=5, img_size=48)
    assert dl.preprocessing(model)["input_size"] == [3, 48, 48]
    table = original.vit.embeddings.position_embeddings
    expected = resample_abs_pos_embed(table, (6, 6), (4, 4), num_prefix_tokens=1)
    assert torch.equal(model.vit.embeddings.position_embeddings, expected)
    assert torch.equal(model.vit.layernorm.weight, original.vit.layernorm.weight)
    with torch.no_grad():
        assert model(pictures(model)).logits.shape == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_other_sizes_for_every_library(name, tmp_path):
    from deltalens.cli.sized_backbone import create_sized_backbone

    model, preprocessing = create_sized_backbone(name, 5, 64)
    assert preprocessing["input_size"] == [3, 64, 64]
    dl.attach(model, BitFitConfig())
    dl.adapter_info(model)["preprocessing"] = preprocessing
    dl.save_pretrained(model, tmp_path)
    again = dl.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(logits_of(again(x)), logits_of(model.eval()(x)))
    assert dl.preprocessing(again)["input_size"] == [3, 64, 64]


def test_torchvisions_vision_transformer_is_resized(world):
    original = world[1]["torchvision/vit_tiny.IMAGENET1K_V1"]
    model = dl.create_backbone("torchvision/vit_tiny", num_classes=5, img_size=48)
    assert dl.preprocessing(model)["input_size"] == [3, 48, 48]
    assert model.encoder.pos_embedding.shape == (1, 37, 24)
    assert torch.equal(model.encoder.pos_embedding[:, 0], original.encoder.pos_embedding[:, 0])
    assert torch.equal(model.conv_proj.weight, original.conv_proj.weight)
    with pytest.raises(ValueError, match="cannot be built for 50 pixels"):
        dl.create_backbone("torchvision/vit_tiny", img_size=50)


def test_downloads_of_torchvision_do_not_mix_with_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConnectionError, match="torchvision/vit_tiny"):
        dl.create_backbone("torchvision/vit_tiny", num_classes=2)
    assert capsys.readouterr().out == ""


def test_sizes_that_do_not_fit():
    from deltalens.cli.sized_backbone import create_sized_backbone

    for name in ("hf/tests/vit", "open_clip/hf-hub:tests/tiny"):
        with pytest.raises(ValueError, match="patches of 8 pixels, which do not divide --img-size 50"):
            create_sized_backbone(name, 5, 50)
    with pytest.raises(ValueError, match="does not take images of"):
        create_sized_backbone("torchvision/maxvit_t", 5, 100, pretrained=False)


# ------------------------------------------------------------------ what can be wrong
def test_what_is_not_in_the_cache():
    for name in ("hf/tests/absent", "open_clip/hf-hub:tests/absent", "timm/resnet18", "hf-hub:timm/absent"):
        with pytest.raises(ConnectionError, match="not in the local cache and could not be fetched"):
            dl.create_backbone(name, num_classes=2)
    with pytest.raises(ConnectionError, match="open_clip/ViT-B-32/openai"):
        dl.create_backbone("open_clip/ViT-B-32/openai", num_classes=2)


def test_weights_of_another_class_are_refused(world, tmp_path):
    """Nothing but the head may be missing: a backbone with random tensors would look like a trained one."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    write_transformers(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["vit.layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lack 1 tensors of ViTForImageClassification, such as vit\.layernorm\.weight"
    ):
        dl.create_backbone(str(folder), num_classes=2)
    write_transformers(tmp_path / "mae", "mae")
    with pytest.raises(ValueError, match="masked autoencoder"):
        dl.create_backbone(str(tmp_path / "mae"), num_classes=2)


class Payload:
    """A pickle that would call a function when it is read in full."""

    def __reduce__(self):
        return (print, ("code was run",))


def test_pickles_that_hold_code_are_refused(world, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "vit"
    write_transformers(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"vit.layernorm.weight": Payload()}, folder / "pytorch_model.bin")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints/shufflenetv2_x0.5-f707e7126e.pth"
    file.parent.mkdir(parents=True)
    torch.save({"fc.weight": Payload()}, file)
    clip = tmp_path / "clip"
    write_open_clip(clip)
    (clip / "open_clip_model.safetensors").unlink()
    torch.save({"logit_scale": Payload()}, clip / "open_clip_pytorch_model.bin")
    torch.save({"fc.weight": Payload()}, tmp_path / "own.pth")
    for name in (str(folder), f"torchvision/{TORCHVISION}", str(clip)):
        with pytest.raises(ValueError, match="a pickle that holds more than tensors"):
            dl.create_backbone(name, num_classes=2)
    with pytest.raises(ValueError, match="a pickle that holds more than tensors"):
        dl.create_backbone(f"torchvision/{TORCHVISION}", num_classes=2, checkpoint=tmp_path / "own.pth")
    assert "code was run" not in capsys.readouterr().out


def test_checkpoints_of_ones_own(world, tmp_path):
    for name in ("hf/tests/vit", "torchvision/vit_tiny", "hf/tests/dinov3"):
        donor = dl.create_backbone(name, num_classes=3, pretrained=False)
        body = donor.backbone if name == "hf/tests/dinov3" else donor
        torch.save({"state_dict": {f"module.{k}": t for k, t in body.state_dict().items()}}, tmp_path / "own.pth")
        model = dl.create_backbone(name, num_classes=3, checkpoint=tmp_path / "own.pth")
        other = dl.create_backbone(name, num_classes=4, checkpoint=tmp_path / "own.pth")
        x = pictures(model)
        if body is donor:
            with torch.no_grad():
                assert torch.equal(logits_of(model.eval()(x)), logits_of(donor.eval()(x)))
                assert logits_of(other.eval()(x)).shape == (2, 4)
        else:
            assert torch.equal(model.backbone.norm.weight, body.norm.weight)
        assert source_of(model).checkpoint == str(tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"own\.pth lacks .* tensors"):
        dl.create_backbone("hf/tests/vit", num_classes=3, checkpoint=tmp_path / "own.pth")
