"""Bytes on disk: of a run's adapter and its backbone, of the tasks of a study, of folders of adapters."""

import json

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from study_fixtures import compare, place, write_study  # noqa: F401
from study_runs import DATASETS, METHODS, study_text, table_of, write_study_folder

import deltalens as dl
from deltalens.cli.main import main
from deltalens.lifecycle.storage import safetensors_bytes, stored_bytes
from deltalens.studies.storage import StoredAdapter, largest_parts, storage_rows, study_storage
from deltalens.studies.study_details import Details
from deltalens.studies.study_plots import write_plots
from deltalens.studies.study_report import render_study_report

TYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16"]
TYPES += ["float32", "float64", "complex64", "float8_e4m3fn", "float8_e5m2"]
KINDS = [dl.FullConfig(), dl.MonaConfig(), [dl.PartialConfig(), dl.MLPConfig()]]


# ------------------------------------------------------------------ files
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 12), max_size=3)), max_size=8))
def test_the_size_of_a_file_is_computed_to_the_byte(tmp_path_factory, entries):
    tensors = {f"blök.{i}": torch.zeros(shape).to(getattr(torch, kind)) for i, (kind, shape) in enumerate(entries)}
    file = tmp_path_factory.mktemp("sizes") / "a.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    assert safetensors_bytes(tensors) == file.stat().st_size


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("methods", KINDS)
def test_bytes_of_adapter_and_backbone_are_those_of_files(name, methods, tmp_path):
    options = {"depth": 2} if name.startswith("vit") else {}
    plain = timm.create_model(name, num_classes=5, **options)
    save_file(plain.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    plain.reset_classifier(0)
    save_file(plain.state_dict(), tmp_path / "backbone.safetensors", metadata={"format": "pt"})
    model = timm.create_model(name, num_classes=5, **options)
    dl.attach(model, methods)
    dl.save_pretrained(model, tmp_path / "adapter")
    found = stored_bytes(model, tmp_path / "adapter")
    assert found["backbone"] == (tmp_path / "backbone.safetensors").stat().st_size
    assert found["adapter"] == (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    if not isinstance(methods, list):
        assert found["model"] == (tmp_path / "model.safetensors").stat().st_size
    if isinstance(methods, dl.FullConfig):
        assert found["adapter"] == found["model"]


def test_layers_that_a_library_wraps_count_as_the_backbones_own(tmp_path):
    pytest.importorskip("peft")
    sizes = []
    for method in (dl.LinearConfig(), dl.make_config("peft/loha")):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=2)
        dl.attach(model, method)
        dl.save_pretrained(model, tmp_path)
        sizes.append(stored_bytes(model, tmp_path))
    assert sizes[0]["backbone"] == sizes[1]["backbone"]
    assert sizes[0]["model"] == sizes[1]["model"]
    assert sizes[0]["adapter"] < sizes[1]["adapter"]


# ------------------------------------------------------------------ rows
def test_a_backbone_is_stored_once_and_not_at_all_by_full_fine_tuning():
    def stored(method, task, size, parameters):
        return StoredAdapter(method, "b", task, size, 1000, 1000 + {"t": 40, "u": 20}[task], parameters, 5, 250)

    sizes = [("Linear", "t", 40, 0), ("Linear", "u", 20, 0), ("Full", "t", 1040, 250), ("Full", "u", 1020, 250)]
    linear, full = storage_rows([stored(*each) for each in sizes])
    assert (linear.total, linear.models, linear.adapter_bytes) == (1060, 2060, 30)
    assert [linear.total_for(count) for count in (1, 10)] == [1030, 1300]
    assert (full.total, full.models, full.percent, full.total_for(10)) == (2060, 2060, 100, 10300)
    assert (linear.parameters, full.parameters) == (260 / 250, 510 / 250)
    unknown = StoredAdapter("LoRA", "b", "t", 12, None, None, 3, 0, None)
    assert (storage_rows([unknown])[0].total, storage_rows([unknown])[0].parameters) == (None, None)


def test_a_study_counts_every_dataset_once_and_says_it_everywhere(tmp_path):
    grid = write_study_folder(tmp_path, study_text(backbones=["ViT-S"], extra="fractions: [0.5, 1]"))
    table = table_of(grid)
    assert largest_parts(table.sources) == {"flowers@100%", "pets@100%", "textures@100%"}
    rows = {row.method: row for row in study_storage(table.cells, table.sources)["ViT-S"]}
    heads = [385 * classes for _, classes in DATASETS.values()]
    backbone, lora = 21_665_664, METHODS["LoRA"][1]
    assert rows["LoRA"].total == 4 * backbone + 15_800 + sum(4 * (lora + head) + 9_000 for head in heads)
    assert rows["Full"].total == rows["LoRA"].models == sum(4 * (backbone + head) + 16_000 for head in heads)
    markdown = table.to_markdown()
    assert "## Storage, ViT-S" in markdown
    assert markdown.count("3.00x") == 1
    page = render_study_report(table, grid.study, Details())
    assert "Storage, ViT-S" in page
    assert "dot: 3 tasks, measured; strokes: 1, 10, 100 tasks, computed" in page
    assert tmp_path / "p/ViT-S-storage.svg" in write_plots(table, tmp_path / "p", "x")


def test_methods_without_all_results_have_no_row(tmp_path):
    def accuracy(run):
        return None if (run.variant.label, run.dataset.name) == ("Mona", "pets") else 0.5

    table = table_of(write_study_folder(tmp_path, study_text(backbones=["ViT-S"]), accuracy))
    assert "Mona" not in [row.method for row in study_storage(table.cells, table.sources)["ViT-S"]]


# ------------------------------------------------------------------ the command
def test_the_command_reads_folders_of_any_origin(place, tmp_path, capsys):  # noqa: F811
    photos, model = str(place / "photos"), str(place / "model")
    words = ["train", "--model", model, "--data", photos, "--epochs", "1", "--warmup-epochs", "0"]
    for name, own in {"a": ["linear"], "b": ["linear"], "full": ["full"]}.items():
        assert main([*words, "--method", *own, "--output", str(tmp_path / name)]) == 0
    results = json.loads((tmp_path / "a/results.json").read_text())["bytes"]
    (tmp_path / "b/results.json").unlink()  # an adapter alone: its backbone is built to be counted
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in ("a", "b", "full")]
    assert main(["analyze", "storage", *folders, "--output", str(tmp_path / "storage.json")]) == 0
    assert "computed" in capsys.readouterr().out
    found = json.loads((tmp_path / "storage.json").read_text())
    linear, full = next(iter(found.values()))
    assert linear["method"] == "linear"
    assert linear["total"] == results["backbone"] + 2 * results["adapter"]
    assert linear["models"] == 2 * results["model"] == 2 * full["total"]
    by_hand = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    dl.attach(by_hand, dl.MonaConfig(bottleneck=8))
    dl.save_pretrained(by_hand, tmp_path / "hand")
    config = tmp_path / "hand/adapter_config.json"
    facts = json.loads(config.read_text())
    facts["base_model"]["id"] = None
    config.write_text(json.dumps(facts))
    assert main(["analyze", "storage", str(tmp_path / "hand")]) == 0
    printed = capsys.readouterr().out
    assert "mona (bottleneck 8)" in printed
    assert "is not known: it was built by hand" in printed
    assert main(["analyze", "storage", photos]) == 1
    assert "is no adapter" in capsys.readouterr().err
    assert main(["analyze", "storage", str(tmp_path / "nowhere")]) == 1
    assert f"there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err
