"""Pickles of numpy arrays, as point-cloud code keeps them, read without running what a pickle asks for."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core import multiarray, numeric

ADVICE = "such files hold lists, tuples, dictionaries, numbers and numpy arrays only; make it anew from the clouds"


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {encoding}")
    return text.encode("latin1")


_ARRAYS: dict[str, Any] = {
    "multiarray._reconstruct": multiarray._reconstruct,
    "multiarray.scalar": multiarray.scalar,
    "numeric._frombuffer": numeric._frombuffer,
}
_KNOWN: dict[tuple[str, str], Any] = {
    (f"numpy.{core}.{name.split('.')[0]}", name.split(".")[1]): function
    for core in ("core", "_core")
    for name, function in _ARRAYS.items()
}
_KNOWN |= {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _latin1}


class _Refused(pickle.UnpicklingError):
    """A pickle that asks for something else than arrays."""


class _OnlyArrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise _Refused(f"{module}.{name}")


def read_arrays(file: Path) -> Any:
    """What a pickle of plain containers and numpy arrays holds. Nothing but arrays and their types is looked up.

    Raises ValueError for a pickle that asks for anything else, with its name, and for one that cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            return _OnlyArrays(stream).load()
    except _Refused as error:
        raise ValueError(f"{file} asks for {error}, and may not: {ADVICE}") from None
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, MemoryError,
        OverflowError,
    ) as error:  # fmt: skip
        raise ValueError(f"{file} cannot be read: {error}; {ADVICE}") from None
