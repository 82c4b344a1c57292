"""Searches and settings of single methods in study files: what may be said, what is drawn, what is refused."""

from pathlib import Path

import pytest

from deltalens.studies.study_reader import read_study

HEAD = "backbones: deltalens/vit-mini\n"
METHODS = "methods:\n  Linear: linear\n  LoRA: {method: lora, r: 4}\n  Mona: mona\n"


def read(folder: Path, text: str):
    (folder / "study.yaml").write_text(HEAD + text)
    return read_study(folder / "study.yaml", {"d": "."})


def values(study, label: str) -> list[dict]:
    return [candidate.values for candidate in study.candidates(next(v for v in study.variants if v.label == label))]


# ------------------------------------------------------------------ what is drawn
def test_a_named_space_scales_with_the_batch_and_is_tried_in_ascending_order(tmp_path):
    study = read(tmp_path, METHODS + "search: {space: vpt-grid}\ntraining: {batch_size: 64}\n")
    found = values(study, "Mona")
    assert len(found) == 40
    assert found[0] == {"optimizer": "sgd", "lr": 0.05 * 64 / 256, "weight_decay": 0.01}
    assert [each["lr"] for each in found] == sorted(each["lr"] for each in found)
    assert {each["lr"] * 4 for each in found} == {50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05}
    part = values(read(tmp_path, METHODS + "search: {space: vpt-grid, trials: 12}\n"), "Mona")
    assert len(part) == 12
    assert all(each in found for each in part)
    assert part == values(read(tmp_path, METHODS + "search: {space: vpt-grid, trials: 12}\n"), "Linear")


def test_a_file_beside_the_study_and_another_sampler(tmp_path):
    (tmp_path / "mine.yaml").write_text("sampler: tpe\nspace: {lr: {low: 1e-4, high: 1e-2, log: true}}\n")
    study = read(tmp_path, METHODS + "search: {space: mine.yaml, trials: 30, sampler: random, fixed: {epochs: 3}}\n")
    rates = [each["lr"] for each in values(study, "Mona")]
    assert len(set(rates)) == 30
    assert 1e-4 <= min(rates) < 1e-3 < max(rates) <= 1e-2
    assert sum(rate < 1e-3 for rate in rates) in range(8, 23)  # half of the logarithm
    assert study.training_of(study.variants[0], values=values(study, "Mona")[0]).epochs == 3
    with pytest.raises(ValueError, match=r"search\.sampler: tpe chooses by the trials before.*sampler: random"):
        read(tmp_path, METHODS + "search: {space: mine.yaml, trials: 30}\n")


def test_a_method_without_a_setting_has_the_same_number_of_trials(tmp_path):
    text = "search: {trials: TRIALS, space: {lr: [1, 2, 3], method.dropout: [0, 0.1, 0.2]}}\n"
    text = text.replace("method.dropout", "method.r").replace("[0, 0.1, 0.2]", "[1, 2, 4]")
    few = read(tmp_path, METHODS + text.replace("TRIALS", "3"))
    assert len(values(few, "LoRA")) == len(values(few, "Linear")) == 3
    assert [each["lr"] for each in values(few, "Linear")] == [1, 2, 3]
    many = read(tmp_path, METHODS + text.replace("TRIALS", "6"))
    assert (len(values(many, "LoRA")), len(values(many, "Linear"))) == (6, 3)  # no more points than three
    drawn = METHODS + "search: {trials: 8, space: {weight_decay: {low: 0.1, high: 0.9}, method.r: [1, 2]}}\n"
    study = read(tmp_path, drawn)
    lora, linear = values(study, "LoRA"), values(study, "Linear")
    assert len(lora) == len(linear) == 8
    assert [each["weight_decay"] for each in lora] == [each["weight_decay"] for each in linear]
    assert study.methods_of(study.variants[1], lora[0])[0].r == lora[0]["method.r"]
    assert "method.r" not in linear[0]


def test_a_space_that_has_no_more_points_ends(tmp_path):
    study = read(tmp_path, METHODS + "search: {trials: 9, space: {warmup_epochs: {low: 1, high: 3}}}\n")
    assert sorted(each["warmup_epochs"] for each in values(study, "Mona")) == [1, 2, 3]
    narrow = read(tmp_path, METHODS + "search: {trials: 9, space: {weight_decay: {low: 0.5, high: 0.501}}}\n")
    assert {each["weight_decay"] for each in values(narrow, "Mona")} == {0.5, 0.501}  # of three digits


def test_the_short_form_is_a_grid_over_the_rate(tmp_path):
    short = read(tmp_path, METHODS + "lr: {relative: [3, 0.33, 1]}\n")
    long = read(tmp_path, METHODS + "search: {sampler: grid, space: {lr: {relative: [0.33, 1, 3]}}}\n")
    assert values(short, "Mona") == values(long, "Mona") == [{"lr": 0.00099}, {"lr": 0.003}, {"lr": 0.009}]


def test_edges_are_of_lists_and_of_the_outermost_twentieth_of_a_range(tmp_path):
    text = "search: {trials: 60, space: {lr: {low: 1e-4, high: 1, log: true}, optimizer: [sgd, adamw]}}\n"
    candidates = read(tmp_path, METHODS + text).candidates(read(tmp_path, METHODS + text).variants[0])
    for candidate in candidates:
        lr = candidate.values["lr"]
        assert candidate.edges == ({"lr"} if lr <= 10**-3.8 or lr >= 10**-0.2 else set())
    assert 0 < sum(bool(candidate.edges) for candidate in candidates) < 20
    grid = read(tmp_path, METHODS + "search: {sampler: grid, space: {base_lr: [1, 2, 4], weight_decay: [0.1]}}\n")
    assert [c.edges for c in grid.candidates(grid.variants[0])] == [{"lr"}, set(), {"lr"}]


# ------------------------------------------------------------------ settings of single methods
PUBLISHED = """\
protocol: published
search: {space: vpt-grid, trials: 12}
training: {epochs: 50, weight_decay: 0.3, batch_size: 32}
base_lr: 0.8
methods:
  Linear: linear
  Mona:
    method: mona
    bottleneck: 8
    training: {lr: 3.125e-5, weight_decay: 0.05, epochs: 100, warmup_epochs: 20, min_lr: 0.01, clip_grad: 5, batch_size: 16, no_decay: [norm]}
    search: null
    backbone: {drop_path_rate: 0.2}
  None: {method: bitfit, search: null}
  Full: {method: full, search: {space: vpt-grid-full}, training: {epochs: 20}}
  Both: {methods: [lora, bitfit], search: {trials: 2, space: {method.r: [2, 4], batch_size: [16]}}, base_lr: 1.6, x: 1, curve: c}
"""  # noqa: E501


def test_a_row_may_have_settings_of_its_own(tmp_path):
    study = read(tmp_path, PUBLISHED)
    assert study.protocol == "published"
    linear, mona, none, full, both = study.variants
    settings = study.training_of(mona).settings(3.125e-5, 0)
    assert values(study, "Mona") == [{"lr": 3.125e-5}]
    assert (settings.epochs, settings.min_lr, settings.clip_grad, settings.no_decay) == (100, 0.01, 5, ("norm",))
    assert (mona.methods[0].bottleneck, dict(mona.backbone)) == (8, {"drop_path_rate": 0.2})
    assert values(study, "None") == [{"lr": 0.8 * 32 / 256}]
    assert len(values(study, "Linear")) == 12
    assert len(values(study, "Full")) == 16
    assert {each["optimizer"] for each in values(study, "Full")} == {"adamw"}
    assert [study.training_of(row).epochs for row in (linear, none, full)] == [50, 50, 20]
    assert values(study, "Both") == [
        {"method.r": 2, "batch_size": 16, "lr": 0.1},
        {"method.r": 4, "batch_size": 16, "lr": 0.1},
    ]
    assert (both.x, both.curve, both.own_fields) == (1, "c", ["base_lr", "search"])


def test_the_pages_examples_are_valid(tmp_path):
    page = (Path(__file__).parents[1] / "docs/studies.md").read_text()
    searched, published = (
        page.partition(f"<!-- {name} -->\n```yaml\n")[2].partition("```")[0] for name in ("search", "published")
    )
    study = read(
        tmp_path,
        "methods: {Mona: mona, Adapter: adapter}\n"
        + searched.replace("dropout", "bottleneck").replace("[0, 0.1]", "[4, 8]"),
    )
    assert [len(study.candidates(variant)) for variant in study.variants] == [12, 12]
    (tmp_path / "study.yaml").write_text(published)
    study = read_study(tmp_path / "study.yaml")
    assert [len(study.candidates(variant)) for variant in study.variants] == [1, 40, 16]


S = "search: {trials: 3, space: {lr: [1, 2]}}\n"
WRONG = {
    S + "lr: {relative: [1]}\n" + METHODS: r"line 2, search: lr: \{relative: \[\.\.\.\]\} is a search too",
    "search: {space: {lr: [1]}}\n" + METHODS: r"line 2, search: trials is missing",
    "search: {space: vpt-gird}\n" + METHODS: r"line 2, search\.space: there is no search space 'vpt-gird'.*vpt-grid",
    "search: {space: vpt-prompts, trials: 3}\n" + METHODS: r"search\.sampler: tpe chooses by the trials before",
    "search: {trials: 0, space: {lr: [1]}}\n" + METHODS: r"search\.trials: expected a whole number above 0",
    "search: {trial: 2, space: {lr: [1]}}\n" + METHODS: r"search\.trial: .*did you mean trials",
    "search:\n  trials: 2\n  space:\n    lr: [0]\n" + METHODS: r"line 5, search\.space\.lr: expected a number above 0",
    "search:\n  trials: 2\n  space: {lr: [1]}\n  fixed: {epochs: 1.5}\n"
    + METHODS: r"line 5, search\.fixed\.epochs: .*whole",
    "search: {trials: 2, space: {epochs: [1.5]}}\n" + METHODS: r"search\.space\.epochs: expected a whole number",
    "search: {trials: 2, space: {optimizer: [lion]}}\n" + METHODS: r"line 2, search: Linear: optimizer must be adamw",
    "search: {trials: 2, space: {hflip: [2]}}\n" + METHODS: r"search\.space\.hflip: expected a share",
    "search: {trials: 2, space: {lr: {relative: [0.1, 1, 10]}}}\n" + METHODS: r"two factors .* only in a grid",
    "search: {trials: 2, space: {method.rank: [1]}}\n" + METHODS: r"names method\.rank, and no method of Linear, LoRA",
    "search: {trials: 2, space: {method.r: [0]}}\n" + METHODS: r"line 2, search: LoRA: r must be",
    "search: {space: vpt-grid, fixed: {weight_decay: 0}}\n" + METHODS: r"search\.fixed: every option may be named once",
    "search: {space: vpt-grid, fixed: {lr: 1}}\n" + METHODS: r"search\.fixed: every option may be named once",
    S + "methods: {A: {method: mona, lr: 1}}\n": r"line 3, methods\.A\.lr: the search of this row chooses it",
    S + "methods: {A: {method: mona, training: {lr: 1}}}\n": r"methods\.A\.lr: the search of this row chooses it",
    S.replace("lr", "epochs") + "methods: {A: {method: mona, training: {epochs: 1}}}\n": (
        r"methods\.A\.training\.epochs: the search of this row chooses it"
    ),
    "methods: {A: {method: mona, lr: 1, training: {base_lr: 1}}}\n": r"training\.base_lr: a rate is said already",
    "lr: 1\nbase_lr: 1\n" + METHODS: r"line 3, base_lr: a rate is said already",
    "methods: {A: {method: mona, training: {epoch: 1}}}\n": r"methods\.A\.training\.epoch: .*did you mean epochs",
    "methods: {A: {method: mona, training: {min_lr: 2}}}\n": r"training\.min_lr: min_lr is a share",
    "methods: {A: {method: mona, training: {no_decay: norm}}}\n": r"training\.no_decay: expected a list of texts",
    "methods: {A: {method: mona, search: 3}}\n": r"methods\.A\.search: expected a mapping",
    "methods: {A: {method: mona, backbone: {img_size: 3}}}\n": r"methods\.A\.backbone\.img_size: .* under backbones",
    "protocol: unfair\n" + METHODS: r"line 2, protocol: expected fair or published, got 'unfair'",
    **{
        f"protocol: fair\nmethods: {{A: linear, B: {{method: mona, {own}}}}}\n": rf"methods\.B\.{name}: under .*fair"
        for name, own in {
            "lr": "lr: 1",
            "base_lr": "training: {base_lr: 1}",
            "training": "training: {epochs: 2}",
            "search": "search: null",
            "backbone": "backbone: {drop_path_rate: 0.1}",
        }.items()
    },
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text.replace(METHODS, "").replace("\n", " ")[:60])
def test_mistakes_are_named(text, tmp_path):
    with pytest.raises(ValueError, match=WRONG[text]):
        read(tmp_path, text)
