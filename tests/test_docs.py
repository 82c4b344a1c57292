"""The documentation is true: its examples run, its commands parse, its links and lists are complete."""

import importlib
import importlib.util
import itertools
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_cache import write_open_clip
from models import tiny_vit
from PIL import Image

import deltalens as dl
from deltalens.cli.main import COMMANDS
from deltalens.methods import base, method_class

ROOT = Path(__file__).resolve().parents[1]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
MARKED = re.compile(r"<!-- (run|file: (?P<file>\S+)) -->\n```python\n(?P<code>.*?)\n```", re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ------------------------------------------------------------------ examples
def load(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("example", "method"), [("plain_loop", "mona"), ("accelerate_loop", "lora")])
def test_loops_train_and_save(example, method, tmp_path, monkeypatch):
    if example == "accelerate_loop":
        pytest.importorskip("accelerate")
    monkeypatch.setattr("deltalens.data.digits.TEST_IMAGES", 100)
    accuracy = load(EXAMPLES / f"{example}.py").main(output=str(tmp_path), epochs=1, train_images=40)
    assert 0 < accuracy <= 1
    model = dl.from_pretrained(tmp_path)
    assert dl.class_names(model)[:2] == ["zero", "one"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["methods"][0]["method"] == method
    backbone = dl.create_backbone("deltalens/vit-mini", num_classes=10).eval()
    x = torch.randn(2, 3, 48, 48)
    assert (model(x) - backbone(x)).abs().max() > 1e-3
    dl.detach(model)
    assert all(torch.equal(p, backbone.get_parameter(n)) for n, p in model.named_parameters() if "head" not in n)


def test_own_network(capsys):
    example = load(EXAMPLES / "own_network.py")
    model = example.freeze_all_but_adapters(example.Network())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None and "blocks" in name}
    assert trained == {"prompts", "lora", "mona"}
    unknown = dl.attach(example.Network(block=example.PlainBlock), dl.MonaConfig(bottleneck=4))
    dl.print_trainable_parameters(unknown)
    assert [block.path for block in dl.describe(unknown).blocks()] == ["blocks.0", "blocks.1", "blocks.2"]
    assert "trainable params" in capsys.readouterr().out


# ------------------------------------------------------------------ code on the pages
@pytest.fixture
def reader(tmp_path, monkeypatch, request):
    """What a reader has at hand: an empty folder with a few photos, a loader; registries are as before afterwards."""
    from deltalens.backbones.describe import FAMILIES

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))
    monkeypatch.setitem(FAMILIES, "my_mixer", FAMILIES.get("my_mixer"))
    noise = np.random.default_rng(0)
    for label, colour in {"red": (220, 30, 30), "green": (30, 200, 30)}.items():
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True)
        for i in range(8):
            pixels = np.clip(np.array(colour) + noise.normal(0, 25, (48, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    names = {"loader": [(torch.randn(2, 3, 48, 48), torch.tensor([3, 101]))]}
    if request.node.callspec.params["page"].name == "clip.md":  # a small CLIP in the place of the one it names
        pytest.importorskip("open_clip")
        write_open_clip(tmp_path / "clip", depth=6)
        names["backbone"] = "clip"
    yield names
    sys.modules.pop("my_mixer", None)


WITH_CODE = [page for page in PAGES if MARKED.search(page.read_text())]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_marked_code_runs(page, reader, tmp_path):
    """Blocks after `<!-- run -->` run in order in one namespace; `<!-- file: NAME -->` makes a file of the block."""
    for block in MARKED.finditer(page.read_text()):
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["code"])
            importlib.invalidate_caches()
        else:
            line = page.read_text()[: block.start()].count("\n") + 2
            exec(compile("\n" * line + block["code"], name_of(page), "exec"), reader)
    check = CHECKS.get(name_of(page))
    assert check is None or check(reader)


CHECKS = {
    "README.md": lambda names: names["model"].num_classes == 102,
    "docs/quickstart.md": lambda names: names["probabilities"].shape == (2,) and "test" in names["results"],
    "docs/clip.md": lambda names: names["model"].num_classes == 3 and names["loss"].grad_fn is not None,
    "docs/dense.md": lambda names: (
        names["found"]["out"].shape == names["found"]["aux"].shape == (2, 3, 101, 67)
        and names["boxes"]["boxes"].shape[1] == 5
    ),
    "docs/models.md": lambda names: names["logits"].shape == (4, 10),
    "docs/own_loop.md": lambda names: [f.shape[1] for f in names["features"]] == [16, 8, 4, 2],
    "docs/adding_a_backbone.md": lambda names: dl.count_parameters(names["model"]).adapter > 0,
}


def test_pages_that_promise_running_code_have_it():
    assert {name_of(page) for page in WITH_CODE} == {*CHECKS, "docs/adding_a_method.md"}


# ------------------------------------------------------------------ commands
def bash_lines(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("pip install uv && ").removeprefix("uv run ") for line in lines]
    return [line for line in lines if line.startswith("deltalens ") and "COMMAND" not in line]


LINES = sorted({(line, name_of(page)) for page in PAGES for line in bash_lines(page)})


@pytest.mark.parametrize("line", [line for line, _ in LINES], ids=[f"{page}: {line[:60]}" for line, page in LINES])
def test_printed_commands_parse(line, tmp_path, monkeypatch):
    from jsonargparse import ArgumentParser

    command, *words = shlex.split(line, comments=True)[1:]
    if command == "--version":
        return
    monkeypatch.chdir(tmp_path)
    for option, file in itertools.pairwise(words):
        config = Path(file) if option == "--config" else Path(file, "config.yaml")  # that of a run to be resumed
        if option == "--config" or (option == "--output" and "--resume" in words):
            config.parent.mkdir(exist_ok=True)
            config.write_text("data: photos\noutput: runs\n")
    module = importlib.import_module(COMMANDS[command][0])
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    module.add_arguments(parser)
    if hasattr(module, "translate"):
        words = module.translate(words)
    if "--print_config" in words:
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        return
    args = parser.parse_args(words)
    if "method" in args:
        from deltalens.cli.method_options import read_methods

        assert read_methods(args.method)


def test_every_command_has_its_section_and_options():
    text = (DOCS / "cli.md").read_text()
    for command in COMMANDS:
        assert f"\n## {command}\n" in text, command
        assert f"```{{command-options}} {command}\n" in text, command


def test_the_recipe_on_the_page_is_one(tmp_path):
    from jsonargparse import ArgumentParser

    from deltalens.cli import train
    from deltalens.cli.method_options import read_methods

    text = re.search(r"<!-- recipe -->\n```yaml\n(.*?)```", (DOCS / "recipes.md").read_text(), re.DOTALL)[1]
    (tmp_path / "flowers.yaml").write_text(text)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    train.add_arguments(parser)
    args = parser.parse_args(["--config", str(tmp_path / "flowers.yaml")])
    assert (args.epochs, args.precision) == (30, "bf16")
    assert read_methods(args.method) == [dl.LoRAConfig(r=16, alpha=16, parts=("q", "k", "v", "proj"))]


# ------------------------------------------------------------------ completeness
def test_every_method_has_a_page():
    index = (DOCS / "methods/index.md").read_text()
    own = [m for m in dl.list_methods() if not m.startswith("peft/")]
    shipped = [m for m in own if method_class(m).__module__.startswith("deltalens.")]
    for method in shipped:  # other tests register methods of their own
        page = (DOCS / f"methods/{method}.md").read_text()
        assert f"```{{method-settings}} {method}\n" in page, method
        assert re.search(r"!\[.+\]\(\.\./images/method-.+\.svg\)", page), method
        assert f"({method}.md)" in index, method


def test_every_tuner_of_peft_is_in_the_table_of_its_page():
    page = (DOCS / "methods/peft.md").read_text()
    assert "(peft.md)" in (DOCS / "methods/index.md").read_text()
    for method in dl.list_methods("peft/*"):
        assert f"| `{method}` |" in page, method


def test_every_page_is_in_a_table_of_contents():
    blocks = re.findall(r"```{toctree}.*?```", (DOCS / "index.md").read_text(), re.DOTALL)
    listed = re.findall(r"^([\w/]+)$", "".join(blocks), re.M)
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES[1:]}
    assert set(listed) == pages - {"index"}


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text()
    documented = set(re.findall(r":: (?:deltalens\.)?(\w+)\n", text))
    assert {name for name in dl.__all__ if not name.startswith("_")} - documented == set()


def test_every_key_of_the_configuration_is_explained(tmp_path):
    model = dl.attach(tiny_vit(), dl.BitFitConfig())
    dl.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    text = (DOCS / "architecture.md").read_text()
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    explained = {key.rpartition(".")[2] for row in rows for key in re.findall(r"`(\S+)`", row)}
    keys = {*config, *config["base_model"]} - {"base_model", "info"}
    assert keys - explained == set()


def test_every_slot_is_explained():
    from deltalens.backbones import unknown
    from deltalens.backbones.timm import convnext, swin, vit

    text = (DOCS / "architecture.md").read_text()
    for family in (vit.BLOCK, swin.BLOCK, convnext.BLOCK, unknown.UNKNOWN_BLOCK):
        assert [slot for slot in family.slots if f"`{slot}`" not in text] == []


def test_the_pictures_are_what_their_script_draws(tmp_path, monkeypatch):
    draw = load(DOCS / "images/draw.py")
    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    draw.draw_all()
    drawn = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert drawn == {file.name: file.read_text() for file in (DOCS / "images").glob("*.svg")}


def test_the_errors_explained_exist():
    """The first column of the troubleshooting tables quotes messages; `...` stands for what varies."""
    sources = "".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    sources = re.sub(r'"\s+f?r?"', "", sources)  # literals over several lines
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = [cell for row in re.findall(r"^\| (`.+?`) \|", page, re.M) for cell in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 25
    pieces = [piece.strip(" ,;") for cell in quoted for piece in cell.split("...")]
    assert [piece for piece in pieces if piece not in sources] == []


# ------------------------------------------------------------------ links
def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
    return slugs | set(re.findall(r"^\((.+)\)=$", text, re.M))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```(?!{).*?```", "", page.read_text(), flags=re.DOTALL)
    broken = []
    for target in re.findall(r'(?:\]\(|src="|href=")([^)"\s]+)[)"]', text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    for target in re.findall(r"```{(?:literalinclude|include)} (\S+)", page.read_text()):
        if not (page.parent / target).exists():
            broken.append(target)
    assert broken == []


def test_the_readme_begins_with_the_two_commands():
    screen = (ROOT / "README.md").read_text().split("\n")[:32]
    code = "\n".join(screen)
    for command in ("pip install uv && uv run deltalens demo", "pip install uv && uv run pytest"):
        assert any(line.startswith(command) for line in screen), command
    assert '<img src="docs/images/demo-table.png"' in code
    assert "dl.attach(model, dl.MonaConfig(" in code
