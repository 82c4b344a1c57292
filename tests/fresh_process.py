"""Run alone, as a program: what a process that knows nothing of the tests finds. `test_fresh_process.py` starts it once
for all of this, because the import of torch is most of its time.

python tests/fresh_process.py FOLDER
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

HEAVY = [
    "open_clip",
    "lightning",
    "peft",
    "transformers",
    "matplotlib",
    "sklearn",
    "torchmetrics",
    "onnx",
    "jsonargparse",
    "rich",
    "optuna",
]


def heavy_modules_of_attach() -> list[str]:
    """Which heavy libraries are imported once adapters were put on and taken off."""
    before = set(sys.modules)
    assert not {"torch", "timm", *HEAVY} & before, "nothing is shown where they are there before"
    import deltalens as dl

    assert not {"torch", "timm"} & (set(sys.modules) - before), "import deltalens alone already imports torch"
    dl.list_methods(), dl.MonaConfig(), dl.attach
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, num_classes=2)
    dl.attach(model, dl.MonaConfig(bottleneck=2))
    dl.count_parameters(model), dl.parameter_table(model), dl.detach(model)
    return sorted(set(sys.modules) & set(HEAVY))


def answers(folder: Path, model: Callable | None = None) -> dict[str, list[str] | None]:
    """Load every adapter of the folder, write what it answers to its images, and return its class names.

    model: builds the backbone; without it, it is rebuilt from what the adapter's files say of it."""
    import torch
    from safetensors.torch import load_file, save_file

    import deltalens as dl

    torch.set_num_threads(1)
    found, classes = {}, {}
    for name, x in load_file(folder / "images.safetensors").items():
        loaded = dl.from_pretrained(folder / name, model and model())
        with torch.no_grad():
            found[name] = loaded(x)
        classes[name] = dl.class_names(loaded)
    save_file(found, folder / "found.safetensors")
    return classes


def answers_of_tuners(folder: Path) -> dict[str, list[str] | None]:
    from models import tiny_swin

    return answers(folder, tiny_swin)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    parts = {
        "light": heavy_modules_of_attach,  # the first: it looks at what is not imported yet
        "shipped": lambda: answers(root / "shipped"),
        "clip": lambda: answers(root / "clip"),
        "tuners": lambda: answers_of_tuners(root / "tuners"),
    }
    report = {}
    for name, part in parts.items():
        try:
            report[name] = {"found": part()}
        except Exception:
            report[name] = {"error": traceback.format_exc()}
    (root / "report.json").write_text(json.dumps(report))
