"""Studies that build on another, one folder for all datasets, and how recipes are found."""

from pathlib import Path

import pytest

from deltalens.cli.compare import read_data
from deltalens.cli.main import main
from deltalens.studies.grid import Grid
from deltalens.studies.recipe_files import recipe_files
from deltalens.studies.study_reader import read_study

BASE = """\
backbones: deltalens/vit-mini
methods:
  Linear: linear
  LoRA: {method: lora, r: 4}
  Mona: {method: mona}
datasets: {a: {hflip: 0}, b: there}
seeds: [0, 1]
training: {epochs: 3, weight_decay: 0.1}
"""


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "own.yaml"


def test_fields_are_merged_and_taken_away(tmp_path):
    own = write(
        tmp_path,
        base=BASE,
        middle="base: base.yaml\ntraining: {epochs: 5}\nmethods: {LoRA: {alpha: 1}}\n",
        own="base: middle.yaml\nseeds: [4]\nmethods: {Linear: null, Full: full}\ndatasets: {a: {hflip: 1}, c: }\n",
    )
    study = read_study(own, {"": "all"})
    assert (study.title, study.seeds) == ("own", (4,))
    assert (study.training.epochs, study.training.weight_decay) == (5, 0.1)
    assert [variant.label for variant in study.variants] == ["LoRA", "Mona", "Full"]
    assert (study.variants[0].methods[0].r, study.variants[0].methods[0].alpha) == (4, 1)
    assert [(d.name, d.path, d.hflip) for d in study.datasets] == [
        ("a", "all", 1),
        ("b", "there", None),
        ("c", "all", None),
    ]


WRONG = {
    "base: none": r"own.yaml, line 1, base: there is no file .*none, nor a study 'none' in the package; it has ",
    "base: own.yaml": r"own.yaml, line 1, base: .*builds on this file itself",
    "base: [base.yaml, 1]": r"line 1, base\.1: expected text",
    "base: circle.yaml": r"circle.yaml, line 1, base: .*own.yaml builds on this file itself",
    "title: t\nbase: base.yaml\nmethods: {A: liner}": r"own.yaml, line 3, methods\.A\.method: unknown method",
    "base: wrong.yaml\ntitle: t": r"wrong.yaml, line 4, training\.epoch: .*did you mean epochs",
    "base: base.yaml\nmethods: {LoRA: {k: 1}}": r"own.yaml, line 2, methods\.LoRA\.k: lora has no setting 'k'",
    "base: base.yaml\nmethods: {Mona: {bottleneck: 3}}\nsplit: {sead: 1}": r"own.yaml, line 3, split\.sead",
}


@pytest.mark.parametrize("text", WRONG)
def test_mistakes_are_named_in_their_file(text, tmp_path):
    wrong = "backbones: b\nmethods: {A: linear}\ntraining:\n  epoch: 3\n"
    own = write(tmp_path, own=text, base=BASE, circle="base: own.yaml\n", wrong=wrong)
    with pytest.raises(ValueError, match=WRONG[text]):
        read_study(own, {"a": "x"})


def test_the_example_of_the_page(tmp_path):
    page = (Path(__file__).parents[1] / "docs/studies.md").read_text()
    (tmp_path / "trial.yaml").write_text(page.partition("<!-- base -->\n```yaml\n")[2].partition("```")[0])
    study = read_study(tmp_path / "trial.yaml", {"": "photos"})
    assert (study.seeds, study.training.epochs, study.training.clip_grad) == ((0,), 10, 5)
    assert "Full" not in [variant.label for variant in study.variants]
    assert "LoRA" in [variant.label for variant in study.variants]


def test_a_search_space_lies_beside_the_file_that_names_it(tmp_path):
    (tmp_path / "deeper").mkdir()
    own = write(tmp_path, base=BASE + "search: {space: rates.yaml}\n", own="base: ../base.yaml\n")
    (tmp_path / "rates.yaml").write_text("sampler: grid\nspace: {lr: [0.1, 0.2]}\n")
    study = read_study(own.rename(tmp_path / "deeper" / "own.yaml"), {"": "x"})
    assert [c.values["lr"] for c in study.candidates(study.variants[0])] == [0.1, 0.2]


ROWS = {
    "datasets: {a: {r: 9}, b: {training: {epochs: 4}, alpha: 2}}": None,
    "datasets: {z: {r: 9}}": r"own.yaml, line 2, methods\.LoRA\.datasets\.z: .*allowed: a, b",
    "datasets: {a: {k: 9}}": r"own.yaml, line 2, methods\.LoRA\.datasets\.a\.k: lora has no setting 'k'",
    "datasets: {a: 9}": r"methods\.LoRA\.datasets\.a: expected a mapping",
}


@pytest.mark.parametrize("text", ROWS)
def test_a_row_may_differ_on_single_datasets(text, tmp_path):
    own = write(tmp_path, base=BASE, own=f"base: base.yaml\nmethods: {{LoRA: {{{text}}}}}\n")
    if ROWS[text]:
        with pytest.raises(ValueError, match=ROWS[text]):
            read_study(own, {"": "x"})
        return
    study = read_study(own, {"": "x"})
    runs = {run.dataset.name: run for run in Grid(study, tmp_path).runs() if run.variant.label == "LoRA"}
    settings = {name: (run.variant.methods[0].r, run.variant.methods[0].alpha) for name, run in runs.items()}
    assert settings == {"a": (9, 8), "b": (4, 2)}
    epochs = {name: study.training_of(run.variant, run.dataset).epochs for name, run in runs.items()}
    assert epochs == {"a": 3, "b": 4}
    (tmp_path / "own.yaml").write_text((tmp_path / "own.yaml").read_text() + "protocol: fair\n")
    with pytest.raises(ValueError, match=r"methods\.LoRA\.datasets: under protocol: fair"):
        read_study(own, {"": "x"})


def test_one_folder_for_all(tmp_path, capsys):
    assert read_data(["all", "a=x"]) == {"": "all", "a": "x"}
    for words, said in ((["x", "y"], "two folders"), (["=x"], "NAME=FOLDER"), (["a="], "NAME=FOLDER")):
        with pytest.raises(ValueError, match=said):
            read_data(words)
    own = write(tmp_path, own=BASE)
    study = read_study(own, {"": "all", "b": "else"})
    assert [(d.name, d.path) for d in study.datasets] == [("a", "all"), ("b", "else")]
    with pytest.raises(ValueError, match=r"got 'all': no dataset of .*own.yaml waits for a folder"):
        read_study(own, {"": "all", "a": "x"})
    assert main(["compare", str(own), "--data", "all", "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "12 runs" in capsys.readouterr().out


def test_recipes_are_listed_by_command(capsys):
    assert main(["list", "recipes"]) == 0
    text = capsys.readouterr().out
    train, compare, tune = (text.index(f"for deltalens {name}") for name in ("train", "compare", "tune"))
    assert train < text.index("  classify-mona") < compare < text.index("  mona/flowers102 ") < tune
    assert "_" not in "".join(recipe_files())
    assert main(["list", "recipes", "vpt/*"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("for deltalens compare NAME:\n  vpt/ade20k ")
    assert "mona" not in text
