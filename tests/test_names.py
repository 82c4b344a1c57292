"""Which library a name belongs to, which models there are, and what is said about names that are wrong."""

import builtins
from types import SimpleNamespace

import pytest
import torch
from hub_cache import write_open_clip, write_transformers
from picture_folders import write_tiny_backbone

import deltalens as dl
from deltalens.backbones.fetching import fetching
from deltalens.backbones.names import _library_and_name, library_of, source_of
from deltalens.cli.main import main


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm/resnet18", ("timm", "resnet18")),
        ("resnet18.a1_in1k", ("timm", "resnet18.a1_in1k")),
        ("timm/hf-hub:owner/name", ("timm", "hf-hub:owner/name")),
        ("hf-hub:owner/name", ("timm", "hf-hub:owner/name")),
        ("deltalens/vit-mini", ("timm", "deltalens/vit-mini")),
        ("hf/owner/name", ("hf", "owner/name")),
        ("hf/local-dir:/a/b", ("hf", "local-dir:/a/b")),
        ("torchvision/swin_t", ("torchvision", "swin_t")),
        ("open_clip/ViT-B-32/openai", ("open_clip", "ViT-B-32/openai")),
        ("open_clip/hf-hub:owner/name", ("open_clip", "hf-hub:owner/name")),
    ],
)
def test_prefixes(name, expected):
    assert _library_and_name(name) == expected
    assert library_of(name) in (expected[0], "deltalens", None)


def test_folders_are_known_by_what_lies_in_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_backbone(tmp_path / "of_timm")
    write_transformers(tmp_path / "of_hf")
    write_open_clip(tmp_path / "of_open_clip")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").mkdir()
    for folder, library in (("of_timm", "timm"), ("of_hf", "hf"), ("of_open_clip", "open_clip")):
        assert _library_and_name(folder) == (library, f"local-dir:{folder}")
        model = dl.create_backbone(folder, num_classes=3)
        source = source_of(model)
        assert _library_and_name(source.name) == (library, f"local-dir:{folder}")
        assert library_of(source.name) == library
        assert dl.preprocessing(model)["input_size"] == [3, 32, 32]
        again = dl.create_backbone(source.name, num_classes=3)
        assert all(torch.equal(p, q) for (n, p), q in zip(model.named_parameters(), again.parameters(), strict=True)
                   if "head" not in n and "classifier" not in n)  # fmt: skip
        with pytest.raises(ValueError, match="leave checkpoint= out"):
            dl.create_backbone(folder, checkpoint=__file__)
    with pytest.raises(ValueError, match=r"no config\.json of timm or transformers and no open_clip_config\.json"):
        dl.create_backbone("empty")
    assert _library_and_name("hf/owner/name")[0] == "hf"
    (tmp_path / "empty/config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        dl.create_backbone("empty")


WRONG = {
    "torchvision/resnet5": "did you mean .*torchvision/resnet50",
    "torchvision/resnet50.V3": "has no weights 'V3'; it has IMAGENET1K_V1, IMAGENET1K_V2",
    "torchvision/fasterrcnn_resnet50_fpn": "torchvision has no classifier",
    "open_clip/ViT-B-31/openai": "did you mean .*open_clip/ViT-B-32",
    "open_clip/ViT-B-32/opanai": "has no weights 'opanai': name one of its tags.*laion2b_s34b_b79k",
    "open_clip/ViT-B-32": "has several weights: name one of its tags",
    "timm/resnet_18": "did you mean timm/resnet",
    "google/vit-base-patch16-224": r"named hf/google/vit-base-patch16-224 \(or hf-hub:google/vit",
    "hf/a/b/c/d": "has no repository for",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_names(name, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=WRONG[name]):
        dl.create_backbone(name)


@pytest.mark.parametrize("option", ["trust_remote_code", "weights_only", "use_safetensors"])
def test_names_in_files_cannot_ask_for_code_to_be_run(option, tmp_path):
    with pytest.raises(ValueError, match=f"{option} is not taken from here"):
        dl.create_backbone("hf/owner/name", **{option: True})


def test_settings_of_the_configuration(tmp_path):
    write_transformers(tmp_path / "vit")
    model = dl.create_backbone(str(tmp_path / "vit"), hidden_dropout_prob=0.25, attn_implementation="eager")
    assert model.config.hidden_dropout_prob == 0.25
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.float32
    assert dl.create_backbone(str(tmp_path / "vit"), dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(TypeError, match="ViTConfig has no setting 'hidden_dropout'"):
        dl.create_backbone(str(tmp_path / "vit"), hidden_dropout=0.25)


@pytest.mark.parametrize(("library", "extra"), [("transformers", "hf"), ("open_clip", "open-clip")])
def test_libraries_that_are_not_installed(library, extra, monkeypatch, capsys):
    original = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.partition(".")[0] == library:
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    name = f"{extra.replace('-', '_')}/some/thing"
    with pytest.raises(ImportError, match=rf"pip install deltalens\[{extra}\]"):
        dl.create_backbone(name)
    assert main(["inspect", "--model", name]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    if library == "open_clip":
        assert "torchvision/swin_t.IMAGENET1K_V1" in dl.list_models("swin_t*")


# ------------------------------------------------------------------ errors of the hub
def hub_error(name: str) -> Exception:
    """An error of the hub as it is raised for a response."""
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None)
    return getattr(errors, name)("said by the hub\nin two lines", response=response)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        ("GatedRepoError", PermissionError, "is a gated repository: accept its terms"),
        ("RepositoryNotFoundError", ValueError, "has no repository for 'hf/owner/name', or it is private"),
        ("RevisionNotFoundError", ValueError, "has no such revision"),
        ("RemoteEntryNotFoundError", ValueError, "lacks a file that is needed"),
        ("HfHubHTTPError", ConnectionError, "not in the local cache and could not be fetched"),
    ],
)
def test_what_the_hub_says_is_said_in_one_line(error, expected, message):
    def fetch():
        try:
            raise hub_error(error)
        except Exception as cause:
            raise OSError("of transformers\nwith a long story") from cause

    with pytest.raises(expected, match=message) as caught, fetching("hf/owner/name"):
        fetch()
    assert "\n" not in str(caught.value)


def test_torchs_downloads_and_other_errors():
    from urllib.error import URLError

    with pytest.raises(ConnectionError, match="torchvision/x"), fetching("torchvision/x"):
        raise URLError("no route")
    with pytest.raises(KeyError, match="own"), fetching("hf/owner/name"):
        raise KeyError("own")


# ------------------------------------------------------------------ lists
def test_lists(capsys):
    for pattern, expected in {
        "torchvision/vit_b_16*": "torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1",
        "torchvision/swin_t": "torchvision/swin_t.IMAGENET1K_V1",
        "open_clip/ViT-B-32": "open_clip/ViT-B-32/laion2b_s34b_b79k",
        "swin_t*": "torchvision/swin_t.IMAGENET1K_V1",
        "timm/swin_tiny*": "timm/swin_tiny_patch4_window7_224.ms_in22k",
    }.items():
        assert main(["list", "models", pattern]) == 0
        assert expected in capsys.readouterr().out.split()
    assert main(["list", "models", "torchvision/*", "--pretrained", "false"]) == 0
    names = capsys.readouterr().out.split()
    assert "torchvision/resnet50" in names
    assert all(name.startswith("torchvision/") and "." not in name for name in names)
    assert main(["list", "models", "hf/*"]) == 1
    assert "the Hugging Face Hub is not listed here" in capsys.readouterr().err
    every = dl.list_models("*")
    assert {name.partition("/")[0] for name in every} == {"deltalens", "timm", "torchvision", "open_clip", "points"}
