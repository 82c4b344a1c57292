"""Example pictures of a study: which are shown, what methods say about them, and how the report shows them."""

import json

import pytest
import torch
from PIL import Image
from study_runs import METHODS, made_up_accuracy, study_text, write_study_folder
from test_report import Page
from test_study_report import page_of, svgs
from torch import nn

from deltalens.data import Splits
from deltalens.studies.examples import Example, Examples, examples_of, picture_file, shown_indices
from deltalens.tasks import ClassificationTask, MultiLabelTask


def test_examples_are_evenly_spaced_and_never_more_than_there_are():
    assert shown_indices(12) == [1, 3, 5, 7, 9, 11]
    assert shown_indices(1000) == [83, 250, 416, 583, 750, 916]
    assert shown_indices(4) == [0, 1, 2, 3]
    assert shown_indices(0) == []
    assert all(len(set(shown_indices(n))) == min(n, 6) for n in range(40))


# ------------------------------------------------------------------ what is said
class Logits(nn.Module):
    """A model of one weight, whose output is what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return x * self.weight


def splits(logits, labels, names, **parts) -> Splits:
    items = list(zip(logits, labels, strict=True))
    return Splits(**{"train": [], "val": items, "test": items, "class_names": names} | parts)


def test_the_most_probable_class_is_said():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 3.0]])
    found = examples_of(ClassificationTask(Logits(), ["a", "b", "c"]).eval(), splits(logits, [0, 1], ["a", "b", "c"]))
    assert (found.part, found.images, [e.index for e in found.shown]) == ("test", 2, [0, 1])
    assert [e.true for e in found.shown] == [("a",), ("b",)]
    sure = torch.softmax(logits, 1).max(1).values.tolist()
    assert [e.said[0] for e in found.shown] == [("a", pytest.approx(sure[0])), ("c", pytest.approx(sure[1]))]
    assert [e.right for e in found.shown] == [True, False]
    assert Examples.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_of_several_labels_all_that_are_probable_are_said():
    logits = torch.tensor([[2.0, 1.0, -1.0], [-3.0, -1.0, -2.0], [1.0, -1.0, 2.0]])
    labels = torch.tensor([[1, 1, 0], [0, 0, -1], [0, 0, 1]], dtype=torch.int8)
    task = MultiLabelTask(Logits(), ["a", "b", "c"]).eval()
    data = splits(logits, labels, ["a", "b", "c"], test=None, task="multilabel")
    found = examples_of(task, data)
    assert found.part == "val"
    assert [e.true for e in found.shown] == [("a", "b"), (), ("c",)]
    assert [[name for name, _ in e.said] for e in found.shown] == [["a", "b"], [], ["c", "a"]]
    assert [e.right for e in found.shown] == [True, True, False]
    assert examples_of(task, splits(logits, labels, ["a", "b", "c"], test=None, val=None)) is None


# ------------------------------------------------------------------ pages of made-up runs
def with_examples(tmp_path, datasets, said, pictures=True, true=("<cat>",)):
    methods = {name: METHODS[name] for name in ("Linear", "Mona")}
    text = study_text(methods, {"ViT-S": 0}, datasets, [0])
    grid = write_study_folder(tmp_path, text, lambda run: 0.5)
    for run in grid.runs():
        examples = Examples("test", 9, (Example(4, true, said[run.variant.label]),))
        run.output.write_results(run.results() | {"examples": examples.to_dict()})
        if pictures:
            file = picture_file(grid.output, run.dataset.name, 4)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(file)
    return grid


def test_names_are_escaped_and_several_or_no_labels_are_written_out(tmp_path):
    said = {"Linear": (("<cat>", 0.9), ("dog", 0.614)), "Mona": ()}
    html = page_of(with_examples(tmp_path, {"pets": 0}, said, true=("<cat>", "dog")))
    page = Page(html)
    assert "cat" not in {tag for tag, _ in page.tags}
    said = " ".join(page.text.split())
    assert "✓ Linear <cat> 90 %, dog 61 %" in said
    assert "✗ Mona none" in said
    assert "<h3>&lt;cat&gt;, dog</h3>" in html


def test_a_lost_picture_leaves_its_words(tmp_path):
    said = {"Linear": (("dog", 0.9),), "Mona": (("<cat>", 0.5),)}
    html = page_of(with_examples(tmp_path, {"pets": 0}, said, pictures=False))
    assert 'class="picture"' in html
    assert "<img" not in html


def test_many_tasks_are_folded_up_and_runs_without_examples_have_none(tmp_path):
    said = {"Linear": (("dog", 0.9),), "Mona": (("<cat>", 0.5),)}
    html = page_of(with_examples(tmp_path / "many", {f"d{i}": 0 for i in range(13)}, said))
    assert html.count("<summary>ViT-S, d") == 13
    assert html.count('class="picture"') == 13
    old = page_of(write_study_folder(tmp_path / "old", accuracy=made_up_accuracy))
    assert "Example pictures" not in old
    assert svgs(old)
