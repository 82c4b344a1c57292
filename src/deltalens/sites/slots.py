"""The container of adapter modules that a swapped module owns as its child `delta`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from deltalens.sites.layout import Layout

ADAPTER_PREFIX = "adapter_"  # nn.ModuleDict refuses keys such as "train" or "keys"


class Slots(nn.Module):
    """slot -> adapter -> method -> module, with the adapters that are active, in order.

    A slot's name is written with "_" instead of "." in parameter names: `attention.stream` is `attention_stream`.
    Modules may declare facts about themselves as attributes:

    * `spatial = True`: called with the map (B, H, W, C); prefix tokens bypass it.
    * `takes_layout = True`: called with the stream as it is and its layout as last argument, for modules that treat
      prefix tokens and map each in their own way.
    * `pointwise = True`: acts on each token alone, so that tokens nobody reads need not be computed.
    * `adds_tokens = True`: returns tokens besides its result, which live on in the stream (`parallel`, `inner`).
    * `in_drop_path = True`: what it adds is dropped together with the branch it is beside (a branch's `parallel`).
    """

    def __init__(self, layout: Layout, last: bool = False):
        super().__init__()
        self.layout = layout
        self.last = last
        self.active: tuple[str, ...] = ()

    def forward(self, x):
        """x as it is: some networks run all children of a module one after another (RegNet's stages)."""
        return x

    def put(self, slot: str, adapter: str, method: str, module: nn.Module) -> str:
        """Place a module. The same method twice in one adapter and slot gets a numbered key. Returns the key."""
        key = slot.replace(".", "_")
        if key not in self._modules:
            self.add_module(key, nn.ModuleDict())
        adapters = self._modules[key]
        if ADAPTER_PREFIX + adapter not in adapters:
            adapters[ADAPTER_PREFIX + adapter] = nn.ModuleDict()
        methods = adapters[ADAPTER_PREFIX + adapter]
        name, count = method, 1
        while name in methods:
            count += 1
            name = f"{method}_{count}"
        methods[name] = module
        return name

    def remove(self, adapter: str) -> None:
        """Forget all modules of an adapter."""
        for slot, adapters in list(self._modules.items()):
            if ADAPTER_PREFIX + adapter in adapters:
                del adapters[ADAPTER_PREFIX + adapter]
            if not len(adapters):
                del self._modules[slot]
        self.active = tuple(name for name in self.active if name != adapter)

    def remove_last(self, slot: str) -> None:
        """Forget the last active module of a slot."""
        adapters = self._modules[slot.replace(".", "_")]
        name = next(name for name in reversed(self.active) if len(adapters._modules.get(ADAPTER_PREFIX + name, ())))
        methods = adapters[ADAPTER_PREFIX + name]
        del methods[list(methods)[-1]]

    def of(self, adapter: str) -> Iterator[tuple[str, nn.Module]]:
        """("slot.method", module) for every module of an adapter."""
        for slot, adapters in self._modules.items():
            if ADAPTER_PREFIX + adapter in adapters:
                for method, module in adapters[ADAPTER_PREFIX + adapter].items():
                    yield f"{slot}.{method}", module

    def live(self, slot: str) -> list[nn.Module]:
        """The active modules of a slot, in the order of their adapters."""
        adapters = self._modules.get(slot.replace(".", "_"))
        if adapters is None:
            return []
        found = []
        for name in self.active:
            if ADAPTER_PREFIX + name in adapters:
                found.extend(adapters[ADAPTER_PREFIX + name].values())
        return found

    def all_live(self) -> list[nn.Module]:
        return [module for slot in self._modules for module in self.live(slot)]

    # ------------------------------------------------------------------ how the slots of a block are read
    def chain(self, slot: str, x: Tensor, layout: Layout, tokens: list[Tensor] | None = None) -> Tensor:
        """f(x) -> x, one after the other: `pre`, `inner` and `stream` slots.

        tokens: where new tokens of modules that return (x, new tokens) are appended; without it those are an error.
        """
        for module in self.live(slot):
            if getattr(module, "takes_layout", False):
                x = module(x, layout)
                if isinstance(x, tuple):
                    x, new = x
                    if tokens is None:
                        raise TypeError(f"{type(module).__name__} makes tokens, which {slot} of this block cannot take")
                    tokens.append(new)
            elif getattr(module, "spatial", False):
                feature_map, prefix = layout.split(x)
                x = layout.join(module(feature_map), prefix)
            else:
                x = layout.stream(module(layout.features(x)))
        return x

    def parallel(
        self, slot: str, x: Tensor, normed: Tensor, layout: Layout, in_drop_path: bool = False
    ) -> tuple[Tensor | None, list[Tensor]]:
        """f(x, n) -> delta or (delta, new tokens): the sum of the deltas, and the new tokens in order. Of the modules
        that say `in_drop_path`, or of the others."""
        total, tokens = None, []
        for module in self.live(slot):
            if getattr(module, "in_drop_path", False) != in_drop_path:
                continue
            plain = False
            if getattr(module, "takes_layout", False):
                delta = module(x, normed, layout)
            elif getattr(module, "spatial", False):
                (x_map, prefix), (n_map, _) = layout.split(x), layout.split(normed)
                delta = layout.join(module(x_map, n_map), None if prefix is None else prefix.new_zeros(prefix.shape))
            else:
                delta, plain = module(layout.features(x), layout.features(normed)), True
            if isinstance(delta, tuple):
                delta, new = delta
                tokens.append(new)
            delta = layout.stream(delta) if plain else delta
            total = delta if total is None else total + delta
        return total, tokens

    def tokens(self, slot: str, x: Tensor, layout: Layout) -> Tensor:
        """f(x, layout) -> x: modules that insert, replace, add or drop tokens."""
        for module in self.live(slot):
            x = module(x, layout)
        return x

    def mask(self, mask: Tensor | None, x: Tensor, layout: Layout) -> Tensor | None:
        """f(mask, x, layout) -> mask for the `attention.mask` slot; x is the stream the mask is for."""
        for module in self.live("attention.mask"):
            mask = module(mask, x, layout)
        return mask


@contextlib.contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Within the context no adapter module of this module and its children acts. Tensors that an adapter trains in
    place of the backbone's own stay."""
    found = [each for each in module.modules() if isinstance(each, Slots)]
    active = [slots.active for slots in found]
    try:
        for slots in found:
            slots.active = ()
        yield
    finally:
        for slots, names in zip(found, active, strict=True):
            slots.active = names
