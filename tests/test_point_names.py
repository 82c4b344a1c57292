"""Point transformers by name, and weights from files as their authors published them."""

import logging
import pickle

import pytest
import reference
import torch
from safetensors.torch import save_file

import deltalens as dl
from deltalens.backbones.points import hub_names
from deltalens.cli.main import main
from deltalens.models.point_mae import PointMAE
from deltalens.models.point_transformer import PointTransformer

SMALL = {"dim": 24, "depth": 2, "heads": 2, "num_groups": 6, "group_size": 4, "encoder_dim": 24}
RECON = {"class_tokens": ("cls", "img", "text"), "two_streams": True}
X = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))


def published(state: dict, path, module: bool = True) -> str:
    """A pickle as the official trainers write it."""
    start = "module." if module else ""
    content = {
        "base_model": {start + name: tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "epoch": 300,
        "metrics": {"acc": 0.0},
        "best_metrics": {"acc": torch.tensor(85.0)},
    }
    torch.save(content, path)
    return str(path)


def prefixed(model: PointTransformer, prefix: str, without: tuple[str, ...] = ()) -> dict:
    left_out = ("cls_head_finetune", *without)
    return {prefix + name: t for name, t in model.state_dict().items() if not name.startswith(left_out)}


def same(found: torch.nn.Module, expected: PointTransformer, but: tuple[str, ...] = ("cls_head_finetune",)) -> bool:
    state = expected.state_dict()
    names = [name for name in state if not name.startswith(but)]
    return all(torch.equal(found.state_dict()[name], state[name]) for name in names)


# ------------------------------------------------------------------ files of the authors
def test_a_pretrained_file_of_point_mae_lacks_the_class_token(tmp_path, caplog):
    autoencoder = PointMAE(**SMALL)
    file = published(autoencoder.state_dict(), tmp_path / "pretrain.pth")
    with caplog.at_level(logging.WARNING):
        model = dl.create_backbone("points/point-mae", num_classes=3, checkpoint=file, **SMALL)
    assert "has no cls_token, cls_pos" in caplog.text
    assert same(model, autoencoder.MAE_encoder)
    assert model.untrained == ("cls_token", "cls_pos")
    assert 0.005 < float(model.cls_token.detach().std()) < 0.05
    again = dl.create_backbone("points/point-mae", num_classes=3, checkpoint=file, **SMALL)
    assert torch.equal(model.cls_token, again.cls_token)
    assert dl.preprocessing(model) == {"kind": "points", "num_points": 2048, "normalize": "unit_sphere"}


def test_the_official_key_list_of_the_pretrained_file_is_read_whole(tmp_path):
    keys = reference.load_json("pointmae_keys")["pretrain"]
    state = {name: torch.zeros(shape) if shape else torch.tensor(0) for name, shape in keys.items()}
    file = published(state, tmp_path / "pretrain.pth")
    model = dl.create_backbone("points/point-mae", num_classes=15, checkpoint=file)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_093_327
    frozen = [n for n, p in model.named_parameters() if not n.startswith("cls_") and bool(p.abs().sum())]
    assert frozen == []


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [
        ("points/act", {}, "ACT_encoder."),
        ("points/recon", RECON, "MAE_encoder."),
        ("points/point-bert", {"encoder_dim": 16, "head": "mlp"}, "transformer_q."),
        ("points/point-bert", {"encoder_dim": 16, "head": "mlp"}, "transformer_k."),
    ],
)
def test_pretrained_files_of_the_others(name, options, prefix, tmp_path):
    source = PointTransformer(3, **{**SMALL, **options})
    noise = {"dvae.encoder.first_conv.0.weight": torch.zeros(1), f"{prefix}lm_head.weight": torch.zeros(1)}
    file = published(prefixed(source, prefix) | noise, tmp_path / "file.pth", module=prefix != "ACT_encoder.")
    given = {**SMALL, **({"encoder_dim": 16} if "encoder_dim" in options else {})}
    model = dl.create_backbone(name, num_classes=5, checkpoint=file, **given)
    assert same(model, source)
    assert model.untrained == ()
    assert model.head_kind == source.head_kind
    assert model(X).shape == (2, 5)


def test_a_fine_tuned_file_brings_its_head_and_its_classes(tmp_path):
    source = PointTransformer(7, **SMALL).eval()
    file = published(source.state_dict(), tmp_path / "tuned.pth")
    model = dl.create_backbone("points/point-mae", checkpoint=file, **SMALL)
    assert torch.equal(model(X), source(X))
    other = dl.create_backbone("points/point-mae", num_classes=4, checkpoint=file, **SMALL)
    assert same(other, source)
    assert other(X).shape == (2, 4)


def test_safetensors_of_a_model_load_as_they_are(tmp_path):
    source = PointTransformer(7, **SMALL).eval()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = dl.create_backbone("points/point-mae", checkpoint=tmp_path / "model.safetensors", **SMALL)
    assert torch.equal(model(X), source(X))


# ------------------------------------------------------------------ files of the hub
def renamed(model: PointTransformer) -> dict[str, torch.Tensor]:
    """The state under torch-pointcloud's names, written down here once more, by hand."""
    names = {}
    for old, new in (("first_conv", "local_mlp"), ("second_conv", "global_mlp")):
        names |= {f"encoder.{old}.{3 * i}": f"encoder.{new}.lins.{i}" for i in (0, 1)}
        names[f"encoder.{old}.1"] = f"encoder.{new}.norms.0.module"
    names |= {"pos_embed.0": "pos_embed.lins.0", "pos_embed.2": "pos_embed.lins.1", "norm": "norm_f"}
    for i in range(len(model.blocks.blocks)):
        names |= {f"blocks.blocks.{i}.mlp.fc{n}": f"blocks.blocks.{i}.mlp.lins.{n - 1}" for n in (1, 2)}
    head = {"mlp-bn": {0: "lins.0", 1: "norms.0.module", 4: "lins.1", 5: "norms.1.module", 8: "lins.2"}}
    head["mlp"] = {0: "lins.0", 3: "lins.1"}
    names |= {f"cls_head_finetune.{i}": f"head.{new}" for i, new in head[model.head_kind].items()}
    state = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        tensor = tensor.squeeze(-1).clone() if "_conv." in name and tensor.dim() == 3 else tensor
        state[f"{names.get(owner, owner)}.{leaf}".lstrip(".")] = tensor
    return state


@pytest.mark.parametrize("options", [{}, {"encoder_dim": 16, "head": "mlp"}], ids=["point-mae", "point-bert"])
def test_names_of_torch_pointcloud(options, tmp_path):
    source = PointTransformer(7, **{**SMALL, **options}).eval()
    state = renamed(source)
    assert hub_names.FIRST in state
    if options:
        state = {name.replace("blocks.blocks.", "blocks."): tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    name = "points/point-bert" if options else "points/point-mae"
    given = {**SMALL, "encoder_dim": source.encoder.width}
    model = dl.create_backbone(name, checkpoint=tmp_path / "model.safetensors", **given)
    assert torch.equal(model(X), source(X))


def test_point_mae_is_fetched_from_the_hub_and_the_others_are_not(tmp_path, monkeypatch):
    source, asked = PointTransformer(7, **SMALL).eval(), []
    save_file(renamed(source), tmp_path / "model.safetensors")

    def download(*args):
        asked.append(args)
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = dl.create_backbone("points/point-mae.scanobjectnn-hardest", **SMALL)
    assert asked == [("torch-pointcloud/point-mae-base.scanobjectnn-hardest.yatian-pang", "model.safetensors")]
    assert torch.equal(model(X), source(X))
    with pytest.raises(ValueError, match="cannot be fetched by name: pass the authors' file as checkpoint="):
        dl.create_backbone("points/recon")


# ------------------------------------------------------------------ what is refused
def test_a_file_of_another_model_is_refused_with_the_tensor(tmp_path):
    source = PointTransformer(3, **SMALL)
    file = published(prefixed(source, "MAE_encoder."), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"lacks \d+ tensors, such as blocks.blocks.2"):
        dl.create_backbone("points/point-mae", checkpoint=file, **{**SMALL, "depth": 3})
    with pytest.raises(ValueError, match=r"reduce_dim\.weight"):
        dl.create_backbone("points/point-mae", checkpoint=file, **{**SMALL, "dim": 32})
    with pytest.raises(ValueError, match=r"first_conv\.0\.weight is \(128, 3, 1\), and \(8, 3, 1\) here"):
        dl.create_backbone("points/point-mae", checkpoint=file, **{**SMALL, "encoder_hidden": (8, 8)})


def test_files_without_a_point_transformer_are_refused(tmp_path):
    file = published({"conv1.weight": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"no point transformer in this file.*it holds conv1\.weight"):
        dl.create_backbone("points/point-mae", checkpoint=file)


class Harm:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_with_more_than_tensors_is_not_loaded(tmp_path, capsys):
    (tmp_path / "file.pth").write_bytes(pickle.dumps({"base_model": Harm()}))
    with pytest.raises(ValueError, match="pickle that holds more than tensors"):
        dl.create_backbone("points/point-mae", checkpoint=tmp_path / "file.pth")
    assert "run" not in capsys.readouterr().out


def test_unknown_names_get_the_nearest_ones():
    with pytest.raises(ValueError, match=r"no points/point-nae; did you mean points/point-mae"):
        dl.create_backbone("points/point-nae")


def test_names_are_listed():
    assert dl.list_models("points/*", pretrained=False) == [
        f"points/{n}" for n in ("point-mae", "point-bert", "act", "recon")
    ]
    assert dl.list_models("points/*") == ["points/point-mae"]
    assert "deltalens/points-mini" in dl.list_models("*-mini")


# ------------------------------------------------------------------ adapters
def test_class_tokens_that_no_pretraining_has_set_are_trained_and_saved_with_every_adapter(tmp_path):
    file = published(PointMAE(**SMALL).state_dict(), tmp_path / "pretrain.pth")
    model = dl.create_backbone("points/point-mae", num_classes=3, checkpoint=file, **SMALL)
    plain = model.cls_token.detach().clone()
    dl.attach(model, dl.LoRAConfig(r=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("cls_head")}
    assert {"cls_token", "cls_pos"} < trained
    with torch.no_grad():
        model.cls_token.add_(1)
    expected = model.eval()(X)
    dl.save_pretrained(model, tmp_path / "adapter")
    assert "clouds of 2,048 points" in (tmp_path / "adapter/README.md").read_text()
    loaded = dl.from_pretrained(tmp_path / "adapter")  # the backbone by its name and its file
    assert torch.equal(loaded(X), expected)
    assert dl.preprocessing(loaded)["kind"] == "points"
    dl.detach(model)
    assert torch.equal(model.cls_token, plain)


def test_a_head_for_other_classes_is_of_the_same_kind():
    model = dl.create_backbone("points/point-mae", pretrained=False, **SMALL)
    dl.attach(model, dl.LinearConfig(), num_classes=4)
    count = dl.count_parameters(model)
    assert model.eval()(X).shape == (2, 4)
    assert count.head == 48 * 256 + 256 + 512 + 256 * 256 + 256 + 512 + 256 * 4 + 4
    assert count.adapter == 0


def test_inspect_shows_a_point_model(capsys):
    arguments = ["inspect", "--model", "points/point-mae", "--method", "adaptformer", "--num-classes", "15"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "input clouds of 2,048 points" in shown
    assert "blocks.blocks" in shown
    assert main([*arguments, "--img-size", "224"]) != 0
    assert "reads clouds of points, and --img-size is the edge of images" in capsys.readouterr().err
