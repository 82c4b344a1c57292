"""Teach a module that we do not own a new forward, by giving it a subclass of its own class.

`swap(module, family)` sets `module.__class__` to a cached subclass whose methods are the family's reading of that
module. Names, attributes, parameters and `isinstance` stay as they are, and so does the class's `__name__`, which
sharding policies of FSDP and accelerate match. `unswap` puts the class back.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from deltalens.sites.anatomy import Family


class Swapped:
    """Mixin that marks a swapped class. `_base` is the class as the backbone has it, `_families` what we added."""

    _base: type
    _families: tuple

    def __reduce_ex__(self, protocol):
        return _rebuild, (type(self)._base, type(self)._families), self.__dict__


def _rebuild(base, families):
    return object.__new__(swapped_class(base, families))


@functools.cache
def swapped_class(base: type, families: tuple[Family, ...]) -> type:
    """The subclass of `base` that reads as `families` say; one class object per pair."""
    methods = {name: method for family in families for name, method in family.methods.items()}
    return type(
        base.__name__,
        (Swapped, base),
        {"_base": base, "_families": families, "__module__": base.__module__, "__doc__": base.__doc__, **methods},
    )


def original_class(module: nn.Module) -> type:
    """The module's class as the backbone's library has it, swapped or not."""
    return type(module)._base if isinstance(module, Swapped) else type(module)


def original_method(module: nn.Module, name: str):
    """The backbone's own method of a swapped module, bound to it."""
    return getattr(original_class(module), name).__get__(module)


def inner_method(module: nn.Module, name: str):
    """What an outer reading is put around: the method of an innermost family of the module, else the backbone's own."""
    for family in type(module)._families if isinstance(module, Swapped) else ():
        if family.innermost and name in family.methods:
            return family.methods[name].__get__(module)
    return original_method(module, name)


def swap(module: nn.Module, family: Family) -> None:
    """Add `family`'s reading to a module. Swapping twice with the same family changes nothing."""
    refuse_unswappable(module)
    families = type(module)._families if isinstance(module, Swapped) else ()
    if family not in families:
        families = (family, *families) if family.innermost else (*families, family)
        module.__class__ = swapped_class(original_class(module), families)


def unswap(module: nn.Module, family: Family | None = None) -> None:
    """Give a module its own class back, or take one family's reading away."""
    if isinstance(module, Swapped):
        left = tuple(each for each in type(module)._families if family is not None and each is not family)
        module.__class__ = swapped_class(original_class(module), left) if left else original_class(module)


def refuse_unswappable(module: nn.Module) -> None:
    """Raise TypeError for modules whose forward Python cannot replace."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{type(module).__name__} is a ScriptModule, whose forward cannot be changed: attach to the eager model "
            "and script or export it afterwards"
        )
    if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
        raise TypeError(
            f"{type(module).__name__} is already sharded by FSDP: attach first, then call fully_shard on the adapted "
            f"model"
        )
