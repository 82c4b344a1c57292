"""What the tests of every family of windows, class attention and permuted tokens do alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matrix import LABELS, ROWS, export, walk_or_refusal
from models import backward, randomize_adapter
from torch import nn

import deltalens as dl
from deltalens.methods import Method

HANDFUL = ("Mona", "VPT-deep", "VPT-shallow", "LoRA on q, v", "Adapter, Houlsby", "SSF")


def check_row(make: Callable[[], nn.Module], row: str, refused: dict[str, str], folder, exported: bool = False) -> None:
    """A row is refused with a message that holds what `refused` says, or walked from attaching to detaching."""
    x = torch.randn(len(LABELS), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loaded, message = walk_or_refusal(make, x, row, folder)
    if row in refused:
        assert message is not None, f"{row} is not refused"
        assert refused[row] in message
        return
    assert message is None, message
    if exported:
        export(loaded, x[:2])


def check_row_names(refused: dict[str, str]) -> None:
    assert set(refused) <= set(ROWS)


def adapted(model: nn.Module, config: Method | list[Method], seed: int = 1) -> nn.Module:
    """The model with an adapter of random values."""
    return randomize_adapter(dl.attach(model, config), seed)


def assert_untouched_by_zero(make: Callable[[], nn.Module], x: torch.Tensor, config: Method) -> None:
    """An adapter that adds zero leaves the output bit for bit, in training too where the method keeps drop path."""
    plain, model = make(), dl.attach(make(), config)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))
        if config.frozen_mode != "train":
            return
        for network in (model, plain):
            network.train()
        torch.manual_seed(3)
        expected = plain(x)
        torch.manual_seed(3)
        assert torch.equal(model(x), expected)


def assert_merges(model: nn.Module, x: torch.Tensor, plain_class: bool = True, **tolerance) -> None:
    """Merging computes the same, and gives back the library's own classes where nothing else is left."""
    with torch.no_grad():
        expected = model.eval()(x)
        merged = dl.merge_and_unload(model)
        torch.testing.assert_close(merged(x), expected, **(tolerance or {"atol": 1e-10, "rtol": 1e-10}))
    if plain_class:
        assert not any(type(module).__mro__[1].__name__ == "Swapped" for module in merged.modules())


def assert_same_run(found: nn.Module, expected: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    """float64: the adapted model and a plain form that uses the same tensors agree, forward and gradients."""
    y, gradients = backward(found, x)
    found.zero_grad()
    z = expected(x)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    (z * weights.to(z)).sum().backward()
    torch.testing.assert_close(y, z.detach(), atol=1e-10, rtol=1e-10)
    for name, parameter in found.named_parameters():
        if parameter.requires_grad:
            assert gradients[name].abs().max() > 0, name
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-10, rtol=1e-8, msg=name)


def compiled_equals_eager(model: nn.Module, x: torch.Tensor) -> None:
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
