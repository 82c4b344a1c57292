"""How many parameters an adapter trains, with and without its head."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from deltalens.lifecycle.state import KEY, state_of
from deltalens.lifecycle.wrapped import wrapper_parameters


class ParameterCount(NamedTuple):
    """Numbers of parameters. `backbone` counts the plain backbone without head; percentages are of that."""

    adapter: int
    head: int
    backbone: int

    @property
    def trainable(self) -> int:
        return self.adapter + self.head

    @property
    def percent(self) -> float:
        """100 * adapter / backbone, without the head."""
        return 100 * self.adapter / self.backbone

    @property
    def percent_with_head(self) -> float:
        return 100 * self.trainable / self.backbone


class ParameterRow(NamedTuple):
    """One trainable tensor."""

    name: str
    shape: tuple[int, ...]
    numel: int
    kind: str  # "inserted", "unfrozen" or "head"


def parameter_table(model: nn.Module) -> list[ParameterRow]:
    """Every trainable tensor of the active adapters, shared ones once. Without adapters: every trainable parameter."""
    heads = tuple(path + "." for path in state_of(model).heads) if KEY in model.__dict__ else ()
    rows, wrappers = [], wrapper_parameters(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "delta" in name.split(".") or id(parameter) in wrappers:
            kind = "inserted"
        else:
            kind = "head" if heads and name.startswith(heads) else "unfrozen"
        rows.append(ParameterRow(name, tuple(parameter.shape), parameter.numel(), kind))
    return rows


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trained parameters of the active adapters and the size of the backbone they are a share of."""
    rows = parameter_table(model)
    heads = tuple(path + "." for path in state_of(model).heads)
    wrappers = wrapper_parameters(model)
    backbone = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "delta" not in name.split(".") and id(p) not in wrappers and not (heads and name.startswith(heads))
    )
    head = sum(row.numel for row in rows if row.kind == "head")
    return ParameterCount(sum(row.numel for row in rows) - head, head, backbone)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print trained parameters without and with the head, as a share of the backbone."""
    count = count_parameters(model)
    print(
        f"trainable params: {count.adapter:,} ({count.percent:.3f} % of the backbone's {count.backbone:,}) | "
        f"with head: {count.trainable:,} ({count.percent_with_head:.3f} %)"
    )
