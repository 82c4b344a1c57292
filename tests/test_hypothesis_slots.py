"""Properties of layouts and slot containers, for any shapes, prefixes and sequences of operations."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltalens.sites.layout import ChannelsFirst, ChannelsLast, Sequence, Tokens
from deltalens.sites.slots import Slots

settings.register_profile("deltalens", max_examples=60, deadline=None)
settings.load_profile("deltalens")
sizes = st.integers(1, 6)


def numbered(*shape: int) -> torch.Tensor:
    """Every entry different, so that any mix-up shows."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


# ------------------------------------------------------------------ layouts
@given(batch=sizes, height=sizes, width=sizes, channels=sizes, prefix=st.integers(0, 5), added=st.integers(0, 4))
def test_tokens_split_and_join(batch, height, width, channels, prefix, added):
    layout = Tokens(prefix, (height, width))
    x = numbered(batch, prefix + added + height * width, channels)
    feature_map, front = layout.split(x)
    assert feature_map.shape == (batch, height, width, channels)
    assert torch.equal(layout.join(feature_map, front), x)
    assert (front is None) == (prefix + added == 0)
    for row in range(height):
        for column in range(width):
            assert torch.equal(feature_map[:, row, column], x[:, prefix + added + row * width + column])


@given(
    batch=sizes, height=sizes, width=sizes, channels=sizes, prefix=st.integers(0, 3),
    inserted=st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=4),
)  # fmt: skip
def test_tokens_insert_then_trim_is_nothing(batch, height, width, channels, prefix, inserted):
    """Newest tokens stand right behind the prefix, the map does not move, trimming drops exactly what was added."""
    layout = Tokens(prefix, (height, width))
    original = x = numbered(batch, prefix + height * width, channels)
    total = 0
    for count, shared in inserted:
        tokens = -1 - numbered(1 if shared else batch, count, channels)
        x = layout.insert(x, tokens)
        total += count
        assert torch.equal(x[:, prefix : prefix + count], tokens.expand(batch, -1, -1))
        assert torch.equal(layout.split(x)[0], layout.split(original)[0])
        assert torch.equal(x[:, :prefix], original[:, :prefix])
    assert x.shape[1] == prefix + height * width + total
    assert torch.equal(layout.trim(x), original)
    assert torch.equal(layout.trim(layout.trim(x)), original)


@given(batch=sizes, height=sizes, width=sizes, channels=sizes)
def test_maps_split_and_join(batch, height, width, channels):
    for layout, x in (
        (ChannelsLast(), numbered(batch, height, width, channels)),
        (ChannelsFirst(), numbered(batch, channels, height, width)),
    ):
        feature_map, front = layout.split(x)
        assert feature_map.shape == (batch, height, width, channels)
        assert front is None
        assert torch.equal(layout.join(feature_map, front), x)
        assert torch.equal(layout.trim(x), x)


@given(batch=sizes, height=sizes, width=sizes, channels=sizes)
def test_features_have_channels_last(batch, height, width, channels):
    shapes = {
        ChannelsFirst: (batch, channels, height, width),
        ChannelsLast: (batch, height, width, channels),
        Tokens: (batch, height * width, channels),
        Sequence: (batch, height * width, channels),
    }
    for cls, shape in shapes.items():
        layout = Tokens(0, (height, width)) if cls is Tokens else cls()
        x = numbered(*shape)
        assert layout.features(x).shape[-1] == channels
        assert torch.equal(layout.stream(layout.features(x)), x)


@given(grids=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=5), prefix=st.integers(0, 2))
def test_the_last_recorded_grid_counts(grids, prefix):
    layout = Tokens(prefix)
    for height, width in grids:
        layout.record(height, width)
        assert layout.split(numbered(1, prefix + height * width, 2))[0].shape == (1, height, width, 2)


# ------------------------------------------------------------------ slots
NAMES = ("a", "b", "train", "keys")  # the last two are attributes of nn.ModuleDict
SLOTS = ("attention.stream", "mlp.inner", "q")
operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(NAMES), st.sampled_from(SLOTS), st.sampled_from(("mona", "lora"))),
        st.tuples(st.just("remove"), st.sampled_from(NAMES), st.none(), st.none()),
        st.tuples(st.just("activate"), st.lists(st.sampled_from(NAMES), unique=True), st.none(), st.none()),
    ),
    max_size=25,
)


@given(operations=operations)
def test_slots_keep_their_books(operations):
    """Against a plain list of (slot, adapter, method, module) in the order of placing."""
    slots, placed, active = Slots(ChannelsLast()), [], ()
    for kind, name, slot, method in operations:
        if kind == "put":
            module = nn.Linear(1, 1)
            slots.put(slot, name, method, module)
            placed.append((slot, name, method, module))
        elif kind == "remove":
            slots.remove(name)
            placed = [entry for entry in placed if entry[1] != name]
            active = tuple(each for each in active if each != name)
        else:
            slots.active = active = tuple(name)
        assert slots.active == active
        for each in SLOTS:
            expected = [m for name in active for s, n, method, m in placed if (s, n) == (each, name)]
            assert slots.live(each) == expected
        assert {id(m) for m in slots.all_live()} == {id(m) for s, n, method, m in placed if n in active}
        for name in NAMES:
            found = list(slots.of(name))
            assert {id(m) for _, m in found} == {id(m) for s, n, method, m in placed if n == name}
            assert len({place for place, _ in found}) == len(found)
        assert set(slots._modules) == {s.replace(".", "_") for s, *_ in placed}
        assert sum(1 for _ in slots.parameters()) == 2 * len(placed)


class Times(nn.Module):
    def __init__(self, factor, spatial=False):
        super().__init__()
        self.factor, self.spatial = factor, spatial

    def forward(self, x, normed=None):
        return self.factor * x if normed is None else self.factor * normed


@given(
    factors=st.lists(st.tuples(st.integers(2, 5), st.booleans()), max_size=4),
    prefix=st.integers(0, 2), height=sizes, width=sizes,
)  # fmt: skip
def test_chains_multiply_and_parallels_add(factors, prefix, height, width):
    """Spatial modules leave prefix tokens alone, in chains and as sums."""
    slots, layout = Slots(Tokens(prefix)), Tokens(prefix, (height, width))
    for i, (factor, spatial) in enumerate(factors):
        slots.put("mlp.stream", f"n{i}", "m", Times(factor, spatial))
        slots.put("mlp.parallel", f"n{i}", "m", Times(factor, spatial))
    slots.active = tuple(f"n{i}" for i in range(len(factors)))
    x, normed = (1 + numbered(2, prefix + height * width, 3) for _ in range(2))
    product = torch.ones(prefix + height * width, 1, dtype=torch.float64)
    total = torch.zeros_like(product)
    for factor, spatial in factors:
        product[prefix if spatial else 0 :] *= factor
        total[prefix if spatial else 0 :] += factor
    assert torch.equal(slots.chain("mlp.stream", x, layout), x * product)
    delta, tokens = slots.parallel("mlp.parallel", x, normed, layout)
    assert tokens == []
    if factors:
        assert torch.equal(delta, normed * total)
    else:
        assert delta is None
