"""The floors of the house: imports go down only. That importing stays light is seen in test_fresh_process.py."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src/deltalens"
FLOORS = [
    "models",
    "sites",
    "backbones",
    "methods",
    "lifecycle",
    "data",
    "tasks",
    "training",
    "studies",
    "deploy",
    "cli",
]
CORE = FLOORS[: FLOORS.index("lifecycle") + 1]
CORE_NEEDS = {"deltalens", "lazy_loader", "torch", "timm", "safetensors", "huggingface_hub"}
# folder of backbones/ -> the library whose models its files know; they are imported when such a model is met
LIBRARIES = {"hf": "transformers", "open_clip": "open_clip", "torchvision": "torchvision", "dense": "torchvision"}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    """deltalens.sites.layout for src/deltalens/sites/layout.py."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(file: Path) -> tuple[tuple[int, str, bool], ...]:
    """(line, module imported, whether it happens when the file is imported) for every import statement."""
    tree = ast.parse(file.read_text())
    package = name_of(file) if file.name == "__init__.py" else name_of(file).rpartition(".")[0]

    def walk(node, at_import):
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                yield child.lineno, base, at_import
                yield from ((child.lineno, f"{base}.{alias.name}", at_import) for alias in child.names)
            else:
                yield from walk(child, at_import and not inside and not typing_only)

    return tuple(walk(tree, True))


def floor_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "deltalens" and len(parts) > 1 and parts[1] in FLOORS else None


def test_every_folder_is_a_floor():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert folders <= set(FLOORS)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down_only(file):
    own = floor_of(name_of(file))
    if own is None:
        return  # the package's own files hand out names from every floor
    above = FLOORS[FLOORS.index(own) + 1 :]
    wrong = [f"line {line}: {module}" for line, module, _ in imports(file) if floor_of(module) in above]
    assert not wrong, f"{name_of(file)} imports from floors above {own}: {wrong}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_the_core_needs_torch_and_timm_only(file):
    own = floor_of(name_of(file))
    if own is not None and own not in CORE:
        return
    needed = {module.partition(".")[0] for _, module, at_import in imports(file) if at_import}
    is_family = own == "backbones" and file.name != "__init__.py" and file.parent.name in LIBRARIES
    of_family = {LIBRARIES[file.parent.name]} if is_family else set()
    assert needed - set(sys.stdlib_module_names) <= CORE_NEEDS | of_family


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) < 400


def test_the_walker_finds_a_wrong_import(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "deltalens")
    file = tmp_path / "deltalens/sites/bad.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import torch\nfrom ..lifecycle import attach\n\ndef f():\n    import lightning\n"
        "    from deltalens.cli.main import main\n"
    )
    found = [(module, at_import) for _, module, at_import in imports(file)]
    assert found == [
        ("torch", True),
        ("deltalens.lifecycle", True),
        ("deltalens.lifecycle.attach", True),
        ("lightning", False),
        ("deltalens.cli.main", False),
        ("deltalens.cli.main.main", False),
    ]
    with pytest.raises(AssertionError, match=r"imports from floors above sites.*lifecycle.*cli\.main"):
        test_imports_go_down_only(file)
