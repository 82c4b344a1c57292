"""The recipes of the package: every one can be read, and holds the papers' rows, sizes, settings and numbers."""

import json
from pathlib import Path

import pytest
from picture_folders import write_pictures, write_splits, write_tiny_backbone
from test_counts import on_meta
from test_counts_baselines import detector_norms

import deltalens as dl
from deltalens.cli.main import main
from deltalens.data.vtab1k import GROUPS, TASKS
from deltalens.studies.grid import Grid
from deltalens.studies.recipe_files import recipe_files, summary
from deltalens.studies.study import Study
from deltalens.studies.study_reader import read_study

STUDIES = recipe_files("compare")
MONA = ("flowers102", "pets", "voc2007")


def study_of(name: str, **folders: str) -> Study:
    return read_study(STUDIES[name], folders or {"": "nowhere"})


def row(study: Study, label: str, dataset: str = ""):
    return next(variant for variant in study.variants if variant.label == label).on(dataset)


def published(study: Study) -> dict[str, dict[str, float]]:
    (source,) = study.published
    found: dict[str, dict[str, float]] = {}
    for score in source.scores:
        found.setdefault(score.label, {})[score.column] = score.percent
    return found


def searched(study: Study, label: str, dataset: str = "") -> dict[str, list]:
    """What a row's search may choose."""
    candidates = study.candidates(row(study, label, dataset))
    return {name: sorted({c.values[name] for c in candidates}) for name in candidates[0].searched}


# ------------------------------------------------------------------ all of them
WITHOUT_SCORES = ("mona/star-kld-published",)  # the paper has a table of them, as a picture that nobody has quoted


@pytest.mark.parametrize("name", [name for name in STUDIES if name.startswith(("mona/", "vpt/"))])
def test_every_recipe_can_be_read_and_says_how_it_is_started(name, tmp_path):
    study = study_of(name)
    assert f": deltalens compare {name} --data " in summary(STUDIES[name])
    assert study.protocol == ("published" if name.endswith("-published") else "fair")
    assert len(study.seeds) == 3
    assert published(study) if study.published else name in WITHOUT_SCORES
    runs = Grid(study, tmp_path)
    assert set(runs.finals) == {
        (study.backbones[0].label, dataset.name, variant.label)
        for dataset in study.datasets
        for variant in study.variants
    }
    if study.protocol == "fair":
        budgets = {len(study.candidates(variant)) for variant in study.variants}
        assert budgets == {study.search.trials}


# ------------------------------------------------------------------ Adapter-X
ADAPTER_X = ("adapter-x/vtab1k", "adapter-x/vtab1k-published")


@pytest.mark.parametrize("name", ADAPTER_X)
def test_adapter_x_on_vtab(name):
    study = study_of(name)
    assert f": deltalens compare {name} --data " in summary(STUDIES[name])
    assert study.protocol == ("published" if name.endswith("-published") else "fair")
    assert {dataset.name for dataset in study.datasets} == set(TASKS)
    collected, figure = study.published
    assert "read off a figure" in figure.note
    assert {score.metric for score in figure.scores} == {"group mean"}
    read = {score.label: score.percent for score in figure.scores}
    tables = {}
    for score in collected.scores:
        tables.setdefault(score.label, {})[score.column] = score.percent
    for label, numbers in tables.items():
        for group in GROUPS:
            tasks = [numbers[task] for task in TASKS if TASKS[task].group == group]
            assert sum(tasks) / len(tasks) == pytest.approx(numbers[group], abs=0.006)
        if label not in ("Adapter", "AdaptFormer"):  # which are 64 wide in the figure
            assert sum(numbers[group] for group in GROUPS) / 3 == pytest.approx(read[label], abs=0.15)
    assert read["Adapter-X"] - read["Adapter"] == pytest.approx(0.1)
    scales = {"Adapter-X", "AdaptFormer-X", "Adapter", "AdaptFormer"}
    for variant in study.variants:
        found = searched(study, variant.label)
        assert (found.get("scale", found.get("method.scale")) == [0.01, 0.1, 1, 10]) == (variant.label in scales), found


def test_rows_of_adapter_x_have_the_figures_sizes():
    found = counted(study_of(ADAPTER_X[0]))
    percents = {label: round(100 * count / 85_798_656, 2) for label, count in found.items()}
    expected = {"Linear": 0, "BitFit": 0.12, "LoRA": 0.34, "Adapter": 1.39, "Adapter-X": 0.2, "AdaptFormer-X": 0.2}
    assert {label: percents[label] for label in expected} == expected


# ------------------------------------------------------------------ Mona
SWIN_L = {  # table of the reference; the classifier has no output norms of a detector
    "Full": 194_998_164 - detector_norms("l", 2),
    "Fixed": 0,
    "BitFit": 302_484 - detector_norms("l", 1),
    "NormTuning": 89_088 - detector_norms("l", 2),
    "Partial-1": 28_339_632,
    "Adapter": 4_659_456,
    "LoRA": 4_620_288,
    "AdaptFormer": 2_329_728,
    "Mona": 5_267_712,
}
LORAND = {"LoRand+": (4, 8), "LoRand++": (4, 16)}


def counted(study: Study) -> dict[str, int]:
    """Trained parameters of every row on the study's backbone."""
    backbone = study.backbones[0]
    options = {key: value for key, value in backbone.options.items() if key != "pretrained_cfg_overlay"}
    model = on_meta(backbone.model.removeprefix("timm/").partition(".")[0], **options)
    found = {}
    for variant in study.variants:
        dl.attach(model, [dl.SidetuneConfig(pretrained=False) if m.name == "sidetune" else m for m in variant.methods])
        found[variant.label] = dl.count_parameters(model).adapter
        dl.detach(model)
    return found


def test_rows_of_mona_have_the_papers_sizes():
    found = counted(study_of("mona/flowers102"))
    lorand = {label: found.pop(label) for label in LORAND}
    assert found == SWIN_L
    widths = [192 * 2**stage for stage, depth in enumerate((2, 2, 18, 2)) for _ in range(2 * depth)]
    for label, (b, k) in LORAND.items():
        assert lorand[label] == sum(b * k * (3 * c + 2 * k) + c + c // 2 for c in widths)


@pytest.mark.parametrize("name", MONA)
def test_monas_two_protocols(name):
    fair, paper = study_of(f"mona/{name}"), study_of(f"mona/{name}-published")
    assert [variant.to_dict() for variant in fair.variants] == [variant.to_dict() for variant in paper.variants]
    assert published(fair) == published(paper)
    assert fair.backbones[0].model == paper.backbones[0].model == "timm/swin_large_patch4_window7_224.ms_in22k"
    assert (fair.datasets[0].protocol, paper.datasets[0].protocol) == ("val", "trainval")
    doubled = 1 if name == "voc2007" else 2
    for variant in paper.variants:
        (candidate,) = paper.candidates(variant)
        assert candidate.values["lr"] == 5e-4 * 16 / 512 * (doubled if variant.label == "Mona" else 1)
        training = vars(paper.training_of(variant))
        assert training | {
            "epochs": 100, "batch_size": 16, "weight_decay": 0.05, "warmup_epochs": 20, "min_lr": 0.01,
            "clip_grad": 5, "optimizer": "adamw", "hflip": 0.5,
            "no_decay": ("norm", "bias", "absolute_pos_embed", "relative_position_bias_table"),
        } == training  # fmt: skip
    assert paper.backbones[0].options["drop_path_rate"] == 0.3
    assert 224 / paper.backbones[0].options["pretrained_cfg_overlay"]["crop_pct"] == 256


def test_monas_published_numbers():
    assert published(study_of("mona/flowers102")) == {
        "Full": {"flowers102": 99.5772}, "Adapter": {"flowers102": 99.5934}, "Mona": {"flowers102": 99.6764},
    }  # fmt: skip
    assert published(study_of("mona/pets")) == {"Full": {"pets": 94.6579}, "Mona": {"pets": 95.4765}}
    assert published(study_of("mona/voc2007")) == {
        "Full": {"voc2007": 84.1276}, "Adapter": {"voc2007": 87.0355}, "Mona": {"voc2007": 86.9709},
    }  # fmt: skip


# ------------------------------------------------------------------ VPT
GROUP_MEANS = {  # ViT-B: Natural, Specialized, Structured, FGVC
    "Full": (75.88, 83.36, 47.64, 88.54),
    "Linear": (68.93, 77.16, 26.84, 79.32),
    "Partial-1": (69.44, 78.53, 34.17, 82.63),
    "MLP-3": (67.80, 72.83, 30.62, 79.80),
    "Sidetune": (58.21, 68.12, 23.41, 78.35),
    "Bias": (73.30, 78.25, 44.09, 88.41),
    "Adapter": (70.39, 77.11, 33.43, 85.66),
    "VPT-shallow": (76.81, 79.66, 46.98, 84.62),
    "VPT-deep": (78.48, 82.43, 54.98, 89.11),
}
SWIN_B = {
    "Full": (79.10, 86.21, 59.65), "Linear": (73.52, 80.77, 33.52), "Partial-1": (73.11, 81.70, 34.96),
    "MLP-3": (73.56, 75.21, 35.69), "Bias": (74.19, 80.14, 42.42), "VPT-shallow": (79.85, 82.45, 37.75),
    "VPT-deep": (76.78, 84.53, 53.35),
}  # fmt: skip
SGD = [50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05]
ADAMW = [0.001, 0.0001, 0.0005, 0.005]
DECAYS = [0, 0.0001, 0.001, 0.01]
BATCH = {"Linear": 2048, "Partial-1": 1280, "Full": 128, "Bias": 128, "Adapter": 128}


@pytest.mark.parametrize("name", ["vpt/vtab1k", "vpt/vtab1k-published"])
def test_vtab(name):
    study = study_of(name)
    assert {(d.name, d.format, d.protocol) for d in study.datasets} == {(t, f"vtab1k/{t}", "trainval") for t in TASKS}
    numbers = published(study)
    for label, means in GROUP_MEANS.items():
        assert tuple(numbers[label][group] for group in GROUPS) == means[:3]
    assert {label for label in numbers if len(numbers[label]) > 3} == {"Full", "VPT-shallow", "VPT-deep"}
    for label in ("Full", "VPT-shallow", "VPT-deep"):  # tasks are rounded to one decimal
        for group, mean in zip(GROUPS, GROUP_MEANS[label], strict=False):
            tasks = [numbers[label][task] for task in TASKS if TASKS[task].group == group]
            assert sum(tasks) / len(tasks) == pytest.approx(mean, abs=0.06)
    assert (study.training.min_crop, study.training.hflip) == (1, 0)
    assert study.backbones[0].options["pretrained_cfg_overlay"]["crop_mode"] == "squash"


def test_rows_of_vpt_have_the_papers_sizes():
    assert counted(study_of("vpt/vtab1k")) == {
        "Full": 85_798_656,
        "Linear": 0,
        "Partial-1": 7_089_408,
        "MLP-3": 0,
        "Sidetune": 9_547_585,
        "Bias": 102_912,
        "Adapter": 1_779_840,
        "VPT-shallow": 7_680,
        "VPT-deep": 92_160,
    }


@pytest.mark.parametrize("name", ["vpt/vtab1k-published", "vpt/fgvc-published"])
def test_vpts_grids(name):
    study = study_of(name)
    assert (study.training.epochs, study.training.warmup_epochs, study.training.min_lr) == (100, 10, 0)
    for dataset in study.datasets:
        for variant in study.variants:
            here = variant.on(dataset.name)
            training = study.training_of(here, dataset)
            prompts = getattr(here.methods[0], "num_tokens", 0)
            assert training.batch_size == (64 if prompts >= 100 else BATCH.get(variant.label, 128))
            adamw = variant.label in ("Full", "Partial-1", "Bias", "Adapter")
            grid = ADAMW if adamw else SGD[:-1] if "VPT" in variant.label and "fgvc" in name else SGD
            found = searched(study, variant.label, dataset.name)
            assert found["lr"] == pytest.approx(sorted(lr * training.batch_size / 256 for lr in grid), rel=1e-5)
            assert found["weight_decay"] == DECAYS
            assert {c.values["optimizer"] for c in study.candidates(here)} == {"adamw" if adamw else "sgd"}
            more = {k: v for k, v in found.items() if k not in ("lr", "weight_decay")}
            expected = {"method.reduction": [8, 64, 256]} if variant.label == "Adapter" else {}
            if (variant.label, name) == ("VPT-shallow", "vpt/fgvc-published"):
                expected = {"method.num_tokens": [1, 5, 10, 50, 100, 200]}
            assert more == expected
            points = [tuple(c.values[name] for name in found) for c in study.candidates(here)]
            whole = 1
            for values in found.values():
                whole *= len(values)
            assert len(set(points)) == len(points) == whole


PROMPTS = {  # task: (shallow, deep), chosen by the paper
    "cifar": (100, 10), "caltech101": (5, 10), "dtd": (1, 10), "oxford_flowers102": (200, 1),
    "oxford_iiit_pet": (50, 1), "svhn": (200, 50), "sun397": (1, 5), "patch_camelyon": (5, 100), "eurosat": (50, 100),
    "resisc45": (50, 10), "diabetic_retinopathy": (10, 1), "clevr_count": (100, 50), "clevr_dist": (200, 200),
    "dmlab": (100, 100), "kitti": (100, 50), "dsprites_loc": (100, 10), "dsprites_ori": (100, 50),
    "smallnorb_azi": (200, 200), "smallnorb_ele": (200, 200),
}  # fmt: skip


def test_vpts_prompts_of_each_task():
    study = study_of("vpt/vtab1k-published")
    for task, numbers in PROMPTS.items():
        found = [row(study, label, task).methods[0] for label in ("VPT-shallow", "VPT-deep")]
        assert tuple(config.num_tokens for config in found) == numbers
        assert [(config.deep, config.dropout) for config in found] == [(False, 0), (True, 0.1)]
    means = {group: [PROMPTS[t][1] for t in TASKS if TASKS[t].group == group] for group in GROUPS}
    assert [sum(p) / len(p) for p in means.values()] == pytest.approx([12.4, 52.8, 107.5], abs=0.05)  # the paper's own
    sets = study_of("vpt/fgvc-published")
    deep = [row(sets, "VPT-deep", d.name).methods[0].num_tokens for d in sets.datasets]
    assert deep == [10, 50, 5, 100, 200]


def test_fgvc_and_swin():
    for name in ("vpt/fgvc", "vpt/fgvc-published"):
        study = study_of(name)
        numbers = published(study)
        assert {label: each["mean"] for label, each in numbers.items()} == {k: v[3] for k, v in GROUP_MEANS.items()}
        for label in ("Full", "VPT-shallow", "VPT-deep"):
            sets = [numbers[label][dataset.name] for dataset in study.datasets]
            assert sum(sets) / 5 == pytest.approx(numbers[label]["mean"], abs=0.05)
        assert (study.split.val_fraction, study.datasets[0].protocol) == (0.1, "val")
    swin = study_of("vpt/vtab1k-swin-b")
    assert {k: tuple(v.values()) for k, v in published(swin).items()} == SWIN_B
    assert [variant.label for variant in swin.variants] == list(SWIN_B)
    assert searched(swin, "VPT-deep")["method.num_tokens"] == [1, 5, 10, 50]
    assert counted(swin)["VPT-deep"] == 10 * 12_032


def test_the_fair_search_of_vpt_chooses_prompts_and_widths():
    study = study_of("vpt/vtab1k")
    assert set(searched(study, "VPT-deep")) == {"lr", "weight_decay", "method.num_tokens"}
    assert set(searched(study, "Adapter")) == {"lr", "weight_decay", "method.reduction"}
    assert set(searched(study, "Full")) == {"lr", "weight_decay"}


# ------------------------------------------------------------------ some datasets only
def test_datasets_without_a_folder_are_left_out(tmp_path, capsys):
    study = study_of("vpt/fgvc", cub="here", cars="there")
    assert ([d.name for d in study.datasets], study.left_out) == (["cub", "cars"], ("nabirds", "flowers", "dogs"))
    assert published(study)["VPT-deep"] == {"cub": 88.5, "cars": 83.6}  # no mean of five
    words = ["compare", "vpt/fgvc", "--output", str(tmp_path), "--dry-run", "--data"]
    assert main([*words, "cub=x"]) == 0
    assert "left out, since no folder was given: nabirds, flowers, dogs, cars" in capsys.readouterr().out
    assert main([*words, "cbu=x"]) == 1
    assert "has no dataset cbu; did you mean cub?" in capsys.readouterr().err


def test_the_example_of_the_page(tmp_path):
    page = (Path(__file__).parents[1] / "docs/recipes.md").read_text()
    text = "# mine.yaml" + page.partition("```yaml\n# mine.yaml")[2].partition("```")[0]
    (tmp_path / "mine.yaml").write_text(text)
    study = read_study(tmp_path / "mine.yaml", {"mine": "photos"})
    assert [(d.name, d.format, d.hflip) for d in study.datasets] == [("mine", "auto", 0)]
    assert ([b.label for b in study.backbones], study.published, study.search.trials) == (["Swin-T"], (), 6)
    assert len(list(Grid(study, tmp_path).runs())) == 11 * (6 + 1)
    runs = {n: len(list(Grid(study_of(n), tmp_path).runs())) for n in ("mona/pets", "mona/pets-published")}
    assert runs == {"mona/pets": 165, "mona/pets-published": 33}
    counts = [len(list(Grid(study_of(n), tmp_path).runs())) for n in ("vpt/vtab1k", "vpt/vtab1k-published")]
    assert counts == [19 * 171, 6137]
    assert all(f" {count} " in page for count in (165, 33, 171, 6137))


# ------------------------------------------------------------------ a fair and a published one, run
SMALL = """\
base: {name}
backbones: [{{label: {label}, model: {model}}}]
seeds: [0, 1]
training: {{epochs: 1, warmup_epochs: 0, batch_size: 4}}
"""
FAIR = """\
datasets: {flowers102: {format: folder, download: false}}
methods: {Full: null, Fixed: null, BitFit: null, NormTuning: null, Partial-1: null, LoRA: null, AdaptFormer: null,
  LoRand+: null, LoRand++: null, Adapter: {bottleneck: 4}, Mona: {bottleneck: 4}}
search: {trials: 2}
published: {scores: {Full: null}, not_run: {Full: {flowers102: 99.5772}}}
"""
PUBLISHED = """\
methods: {Full: null, Linear: null, Partial-1: null, MLP-3: null, Sidetune: null, Adapter: null, VPT-shallow: null,
  Bias: {search: {trials: 2}},
  VPT-deep: {search: {space: vpt-grid, trials: 2}, datasets: {cifar: {num_tokens: 2}}}}
published: {scores: {Full: null, Linear: null, Partial-1: null, MLP-3: null, Sidetune: null, Adapter: null,
  VPT-shallow: null}}
"""


def write_cifar(folder: Path) -> Path:
    """The task of VTAB-1k in miniature."""
    for name, count in (("train800", 8), ("val200", 4), ("test", 4)):
        write_pictures(folder / "cifar" / "images" / name, count // 2, classes={"0": (40, 60, 200), "1": (200, 40, 50)})
        paths = sorted((folder / "cifar" / "images" / name).rglob("*.*"))
        lines = "".join(f"{path.relative_to(folder / 'cifar')} {path.parent.name}\n" for path in paths)
        (folder / "cifar" / f"{name}.txt").write_text(lines)
    return folder


@pytest.mark.parametrize(
    ("name", "label", "dataset", "write", "more", "rows"),
    [
        (
            "mona/flowers102",
            "Swin-L",
            "flowers102",
            lambda folder: write_splits(folder, train=4, val=2, test=3),
            FAIR,
            {"Adapter": "99.5934", "Mona": "99.6764", "Full": "99.5772"},
        ),
        ("vpt/vtab1k-published", "ViT-B", "cifar", write_cifar, PUBLISHED, {"Bias": "", "VPT-deep": "78.8"}),
    ],
    ids=["fair", "published"],
)
def test_a_recipe_runs_small(name, label, dataset, write, more, rows, tmp_path):
    write(tmp_path / "photos")
    write_tiny_backbone(tmp_path / "model")
    text = SMALL.format(name=name, label=label, model=tmp_path / "model") + more
    (tmp_path / "small.yaml").write_text(text)
    words = ["compare", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "out"), "--workers", "0"]
    assert main([*words, "--data", f"{dataset}={tmp_path / 'photos'}"]) == 0
    table = (tmp_path / "out/table.md").read_text().partition(f"## {label}, {dataset}\n")[2]
    table = table.partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    column = lines[0].index("published")
    found = {line[0]: line for line in lines[2:]}
    assert {key: found[key][column] for key in rows} == rows
    assert {key: "±" in found[key][1] for key in rows} == {key: key != "Full" for key in rows}
    results = [json.loads(file.read_text()) for file in (tmp_path / "out/runs").rglob("results.json")]
    assert len(results) == 2 * (2 + 2)
    if name == "vpt/vtab1k-published":
        finals = [each for each in results if each["test"]]
        assert {each["data"]["train"] for each in finals} == {12}  # training and validation images
