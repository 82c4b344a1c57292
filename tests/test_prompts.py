"""Templates of the datasets, and files with templates or sentences."""

import json

import pytest

from deltalens.data.coop import SETS
from deltalens.data.prompts import IMAGENET_SELECT, TEMPLATES, class_texts, fill, read_sentences, read_templates


def test_every_dataset_has_a_template():
    assert TEMPLATES.keys() == SETS.keys()
    assert fill([TEMPLATES["dtd"], TEMPLATES["food-101"]], ["polka_dotted"]) == [
        ["polka dotted texture.", "a photo of polka dotted, a type of food."]
    ]
    assert [len(each) for each in fill(IMAGENET_SELECT, ["a", "b"])] == [7, 7]
    for wrong, message in (([], "no templates given"), (["a photo."], "needs exactly one {} for the class name")):
        with pytest.raises(ValueError, match=message):
            fill(wrong, ["cat"])


def test_template_files(tmp_path):
    (tmp_path / "t.txt").write_text("a photo of a {}.\n\nart of the {}.\n")
    (tmp_path / "t.json").write_text(json.dumps(["a photo of a {}.", "art of the {}."]))
    for name in ("t.txt", "t.json"):
        assert read_templates(tmp_path / name) == ["a photo of a {}.", "art of the {}."]
    for name, content, message in (
        ("t.txt", "a {}\n\na {} and {}\n", r"line 3 of .*t\.txt: 'a {} and {}' needs exactly one"),
        ("t.json", '["a {}", "b"]', r"item 2 of .*t\.json: 'b' needs exactly one"),
        ("t.txt", "\n", "holds no templates; write one on a line"),
        ("t.json", '{"a": 1}', "is no list of templates"),
        ("t.json", "[", "is no JSON"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_templates(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere"):
        read_templates(tmp_path / "nowhere.txt")


def test_sentences_of_every_class(tmp_path):
    file = tmp_path / "cupl.json"
    content = {"Audi TTS 2012": ["An Audi.", " "], "Polka-Dotted": ["dots"], "cow": ["moos "], "extra": []}
    file.write_text(json.dumps(content))
    assert read_sentences(file, ["cow", "polka_dotted", "2012 Audi TTS"]) == [["moos"], ["dots"], ["An Audi."]]
    with pytest.raises(
        ValueError, match=r"no sentences for 2 of the 3 classes: cows \(there is 'cow'\), extra; it has 4"
    ):
        read_sentences(file, ["cows", "extra", "cow"])
    for content, message in (
        ({"cow": "moos"}, "has no list of sentences for 'cow'"),
        ({"cow": [1]}, "has no list of sentences for 'cow'"),
        (["cow"], "is no mapping of class names"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_sentences(file, ["cow"])


def test_a_name_that_fits_two_classes_of_the_file_finds_none(tmp_path):
    file = tmp_path / "two.json"
    file.write_text(json.dumps({"house boat": ["a boat"], "boat house": ["a house"]}))
    assert read_sentences(file, ["boat_house"]) == [["a house"]]
    file.write_text(json.dumps({"Crane": ["a bird"], "crane": ["a machine"]}))
    assert read_sentences(file, ["crane"]) == [["a machine"]]
    with pytest.raises(ValueError, match="no sentences for 1 of the 1 classes"):
        read_sentences(file, ["CRANE"])


def test_texts_of_classes_for_a_backbone(tmp_path):
    file = tmp_path / "told.json"
    file.write_text(json.dumps({"big cat": ["it has claws", "stripes"], "dog": ["a tail"], "cow": ["horns"]}))
    (tmp_path / "some.txt").write_text("a {}.\na drawing of a {}.\n")
    names = ["dog", "big_cat"]
    assert class_texts(names) == {}
    assert class_texts(names, "a {}.") == {"class_names": names, "templates": ["a {}."]}
    assert class_texts(names, str(tmp_path / "some.txt"))["templates"] == ["a {}.", "a drawing of a {}."]
    told = class_texts(names, None, file)
    assert told["class_names"] == names
    assert [told["descriptions"][name] for name in (*names, "cow")] == [
        ["a tail"],
        ["it has claws", "stripes"],
        ["horns"],
    ]
    both = class_texts(names, ["a {}, which has {description}.", "{}: {description}"], file)
    assert both["descriptions"]["dog"] == ["a {}, which has a tail.", "{}: a tail"]
    assert len(both["descriptions"]["big_cat"]) == 4
    with pytest.raises(ValueError, match=r"'a \{\}\.' has none; leave templates out"):
        class_texts(names, ["a {}."], file)
    with pytest.raises(ValueError, match=r"no sentences for 1 of the 1 classes: bird"):
        class_texts(["bird"], None, file)
