"""One model's life with every method: attach, forward, backward, save, reload, detach; then compile and export."""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltalens as dl
from deltalens.methods import Method
from deltalens.sites.output import logits_of

from .models import CLASSES, Model, build

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from matrix import ROWS

IMAGES = 2


def live(key: str, rows: list[str] | None = None, fallback_only: bool = False, graphs: bool = True) -> dict[str, Any]:
    """The result of a model, for the page. rows: names in ROWS, all of them by default. It never raises: what goes
    wrong is in the result, under "outcome" for the model, under "methods" for a method."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    start, result = time.monotonic(), {"key": key, "outcome": "built nothing"}
    try:
        made = build(key)
        model = settled(made).requires_grad_(True)
        result |= {"name": made.name, "size": made.size, "note": made.note}
        result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        result |= anatomy(made)
        if fallback_only and result["families"] != ["fallback"]:
            return {**result, "outcome": "passed over: it has a family"}
        result["methods"] = {row: step(made, row) for row in rows or ROWS}
        if graphs:
            result |= graphs_of(made, [row for row, each in result["methods"].items() if each.get("inserts")])
        result["outcome"] = outcome(result)
    except Exception as error:
        result["outcome"] = said(error)
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def outcome(result: dict[str, Any]) -> str:
    """ "adapts", or in words why it does not."""
    wrong = [f"{row}: {each['wrong']}" for row, each in result["methods"].items() if "wrong" in each]
    if wrong:
        return wrong[0]
    if not any(each.get("inserts") for each in result["methods"].values()):
        return "no method that inserts modules fits"
    return "adapts"


def said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


# ------------------------------------------------------------------ the model
def settled(made: Model) -> nn.Module:
    """The model in eval mode; running statistics are those of a few images, so that activations keep their size."""
    norms = [module for module in made.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:
        momenta = [module.momentum for module in norms]
        for module in norms:
            module.momentum = 1.0
        with torch.no_grad():
            made.model.train()(images(made, 4))
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
    return made.model.eval()


def images(made: Model, count: int = IMAGES) -> Tensor:
    return torch.randn(count, 3, made.size, made.size, generator=torch.Generator().manual_seed(1))


def anatomy(made: Model) -> dict[str, Any]:
    found = dl.describe(made.model, made.backbone)
    blocks = found.blocks()
    return {
        "families": sorted({family_name(block.family.name) for block in blocks}),
        "blocks": len(blocks),
        "layouts": sorted({type(tower.layout).__name__ for tower in found.towers}),
        "slots": sorted(set.union(*[set(block.slots) for block in blocks])),
        "why no map": sorted({getattr(tower.layout, "reason", "") for tower in found.towers} - {""}),
        "heads": found.heads,
    }


def family_name(name: str) -> str:
    module = name.partition(":")[0].removeprefix("deltalens.backbones.")
    return "fallback" if module == "unknown" else module


# ------------------------------------------------------------------ a method
def step(made: Model, row: str) -> dict[str, Any]:
    """{} where all goes well, {"refused": the message} or {"wrong": what went wrong}; "inserts": whether the method
    puts modules into the backbone."""
    model, x = made.model, images(made)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keys, modules = list(before), [type(module) for module in model.modules()]
    with torch.no_grad():
        plain = logits_of(model(x))
    found: dict[str, Any] = {}
    try:
        try:
            dl.attach(model, ROWS[row](), backbone=made.backbone)
        except (TypeError, ValueError) as error:
            return {"refused": said(error)}
        found["inserts"] = any("delta" in name.split(".") for name, _ in model.named_parameters())
        walk(made, row, x, plain)
        dl.detach(model)
        with torch.no_grad():
            assert torch.equal(logits_of(model.eval()(x)), plain), "detach left something behind"
    except Exception as error:
        found["wrong"] = said(error)
        if "_deltalens" in model.__dict__:
            dl.detach(model)
    finally:
        after = model.state_dict()
        same = list(after) == keys and all(torch.equal(after[key], before[key]) for key in keys)
        if not same or [type(module) for module in model.modules()] != modules:
            found["wrong"] = found.get("wrong", "the model is not what it was")
            model.load_state_dict(before)
    return found


def walk(made: Model, row: str, x: Tensor, plain: Tensor) -> None:
    """Everything between attach and detach."""
    model = made.model
    if needs_preparation(ROWS[row]()):
        more = images(made, CLASSES + 1)
        dl.prepare(model, [(more, torch.arange(CLASSES + 1) % CLASSES)])
    shake(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = F.cross_entropy(logits_of(model(x)), torch.arange(IMAGES))
    loss.backward()
    reached = [parameter for parameter in trained if parameter.grad is not None]
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in reached), "gradients are not finite"
    assert any(bool(parameter.grad.any()) for parameter in reached), "no gradient"
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        adapted = logits_of(model(x))
    assert bool(torch.isfinite(adapted).all()), "the output is not finite"
    assert not torch.equal(adapted, plain), "the adapter changes nothing"
    with tempfile.TemporaryDirectory() as folder:
        dl.save_pretrained(model, folder)
        dl.set_adapter(model, ())
        with torch.no_grad():
            torch.testing.assert_close(logits_of(model(x)), plain, atol=1e-4, rtol=1e-4)
        dl.load_adapter(model, folder, name="loaded")
    with torch.no_grad():
        assert torch.equal(logits_of(model.eval()(x)), adapted), "the loaded adapter computes something else"


def needs_preparation(config: Method | list[Method]) -> bool:
    configs = config if isinstance(config, list) else [config]
    return any(type(each).prepare is not Method.prepare for each in configs)


def shake(model: nn.Module) -> None:
    """Move every trained tensor off its start, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.05 * spread if spread else 0.01))


# ------------------------------------------------------------------ graphs
def graphs_of(made: Model, rows: list[str]) -> dict[str, str]:
    """Whether the model compiles and exports with one adapter: with Mona where it fits."""
    if not rows:
        return {"compile": "no adapter", "export": "no adapter"}
    row = "Mona" if "Mona" in rows else rows[0]
    found = {"graphs with": row}
    plain = copy.deepcopy(made.model)
    dl.attach(made.model, ROWS[row](), backbone=made.backbone)
    shake(made.model)
    for name, check in (("export", exports), ("compile", compiles)):
        try:
            check(made.model.eval(), images(made))
            found[name] = "yes"
        except Exception as error:
            try:
                check(plain.eval(), images(made))
                found[name] = said(error)
            except Exception as own:
                found[name] = f"not without an adapter either: {said(own)[:200]}"
    dl.detach(made.model)
    return found


@torch.no_grad()
def exports(model: nn.Module, x: Tensor) -> None:
    exported = torch.export.export(model, (x,), strict=False).module()
    torch.testing.assert_close(logits_of(exported(x)), logits_of(model(x)), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def compiles(model: nn.Module, x: Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled(x)), logits_of(model(x)), atol=1e-3, rtol=1e-3)
