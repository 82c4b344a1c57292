"""Every method on every family: the steps of a cell, the methods of the rows, and the page made of both.

python tests/matrix.py          writes docs/compatibility.md
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from clip_models import hf_model, zero_shot
from models import MODELS, images, randomize_adapter
from torch import nn

import deltalens as dl
from deltalens.methods import Method
from deltalens.models.point_transformer import PointTransformer
from deltalens.sites.output import logits_of

PAGE = Path(__file__).resolve().parents[1] / "docs/compatibility.md"
HEADINGS = {"vit": "ViT", "swin": "Swin", "convnext": "ConvNeXt", "resnet": "unknown network (ResNet)"}
LABELS = torch.tensor([0, 3, 1, 2, 4, 3])

# row of the first table -> a small configuration; every shipped method has a row there, in `CLIP_ROWS` or in
# `POINT_ROWS`
ROWS: dict[str, Callable[[], Method | list[Method]]] = {
    "Full": dl.FullConfig,
    "Linear": dl.LinearConfig,
    "MLP-3 head": dl.MLPConfig,
    "Partial-1": dl.PartialConfig,
    "NormTuning": dl.NormTuningConfig,
    "BitFit": dl.BitFitConfig,
    "Sidetune": lambda: dl.SidetuneConfig(pretrained=False),
    "Adapter, Houlsby": lambda: dl.AdapterConfig.houlsby(bottleneck=4),
    "Adapter, Pfeiffer": lambda: dl.AdapterConfig.pfeiffer(bottleneck=4),
    "Adapter, parallel": lambda: dl.AdapterConfig(bottleneck=4, parallel=True),
    "AdaptFormer": lambda: dl.AdaptFormerConfig(bottleneck=4),
    "Adapter-X": lambda: dl.AdapterXConfig(experts=3, bottleneck=4),
    "Adapter-X, sequential": lambda: dl.AdapterXConfig(experts=3, bottleneck=4, placement="serial"),
    "LoRand": lambda: dl.LoRandConfig(rank=2),
    "LoRA on q, v": lambda: dl.LoRAConfig(r=2, parts=("q", "v")),
    "LoRA on fc1, fc2": lambda: dl.LoRAConfig(r=2, parts=("fc1", "fc2")),
    "FacT": lambda: dl.FacTConfig(r=2),
    "SSF": dl.SSFConfig,
    "RepAdapter": lambda: dl.RepAdapterConfig(bottleneck=4),
    "Convpass": lambda: dl.ConvpassConfig(bottleneck=4),
    "SCT": lambda: dl.SCTConfig(num_channels=4),
    "VPT-deep": lambda: dl.VPTConfig(num_tokens=3),
    "VPT-shallow": lambda: dl.VPTConfig(num_tokens=3, deep=False),
    "VPT, 2 of the blocks": lambda: dl.VPTConfig(num_tokens=3, depth=2),
    "VPT, shared": lambda: dl.VPTConfig(num_tokens=3, shared="inter", project=5),
    "VPT, class prototypes": lambda: dl.VPTConfig(num_tokens=5, init="cls-nolastl"),
    "VPT, prefix": lambda: dl.VPTConfig(num_tokens=3, location="prefix"),
    "VPT, added": lambda: dl.VPTConfig(location="add"),
    "VPT, added to all": lambda: dl.VPTConfig(location="add-1"),
    "VPT, patches of pixels": lambda: dl.VPTConfig(num_tokens=3, location="prepend-pixel", deep=False),
    "VPT, image channels": lambda: dl.VPTConfig(num_tokens=2, location="concat-channel", deep=False),
    "VPT, frame of pixels": lambda: dl.VPTConfig(num_tokens=4, location="padding", deep=False),
    "VPT and BitFit": lambda: [dl.VPTConfig(num_tokens=3), dl.BitFitConfig()],
    "Mona": lambda: dl.MonaConfig(bottleneck=6),
    "Mona, design v3": lambda: dl.MonaConfig(bottleneck=6, design="v3"),
    "DoRA of peft": lambda: dl.make_config("peft/dora", r=2),
    "LoHa of peft": lambda: dl.make_config("peft/loha", r=2),
}

# the same for classifiers whose classes are texts
CLIP_HEADINGS = {"open_clip": "open_clip", "transformers": "transformers"}
CLIP_MODELS: dict[str, Callable[[], nn.Module]] = {
    "open_clip": zero_shot,
    "transformers": lambda: zero_shot(clip=hf_model()),
}
CLIP_ROWS: dict[str, Callable[[], Method | list[Method]]] = {
    "MMA": lambda: dl.MMAConfig(start=3, bottleneck=4),
    "CoOp": lambda: dl.CoOpConfig(num_words=3),
    "CoOp with words per class": lambda: dl.CoOpConfig(num_words=3, per_class=True),
    "CoCoOp": dl.CoCoOpConfig,
    "MaPLe": lambda: dl.MaPLeConfig(depth=2),
    "RPO": lambda: dl.RPOConfig(num_prompts=2),
    "KgCoOp": dl.KgCoOpConfig,
    "ProGrad": lambda: dl.ProGradConfig(num_words=2),
    "LASP": dl.LASPConfig,
    "CLIP-Adapter": dl.CLIPAdapterConfig,
    "CLIP-Adapter on both": lambda: dl.CLIPAdapterConfig(towers="both"),
    "Tip-Adapter-F": lambda: dl.TipAdapterConfig(train_keys=True, passes=1),
    "LoRA on q, v of both towers": lambda: dl.LoRAConfig(r=2, parts=("q", "v")),
    "MMA and CoOp": lambda: [dl.MMAConfig(start=3, bottleneck=4), dl.CoOpConfig(num_words=3)],
}
NEEDS_TEXTS = (
    "MMA",
    "CoOp",
    "CoOp with words per class",
    "CoCoOp",
    "MaPLe",
    "RPO",
    "KgCoOp",
    "ProGrad",
    "LASP",
    "CLIP-Adapter on both",
    "Tip-Adapter-F",
    "MMA and CoOp",
)

# the same for point clouds: all of `ROWS`, and what is for nothing else
POINT_ROWS: dict[str, Callable[[], Method | list[Method]]] = {
    "DAPT": lambda: dl.DAPTConfig(bottleneck=4),
    "IDPT": lambda: dl.IDPTConfig(neighbours=3),
    "Point-PEFT": lambda: dl.PointPEFTConfig(bottleneck=4, num_prompts=5, inner=6, heads=2),
    "DAPT-X (Adapter-X)": lambda: dl.AdapterXConfig(
        experts=3, bottleneck=4, activation="gelu", prompt_act="gelu", last_prompt=True
    ),
}
NEEDS_POINTS = ("DAPT", "IDPT", "Point-PEFT")
EVERY_ROW = ROWS | CLIP_ROWS | POINT_ROWS


# ------------------------------------------------------------------ one cell
def refusal(make: Callable[[], nn.Module], row: str) -> str | None:
    """The message with which a method refuses a model, None where it fits. The model must then be untouched."""
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        dl.attach(model, EVERY_ROW[row]())
    except (TypeError, ValueError) as error:
        assert_equal_states(model.state_dict(), before)
        return str(error)
    return None


def walk(make: Callable[[], nn.Module], x: torch.Tensor, row: str, folder: Path) -> nn.Module:
    """Attach, prepare, train three steps, save, load, switch, disable, detach. Raises where anything is wrong.
    Returns the loaded model, which the caller may export.

    make: builds the same classifier of CLASSES classes each time. x: one image for each of LABELS."""
    loaded, message = walk_or_refusal(make, x, row, folder)
    assert loaded is not None, message
    return loaded


def walk_or_refusal(
    make: Callable[[], nn.Module], x: torch.Tensor, row: str, folder: Path
) -> tuple[nn.Module, None] | tuple[None, str]:
    """`walk` where the method fits; where it refuses the model, what `refusal` says. One model is for both: reading a
    network costs more than all else here."""
    model = make()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected_plain = logits_of(model(x))
    try:
        dl.attach(model, EVERY_ROW[row]())
    except (TypeError, ValueError) as error:
        assert_equal_states(model.state_dict(), plain)
        return None, str(error)
    dl.prepare(model, [(x, LABELS)])
    train_three_steps(model, x)
    with torch.no_grad():
        expected = logits_of(model.eval()(x))
    assert torch.isfinite(expected).all()
    assert not torch.equal(expected, expected_plain)

    dl.save_pretrained(model, folder)
    loaded = dl.from_pretrained(folder, make())
    with torch.no_grad():
        assert torch.equal(logits_of(loaded(x)), expected), "the loaded adapter computes something else"

    if isinstance(model, dl.ZeroShotClassifier):  # its classes are texts, not a head
        dl.attach(model, dl.BitFitConfig(), name="other")
        classes = model.num_classes
    else:
        classes = 3
        dl.attach(model, dl.LinearConfig(), name="other", num_classes=classes)
    randomize_adapter(model)
    with torch.no_grad():
        other = logits_of(model.eval()(x))
        assert other.shape == (len(x), classes)
        assert other.shape != expected.shape or not torch.equal(other, expected)
        dl.set_adapter(model, "default")
        assert torch.equal(logits_of(model.eval()(x)), expected), "switching there and back changed the adapter"
        with dl.disable_adapter(model):
            torch.testing.assert_close(
                logits_of(model.eval()(x)), expected_plain, atol=1e-5, rtol=1e-5
            )  # class row only: rounding
    dl.detach(model)
    assert_equal_states(model.state_dict(), plain)
    with torch.no_grad():
        assert torch.equal(logits_of(model.eval()(x)), expected_plain), "detach left something behind"
    return loaded, None


def train_three_steps(model: nn.Module, x: torch.Tensor) -> None:
    """AdamW; every step must change the loss, and gradients must be finite."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    before = [parameter.detach().clone() for parameter in parameters]
    model.train()
    losses = []
    for step in range(3):
        torch.manual_seed(step)
        loss = F.cross_entropy(logits_of(model(x)), LABELS)
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in parameters if p.grad is not None)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(set(losses)) == 3, f"training stands still: {losses}"
    assert any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def export(model: nn.Module, x: torch.Tensor) -> None:
    """torch.export of the adapted model computes the same."""
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (x,)).module()
        torch.testing.assert_close(logits_of(exported(x)), logits_of(model(x)), atol=1e-5, rtol=1e-5)


def assert_equal_states(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# ------------------------------------------------------------------ the page
def page() -> str:
    """Run every cell and write down what happened."""
    rows, reasons = [], []
    for row in ROWS:
        cells = []
        for family in HEADINGS:
            with tempfile.TemporaryDirectory() as folder:
                x = images(family, batch=len(LABELS))
                loaded, message = walk_or_refusal(MODELS[family], x, row, Path(folder))
            if message is None:
                export(loaded, images(family))
                cells.append("yes")
            else:
                cells.append("no")
                reasons.append(f"| {row} | {HEADINGS[family]} | {message.replace('|', chr(92) + '|')} |")
        rows.append(f"| {row} | {' | '.join(cells)} |")
    return TEMPLATE.format(
        head=" | ".join(HEADINGS.values()), rule="|---" * (len(HEADINGS) + 1), rows="\n".join(rows),
        reasons="\n".join(reasons), needs=", ".join(NEEDS_TEXTS), texts="\n".join(clip_rows()),
        points="\n".join(point_rows()), needs_points=", ".join(NEEDS_POINTS),
    )  # fmt: skip


def point_model() -> nn.Module:
    """A point transformer of Point-MAE's kind."""
    torch.manual_seed(0)
    return PointTransformer(5, dim=24, depth=2, heads=2, num_groups=5, group_size=4, encoder_dim=24).eval()


def point_clouds() -> torch.Tensor:
    return torch.randn(len(LABELS), 24, 3, generator=torch.Generator().manual_seed(0))


def point_rows() -> list[str]:
    """The table of point clouds: every method works, or says why not."""
    rows = ["| method | | error |", "|---|---|---|"]
    for row in ROWS | POINT_ROWS:
        with tempfile.TemporaryDirectory() as folder:
            loaded, message = walk_or_refusal(point_model, point_clouds(), row, Path(folder))
        if message is None:
            export(loaded, point_clouds()[:2])
        rows.append(point_line(row, message))
    for row in NEEDS_POINTS:
        if not all(refusal(MODELS[family], row) for family in HEADINGS):
            raise AssertionError(f"{row} works without point clouds")
    return rows


def point_line(row: str, message: str | None) -> str:
    return f"| {row} | {'yes' if message is None else 'no'} | {(message or '').replace('|', chr(92) + '|')} |"


def clip_rows() -> list[str]:
    """The table of classifiers made of texts, where every cell works; and of what needs texts, where none does."""
    rows = ["| method | " + " | ".join(CLIP_HEADINGS.values()) + " |", "|---" * (len(CLIP_HEADINGS) + 1) + "|"]
    for row in CLIP_ROWS:
        for family in CLIP_HEADINGS:
            with tempfile.TemporaryDirectory() as folder:
                walk(CLIP_MODELS[family], images("vit", batch=len(LABELS)), row, Path(folder))
        rows.append(f"| {row} |{' yes |' * len(CLIP_HEADINGS)}")
    for row in NEEDS_TEXTS:
        if not all(refusal(MODELS[family], row) for family in HEADINGS):
            raise AssertionError(f"{row} works without texts")
    return rows


TEMPLATE = """# What fits what

Made by `python tests/matrix.py`. "yes" means that the method was attached to a small network of the family, trained
for three steps, saved, loaded into a fresh backbone with identical outputs, switched against another adapter,
disabled, exported with `torch.export`, and detached, which gave the backbone back bit for bit. The test suite does the
same.

| method | {head} |
{rule}|
{rows}

Where it says "no", attaching is refused, and the model stays as it was:

| method | family | error |
|---|---|---|
{reasons}

## Classifiers whose classes are texts

A small CLIP with class names ([CLIP](clip.md)), the same steps but for the export:

{texts}

Refused on all networks of the first table, because they need a text tower: {needs}.

## Point clouds

A small [point transformer](models.md#point-clouds) of Point-MAE's kind, all the steps of the first table:

{points}

Refused on all networks of the first table, because they need patches of a point cloud: {needs_points}.
"""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
