"""Seam: a convolutional block without norm(x) (ConvNeXt): inner and pre exist, parallel does not."""

import pytest
import torch
from models import images, randomize_adapter, tiny_convnext
from torch import nn

import deltalens as dl
from deltalens.methods import Method


class PerPosition(nn.Module):
    """f(u) -> u on the channels of each position; refuses anything but channels last."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.layer = nn.Linear(width, width)

    def forward(self, u):
        assert u.shape[-1] == self.width
        return u + torch.tanh(self.layer(u))


class InSlot(Method):
    name = "in_slot"

    def __init__(self, slot):
        self.__dict__["slot"] = slot

    def place(self, anatomy):
        for block in anatomy.blocks():
            yield block, self.slot, PerPosition(block.width)


def explicit(block, module, slot):
    """A plain block's forward with `module` in `slot`."""

    def forward(x):
        u = block.conv_dw(x)
        u = u if block.use_conv_mlp else u.permute(0, 2, 3, 1)
        u = block.norm(u)
        inside = (lambda y: module(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) if block.use_conv_mlp else module
        u = inside(u) if slot == "mlp.pre" else u
        u = block.mlp(u)
        u = u * (block.gamma.reshape(-1, 1, 1) if block.use_conv_mlp else block.gamma)
        u = inside(u) if slot == "mlp.inner" else u
        y = x + (u if block.use_conv_mlp else u.permute(0, 3, 1, 2))
        return module(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if slot == "block.stream" else y

    return forward


@pytest.mark.parametrize("options", [{}, {"conv_mlp": True}, {"use_grn": True}])
@pytest.mark.parametrize("slot", ["mlp.pre", "mlp.inner", "block.stream"])
def test_equals_an_explicit_computation(slot, options):
    model, plain = tiny_convnext(**options).double(), tiny_convnext(**options).double()
    x = images("convnext").double()
    dl.attach(model, InSlot(slot))
    randomize_adapter(model)
    for (_, block), adapted in zip(
        [(p, m) for p, m in plain.named_modules() if type(m).__name__ == "ConvNeXtBlock"],
        [m for m in model.modules() if type(m).__name__ == "ConvNeXtBlock"],
        strict=True,
    ):
        (module,) = adapted.delta.live(slot)
        block.forward = explicit(block, module, slot)
    plain.head.fc = model.head.fc
    torch.testing.assert_close(model(x), plain(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("slot", ["mlp.parallel", "block.parallel", "attention.inner", "attention.stream"])
def test_slots_that_need_a_norm_or_attention_are_a_named_error(slot):
    model, x = tiny_convnext(), images("convnext")
    output, modules = model(x), {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(TypeError) as caught:
        dl.attach(model, InSlot(slot))
    for word in ("InSlot", slot, "ConvNeXtBlock", "stages.0.blocks.0", "ConvNeXt", "mlp.inner"):
        assert word in str(caught.value)
    assert {name: type(m) for name, m in model.named_modules()} == modules
    assert torch.equal(model(x), output)
