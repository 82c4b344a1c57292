"""Layers with weight modules of both kinds: rows, order, which layers can hold what; modules that take the layout."""

import pytest
import torch
from models import images, tiny_vit
from torch import nn

import deltalens as dl
from deltalens.methods import Method, register
from deltalens.sites.anatomy import Part
from deltalens.sites.layout import ChannelsFirst, Tokens
from deltalens.sites.slots import Slots
from deltalens.sites.weights import equip, linear_rows, merge_changes


class Add(nn.Module):
    """A change computed from the input."""

    def __init__(self, inputs: int, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, inputs).double())

    def forward(self, x):
        return x @ self.weight.T

    def weight_change(self):
        return self.weight


class Mix(nn.Module):
    """y -> M y + c: every row depends on all rows of its part."""

    transforms_output = True

    def __init__(self, rows: int):
        super().__init__()
        self.matrix, self.shift = (nn.Parameter(torch.randn(*shape).double()) for shape in ((rows, rows), (rows,)))

    def forward(self, y):
        assert y.shape[-1] == len(self.matrix)
        return y @ self.matrix.T + self.shift

    def merged(self, weight, bias):
        return self.matrix @ weight, self.matrix @ bias + self.shift


def equipped(bias: bool = True):
    """A linear layer with 9 rows: q, k, v of 3 each, and modules that act in an order that is not theirs by rows."""
    layer = nn.Linear(4, 9, bias=bias).double()
    parts = {"v": (6, 9), "q": (0, 3), "kv": (3, 9), "all": None}
    for part, rows in parts.items():
        equip(layer, Part("", rows), None).delta.rows[part] = rows
    modules = [("q", Add(4, 3)), ("kv", Mix(6)), ("v", Add(4, 3)), ("q", Mix(3)), ("all", Add(4, 9)), ("v", Mix(3))]
    for part, module in modules:
        layer.delta.put(part, "a", "test", module)
    layer.delta.active = ("a",)
    return layer, [(parts[part] or (0, 9), module) for part, module in modules]


@pytest.mark.parametrize("bias", [True, False])
def test_modules_act_in_attach_order(bias):
    layer, modules = equipped(bias)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    expected = x @ layer.weight.T + (layer.bias if bias else 0)
    for (start, stop), module in modules:
        rows = expected[..., start:stop]
        rows = rows + module(x) if isinstance(module, Add) else module(rows)
        expected = torch.cat([expected[..., :start], rows, expected[..., stop:]], -1)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)
    for start in range(9):
        for stop in range(start + 1, 10):
            found = linear_rows(layer, x, start, stop)
            torch.testing.assert_close(found, expected[..., start:stop], atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        merge_changes(layer)
    layer.delta.active = ()
    torch.testing.assert_close(layer(x), expected, atol=1e-11, rtol=1e-11)


def test_removing_an_adapter_forgets_its_places():
    layer, _ = equipped()
    layer.delta.put("q", "b", "test", Add(4, 3))
    layer.delta.remove("a")
    assert [place[0] for place in layer.delta.placed] == ["b"]
    layer.delta.active = ("b",)
    assert len(layer.delta.changes()) == 1


def test_which_layers_can_be_transformed():
    @register("test_mix")
    class MixConfig(Method):
        def place(self, anatomy):
            from deltalens.sites.anatomy import Family, Site

            family = Family(name="test_weight_slots:FAMILY", methods={}, parts=lambda layer: {"all": Part("")})
            yield Site("blocks.0.mlp", anatomy.model.blocks[0].mlp, family, 24), "weights:all", Mix(24)

    model = tiny_vit()
    with pytest.raises(TypeError, match="is a Mlp, which has no plain weight and bias at its end"):
        dl.attach(model, MixConfig())
    assert not hasattr(model, "_deltalens")


# ------------------------------------------------------------------ takes_layout
class Flip(nn.Module):
    """Turns the map around and leaves prefix tokens alone, which only a module with the layout can do by itself."""

    takes_layout = True

    def forward(self, x, *rest):
        layout = rest[-1]
        feature_map, prefix = layout.split(x)
        return layout.join(feature_map.flip(1, 2), prefix)


@pytest.mark.parametrize("layout", [Tokens(2, (3, 2)), ChannelsFirst()])
def test_modules_that_take_the_layout(layout):
    slots = Slots(layout)
    for slot in ("mlp.stream", "mlp.parallel"):
        slots.put(slot, "a", "flip", Flip())
    slots.active = ("a",)
    x = torch.randn(2, 8, 4) if isinstance(layout, Tokens) else torch.randn(2, 4, 3, 2)
    if isinstance(layout, Tokens):
        expected = torch.cat([x[:, :2], x[:, 2:].flip(1)], 1)
    else:
        expected = x.flip(2, 3)
    assert torch.equal(slots.chain("mlp.stream", x, layout), expected)
    assert torch.equal(slots.parallel("mlp.parallel", x, x, layout)[0], expected)


def test_a_module_with_the_layout_in_the_last_block():
    """It is not pointwise, so the last block computes all tokens."""

    @register("test_flip")
    class FlipConfig(Method):
        def place(self, anatomy):
            for block in anatomy.blocks():
                yield block, "attention.stream", Flip()

    model, x = dl.attach(tiny_vit(), FlipConfig()), images("vit")
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)), atol=1e-6, rtol=1e-6)
