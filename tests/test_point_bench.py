"""`deltalens bench points`: patches of point clouds beside training steps."""

import json

from deltalens.cli.main import main


def test_points_are_measured_beside_both_training_steps(tmp_path, capsys):
    file = tmp_path / "points.json"
    assert main(["bench", "points", "--quick", "--rounds", "1", "--json", str(file)]) == 0
    (report,) = json.loads(file.read_text())["reports"]
    rows = {row["name"]: row for row in report["sections"][0]["rows"]}
    assert set(rows) == {"full fine-tuning", "AdaptFormer", "patches", "farthest points", "neighbours"}
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["patches"]["ratios"]["full"] < rows["AdaptFormer"]["ratios"]["full"]
    assert report["settings"]["points"] == 1024
    assert report["targets"] == []  # they are stated for Point-MAE
    assert "neighbours" in capsys.readouterr().out


def test_models_of_images_are_refused(capsys):
    assert main(["bench", "points", "--model", "timm/resnet18", "--quick"]) != 0
    assert "takes a model of point clouds, such as points/point-mae" in capsys.readouterr().err
