"""`deltalens demo` of segmentation, detection and oriented boxes on a tiny budget: what a run leaves and says."""

import json

import pytest
import torch

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data import oriented_scenes, scenes
from deltalens.studies import dense_demo
from deltalens.studies.demo import contender
from deltalens.studies.dense_demo import CONTENDERS, DenseSettings
from deltalens.studies.results import Comparison, RunResult

CLASSES = {"segmentation": ["ground", "shape"], "detection": ["shape"], "oriented": ["vehicle"]}
TINY = ["--epochs", "1", "--train-images", "8", "--methods", "linear", "lora"]


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("segmentation", "mIoU"),
        pytest.param("detection", "AP50", marks=pytest.mark.slow),
        pytest.param("oriented", "AP50", marks=pytest.mark.slow),
    ],
)
def test_a_run_leaves_table_report_results_and_adapters(task, metric, tmp_path, monkeypatch, capsys):
    for module in (scenes, oriented_scenes):
        monkeypatch.setattr(module, "VAL_SCENES", 4)
        monkeypatch.setattr(module, "TEST_SCENES", 6)
    monkeypatch.setenv("COLUMNS", "80")
    output = tmp_path / "out"
    assert main(["demo", "--task", task, *TINY, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert metric in shown
    assert "accuracy" not in shown
    content = json.loads((output / "results.json").read_text())
    assert content["metric"] == metric
    assert [run["method"] for run in content["runs"]] == ["Head only", "LoRA"]
    head, lora = content["runs"]
    assert head["adapter_parameters"] == 0 < lora["adapter_parameters"]
    assert head["head_parameters"] == lora["head_parameters"]
    assert 0 < head["saved_bytes"] < lora["saved_bytes"]
    page = (output / "report.html").read_text()
    assert f"{metric} on 6 test scenes" in page
    assert "may be chance" not in page
    assert page.count("data:image/jpeg;base64,") == dense_demo.PICTURES * 3  # the truth and two methods
    assert f"--task {task}" in page
    for run in content["runs"]:
        assert 0 <= run[metric] <= 1
        assert "accuracy" not in run
        assert f"val_{metric}" in run["epochs"][0]
        model = dl.from_pretrained(output / run["folder"])
        info = dl.adapter_info(model)
        assert info["task"] == task
        assert info["class_names"] == CLASSES[task]
        assert list(info["metrics"].values())[1] == pytest.approx(run[metric])
        with torch.no_grad():
            assert model.eval()(torch.zeros(1, 3, 64, 64) if task == "segmentation" else [torch.zeros(3, 64, 64)])


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_scenes_have_shapes_of_one_class(task):
    six = scenes.make_scenes(2, 64, 0, task)
    one = dense_demo.objects_alone(six, "shape")
    if task == "segmentation":
        assert one.class_names == ["ground", "shape"]
        assert torch.equal(one.test.truth(0), (six.test.truth(0) > 0).long())
    else:
        assert one.class_names == ["shape"]
        assert torch.equal(one.test.truth(0)["boxes"], six.test.truth(0)["boxes"])
        assert not one.test.truth(0)["labels"].any()


def test_settings_of_a_method():
    rates = {task: contender("mona", CONTENDERS[task]).learning_rate for task in dense_demo.METRICS}
    assert rates == {"segmentation": 1e-3, "detection": 3e-3, "oriented": 2e-3}
    assert contender("normtuning", CONTENDERS["detection"]).learning_rate > 0
    with pytest.raises(ValueError, match="segmentation or detection or oriented"):
        DenseSettings(task="instance")


def test_results_of_other_metrics_have_their_own_names():
    run = RunResult("A", {}, 1, 2, 3, 0.25, 1.0, 4, 5)
    plain, named = (Comparison("t", "i", [run], 9, metric=metric).to_dict() for metric in ("accuracy", "mIoU"))
    assert plain["runs"][0]["accuracy"] == named["runs"][0]["mIoU"] == 0.25
    assert "accuracy" not in named["runs"][0]
